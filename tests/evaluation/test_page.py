"""python -m pytest tests/evaluation/test_page.py"""

import html
import re
from pathlib import Path

import pytest

from nanoalign.evaluation.comparison import Compared, Judged, comparison_metrics
from nanoalign.evaluation.diagnosis import (
    caution,
    conclusion,
    diagnosis,
    figure_groups,
    figure_rows,
)
from nanoalign.evaluation.page import comparison_page
from nanoalign.evaluation.ranking import TrueRule

NASTY = "<script>alert('x')</script> & \"quotes\""


def one(answer: str, score: float, tokens: int, ended: bool = True) -> tuple[Judged, ...]:
    return (Judged(answer, score, tokens, ended, 1.0),)


@pytest.fixture
def compared() -> list[Compared]:
    messages = [{"role": "user", "content": NASTY}]
    return [
        Compared("p:1", NASTY, one(NASTY, 2.0, 3), one("fine", 1.0, 4, False)),
        Compared("p:2", "q", one("a", 0.5, 3), one(NASTY, 0.5, 4)),
        Compared("p:3", messages, one("a", -1.0, 3), one("b", 3.0, 4)),
    ]


def figures_of(compared: list[Compared]) -> dict:
    return comparison_metrics(compared, 320)


UNKNOWN = TrueRule(lambda prompt: False, {})


def page_of(compared: list[Compared], folder: Path, truth: TrueRule = UNKNOWN) -> str:
    (folder / "p.png").write_bytes(b"\x89PNG")
    figures = comparison_metrics(compared, 320, truth)
    return comparison_page(NASTY, compared, figures, [NASTY], folder / "p.png", truth)


@pytest.fixture
def page(compared, tmp_path) -> str:
    return page_of(compared, tmp_path)


def test_text_of_models_and_data_is_escaped_everywhere(page):
    """Title (twice), a note, two prompts, two answers: as text, never as a tag."""
    assert page.count("<script>") == 1 and "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)") == 7


def test_the_page_loads_nothing(page):
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|https?://", page)
    assert "data:image/png;base64,iVBORw==" in page


def test_every_case_is_there_with_its_kind_and_difference(page):
    found = re.findall(r'data-place="(\d)" data-difference="([^"]*)" data-kind="(\w+)"', page)
    assert found == [("0", "1.0", "win"), ("1", "0.0", "tie"), ("2", "-4.0", "loss")]
    assert page.count("sampling stopped at --max_new_tokens") == 1  # the baseline's first answer
    assert '<span class="mark">cut' not in page and 'class="caution"' not in page


def test_all_answers_of_a_prompt_are_in_one_case(tmp_path):
    """2 against 3: each answer once, coloured by its own wins; the second one's reward is 3."""
    policy = (*one("first", 1.0, 4), *one("second", 3.0, 4))
    baseline = (*one("third", 0.0, 4), *one("fourth", 2.0, 4), *one("fifth", 2.0, 4))
    page = page_of([Compared("p:1", "q", policy, baseline)], tmp_path)
    assert page.count("<article") == 1 and page.count('<div class="answer ') == 5
    found = re.findall(r'<div class="answer (\w+)">.*?<div class="text">(\w+)<', page)
    looks = {"third": "worse", "fourth": "tie", "fifth": "tie", "first": "worse"}
    assert {text: look for look, text in found} == looks | {"second": "better"}
    assert "p:1: win, the policy wins 67% of 6 comparisons; mean difference +0.667" in page


# --- answers that the reward model read only in part


def partly(cut: int, whole: int, best: float = 1.0) -> list[Compared]:
    """Wins of the policy where the baseline was cut, and rewards of `best` against 0 elsewhere."""
    lines = [
        Compared(f"p:{n}", f"q{n}", one("a", 1.0, 9), (Judged("b", 0.0, 500, False, 0.474),))
        for n in range(cut)
    ]
    return lines + [
        Compared(f"w:{n}", f"w{n}", one("a", best, 9), one("b", 0.0, 8)) for n in range(whole)
    ]


def test_the_verdict_says_what_it_rests_on(tmp_path):
    """30 of 40 answers of the baseline were cut; the policy loses all 10 other comparisons."""
    compared = partly(30, 10, best=-1.0)
    text = caution(figures_of(compared))
    assert "is better" in conclusion(figures_of(compared))
    assert "only the beginning of 30 of the baseline's 40 answers: its max_length of 320" in text
    assert "The result rests on these beginnings" in text
    assert "win 0.0% [0.0%, 27.8%] of 10 comparisons: the policy is worse" in text
    page = html.unescape(page_of(compared, tmp_path))
    assert f'<p class="caution">{text}</p>' in page
    mark = '<span class="mark">cut: the reward model read only 47% of it</span>'
    assert page.count(mark) == 30 == len(re.findall('data-kind="win cut"', page))
    assert page.count("with a cut answer</label>") == 1


def test_no_comparison_of_whole_answers_is_said():
    assert caution(figures_of(partly(0, 9))) is None
    assert "no comparison is of two answers read whole" in caution(figures_of(partly(3, 0)))
    note = " ".join(diagnosis(figures_of(partly(3, 0))))
    assert "larger --max_length" in note


def test_figures_have_a_column_without_cut_answers():
    figures = figures_of(partly(3, 1))
    rows = {name: values for name, *values in figure_rows(figures)}
    assert rows[""] == ["all", "without cut answers"]
    assert rows["pairs"] == ["4", "1"] and rows["baseline_cut_count"] == ["3", ""]
    assert rows["baseline_tokens_mean"] == ["377.0000", "8.0000"]
    assert rows["policy_ended_share"] == ["1.0000", "1.0000"] and "without_cut" not in rows
    assert [len(row) for row in figure_rows(figures_of(partly(0, 4)))] == [2] * (len(rows) - 1)


# --- what the figures mean


INTERVALS = {1: (0.51, 0.7), 0: (0.45, 0.6), -1: (0.3, 0.49)}


def _figures(judged: int, true: int | None) -> dict:
    figures = {"pairs": 2000, "prompts": 2000}
    for key, sign in (("", judged), ("true_", true)):
        if sign is not None:
            low, high = INTERVALS[sign]
            ends = {f"{key}win_rate_low": low, f"{key}win_rate_high": high}
            figures |= ends | {f"{key}win_rate": (low + high) / 2}
    return figures


@pytest.mark.parametrize(
    ("judged", "true", "result"),
    [
        (1, None, "is better"),
        (-1, -1, "is worse"),
        (0, 0, "is within chance"),
        (1, -1, "do not agree"),
        (0, 1, "do not agree"),
    ],
)
def test_the_conclusion_follows_the_intervals(judged, true, result):
    text = conclusion(_figures(judged, true))
    low, high = INTERVALS[judged]
    assert result in text and f"{(low + high) / 2:.1%} [{low:.1%}, {high:.1%}]" in text
    assert ("ground truth" in text) == (true is not None)


@pytest.mark.parametrize(
    ("pairs", "prompts", "text"),
    [(1, 1, "of 1 comparison."), (600, 600, "of 600 comparisons."),
     (6, 1, "of 6 comparisons."),
     (9367, 360, "of 9,367 comparisons (each of 360 prompts counts as one).")],
)  # fmt: skip
def test_the_conclusion_says_what_was_counted(pairs, prompts, text):
    figures = _figures(1, None) | {"pairs": pairs, "prompts": prompts}
    assert conclusion(figures).endswith(text)


@pytest.mark.parametrize(
    ("won", "result", "interval"),
    [([[1]] * 3, "is within chance", "100.0% [43.8%, 100.0%]"),
     ([[0] * 8], "is within chance", "0.0% [0.0%, 79.3%]"),
     ([[1]] * 6 + [[0.5]] * 2 + [[0.0]], "is within chance", "77.8% [45.3%, 93.7%]"),
     ([[1]] * 8, "is better", "100.0% [67.6%, 100.0%]"),
     ([[0]] * 8, "is worse", "0.0% [0.0%, 32.4%]")],
)  # fmt: skip
def test_the_result_is_that_of_the_printed_interval(won, result, interval):
    """Few prompts, or equal outcomes: Wilson's interval has a width. 1: a win, 0.5: a tie."""
    lines = []
    for n, own in enumerate(won):
        policy = tuple(x for score in own for x in one("a", score, 3))
        lines.append(Compared(str(n), f"p{n}", policy, one("b", 0.5, 3)))
    text = conclusion(figures_of(lines))
    assert result in text and interval in text


def test_the_diagnosis_by_hand(compared):
    """A sentence is there only where its cause is: a stopped answer, a cut one, a known KL."""
    figures = figures_of(compared)
    assert diagnosis(figures) == []  # all answers of the policy ended
    causes = {
        "stopped 25.0% of the policy's answers at --max_new_tokens, and 33.3% of the baseline's. "
        "Give a larger --max_new_tokens": {"policy_ended_share": 0.75},
        "stops less often by itself": {"policy_ended_share": 0.4},
        "1.25 [1.00, 1.50] nats an answer": kl_of(1.25),
        "hardly changed: raise --lr": kl_of(0.1),
        "changed a lot: compare with a larger --beta": kl_of(40),
        "train a reward model with a larger --max_length": {"without_cut": {}},
        "2 of 3 prompts were trained on by the policy": {"policy_trained_on": 2},
    }
    for text, cause in causes.items():
        (note,) = diagnosis(figures | cause)
        assert text in note
    assert diagnosis(figures | {"policy_ended_share": None}) == []  # answers of a file
    assert diagnosis(figures | {"policy_ended_share": 0.9996}) == []  # as good as all
    won = {"win_rate": 0.75, "win_rate_low": 0.625, "win_rate_high": 0.875}
    (note,) = diagnosis(figures | kl_of(0.25) | won)  # a policy that wins has changed enough
    assert note == "KL(policy || baseline) is 0.25 [0.00, 0.50] nats an answer, 0.250 a token."
    one = kl_of(5.0) | {"kl_per_answer_low": None, "kl_per_answer_high": None}  # one prompt
    (note,) = diagnosis(figures | one)
    assert note == "KL(policy || baseline) is 5.00 nats an answer, 0.250 a token."


def kl_of(kl: float) -> dict[str, float]:
    ends = {"kl_per_answer_low": kl - 0.25, "kl_per_answer_high": kl + 0.25}
    return {"kl_per_answer": kl, **ends, "kl_per_token": 0.25}


def test_each_figure_is_shown_once_in_a_group(compared):
    figures = figures_of(compared) | {"kl_per_answer": 5.0, "prompts_left_out": 2}
    groups = figure_groups(figures)
    shown = [name for rows in groups.values() for name, *_ in rows]
    assert len(shown) == len(set(shown))
    twice = {"dpo_data_mean", "no_dpo_data_mean", "no_dpo_better_than_dpo_count",
             "no_dpo_worse_than_dpo_count"}  # fmt: skip
    assert set(shown) == {row[0] for row in figure_rows(figures)} - twice
    assert [name for name, *_ in groups["Change of the policy"]] == ["kl_per_answer"]
    assert "prompts_left_out" in dict(groups["Data and models"])
    heads = [rows[0] for rows in figure_groups(figures_of(partly(3, 1))).values()]
    assert all(head == ["", "all", "without cut answers"] for head in heads)


def test_true_rewards_stand_beside_those_of_the_model(tmp_path):
    """The rule is the number of letters: it agrees on the first prompt, and not on the second."""
    truth = TrueRule({"p", "q"}.__contains__, {"better": lambda prompt, answer: float(len(answer))})
    both = [Compared("1", "p", one("long", 2.0, 3), one("a", 1.0, 4)),
            Compared("2", "q", one("a", 2.0, 3), one("long", 1.0, 4))]  # fmt: skip
    page = page_of(both, tmp_path, truth)
    found = re.findall(r"<b>(\w+)</b>, (\w+): (\S+), true reward (\S+) \(", page)
    assert found == [
        ("baseline", "worse", "+1.000", "+1.000"), ("policy", "better", "+2.000", "+4.000"),
        ("baseline", "worse", "+1.000", "+4.000"), ("policy", "better", "+2.000", "+1.000"),
    ]  # fmt: skip
    assert re.findall(r'data-kind="([^"]*)"', page) == ["win", "win misjudged"]
    assert "where the ground truth says otherwise</label>" in page
    assert "true reward" not in page_of(both, tmp_path)
