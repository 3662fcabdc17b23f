"""python -m pytest tests/evaluation/test_best_of_n.py"""

import itertools
import math

import numpy as np
import pytest

from nanoalign.evaluation.best_of import curve, picture, table, weights
from nanoalign.evaluation.comparison import Compared, Judged
from nanoalign.tiny import world


def judged(score: float, answer: str = "a") -> Judged:
    return Judged(answer, score, 3, True, 1.0)


def compared(*scores: float, prompt: str = "p", answers: tuple[str, ...] = ()) -> Compared:
    texts = answers or ("a",) * len(scores)
    policy = tuple(judged(score, text) for score, text in zip(scores, texts, strict=True))
    return Compared("x", prompt, policy, (judged(0.0),))


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_the_expectation_is_that_over_all_subsets(samples):
    """The oracle takes the best of every subset of size n."""
    rewards = np.sort(np.random.default_rng(samples).normal(size=samples))
    for n in range(1, samples + 1):
        best = [max(subset) for subset in itertools.combinations(rewards, n)]
        assert weights(n, samples) @ rewards == pytest.approx(np.mean(best), abs=1e-12)
        assert weights(n, samples).sum() == pytest.approx(1)


def test_by_hand():
    """Of 1, 3 and 8 the best of two is 3, 8 and 8: 19 / 3. Prompts count equally."""
    lines = curve([compared(3, 8, 1), compared(0, 0, 0, 6)])
    assert [line["n"] for line in lines] == [1, 2, 3]  # the first prompt has three answers
    assert lines[0]["reward"] == pytest.approx((4 + 1.5) / 2) and lines[0]["kl"] == 0
    assert lines[1]["reward"] == pytest.approx((19 / 3 + 3) / 2)
    assert lines[2]["reward"] == pytest.approx((8 + 4.5) / 2)
    assert lines[2]["kl"] == pytest.approx(math.log(3) - 2 / 3)
    assert "true_reward" not in lines[0]


def test_the_true_rule_judges_what_the_reward_model_chose(tmp_path):
    prompt = next(iter(world.prompts()))
    truly = [world.true_reward(prompt, text) for text in ("It is 5.", "No.")]
    lines = curve([compared(1.0, 2.0, prompt=prompt, answers=("It is 5.", "No."))])
    assert lines[1]["true_reward"] == pytest.approx(truly[1])  # of the larger reward
    assert lines[0]["true_reward"] == pytest.approx(sum(truly) / 2)
    assert table(lines).splitlines()[0].split() == ["n", "kl", "reward", "true", "reward"]
    picture(tmp_path / "a.png", lines)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
