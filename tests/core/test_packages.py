"""python -m pytest tests/core/test_packages.py"""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from nanoalign import distributed

ROOT = Path(__file__).parents[2]


def versions_of(text: str) -> dict[str, tuple[int, ...]]:
    found = re.findall(r"^(\w+)[>=]=([\d.]+)", text, flags=re.MULTILINE)
    return {name: tuple(map(int, version.split(".")))[:2] for name, version in found}


@pytest.mark.parametrize("script", ["train_dpo.py", "train_rm.py", "evaluate.py"])
def test_without_packages_a_script_says_what_to_install(script):
    """-S: Python without its site-packages."""
    command = [sys.executable, "-S", ROOT / script]
    run = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: torch is not installed, transformers is not installed, ")
    assert run.stderr.endswith(": pip install -r requirements.txt\n")
    assert run.stderr.count("\n") == 1


def test_old_packages_and_an_old_python(monkeypatch):
    assert distributed.check_versions() == ""
    versions = {"torch": "2.5.1+cu124", "numpy": "2.10.0"}
    monkeypatch.setattr(
        distributed, "version", lambda name: versions.get(name) or metadata.version(name)
    )
    assert (
        distributed.check_versions()
        == "torch 2.5.1+cu124 is older than 2.11: pip install -r requirements.txt"
    )
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert distributed.check_versions() == "this is Python 3.9, and nanoalign needs 3.11 or newer"


def test_the_lower_ends_are_those_of_requirements_txt():
    assert versions_of((ROOT / "requirements.txt").read_text()) == distributed.PACKAGES


def test_the_lock_is_within_the_ranges():
    locked = versions_of((ROOT / "requirements.lock").read_text())
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, low, high = re.fullmatch(r"(\w+)>=([\d.]+),<([\d.]+)", line).groups()
        bounds = [tuple(map(int, end.split("."))) for end in (low, high)]
        assert bounds[0] <= locked[name] < bounds[1], name
