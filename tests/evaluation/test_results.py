"""python -m pytest tests/evaluation/test_results.py

What an evaluation keeps that can't write its results, and two evaluations into one folder.
"""

import errno
import os
import re
from pathlib import Path

import pytest
from evaluations import answers_of, evaluated, policy_argv, script, write_policies
from processes import run_ranks

from nanoalign.evaluation import results
from nanoalign.files import lock


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    return write_policies(tmp_path_factory.mktemp("policies"), llama_folder, tokenizer)


def full_at_the_end(argv: list[str]) -> None:
    def write(*results: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    results.write_comparison = write
    script(argv)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def test_sampled_answers_are_kept_until_results_are_written(world):
    """The flags that are printed read them, so that nothing is sampled again; on two ranks."""
    argv = policy_argv(world, "kept", "--samples", 2)
    undisturbed, _, _ = evaluated(argv, ranks=2)
    outcome = run_ranks(2, full_at_the_end, list(map(str, argv)))
    (line,) = [line for line in outcome.stderr.splitlines() if line]
    assert line.startswith("error: results can't be written to ") and "No space left" in line
    out = Path(argv[argv.index("--out") + 1])
    assert (out / "report.html").exists()  # of the evaluation before
    kept = [f".{out.name}.{role}.jsonl" for role in ("baseline", "policy")]
    assert hidden(world) == kept
    flags = re.findall(r"for --(\w+_answers): (.*)", outcome.stdout)
    assert [name for name, _ in flags] == ["policy_answers", "baseline_answers"]
    again = list(map(str, argv))
    for flag in ("--policy", "--baseline", "--samples"):
        del again[again.index(flag) : again.index(flag) + 2]
    again += [word for name, path in flags for word in (f"--{name}", path)]
    lines, _, printed = evaluated(again, ranks=2)
    assert "sampled     " not in printed
    for role in ("policy", "baseline"):
        assert answers_of(lines, role) == answers_of(undisturbed, role)
    assert hidden(world) == []


def test_an_evaluation_waits_for_no_other_one(world):
    """The second one into a folder is one error, and does not touch what the first one writes."""
    argv = list(map(str, policy_argv(world, "locked")))
    path = world / ".locked.lock"
    lock.hold(path, "--out")
    (world / ".locked.partial").mkdir()
    outcome = run_ranks(1, script, argv)
    assert outcome.codes == [1]
    assert f" is being written by process {os.getpid()} on " in outcome.stderr
    assert (world / ".locked.partial").exists()
    lock.locks.pop(path).release()
    evaluated(argv)
    assert hidden(world) == []
