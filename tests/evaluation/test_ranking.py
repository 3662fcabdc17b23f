"""python -m pytest tests/evaluation/test_ranking.py

The figures of scored pairs: their intervals are over prompts, and answers that were cut are told.
"""

import re

import pytest

from nanoalign.evaluation.ranking import (
    PRINTED,
    Scored,
    TrueRule,
    reward_metrics,
    score_line,
    scored_lines,
    table,
)
from nanoalign.evaluation.results import cases
from nanoalign.records import Record
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


def test_prompts_with_other_tools_are_other_prompts():
    """Two pairs that differ in their tools tell as much as two prompts."""
    tools = [[{"name": name}] for name in "ab"]
    sides = (("chosen", 1.0), ("rejected", 0.0))
    scored = [line(n, 0, *side, tools=own) for n, own in enumerate(tools) for side in sides]
    assert interval(scored) == pytest.approx(wilson_interval(1.0, 2))
    assert [score_line(each)["tools"] for each in scored[::2]] == tools
    assert "tools" not in score_line(line(0, 0, "chosen", 1.0))


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


def test_a_line_has_a_true_reward_where_the_rule_knows_the_prompt():
    truth = TrueRule({"known"}.__contains__, {"better": lambda prompt, text: float(len(text))})
    records = [Record(prompt, ("ab", "c"), ((0, 1),), name=prompt) for prompt in ("known", "other")]
    found = scored_lines(records, [[(3, 1.0)] * 2] * 2, [[0.5, 0.1]] * 2, "", truth.rule("better"))
    assert [line.true_reward for line in found] == [2.0, 1.0, None, None]
    assert [score_line(line).get("true_reward", "none") for line in found][1:3] == [1.0, "none"]


def test_cases_tell_label_errors_from_errors_of_the_model():
    """Pairs 0, 1 are labelled right, 2 and 3 wrongly; the model orders 0 and 2 as labelled."""
    lines = []
    for n, (margin, true) in enumerate([(3, 1), (-3, 1), (1, -1), (-2, -1)]):
        lines += [line(n, n, "chosen", margin, true_reward=float(true)),
                  line(n, n, "rejected", 0, true_reward=0.0)]  # fmt: skip
    text = cases(lines, 9)
    assert (
        "2 of 4 labels are errors by the ground truth. Of the 2 pairs that the model ranks" in text
    )
    assert "otherwise than labelled, 1 are label errors" in text
    found = dict(re.findall(r"## s: (.*)\n\n### (.*)\n", text))
    assert found == {
        "surest right": "s:0: +3.000",
        "surest wrong": "s:1: -3.000",
        "label errors, where the model is right": "s:3: -2.000, a label error",
        "label errors, which the model follows": "s:2: +1.000, a label error",
        "closest": "s:2: +1.000, a label error",
    }
    assert "chosen, reward +3.000, true reward +1.000, 3 tokens" in text
    assert "label error" not in cases(pairs([True, False]), 9)
