"""python -m pytest tests/lab/test_exercises.py"""

import re
from pathlib import Path

import pytest

from nanoalign.errors import RunError
from nanoalign.lab import __main__ as lab
from nanoalign.lab.exercises import EXERCISES

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = sorted(EXERCISES)


def file_of(folder: str, number: int) -> str:
    (path,) = (DOCS / folder).glob(f"{number:02d}_{EXERCISES[number].name}.py")
    return str(path)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_is_right_and_what_it_begins_with_is_not(number, capsys):
    lab.main(["check", str(number), file_of("solutions", number)])
    printed = capsys.readouterr().out
    assert re.search(rf"^right: {EXERCISES[number].name} of .*, on 2\d cases$", printed)
    with pytest.raises(RunError, match=rf"^{EXERCISES[number].name}\(.*"):
        lab.main(["check", str(number), file_of("exercises", number)])


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
        ("def hinge(w, l, beta): return None", "is None, and should be"),
        ("def hinge(w, l, beta): return (1 - beta * (w - l)).relu().sum()", "0 cases before it"),
        ("def hinge(w, l, beta): return 1 - beta * (w - l)", "and should be"),
        ("def hinge(w, l, beta): return w.nothing", "raises AttributeError"),
        ("def hinge(w, l, beta): return (1 - 0.1 * (w - l)).double().relu()", None),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, code, message):
    (tmp_path / "mine.py").write_text(code)
    if message is None:
        lab.main(["check", "1", str(tmp_path / "mine.py")])
        assert capsys.readouterr().out.startswith("right: hinge of ")
        return
    with pytest.raises(RunError, match=message):
        lab.main(["check", "1", str(tmp_path / "mine.py")])


def test_a_file_that_is_not_there(tmp_path):
    for name in ("none.py", "text.txt"):
        with pytest.raises(RunError, match="is no Python file"):
            lab.main(["check", "1", str(tmp_path / name)])
