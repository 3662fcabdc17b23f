"""python -m pytest tests/evaluation/test_results.py

What an evaluation keeps that can't write its results, and two evaluations into one folder.
"""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from evaluations import evaluated, policy_argv, script, write_policies
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


def encoded(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def test_sampled_answers_are_kept_until_results_are_written(world):
    """The flags that are printed read them, so that nothing is sampled again; on two ranks.

    Rewards are those of the tokens that were sampled, also where text would have others, and where
    sampling stopped. answers.jsonl is read in the same way.
    """
    argv = policy_argv(world, "kept", "--samples", 2)
    undisturbed, figures, _ = evaluated(argv, ranks=2)
    assert any(encoded(line["answer"]) != line["token_ids"] for line in undisturbed)
    assert {line["ended"] for line in undisturbed} == {True, False}
    own = Path(argv[argv.index("--out") + 1]) / "answers.jsonl"
    shutil.copy(own, world / "copied.jsonl")
    outcome = run_ranks(2, full_at_the_end, list(map(str, argv)))
    lines = [line for line in outcome.stderr.splitlines() if line]
    assert len(lines) == 1, outcome.stderr
    (line,) = lines
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
    copied = [(name, str(world / "copied.jsonl")) for name, _ in flags]
    for files in (flags, copied):
        words = [word for name, path in files for word in (f"--{name}", path)]
        lines, same, printed = evaluated(again + words, ranks=2)
        assert "sampled     " not in printed
        assert "16 answers to 8 prompts, 16 with the tokens that the baseline sampled" in printed
        assert lines == [line | {"log_ratio": None} for line in undisturbed]
        assert same.items() <= figures.items()
        ends = {"kl_per_answer", "kl_per_answer_low", "kl_per_answer_high", "kl_per_token"}
        assert figures.keys() - same.keys() == ends
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
