"""python -m pytest tests/runs/test_inputs.py

Ranks with other flags, models or data than rank 0: one line of error on all of them, no training.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pairs
from processes import run_ranks
from safetensors.torch import load_file, save_file

import train_dpo
from nanoalign.distributed import run
from nanoalign.ranks.report import report
from nanoalign.runs.inputs import BLOCK, BLOCKS, sampled_digest


def _train(argvs: list[list[str]]) -> None:
    run(partial(train_dpo.main, argvs[int(os.environ["RANK"])]), report)


def error_of(argv: list[object], second: list[object]) -> str:
    """Trains on two ranks, each with flags of its own; returns the error, which is one line."""
    argvs = [[str(arg) for arg in words] for words in (argv, second)]
    outcome = run_ranks(2, _train, argvs, timeout=60)
    assert outcome.codes == [1, 1], outcome.stderr
    (line,) = outcome.stderr.splitlines()
    return line


@pytest.fixture
def flags(llama_folder, tmp_path) -> list[object]:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    return ["--model", llama_folder, "--data", data, "--out", tmp_path / "run",
            "--template", "raw", "--steps", 2, "--batch_size", 4]  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [("--lr", 3e-6), ("--steps", 3), ("--micro_batch_tokens", 64), ("--loss", "ipo")],
)
def test_ranks_with_another_flag_are_refused(flags, other):
    error = error_of(flags, [*flags, *other])
    assert other[0] in error and f"{other[1]} on rank 1" in error and "on rank 0" in error


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = min(weights, key=lambda name: weights[name].numel())
    weights[name] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_weights, "model.safetensors of --model"),
        (change_config, "config.json of --model"),
        (change_tokenizer, "tokenizer.json of --model"),
    ],
)
def test_ranks_with_another_model_are_refused(flags, tmp_path, change: Callable, name: str):
    other = shutil.copytree(flags[1], tmp_path / "other")
    change(other)
    assert name in error_of(flags, ["--model", other, *flags[2:]])


def test_ranks_with_other_data_are_refused(flags, tmp_path):
    lines = Path(flags[3]).read_text().splitlines()
    fewer, changed = tmp_path / "fewer.jsonl", tmp_path / "changed.jsonl"
    fewer.write_text("\n".join(lines[:-1]))
    record = json.loads(lines[0])
    changed.write_text("\n".join([json.dumps(record | {"chosen": "Other."}), *lines[1:]]))
    for other in (fewer, changed):
        assert "the data is" in error_of(flags, [*flags, "--data", other])
    error = error_of([*flags, "--eval_data", fewer], [*flags, "--eval_data", changed])
    assert "the held-out data is 11 records" in error


def test_equal_copies_at_other_paths_are_accepted(flags, tmp_path):
    model, data = shutil.copytree(flags[1], tmp_path / "copy"), tmp_path / "copy.jsonl"
    shutil.copy(flags[3], data)
    copies = [*flags, "--model", model, "--data", data, "--cache", tmp_path]
    argvs = [[str(arg) for arg in words] for words in ([*flags, "--cache", tmp_path], copies)]
    outcome = run_ranks(2, _train, argvs, timeout=60)
    assert outcome.codes == [0, 0], outcome.stderr


def test_a_sample_of_a_file_covers_it_evenly(tmp_path):
    path, size = tmp_path / "file", 3 * BLOCK * BLOCKS
    content = np.zeros(size, np.uint8)
    path.write_bytes(content)
    same = sampled_digest(path)
    changed = 0
    for start in range(0, size, BLOCK):  # a block that is not aligned with those that are read
        content[start + BLOCK // 2] = 1
        path.write_bytes(content)
        changed += sampled_digest(path) != same
        content[start + BLOCK // 2] = 0
    assert 0.25 < changed / (3 * BLOCKS) < 0.4  # a third of the file is read
    path.write_bytes(content[:-1])
    assert sampled_digest(path) != same  # another size
    small = tmp_path / "small"
    small.write_bytes(content[: BLOCK * BLOCKS])
    whole = sampled_digest(small)
    for place in (0, BLOCK * BLOCKS // 2 + 1, BLOCK * BLOCKS - 1):
        content[place] = 1
        small.write_bytes(content[: BLOCK * BLOCKS])
        assert sampled_digest(small) != whole
        content[place] = 0
