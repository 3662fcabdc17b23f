"""python -m pytest tests/ranks/test_report.py

Errors on two ranks: which rank prints them, and what is printed when a rank is lost.
"""

import os
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch
from conftest import write_pairs
from processes import run_ranks
from trainings import script

from nanoalign.distributed import run, setup, sum_over_ranks
from nanoalign.errors import RunError
from nanoalign.ranks import report


def _all_ranks_fail() -> None:
    def main():
        setup()
        raise RunError("a mistake")

    run(main, report.report)


def test_an_error_of_all_ranks_is_printed_once():
    outcome = run_ranks(3, _all_ranks_fail)
    assert outcome.codes == [1, 1, 1] and outcome.stderr == "error: a mistake\n"


def _rank_1_fails(rank_0_waits: bool) -> None:
    def main():
        if setup().rank == 1:
            raise RunError("only rank 1 found this")
        if rank_0_waits:
            sum_over_ranks(torch.ones(1))

    report.RANK_0_SECONDS = 1.0
    run(main, report.report)


@pytest.mark.parametrize("rank_0_waits", [False, True])
def test_an_error_of_one_rank_is_printed_by_that_rank_alone(rank_0_waits):
    """A rank that waited for it adds nothing."""
    outcome = run_ranks(2, _rank_1_fails, rank_0_waits)
    assert outcome.codes[1] == 1 and outcome.stderr == "error: only rank 1 found this\n"
    assert outcome.codes[0] == int(rank_0_waits)


def _rank_1_ends(how: str) -> None:
    def main():
        world = setup()
        sum_over_ranks(torch.ones(1))
        if world.rank == 1:
            if how == "killed":
                os._exit(9)
            raise RuntimeError("a bug")
        sum_over_ranks(torch.ones(1))

    run(main, report.report)


@pytest.mark.parametrize("how", ["killed", "a bug"])
def test_a_lost_rank_is_one_line_and_a_bug_has_its_traceback(how):
    outcome = run_ranks(2, _rank_1_ends, how)
    assert outcome.codes == [1, 9 if how == "killed" else 70]
    ours = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1 and ours[0].startswith("error: rank 0 has lost contact with another rank")
    assert outcome.stderr.count("Traceback") == outcome.stderr.count("\nRuntimeError: a bug")
    assert ("RuntimeError: a bug" in outcome.stderr) == (how == "a bug")


def _run_and_go_on() -> None:
    run(lambda: print("done", setup().size), report.report)
    print("Python is finalized")


def test_ranks_end_without_finalizing_python():
    """Else a thread of gloo that frees its last tensor then aborts a rank whose work is done."""
    several, alone = run_ranks(2, _run_and_go_on), run_ranks(1, _run_and_go_on)
    assert several.codes == [0, 0] and several.stdout == "done 2\n" * 2
    assert alone.codes == [0] and alone.stdout == "done 1\nPython is finalized\n"


def test_one_process_prints_expected_errors_alone(capsys):
    assert report.report(RunError("a mistake")) and report.report(OSError("no disk"))
    assert capsys.readouterr().err == "error: a mistake\nerror: no disk\n"
    assert not report.report(RuntimeError("connection closed"))
    assert not report.report(ValueError("a bug")) and capsys.readouterr().err == ""


def test_too_little_memory_is_one_line_that_names_the_flags_for_it(capsys):
    """On a GPU, as torch words it there; and on a CPU, which has not 2**60 bytes."""
    of_gpu = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23 GiB"
    assert report.report(torch.OutOfMemoryError(of_gpu))
    with pytest.raises(RuntimeError) as of_cpu:
        torch.empty(2**60, dtype=torch.uint8)
    assert report.report(of_cpu.value)
    first, second = capsys.readouterr().err.splitlines()
    assert "CUDA out of memory. Tried to allocate 20.00 MiB" in first and "GPU 0" not in first
    assert f"you tried to allocate {2**60} bytes" in second
    for line in (first, second):
        assert line.startswith("error: ")
        assert "--micro_batch_tokens" in line and "--activation_checkpointing" in line


def _train_from_another_folder(argv: list[str], folder: str) -> None:
    """--out is a relative path, and each rank starts in a folder of its own."""
    report.RANK_0_SECONDS = 1.0
    own = Path(folder) / os.environ["RANK"]
    own.mkdir()
    os.chdir(own)
    script(argv)


def test_out_must_be_shared_by_all_hosts(llama_folder, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    argv = ["--model", str(llama_folder), "--data", str(pairs), "--out", "run", "--steps", "2"]
    outcome = run_ranks(2, _train_from_another_folder, argv, str(tmp_path))
    assert outcome.codes == [1, 1]
    assert outcome.stderr.splitlines()[-1] == (
        "error: rank 1 does not see run/args.json; --out must be on a shared disk"
    )


def test_an_error_that_has_a_code_of_its_own_ends_with_1(capsys):
    """An OSError of urllib: only a signal gives a run another code."""
    assert report.report(HTTPError("http://host/file", 404, "not found", None, None)) == 1
    assert capsys.readouterr().err == "error: HTTP Error 404: not found\n"
