"""python -m pytest tests/core/test_packages.py"""

import os
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from nanoalign import errors
from nanoalign.distributed import run
from nanoalign.errors import RunError

ROOT = Path(__file__).parents[2]


def versions_of(text: str) -> dict[str, tuple[int, ...]]:
    found = re.findall(r"^(\w+)[>=]=([\d.]+)", text, flags=re.MULTILINE)
    return {name: tuple(map(int, version.split(".")))[:2] for name, version in found}


def test_a_run_on_old_packages_ends_with_what_to_install(monkeypatch):
    """distributed.run asks before it calls main."""
    called, reported = [], []
    report = lambda error: reported.append(str(error)) or 1  # noqa: E731
    monkeypatch.setattr(os, "_exit", lambda code: None)
    run(lambda: called.append(True), report)
    assert called == [True] and reported == []
    versions = {"torch": "2.5.1+cu124", "numpy": "2.10.0"}
    monkeypatch.setattr(
        errors, "version", lambda name: versions.get(name) or metadata.version(name)
    )
    run(lambda: called.append(True), report)
    assert called == [True]
    assert reported == ["torch 2.5.1+cu124 is older than 2.11: pip install -r requirements.txt"]
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(RunError, match="this is Python 3.9, and nanoalign needs 3.11 or newer"):
        errors.check_versions()


def test_the_lower_ends_are_those_of_requirements_txt():
    assert versions_of((ROOT / "requirements.txt").read_text()) == errors.PACKAGES


def test_the_lock_is_within_the_ranges():
    locked = versions_of((ROOT / "requirements.lock").read_text())
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, low, high = re.fullmatch(r"(\w+)>=([\d.]+),<([\d.]+)", line).groups()
        bounds = [tuple(map(int, end.split("."))) for end in (low, high)]
        assert bounds[0] <= locked[name] < bounds[1], name
