"""python -m pytest tests/evaluation/test_comparison.py

The figures of a comparison, and preference pairs of a policy's own answers.
"""

import numpy as np
import pytest

from nanoalign.encode import Record
from nanoalign.evaluation.comparison import Compared, comparison_metrics, new_pairs
from nanoalign.tiny import world


def compared(policy: float, baseline: float, prompt: str = "p", tokens=(5, 5), ended=(True, True)):
    return Compared("1", prompt, "a", "b", policy, baseline, *tokens, *ended)


def test_figures_by_hand():
    """Wins 2, losses 1, a tie: 2.5 of 4."""
    lines = [
        compared(1.0, 0.0, "p", (4, 8)),
        compared(2.0, 3.0, "q", (6, 8), (False, True)),
        compared(0.5, 0.5, "r"),
        compared(0.0, -4.0, "s"),
    ]
    figures = comparison_metrics(lines)
    assert (figures["wins"], figures["losses"], figures["ties"]) == (2, 1, 1)
    assert figures["win_rate"] == 0.625
    assert figures["policy_mean"] == figures["dpo_data_mean"] == 3.5 / 4
    assert figures["baseline_mean"] == figures["no_dpo_data_mean"] == -0.5 / 4
    assert figures["no_dpo_better_than_dpo_count"] == 1
    assert figures["no_dpo_worse_than_dpo_count"] == 2
    assert figures["policy_tokens_mean"] == 5.0 and figures["baseline_tokens_mean"] == 6.5
    assert figures["policy_ended_share"] == 0.75 and figures["baseline_ended_share"] == 1.0
    assert figures["win_rate_low"] < 0.625 < figures["win_rate_high"]
    assert "true_win_rate" not in figures


def test_answers_made_elsewhere_have_no_share_that_ended():
    assert comparison_metrics([compared(1, 0, ended=(None, True))])["policy_ended_share"] is None


def test_figures_of_the_embedded_world_by_hand():
    """Two answers to one prompt, and one to another: by the true rule won, a tie, and lost."""
    first, second = list(world.PROMPTS)[:2]
    texts = {
        p: sorted(("It is 7.", "I do not know.", ""), key=lambda a: world.true_reward(p, a))
        for p in (first, second)
    }
    lines = [
        Compared("1", first, texts[first][2], texts[first][0], 0.0, 1.0, 5, 5, True, True),
        Compared("2", first, texts[first][1], texts[first][1], 1.0, 0.0, 5, 5, True, True),
        Compared("3", second, texts[second][0], texts[second][2], 1.0, 0.0, 9, 1, True, True),
    ]
    figures = comparison_metrics(lines)
    rewards = [
        [world.true_reward(x.prompt, answer) for answer in (x.policy_answer, x.baseline_answer)]
        for x in lines
    ]
    assert rewards[0][0] > rewards[0][1] and rewards[2][0] < rewards[2][1]
    assert figures["true_win_rate"] == 0.5 and figures["win_rate"] == pytest.approx(2 / 3)
    assert figures["policy_true_mean"] == pytest.approx(sum(r[0] for r in rewards) / 3)
    assert figures["baseline_true_mean"] == pytest.approx(sum(r[1] for r in rewards) / 3)
    assert figures["prompts"] == 2
    # Two groups: by the true rule of mean 3/4 and 0, by the reward model of mean 1/2 and 1.
    assert (figures["true_win_rate_low"], figures["true_win_rate_high"]) == (0.0, 0.75)
    assert (figures["win_rate_low"], figures["win_rate_high"]) == (0.5, 1.0)


def test_longer_is_the_policys_length_less_the_baselines():
    """Wins by length alone, and a policy with longer answers: about 0.5 is left."""
    draw = np.random.default_rng(1)
    lines = []
    for i in range(400):
        longer = int(draw.integers(-5, 16))
        won = draw.random() < 1 / (1 + np.exp(-0.3 * longer))
        lines.append(compared(float(won), 0.5, f"p{i}", (30 + longer, 30)))
    figures = comparison_metrics(lines)
    assert figures["win_rate"] > 0.7 and abs(figures["length_controlled_win_rate"] - 0.5) < 0.12


# --- preference pairs of the policy's answers


def lines_of(*scored: tuple[str, float]) -> list[Compared]:
    return [Compared("1", "p", a, "b", s, 0.0, 1, 1, True, True) for a, s in scored]


def prompt_of(prompt: str | list[dict]) -> Record:
    return Record(prompt, (), (), name="t")


def test_equal_answers_are_no_pair_whatever_their_rounding():
    compared = lines_of(("same", 1.65030241), ("same", 1.65030253))
    assert new_pairs([prompt_of("q")], compared, 2) == []


def test_pairs_of_dialogues_are_dialogues_and_ties_are_left_out():
    prompts = [prompt_of("\n\nHuman: q\n\nAssistant:"), prompt_of("q")]
    compared = lines_of((" x", 1.0), (" y", 2.0), ("u", 1.0), ("u", 1.0))
    assert new_pairs(prompts, compared, 2) == [
        {"chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: x"}
    ]


def test_cut_answers_make_no_pairs():
    """The best and the worst were cut; of the two that are left the better is chosen."""
    compared = [
        Compared("1", "q", a, "b", score, 0.0, 1, 1, ended, True)
        for a, score, ended in (
            ("w", 0.0, False),
            ("x", 1.0, True),
            ("y", 2.0, None),
            ("z", 3.0, False),
        )
    ]
    prompt = prompt_of("q")
    assert new_pairs([prompt], compared, 4) == [{"prompt": "q", "chosen": "y", "rejected": "x"}]
    assert new_pairs([prompt, prompt], compared, 2) == []
