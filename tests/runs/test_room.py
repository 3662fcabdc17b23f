"""python -m pytest tests/runs/test_room.py

Disks that are full, before the first step or later: one error, and what was trained is kept.
"""

import errno
import filecmp
import json
import os
import re
import resource
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_pairs
from processes import run_ranks
from trainings import metrics_of, script, without_picture

from nanoalign import loop
from nanoalign.distributed import environment_ranks
from nanoalign.files import run_folder
from nanoalign.runs import checkpoints
from nanoalign.weights import write


@pytest.fixture(scope="module")
def argv(llama_folder, tmp_path_factory) -> list[str]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 12)
    return ["--model", str(llama_folder), "--data", str(pairs), "--batch_size", "7", "--lr",
            "1e-2", "--template", "raw", "--steps", "3", "--out"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run_ranks(1, without_picture, [*argv, str(out)]).codes == [0]
    return out


def with_free_bytes(free: int, argv: list[str]) -> None:
    shutil.disk_usage = lambda path: SimpleNamespace(free=free)
    script(argv)


def one_line(outcome) -> str:
    (line,) = [line for line in outcome.stderr.splitlines() if line]
    assert outcome.codes == [1] * len(outcome.codes)
    return line


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_little_room_is_an_error_before_the_first_step(argv, tmp_path, ranks):
    """The model has 23,808 parameters: 4 bytes each in the result, 12 more with checkpoints."""
    out = str(tmp_path / "run")
    parameters = 23_808
    error = one_line(run_ranks(ranks, with_free_bytes, 4 * parameters - 1, [*argv, out]))
    assert error == (
        f"error: --out {out}: the result needs 9.52e-05 GB, and the disk has 9.52e-05 GB left; "
        "make room, or give another --out"
    )
    assert not Path(out).exists()
    few = 16 * parameters - 1
    error = one_line(run_ranks(ranks, with_free_bytes, few, [*argv, out, "--save_every", "2"]))
    assert "the result needs 0.000381 GB" in error
    assert run_ranks(ranks, with_free_bytes, few, [*argv, out]).codes == [0] * ranks


def full_at_the_end(argv: list[str]) -> None:
    """The disk has no room for the model; a checkpoint still fits."""

    def move(temporary: Path, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    write.move_into_place = move
    script(argv)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("flags", [[], ["--keep_best"], ["--save_every", "2"]])
def test_a_result_that_can_not_be_written_is_kept(argv, whole, tmp_path, ranks, flags):
    """On all ranks; the command of the error writes what an undisturbed run would have written."""
    out = tmp_path / "run"
    error = one_line(run_ranks(ranks, full_at_the_end, [*argv, str(out), *flags]))
    assert error.startswith(f"error: the model could not be written to '{out}': [Errno 28] No sp")
    assert not list(out.glob(".*.partial"))
    found = re.search(r"; (\S+) has what was trained. Make room, and finish: (.*)", error)
    assert found[1] == str(out / "checkpoints" / "step_000003")
    start = ["torchrun", "--nproc_per_node", "2"] if ranks == 2 else ["python"]
    command = shlex.split(found[2])
    assert command[: len(start) + 1] == [*start, "train_dpo.py"]
    outcome = run_ranks(ranks, without_picture, command[len(start) + 1 :])
    assert outcome.codes == [0] * ranks, outcome.stderr
    steps, expected = ([line["step"] for line in metrics_of(run)] for run in (out, whole))
    assert steps == expected
    if ranks == 1 and "--keep_best" not in flags:
        assert filecmp.cmp(out / "model.safetensors", whole / "model.safetensors", shallow=False)


def with_small_files(size: int, rank: int, argv: list[str]) -> None:
    """On one rank no file can have more bytes than this."""
    if environment_ranks()[0] == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    script(argv)


TOO_LARGE = f"[Errno {errno.EFBIG}] File too large"


@pytest.mark.parametrize("size", [300, 3_000, 60_000])
def test_where_no_checkpoint_fits_either_the_error_says_so(argv, tmp_path, size):
    """args.json and what is printed are larger than 300 bytes, the tokenizer than 3,000, and the
    weights than 60,000.
    """
    out = tmp_path / "run"
    error = one_line(run_ranks(1, with_small_files, size, 0, [*argv, str(out)]))
    if size == 300:
        assert error == f"error: {TOO_LARGE}"
        return
    assert error.startswith(f"error: the model could not be written to '{out}': ")
    assert "; no checkpoint could be written either: " in error
    assert not list(out.glob("*.safetensors"))


def test_metrics_that_can_not_be_written(argv, tmp_path):
    """2,500 bytes: the flags fit, and the metrics of a few steps, but not those of 30."""
    path = tmp_path / "run" / "metrics.jsonl"
    flags = [*argv, str(tmp_path / "run"), "--steps", "30"]
    error = one_line(run_ranks(2, with_small_files, 2500, 0, flags))
    assert error == f"error: {path} can't be written: OSError: {TOO_LARGE}: '{path}'"
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["eval/loss"] and len(lines) > 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_that_can_not_be_written(argv, tmp_path, rank):
    """20,000 bytes: half of the embedding is 16,576 on each rank, and has two moments."""
    out = tmp_path / "run"
    flags = [*argv, str(out), "--save_every", "2"]
    error = one_line(run_ranks(2, with_small_files, 20_000, rank, flags))
    path = out / "checkpoints" / "step_000002"
    assert error.startswith(f"error: {path}: the checkpoint can't be written: ")
    assert TOO_LARGE in error and run_folder.complete_checkpoints(out) == []


def without_run_json(argv: list[str]) -> None:
    """On rank 0, the last file of a checkpoint can't be written."""
    if environment_ranks()[0] == 0:
        checkpoints.ABOUT = "missing/run.json"
    script(argv)


def test_the_last_file_of_a_checkpoint_can_not_be_written(argv, tmp_path):
    """Rank 0 alone writes it, and both ranks end."""
    flags = [*argv, str(tmp_path / "run"), "--save_every", "2"]
    assert "No such file or directory" in one_line(run_ranks(2, without_run_json, flags))
    assert run_folder.complete_checkpoints(tmp_path / "run") == []


def without_its_folder(argv: list[str]) -> None:
    """Someone removes --out in the second step."""
    get_lr, out = loop.get_lr, Path(argv[argv.index("--out") + 1])

    def get_lr_and_remove(step: int, *rest: object) -> float:
        if step == 1 and environment_ranks()[0] == 0:
            shutil.rmtree(out)
        return get_lr(step, *rest)

    loop.get_lr = get_lr_and_remove
    script(argv)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("flags", [[], ["--save_every", "1"]])
def test_a_run_whose_folder_is_removed_ends_and_makes_no_half_of_it(argv, tmp_path, ranks, flags):
    outcome = run_ranks(ranks, without_its_folder, [*argv, str(tmp_path / "run"), *flags])
    assert outcome.codes == [1] * ranks
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert "/run/metrics.jsonl can't be written: FileNotFoundError" in lines[0]
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "run").exists()
