"""python -m pytest tests/evaluation/test_comparison.py

The figures of a comparison, and preference pairs of a policy's own answers.
"""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from evaluations import write_jsonl

from evaluate import embedded_truth
from nanoalign.data.prompts import Written, read_answers
from nanoalign.evaluation.comparison import (
    Compared,
    Judged,
    answer_lines,
    best_of_n,
    comparison_metrics,
    new_pairs,
)
from nanoalign.runs.result import wilson_interval
from nanoalign.tiny import world

EMBEDDED = embedded_truth()


def judged(
    score: float, tokens: int = 5, ended: bool | None = True, read: float = 1.0, answer: str = "a"
) -> Judged:
    return Judged(answer, score, tokens, ended, read)


def compared(policy: float, baseline: float, prompt="p", tokens=(5, 5), ended=(True, True)):
    sides = zip((policy, baseline), tokens, ended, strict=True)
    return Compared("1", prompt, *((judged(*side),) for side in sides))


def test_figures_by_hand():
    """Wins 2, losses 1, a tie: 2.5 of 4."""
    lines = [
        compared(1.0, 0.0, "p", (4, 8)),
        compared(2.0, 3.0, "q", (6, 8), (False, True)),
        compared(0.5, 0.5, "r"),
        compared(0.0, -4.0, "s"),
    ]
    figures = comparison_metrics(lines, 320)
    assert (figures["wins"], figures["losses"], figures["ties"]) == (2, 1, 1)
    assert figures["win_rate"] == 0.625
    assert figures["policy_mean"] == figures["dpo_data_mean"] == 3.5 / 4
    assert figures["baseline_mean"] == figures["no_dpo_data_mean"] == -0.5 / 4
    assert figures["no_dpo_better_than_dpo_count"] == 1
    assert figures["no_dpo_worse_than_dpo_count"] == 2
    assert figures["policy_tokens_mean"] == 5.0 and figures["baseline_tokens_mean"] == 6.5
    assert figures["policy_ended_share"] == 0.75 and figures["baseline_ended_share"] == 1.0
    assert figures["win_rate_low"] < 0.625 < figures["win_rate_high"]
    assert "true_win_rate" not in figures and "without_cut" not in figures
    assert figures["policy_cut_share"] == 0 and figures["reward_max_length"] == 320


# --- uneven numbers of answers

UNEVEN = [  # p: 2 x 3 pairs, of which 3 are won, 1 is tied; q: 1 x 2 pairs, one won, one lost
    Compared(
        "p",
        "p",
        (judged(1.0, 10), judged(3.0, 20)),
        (judged(0.0, 5), judged(2.0, 10), judged(3.0, 30)),
    ),
    Compared("q", "q", (judged(0.0, 7, read=0.5),), (judged(-1.0, 8), judged(4.0, 9))),
]


def test_every_prompt_counts_as_one_by_hand():
    """p: 1 beats 0; 3 beats 0 and 2, and ties with 3: 3.5 of 6. q: 1 of 2."""
    figures = comparison_metrics(UNEVEN, 320)
    assert (figures["pairs"], figures["prompts"]) == (8, 2)
    assert (figures["wins"], figures["losses"], figures["ties"]) == (4, 3, 1)
    assert figures["win_rate"] == pytest.approx((3.5 / 6 + 1 / 2) / 2)
    assert figures["policy_mean"] == pytest.approx((2 + 0) / 2)
    assert figures["baseline_mean"] == pytest.approx((5 / 3 + 3 / 2) / 2)
    assert figures["policy_tokens_mean"] == pytest.approx((15 + 7) / 2)
    assert figures["baseline_tokens_mean"] == pytest.approx((15 + 8.5) / 2)
    # Pairs of p have the weight 1/12, those of q 1/4: together they are worth as many as
    # 1 / (6 / 144 + 2 / 16) = 6 at most, and as the 2 prompts at least. The centre of Wilson's
    # interval for 2 is 0.514271. The squared deviations from it sum to 1.236953 for p, and to
    # 0.500407 for q, so that a = (1.236953 / 12 + 0.500407 / 4) / (5 / 6) = 0.273818 and
    # b = (((3.5 - 6 * 0.514271) / 12)^2 + ((1 - 2 * 0.514271) / 4)^2) / (1 / 2) = 0.0024867.
    # Student's t is 12.7062 with 1 degree of freedom and 2.5706 with 5.
    worth = 0.273818 / 0.0024867 * (2.5706 / 12.7062) ** 2
    assert worth == pytest.approx(4.507, abs=1e-3)
    interval = figures["win_rate_low"], figures["win_rate_high"]
    assert interval == pytest.approx(wilson_interval(6.5 / 12, worth), abs=1e-4)
    assert (figures["policy_answers"], figures["baseline_answers"]) == (3, 5)


def test_figures_without_cut_answers_are_those_of_the_other_pairs():
    """The one answer of the policy to q was cut: p alone is left."""
    figures = comparison_metrics(UNEVEN, 320)
    assert (figures["policy_cut_count"], figures["baseline_cut_count"]) == (1, 0)
    assert figures["policy_cut_share"] == (0 + 1) / 2
    whole = comparison_metrics(UNEVEN[:1], 320)
    assert figures["without_cut"] == {key: whole[key] for key in figures["without_cut"]}
    assert (figures["without_cut"]["pairs"], figures["without_cut"]["prompts"]) == (6, 1)
    none_left = comparison_metrics(UNEVEN[1:], 320)
    assert none_left["without_cut"] == {"pairs": 0, "prompts": 0}


def test_a_line_an_answer():
    lines = answer_lines(UNEVEN)
    assert [(x["side"], x["score"]) for x in lines[-2:]] == [("baseline", -1.0), ("baseline", 4.0)]
    values = {"answer": "a", "score": 0.0, "tokens": 7, "ended": True, "cut": True}
    ids = {"id": "q", "prompt": "q", "side": "policy"}
    # The tokens are those of the judge, and no baseline was sampled.
    of_file = {"tokenizer": None, "token_ids": None, "log_ratio": None}
    assert lines[-3] == ids | values | of_file | {"read_share": 0.5}


# --- the ground truth


def test_figures_of_the_embedded_world_by_hand():
    """Two answers each to one prompt, and one each to another."""
    first, second = list(world.prompts())[:2]
    texts = {
        p: sorted(("It is 7.", "I do not know.", ""), key=lambda a: world.true_reward(p, a))
        for p in (first, second)
    }

    def some(score: float, prompt: str, *places: int) -> tuple[Judged, ...]:
        return tuple(judged(score, answer=texts[prompt][n]) for n in places)

    lines = [
        Compared("1", first, some(0.0, first, 2, 1), some(1.0, first, 0, 1)),
        Compared("2", second, some(1.0, second, 0), some(0.0, second, 2)),
    ]
    figures = comparison_metrics(lines, 320, EMBEDDED)
    rewards = [
        [[world.true_reward(each.prompt, x.answer) for x in side] for side in sides]
        for each in lines
        for sides in [(each.policy, each.baseline)]
    ]
    (best, also), (worst, _) = rewards[0]
    assert best == also > worst and rewards[1][0] < rewards[1][1]
    # By the rule the policy wins 2 of 4 and ties 2, then loses; by the reward model the reverse.
    assert figures["true_win_rate"] == (3 / 4 + 0) / 2 and figures["win_rate"] == 0.5
    for n, role in enumerate(("policy", "baseline")):
        means = [statistics.fmean(own[n]) for own in rewards]
        assert figures[f"{role}_true_mean"] == pytest.approx(statistics.fmean(means))
    assert figures["prompts"] == 2
    # With one degree of freedom the pairs are worth no more than the two prompts.
    interval = figures["true_win_rate_low"], figures["true_win_rate_high"]
    assert interval == pytest.approx(wilson_interval(3 / 8, 2))


def test_longer_is_the_policys_length_less_the_baselines():
    """Wins by length alone, and a policy with longer answers: about 0.5 is left."""
    draw = np.random.default_rng(1)
    lines = []
    for i in range(400):
        longer = int(draw.integers(-5, 16))
        won = draw.random() < 1 / (1 + np.exp(-0.3 * longer))
        lines.append(compared(float(won), 0.5, f"p{i}", (30 + longer, 30)))
    figures = comparison_metrics(lines, 320)
    assert figures["win_rate"] > 0.7 and abs(figures["length_controlled_win_rate"] - 0.5) < 0.12


# --- the best of n answers


def sampled(*scores: float, prompt: str = "p", answers: tuple[str, ...] = ()) -> Compared:
    texts = answers or ("a",) * len(scores)
    policy = (judged(score, answer=text) for score, text in zip(scores, texts, strict=True))
    return Compared("x", prompt, tuple(policy), (judged(0.0),))


def test_the_best_of_n_by_hand():
    """Of 1, 3 and 8 the best of two is 3, 8 and 8: 19 / 3. Prompts count equally."""
    lines = best_of_n([sampled(3, 8, 1), sampled(0, 0, 0, 6)], EMBEDDED)
    assert [line["n"] for line in lines] == [1, 2, 3]  # the first prompt has three answers
    assert lines[0]["reward"] == pytest.approx((4 + 1.5) / 2) and lines[0]["kl"] == 0
    assert lines[1]["reward"] == pytest.approx((19 / 3 + 3) / 2)
    assert lines[2]["reward"] == pytest.approx((8 + 4.5) / 2)
    assert lines[2]["kl"] == pytest.approx(math.log(3) - 2 / 3)
    assert "true_reward" not in lines[0]


def test_the_true_rule_judges_what_the_reward_model_chose():
    prompt = next(iter(world.prompts()))
    truly = [world.true_reward(prompt, text) for text in ("It is 5.", "No.")]
    lines = best_of_n([sampled(1.0, 2.0, prompt=prompt, answers=("It is 5.", "No."))], EMBEDDED)
    assert lines[1]["true_reward"] == pytest.approx(truly[1])  # of the larger reward
    assert lines[0]["true_reward"] == pytest.approx(sum(truly) / 2)


# --- preference pairs of the policy's answers


def answers_to(prompt: str | list[dict], *answers: Judged) -> Compared:
    return Compared("1", prompt, answers, (judged(0.0),))


def test_equal_answers_are_no_pair_whatever_their_rounding():
    same = (judged(1.65030241, answer="same"), judged(1.65030253, answer="same"))
    assert new_pairs([answers_to("q", *same)]) == []


def test_pairs_of_dialogues_are_dialogues_and_ties_are_left_out():
    prompt = "\n\nHuman: q\n\nAssistant:"
    answers = judged(1.0, answer=" x"), judged(2.0, answer=" y")
    ties = judged(1.0, answer="u"), judged(1.0, answer="v")
    found = new_pairs([answers_to(prompt, *answers), answers_to("q", *ties)])
    assert found == [{"chosen": f"{prompt} y", "rejected": f"{prompt} x"}]


def test_pairs_keep_the_tools_of_their_prompt():
    line = answers_to("q", judged(1.0, answer="x"), judged(2.0, answer="y"))
    tools = [{"name": "look"}]
    (record,) = new_pairs([replace(line, tools=tools)])
    assert record == {"prompt": "q", "chosen": "y", "rejected": "x", "tools": tools}


def test_lines_of_answers_are_read_with_the_tools_of_their_prompt(tmp_path):
    tools = [{"type": "function", "function": {"name": "clock"}}]
    sampled = replace(judged(1.0, ended=False), tokenizer="t", token_ids=[7, 8])
    case = Compared("1", [{"role": "user", "content": "q"}], (sampled,), (judged(0.0),), tools)
    path = write_jsonl(tmp_path / "answers.jsonl", answer_lines([case]))
    (prompt,), answers = read_answers(str(path), "policy")
    assert (prompt.prompt, prompt.tools) == (case.prompt, tools)
    assert list(answers.values()) == [[Written("a", False, "t", [7, 8])]]


def test_pairs_have_the_tokens_of_answers_of_one_tokenizer():
    one = replace(judged(2.0, answer="x"), tokenizer="t", token_ids=[7])
    other = replace(judged(1.0, answer="y"), tokenizer="t", token_ids=[8])
    tokens = {"chosen_tokens": [7], "rejected_tokens": [8], "tokenizer": "t"}
    pair = {"prompt": "q", "chosen": "x", "rejected": "y"}
    assert new_pairs([answers_to("q", one, other)]) == [pair | tokens]
    for changed in (replace(other, tokenizer="u"), judged(1.0, answer="y")):
        assert new_pairs([answers_to("q", one, changed)]) == [pair]


def test_stopped_and_cut_answers_make_no_pairs():
    """The best and the worst were stopped or cut; of the two that are left the better is chosen."""
    kinds = (0.0, False, 1.0), (1.0, True, 1.0), (2.0, None, 1.0), (3.0, True, 0.5)
    answers = [judged(kind[0], 1, *kind[1:], "wxyz"[n]) for n, kind in enumerate(kinds)]
    (pair,) = new_pairs([answers_to("q", *answers)])
    assert pair == {"prompt": "q", "chosen": "y", "rejected": "x"}
    assert new_pairs([answers_to("q", *answers[:2]), answers_to("r", *answers[2:])]) == []
