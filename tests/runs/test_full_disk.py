"""python -m pytest tests/runs/test_full_disk.py

Two ranks whose files can't be written: one error that names the file, and no half of a checkpoint.
"""

import errno
import json
import os
import resource
from pathlib import Path

import pytest
from conftest import write_pairs
from processes import run_ranks
from trainings import script

from nanoalign.files import run_folder
from nanoalign.runs import checkpoints

TOO_LARGE = f"[Errno {errno.EFBIG}] File too large"


@pytest.fixture
def argv(llama_folder, tmp_path) -> list[str]:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    flags = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run",
             "--template", "raw", "--batch_size", 4]  # fmt: skip
    return [str(flag) for flag in flags]


def _train_with_small_files(argv: list[str], rank: int, limit: int) -> None:
    """On one rank, files can't grow beyond `limit` bytes."""
    if os.environ["RANK"] == str(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    script(argv)


def one_error(outcome) -> str:
    """The only line on standard error, of a run that failed."""
    assert outcome.codes == [1, 1], outcome.stderr
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    return lines[0]


def test_metrics_that_can_not_be_written(argv, tmp_path):
    """2,500 bytes: the flags fit, and the metrics of a few steps, but not those of 30."""
    outcome = run_ranks(2, _train_with_small_files, [*argv, "--steps", "30"], 0, 2500)
    path = tmp_path / "run" / "metrics.jsonl"
    assert one_error(outcome) == f"error: {path} can't be written: OSError: {TOO_LARGE}"
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["eval/loss"] and len(lines) > 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_that_can_not_be_written(argv, tmp_path, rank):
    """20,000 bytes: half of the embedding is 16,576 on each rank, and has two moments."""
    flags = [*argv, "--steps", "4", "--save_every", "2"]
    outcome = run_ranks(2, _train_with_small_files, flags, rank, 20_000)
    path = tmp_path / "run" / "checkpoints" / "step_000002"
    error = one_error(outcome)
    assert (
        error.startswith(f"error: {path}: the checkpoint can't be written: ") and TOO_LARGE in error
    )
    assert run_folder.complete_checkpoints(tmp_path / "run") == []


def _about_can_not_be_written(argv: list[str]) -> None:
    """On rank 0, the last file of a checkpoint can't be written."""
    if os.environ["RANK"] == "0":
        checkpoints.ABOUT = "missing/run.json"
    script(argv)


def test_the_last_file_of_a_checkpoint_can_not_be_written(argv, tmp_path):
    """Rank 0 alone writes it, and both ranks end."""
    outcome = run_ranks(2, _about_can_not_be_written, [*argv, "--steps", "4", "--save_every", "2"])
    assert "No such file or directory" in one_error(outcome)
    assert run_folder.complete_checkpoints(tmp_path / "run") == []


def test_a_model_that_can_not_be_written(argv, tmp_path):
    """30,000 bytes: the tokenizer fits, but not model.safetensors, which rank 0 alone writes."""
    outcome = run_ranks(2, _train_with_small_files, [*argv, "--steps", "1"], 0, 30_000)
    assert outcome.codes[0] == 1, outcome.stderr
    error = outcome.stderr.splitlines()[-1]
    assert error.startswith(f"error: the model could not be written to '{tmp_path / 'run'}': ")
    assert "File too large" in error
    assert not list(Path(tmp_path / "run").glob("*.safetensors"))
