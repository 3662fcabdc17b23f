"""python -m pytest tests/evaluation/test_page.py"""

import json
import re

import pytest

from nanoalign.evaluation.comparison import Compared, comparison_metrics
from nanoalign.evaluation.diagnosis import conclusion, diagnosis, read_log
from nanoalign.evaluation.page import comparison_page

NASTY = "<script>alert('x')</script> & \"quotes\""


@pytest.fixture
def compared() -> list[Compared]:
    return [
        Compared("p:1#0", NASTY, NASTY, "fine", 2.0, 1.0, 3, 4, True, False),
        Compared("p:2#0", "q", "a", NASTY, 0.5, 0.5, 3, 4, True, True),
        Compared(
            "p:3#0", [{"role": "user", "content": NASTY}], "a", "b", -1.0, 3.0, 3, 4, True, True
        ),
    ]


@pytest.fixture
def page(compared, tmp_path) -> str:
    (tmp_path / "p.png").write_bytes(b"\x89PNG")
    return comparison_page(
        NASTY, compared, comparison_metrics(compared), [NASTY], tmp_path / "p.png"
    )


def test_text_of_models_and_data_is_escaped_everywhere(page):
    """Title (twice), a note, two prompts, two answers: as text, never as a tag."""
    assert page.count("<script>") == 1 and "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)") == 7


def test_the_page_loads_nothing(page):
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|https?://", page)
    assert "data:image/png;base64,iVBORw==" in page


def test_every_case_is_there_with_its_kind_and_difference(page):
    found = re.findall(r'data-place="(\d)" data-difference="([^"]*)" data-kind="(\w+)"', page)
    assert found == [("0", "1.0", "win"), ("1", "0.0", "tie"), ("2", "-4.0", "loss")]
    assert page.count(", cut)") == 1  # the baseline's first answer


INTERVALS = {1: (0.51, 0.7), 0: (0.45, 0.6), -1: (0.3, 0.49)}


def _figures(judged: int, true: int | None) -> dict:
    figures = {"pairs": 2000, "prompts": 2000}
    for key, sign in (("", judged), ("true_", true)):
        if sign is not None:
            low, high = INTERVALS[sign]
            figures |= {
                f"{key}win_rate_low": low,
                f"{key}win_rate": (low + high) / 2,
                f"{key}win_rate_high": high,
            }
    return figures


@pytest.mark.parametrize(
    ("judged", "true", "result"),
    [(1, None, "is better"), (-1, None, "is worse"), (0, None, "is within chance"),
     (1, 1, "is better"), (-1, -1, "is worse"), (0, 0, "is within chance"),
     (1, -1, "contradicts the true rule"), (-1, 1, "contradicts the true rule"),
     (1, 0, "The reward model shows a difference, the true rule does not"),
     (-1, 0, "The reward model shows a difference, the true rule does not"),
     (0, 1, "The true rule shows a difference, the reward model does not"),
     (0, -1, "The true rule shows a difference, the reward model does not")],
)  # fmt: skip
def test_the_conclusion_follows_the_intervals(judged, true, result):
    text = conclusion(_figures(judged, true))
    assert (
        result in text and f"{sum(INTERVALS[judged]) / 2:.1%} [{INTERVALS[judged][0]:.1%}" in text
    )
    assert ("true rule" in text) == (true is not None)


def test_three_wins_of_three_are_no_proof():
    """A bootstrap of three wins has no width; Wilson's interval of 3 of 3 begins at 0.44."""
    figures = {f"win_rate{end}": 1.0 for end in ("", "_low", "_high")} | {"pairs": 3, "prompts": 3}
    assert "is within chance" in conclusion(figures)


def test_the_diagnosis_reads_the_runs_metrics(compared, tmp_path):
    """Chosen fell by 2, rejected by 5; margins 0.4 held out, 0.8 on the last step.

    The last line is incomplete.
    """
    keys = ("eval/logps/chosen", "eval/logps/rejected", "eval/rewards/margins")
    lines = [
        {"step": 0} | dict(zip(keys, (-10.0, -12.0, 0.0), strict=True)),
        {"step": 1, "rewards/margins": 0.8},
        {"step": 1} | dict(zip(keys, (-12.0, -17.0, 0.4), strict=True)),
        {"step": 2, "eval/logps/chosen": -99.0},
        3,
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "eval/lo')
    text = " ".join(diagnosis(comparison_metrics(compared), read_log(path)))
    assert "moved by -2.00 nats, the rejected ones' by -5.00" in text
    assert "0.400 on held-out pairs, and 0.800 on the last 1 training steps" in text
    assert "0.0% of the policy's and 33.3% of the baseline's" in text
    assert "1.0 tokens shorter" in text and "KL" not in text
    kl = {"kl_per_answer": 1.5, "kl_per_token": 0.25}
    assert "KL(policy || baseline) is 1.50 nats an answer, 0.250 a token" in " ".join(
        diagnosis(comparison_metrics(compared) | kl, [])
    )
    assert len(diagnosis(comparison_metrics(compared), read_log(tmp_path / "none"))) == 2


def test_lengths_that_hardly_overlap_are_not_controlled(compared):
    figures = comparison_metrics(compared) | {"length_controlled_win_rate": None}
    assert "length can't be controlled" in diagnosis(figures, [])[0]
