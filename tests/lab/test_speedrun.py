"""The speed run: its rules, its limit of time, and that an entry's loss is the one that trains."""

import sys
from pathlib import Path

import numpy as np
import pytest

import train_dpo
from nanoalign.errors import RunError
from nanoalign.lab import execute, speedrun
from nanoalign.model import TINY

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("FLAGS = ''\n" + "x = 1\n" * 40, "41 lines"),
        ("x = 1", "has no FLAGS"),
        ("FLAGS = 3", "has no FLAGS"),
        ("FLAGS = '--beta 0.3 --data mine.jsonl'", "--data is the same"),
        ("FLAGS = '--model=mine'", "--model=mine is the same"),
        ("FLAGS = '--epochs 2 --keep_best'", "--keep_best is the same"),
    ],
)
def test_an_entry_that_breaks_a_rule_is_named(tmp_path, text, error):
    (entry := tmp_path / "entry.py").write_text(text)
    with pytest.raises(RunError, match=error):
        speedrun.check_entry(entry)


def test_the_time_of_a_child_counts(tmp_path, monkeypatch):
    """A child that computes for half a second is beyond a limit of a tenth, and not of a minute."""
    (entry := tmp_path / "entry.py").write_text("FLAGS = ''")
    code = "import time\nwhile time.process_time() < 0.5: pass"
    run = speedrun.subprocess.run
    monkeypatch.setattr(
        speedrun.subprocess, "run", lambda _, **kept: run([sys.executable, "-c", code], **kept)
    )
    monkeypatch.setattr(speedrun, "graded", lambda out, count, seed: np.arange(2.0) + seed)
    with pytest.raises(RunError, match=r"took 0\.[5-9].* CPU seconds; 0.1 are allowed"):
        speedrun.scores_of(entry, seconds=0.1)
    assert speedrun.scores_of(entry).tolist() == [[0, 1], [1, 2], [2, 3]]


def test_the_difference_of_two_entries_is_that_of_each_seed_and_prompt(monkeypatch, capsys):
    """Grades of two entries that differ by a half everywhere, and much from seed to seed."""
    scores = {"a": np.array([[0.0, 9.0], [5.0, 1.0]]), "b": np.array([[0.5, 9.5], [5.5, 1.5]])}
    monkeypatch.setattr(speedrun, "scores_of", scores.__getitem__)
    speedrun.speedrun("b", "a")
    assert capsys.readouterr().out == "difference  0.500 [0.500, 0.500]: b minus a\n"


def test_the_loss_of_an_entry_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(train_dpo, "loss_of_batch", train_dpo.loss_of_batch)
    (entry := tmp_path / "entry.py").write_text(
        "FLAGS = '--steps 1 --batch_size 4 --eval_every 1000'\n"
        "def loss_of_batch(*given):\n    raise ArithmeticError('of the entry')\n"
    )
    with pytest.raises(ArithmeticError, match="of the entry"):
        speedrun.train(str(entry), "0", str(tmp_path / "out"))


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "speedrun").glob("*.py")), ids=str)
def test_the_entries_of_the_docs_keep_the_rules(path):
    speedrun.check_entry(path)
    assert f"speedrun/{path.name}" in (ROOT / "docs" / "speedrun.md").read_text()


def test_the_base_is_graded_by_the_true_rule():
    """Another world has other prompts, and grades by its own rule."""
    grades = speedrun.graded(TINY, 20, 0)
    assert grades.shape == (20,) and -4 < grades.mean() < 3 and grades.std() > 0.5
    assert speedrun.graded(TINY, 20, 0, other=7).mean() != grades.mean()
    with pytest.raises(RunError, match="model folder 'runs/none' does not exist"):
        execute.main(["grade", "runs/none"])
