"""python -m pytest tests/evaluation/test_ranking.py

The figures of scored pairs: their intervals are over prompts, and answers that were cut are told.
"""

import pytest

from nanoalign.evaluation.ranking import PRINTED, Scored, reward_metrics, table
from nanoalign.runs.result import wilson_interval


def line(record: int, prompt: int, side: str, score: float, tokens: int = 3, **more) -> Scored:
    settings = {"subset": "s", "response": "r", "cut": False} | more
    return Scored(
        pair_id=f"s:{record}",
        prompt=f"prompt {prompt}",
        side=side,
        score=score,
        tokens=tokens,
        **settings,
    )


def pairs(hits: list[bool], copies: int = 1) -> list[Scored]:
    """A pair of each prompt, `copies` times as records of its own; a hit or a miss."""
    return [
        each
        for n, hit in enumerate(hits * copies)
        for each in (
            line(n, n % len(hits), "chosen", 1.0),
            line(n, n % len(hits), "rejected", 0.0 if hit else 2.0),
        )
    ]


def interval(scored: list[Scored]) -> tuple[float, float]:
    figures = reward_metrics(scored)
    return figures["accuracy_low"], figures["accuracy_high"]


@pytest.mark.parametrize("hits", [[True] * 70 + [False] * 30, [True] * 20])
def test_records_that_repeat_a_prompt_with_its_answers_tell_nothing_new(hits):
    assert interval(pairs(hits, copies=4)) == pytest.approx(interval(pairs(hits)), rel=1e-12)


def test_one_ranked_record_is_one_prompt():
    """28 pairs of 8 answers, all ordered rightly: as sure as one pair."""
    ranked = [line(0, 0, "chosen", 1.0)] + [line(0, 0, "rejected", 0.1 * n) for n in range(7)]
    assert interval(ranked) == pytest.approx(wilson_interval(1.0, 1), rel=1e-12)
    assert reward_metrics(ranked)["pairs"] == 7


def test_the_printed_table_fits_a_terminal():
    """With the numbers of a large set, in 100 columns beside a name of 8."""
    figures = dict.fromkeys(PRINTED, 0.123) | {"pairs": 10_000, "margin_mean": -123.456}
    figures["trained_on"] = 0
    text = table({"a" * 8: figures | {"other": 1.0}})
    assert max(map(len, text.splitlines())) <= 100 and "other" not in text
    known = {key: figures[key] for key in figures if key != "true_accuracy"}
    assert "true" not in table({"a": known}) and "true" in text
