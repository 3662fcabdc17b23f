"""python -m pytest tests/lab/test_exercises.py answers.txt has wrong and unusual answers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanoalign.errors import RunError
from nanoalign.lab import check as checks
from nanoalign.lab.check import EXERCISES, check, main
from nanoalign.lab.exercises import parts
from nanoalign.lab.lab_commands import parse

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = sorted(EXERCISES)
HEAD = """import torch, numpy as np
from functools import reduce
from math import e, exp, log, tanh
import torch.nn.functional as F
from torch import nn
T = lambda x: torch.tensor(x, dtype=torch.float64)
"""


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    """Exercise 24 trains nothing here: its flags are judged by the reward that `trained` names."""
    found = {"reward": "+3.100", "commands": []}

    def run(words: list[str]) -> str:
        found["commands"].append(words)
        return f"true reward {found['reward']}  [+2.900, +3.300]"

    monkeypatch.setattr(parts, "run", run)
    return found


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_is_right_and_what_it_begins_with_is_not(number, capsys):
    name = EXERCISES[number].name
    (path,) = (DOCS / "solutions").glob(f"{number:02d}_{name}.py")
    main(["check", str(number), str(path)])
    assert re.search(rf"^right: {name} of .*, on (2\d cases|1 case)$", capsys.readouterr().out)
    with pytest.raises(RunError, match=rf"^{name}(\(| is not written yet)"):
        main(["check", str(number), str(DOCS / "exercises")])


def test_the_pages_have_every_exercise_by_level():
    found = []
    for level in range(1, 5):
        page = (DOCS / f"exercises/level_{level}.md").read_text()
        rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)
        assert len(rows) == 6
        found += [(int(number), name) for number, name in rows]
    assert found == [(number, EXERCISES[number].name) for number in NUMBERS]
    assert parse(["check", "all"]).numbers == NUMBERS


def answers() -> list[tuple[str, str, str]]:
    """(name of the exercise, - or +, code) of each line of answers.txt."""
    found = []
    _, *blocks = (Path(__file__).parent / "answers.txt").read_text().split("\n\n")
    for block in blocks:
        head, *lines = block.strip().splitlines()
        for sign, answer in ((line[0], line[2:]) for line in lines):
            statements = "; " in answer
            body = answer if statements else f"return {answer}"
            code = f"def {head}{'' if head.endswith(':') else ';'} {body}\n"
            found.append((head.partition("(")[0], sign, code))
    return found


def test_wrong_answers_are_refused_and_unusual_ones_are_not(tmp_path):
    numbers = {exercise.name: number for number, exercise in EXERCISES.items()}
    path, found, judged = tmp_path / "mine.py", answers(), []
    for name, _, code in found:
        path.write_text(HEAD + code)
        try:
            check(numbers[name], path)
            judged.append((name, "+", code))
        except RunError:
            judged.append((name, "-", code))
    assert judged == found
    for name in (EXERCISES[number].name for number in NUMBERS[:-1]):
        signs = [sign for other, sign, _ in found if other == name]
        assert signs.count("-") == 10 and signs.count("+") == 5, name


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def other(): pass", "has no function hinge"),
        ("1 / 0", "can't be imported: ZeroDivisionError"),
        ("def hinge(w, l, beta): return None", "is None, of type NoneType; a tensor of shape"),
        (
            "def hinge(w, l, beta): return (1 - beta * (w - l)).relu().sum()",
            r"a tensor of shape \(\); a tensor of shape \(4,\)",
        ),
        ("def hinge(w, l, beta): return (1 - 0.1 * (w - l)).relu()", "right cases before it: 0"),
        (
            "def hinge(w, l, beta):\n  return w.nothing",
            "raises AttributeError.* in line 2 of .*mine.py",
        ),
        ("def hinge(w, l, beta): raise SystemExit", "raises SystemExit"),
        ("def hinge(w, l, beta): raise NotImplementedError", "is not written yet"),
        ("def hinge(w, l, beta): return (1 - beta * (w - l)).relu().detach()", "has no gradient"),
        (
            "def hinge(w, l, beta): return (1 - beta * (w - l)).relu().tolist()",
            "without a gradient; a tensor of shape",
        ),
        ("def hinge(w, l, beta):\n  while True: pass", "has not ended after 1 seconds"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, monkeypatch, code, message):
    monkeypatch.setitem(checks.EXERCISES, 1, EXERCISES[1]._replace(seconds=1))
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(RunError, match=message):
        main(["check", "1", str(tmp_path / "mine.py")])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="is not there; give the file with your function"):
        main(["check", "1", str(tmp_path / "none.py")])
    with pytest.raises(
        RunError, match=r"has 0 files 01_\*.py; give it one, with your function hinge"
    ):
        main(["check", "1", str(tmp_path)])
    with pytest.raises(RunError, match="give the file with your function, or a folder"):
        main(["check", "1"])
    with pytest.raises(RunError, match="expected a number of 1 to 24, or all: '25'"):
        main(["check", "25", str(tmp_path)])


def test_the_place_of_a_difference_in_a_long_list_is_named(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def labels(p, r, w):\n    return [-100] * len(p) + r + [0] * (w - len(p) - len(r))\n"
    )
    with pytest.raises(RunError, match=r"should be \[.*\], first at place \d+;"):
        check(2, tmp_path / "mine.py")


def test_stop_steps_into_the_function_on_the_first_wrong_case(tmp_path):
    (tmp_path / "mine.py").write_text("def kl(a, b):\n    d = a - b\n    return d.mean()\n")
    command = [sys.executable, "-m", "nanoalign.lab", "check", "8", "mine.py", "--stop"]
    done = subprocess.run(
        command,
        input="p len(a)\nstep\nstep\np d.shape\nquit\n",
        cwd=tmp_path,
        env={"PYTHONPATH": str(DOCS.parent)},
        capture_output=True,
        text=True,
    )
    at = r"mine.py\(2\)kl\(\).*\n-> d = a - b\n\(Pdb\) 3\n.*mine.py\(3\)kl\(\).*torch.Size\(\[3\]\)"
    assert re.search(at, done.stdout, re.DOTALL)
    assert done.returncode == 1 and done.stderr.startswith("error: kl(")


def test_stop_in_a_function_that_raises_ends_with_the_same_error(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def kl(a, b):\n    return a / None\n")
    monkeypatch.setattr(checks.pdb, "runcall", lambda function, *inputs: function(*inputs))
    with pytest.raises(RunError, match=r"^kl\(.* raises TypeError: .* in line 2 of"):
        main(["check", "8", str(tmp_path / "mine.py"), "--stop"])


def test_all_exercises_give_a_score_for_people_and_for_graders(tmp_path, capsys):
    for path in (DOCS / "solutions").glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "04_accuracy.py").write_text("def accuracy(w, l): print('seen'); return 1.0")
    (tmp_path / "09_positions.py").unlink()
    main(["check", "all", str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.err.strip() == "seen"
    lines = printed.out.splitlines()
    assert len(lines) == 25 and lines[-1] == "score 22 of 24"
    assert lines[3].startswith(" 4 accuracy        accuracy([") and "0 files 09_" in lines[8]
    main(["check", "all", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["score"] == 22 == sum(test["score"] for test in found["tests"])
    failed = [test for test in found["tests"] if test["status"] == "failed"]
    assert [test["name"] for test in failed] == ["accuracy", "positions"]
    assert all(test["max_score"] == 1 for test in found["tests"])


def test_another_seed_draws_other_inputs():
    first, same, other = (
        [inputs for inputs in checks.cases(EXERCISES[2], seed)] for seed in ("Ada", "Ada", "Bob")
    )
    assert first == same != other
    main(["check", "4", str(DOCS / "solutions"), "--seed", "Ada"])


def test_a_hint_needs_no_file(capsys):
    main(["check", "5", "--hint"])
    assert capsys.readouterr().out == f" 5 reward_loss: {EXERCISES[5].hint}\n"


def test_the_last_exercise_trains_on_the_same_pairs_for_all(trained, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def flags(): return ['--data', 'more.jsonl', '--epochs', '2']")
    check(24, path)
    train, grade = trained["commands"]
    assert train[0].endswith("train_dpo.py") and train[-8:-1] == [
        "--model", "tiny", "--data", "tiny", "--eval_data", "tiny:test", "--out",
    ]  # fmt: skip
    assert grade == ["-m", "nanoalign.lab", "grade", train[-1]]
    trained["reward"] = "+3.000"
    with pytest.raises(RunError, match=r"a true reward of 3.000; it must be above 3.0"):
        check(24, path)
    path.write_text("def flags(): return '--epochs 2'")
    with pytest.raises(RunError, match="must return the flags of train_dpo.py, a list of texts"):
        check(24, path)


@pytest.mark.parametrize(
    ("argv", "unneeded"),
    [
        ([], "torch"),
        (["walk", "--help"], "torch"),
        (["beta", "--help"], "torch"),
        (["check", "4", str(DOCS / "solutions")], "transformers"),
    ],
)
def test_a_list_and_help_take_no_second_and_a_check_few(argv, unneeded):
    """Measured by what is imported: a list takes 0.1 s, torch 1.5 s, the whole lab 3 s."""
    command = [sys.executable, "-X", "importtime", "-m", "nanoalign.lab", *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent)
    assert done.returncode == 0 and done.stdout
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "nanoalign.lab.lab_commands" in imported and unneeded not in imported
