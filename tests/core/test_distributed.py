"""python -m pytest tests/core/test_distributed.py"""

import os
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from nanoalign import distributed, errors
from nanoalign.distributed import compute_dtype, progress_bar, run, setup
from nanoalign.errors import RunError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "expected"),
    [
        ("auto", CPU, False, torch.float32),
        ("bf16", CPU, False, torch.bfloat16),
        ("auto", CUDA, True, torch.bfloat16),
        ("fp32", CUDA, True, torch.float32),
        ("bf16", CUDA, True, torch.bfloat16),
        ("auto", CUDA, False, torch.float32),
        ("fp16", CUDA, False, torch.float16),
        ("fp32", CPU, False, torch.float32),
    ],
)
def test_the_dtype_of_matrix_products(monkeypatch, precision, device, has_bf16, expected):
    """has_bf16: whether the GPU computes bfloat16 itself; a T4 does not."""

    def is_supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert compute_dtype(precision, device) == expected


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(RunError, match="--precision bf16: .* use --precision fp32"):
        compute_dtype("bf16", CUDA)


def test_more_ranks_than_gpus_are_refused_before_a_group_is_joined(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", None)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RunError, match="--nproc_per_node: this host has 2 GPUs; give 2 or less"):
        setup()


@pytest.mark.parametrize(
    ("ranks", "given", "expected"),
    [("2", "1", [4]), ("16", "1", [1]), ("2", "3", []), ("", "", [])],
)
def test_ranks_of_a_host_share_its_cores(monkeypatch, ranks, given, expected):
    """8 cores. torchrun gives each rank one thread; a number that a user gives is kept."""
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    for name, value in (("LOCAL_WORLD_SIZE", ranks), ("OMP_NUM_THREADS", given)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    setup()
    assert found == expected


def test_a_bar_in_a_file_is_a_line_for_each_new_count(monkeypatch, capsys):
    """A short one is none, and neither is one that is not shown."""
    for seconds, shown, counts in ((0.0, True, ["0/3", "1/3", "2/3", "3/3"]), (0.0, False, []),
                                   (distributed.LINE_SECONDS, True, [])):  # fmt: skip
        monkeypatch.setattr(distributed, "LINE_SECONDS", seconds)
        with progress_bar(3, "step", shown) as bar:
            for _ in range(3):
                bar.update()
        lines = capsys.readouterr().err.split("\n")
        assert lines.pop() == "" and not any("\r" in line for line in lines)
        assert [line.split("| ")[-1].split(" [")[0] for line in lines] == counts


# --- versions of packages -------------------------------------------------------------------------


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
    with pytest.raises(RunError, match="nanoalign needs Python 3.11 or newer; this is 3"):
        errors.check_versions()


def test_the_lower_ends_are_those_of_requirements_txt():
    assert versions_of((ROOT / "requirements.txt").read_text()) == errors.PACKAGES


def test_the_lock_is_within_the_ranges():
    locked = versions_of((ROOT / "requirements.lock").read_text())
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, low, high = re.fullmatch(r"(\w+)>=([\d.]+),<([\d.]+)", line).groups()
        bounds = [tuple(map(int, end.split("."))) for end in (low, high)]
        assert bounds[0] <= locked[name] < bounds[1], name
