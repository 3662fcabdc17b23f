"""The homework: its commands are those of the scripts, and its page has their figures and cases."""

import json
import re
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

import evaluate
import train_dpo
import train_rm
from nanoalign.errors import RunError
from nanoalign.lab import homework

FIGURES = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9, "reward_mean": -1.25}
FIGURES |= {"reward_std": 2.0} | {name: 1.5 for name in homework.COUNTERS}
WINS = {"wins": 7, "losses": 2, "ties": 1, "win_rate": 0.75, "win_rate_low": 0.5}
WINS |= {"win_rate_high": 0.875} | {name: 3 for name in homework.POLICY_COUNTERS}
PROMPTS = ("What is 2 plus 3?", "<script>What is 3 plus 4?</script>")


def results(words: list[str], log: Path) -> None:
    """Parses a command as its script does, and writes small results of it."""
    if words[0] == "evaluate.py":
        evaluate.parse_args(words[1:])
    else:
        {"train_rm.py": train_rm, "train_dpo.py": train_dpo}[words[0]].parse_args(words[1:])
    out = Path(words[-1])
    out.mkdir()
    plt.figure(figsize=(1, 1)).savefig(out / ("answers.png" if "policy" in words else "curves.png"))
    if "rm" in words:
        text = json.dumps({"subsets": {"one & two": FIGURES}, "all": FIGURES})
        (out / "metrics.json").write_text(text)
    if "policy" in words:
        (out / "metrics.json").write_text(json.dumps(WINS))
        lines = [
            {"prompt": prompt, "side": side, "answer": f"{side} {n}", "score": n * sign}
            for n, prompt in enumerate(PROMPTS, start=1)
            for side, sign in (("policy", 1), ("baseline", -1))
        ]
        (out / "answers.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_the_page_has_the_figures_the_cases_and_the_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(homework, "run", results)
    homework.homework(tmp_path / "hw", "tiny", "tiny")
    page = (tmp_path / "hw" / "index.html").read_text()
    assert "75.0% [50.0%, 87.5%]" in page and "7 : 2, and 1 ties" in page
    assert "one &amp; two" in page and "80.0% [70.0%, 90.0%]" in page and "-1.25" in page
    assert "<script" not in page and "&lt;script&gt;What is 3" in page
    assert page.index("policy 1") < page.index("policy 2")  # the smallest gain first
    assert all(question in page for question in homework.QUESTIONS)
    assert page.count("<textarea>") == 3 + len(PROMPTS) + len(homework.QUESTIONS)
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # loads nothing


def test_a_homework_of_other_inputs_needs_another_folder(tmp_path, monkeypatch):
    """Its commands are done, so they would not run again, and the page would be that of before."""
    monkeypatch.setattr(homework, "run", results)
    homework.homework(tmp_path / "hw", "tiny", "tiny")
    before = (tmp_path / "hw" / "index.html").read_bytes()
    homework.homework(tmp_path / "hw", "tiny", "tiny")
    with pytest.raises(RunError, match="is the homework of --data tiny --model tiny; give another"):
        homework.homework(tmp_path / "hw", "tiny:7", "tiny")
    assert (tmp_path / "hw" / "index.html").read_bytes() == before


def test_a_command_that_fails_ends_it(tmp_path):
    with pytest.raises(RunError, match="train_dpo.py has failed; the end of .* has its error"):
        homework.run(["train_dpo.py", "--beta", "-1"], tmp_path / "log.txt")
    assert "error: argument --beta" in (tmp_path / "log.txt").read_text()


def test_an_interrupted_homework_goes_on_where_it_was(tmp_path, monkeypatch):
    done = []

    def fails_at_third(words: list[str], log: Path) -> None:
        if len(done) == 2:
            Path(words[-1]).mkdir()  # half of a result
            raise RunError("killed")
        done.append(words[0])
        results(words, log)

    monkeypatch.setattr(homework, "run", fails_at_third)
    with pytest.raises(RunError, match="killed"):
        homework.homework(tmp_path / "hw", "tiny", "tiny")
    monkeypatch.setattr(homework, "run", lambda *given: done.append(given[0][0]) or results(*given))
    homework.homework(tmp_path / "hw", "tiny", "tiny")
    assert done == ["train_rm.py", "evaluate.py", "train_dpo.py", "evaluate.py"]
