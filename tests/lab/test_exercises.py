"""python -m pytest tests/lab/test_exercises.py"""

import re
import sys
from pathlib import Path

import pytest

from nanoalign.errors import RunError
from nanoalign.lab import __main__
from nanoalign.lab.exercises import EXERCISES, cases, check

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = sorted(EXERCISES)


def file_of(folder: str, number: int) -> str:
    (path,) = (DOCS / folder).glob(f"{number:02d}_{EXERCISES[number].name}.py")
    return str(path)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_is_right_and_what_it_begins_with_is_not(number, capsys):
    __main__.main(["check", str(number), file_of("solutions", number)])
    printed = capsys.readouterr().out
    assert re.search(rf"^right: {EXERCISES[number].name} of .*, on 2\d cases$", printed)
    with pytest.raises(RunError, match=rf"^{EXERCISES[number].name}\(.*"):
        __main__.main(["check", str(number), file_of("exercises", number)])


def test_the_page_has_every_exercise():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (DOCS / "exercises.md").read_text(), re.MULTILINE)
    assert [(int(number), name) for number, name in rows] == [
        (number, EXERCISES[number].name) for number in NUMBERS
    ]


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
    ],
)
def test_what_is_wrong_is_said(tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(RunError, match=message):
        __main__.main(["check", "1", str(tmp_path / "mine.py")])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="is not there; give the file with your function"):
        __main__.main(["check", "1", str(tmp_path / "none.py")])
    with pytest.raises(RunError, match="is no Python file"):
        __main__.main(["check", "1", str(tmp_path)])


WRONG = {
    1: ["return (1 - 0.1 * (a - b)).relu()"],
    3: [
        "import torch\n"
        "    logps = a.roll(1, 1).log_softmax(-1).gather(2, b.clamp(min=0)[:, :, None])[:, :, 0]\n"
        "    return (logps * (b != -100)).sum(1)",
    ],
    4: ["return ((a - b).clamp(-1, 1) / 2 + .5).mean()"],
    5: [
        "import torch\n    d = a - b\n"
        "    return torch.where(d < -30, -d, -torch.log(torch.sigmoid(d)))",
        "return (b - a).relu() + (-(a - b).abs()).exp().log1p()",  # the gradient at 0
    ],
    6: ["import math\n    h = 0.1 * (a - c - b + d)\n    s = 0.1 / (1 + math.exp(h))\n"
        "    return -s, s"],
    7: [
        "import torch.nn.functional as F\n    return -F.logsigmoid(e * (a / c - b / d) - f)",
    ],
    8: ["return (a - b).sum().clamp(min=0) / 6"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "body"), [(number, body) for number, each in WRONG.items() for body in each]
)
def test_answers_that_are_wrong_somewhere_are_not_right(tmp_path, number, body):
    """Each is right on many inputs: with one beta, of rewards that are far apart, and so on."""
    count = len(next(cases(EXERCISES[number])))
    code = f"def {EXERCISES[number].name}({', '.join('abcdef'[:count])}):\n    {body}\n"
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(RunError, match=rf"^{EXERCISES[number].name}\("):
        check(number, tmp_path / "mine.py")


def test_the_place_of_a_difference_in_a_long_list_is_named(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def labels(p, r, w):\n    return [-100] * len(p) + r + [0] * (w - len(p) - len(r))\n"
    )
    with pytest.raises(RunError, match=r"should be \[.*\], first at place \d+;"):
        check(2, tmp_path / "mine.py")


def test_stop_opens_the_debugger_at_the_first_wrong_case(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def kl(a, b): return (a - b).mean()")
    seen = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: seen.append(True))
    with pytest.raises(RunError, match="right cases before it"):
        __main__.main(["check", "8", str(tmp_path / "mine.py"), "--stop"])
    assert seen == [True]
