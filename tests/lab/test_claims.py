"""python -m pytest tests/lab/test_claims.py

Guesses against figures that make each of them right, or one of them wrong: a difference of the
wrong sign, or of the wrong cells, gives another verdict.
"""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import FakeRuns

from nanoalign.lab.experiments import ensembles, pipeline, why_lose
from nanoalign.lab.lab import Lab
from nanoalign.lab.perform import EXPERIMENTS

S, P = 3, 50


class Given(Lab):
    """A lab whose grid has the figures that are given: by name a function of the cell."""

    def __init__(self, tmp_path, figures):
        super().__init__(FakeRuns(tmp_path), quick=False)
        self.figures = figures

    def grid(self, function, **axes):
        found = {}
        for values in product(*axes.values()):
            cell = values if len(values) != 1 else values[0]
            own = SimpleNamespace(**dict(zip(axes, values, strict=True)))
            found[cell] = {
                name: noisy(of(own), 1 if name in ("rate", "pairs") else P)
                for name, of in self.figures.items()
            }
        return found


def noisy(mean: float, prompts: int) -> np.ndarray:
    draw = np.random.default_rng(0).standard_normal((S, prompts))
    return mean + 0.01 * draw


def verdicts(lab: Lab, name: str) -> dict[str, str]:
    return {claim.guess: claim.verdict for claim in EXPERIMENTS[name].run(lab).claims}


AS_GUESSED = {
    "beta": {
        "kl": lambda x: 3 - x.beta,
        "judged": lambda x: -x.beta,
        "true": lambda x: -abs(np.log10(x.beta) + 1),
        "base_judged": lambda x: 0,
        "base_true": lambda x: 0,
        "true_win": lambda x: 0.5,
    },
    "pipeline": {
        **dict.fromkeys(("judged", "kl", "tokens"), lambda x: 1),
        "true": lambda x: (1 - 0.5 ** pipeline.STAGES.index(x.stage)),
        "true_win": lambda x: 0.5,
    },
    "overfitting": {
        "train": lambda x: 0.8 + x.epochs / 100,
        "test": lambda x: 0.6 + x.pairs / 10000 - x.epochs / 100,
        "true": lambda x: 0.5,
        "loss": lambda x: x.epochs,
    },
    "noise": {
        "true": lambda x: (
            2 - 3 * x.flipped + x.flipped * (x.loss != "sigmoid") - 0.2 * (x.loss == "ipo_sum")
            if hasattr(x, "loss")
            else 0.9 - x.flipped + 0.5 * x.flipped * (x.smoothed == "smoothing")
        ),
    },
    "own_samples": {
        "judged": lambda x: {"offline": 0, "one round": 5, "three rounds": 9}[x.way],
        "true": lambda x: {"offline": 0, "one round": 1, "three rounds": 2}[x.way],
        "base_true": lambda x: -1,
        "base_judged": lambda x: -1,
        "win": lambda x: 0.5,
        "true_win": lambda x: 0.5,
        "kl": lambda x: 1,
        "tokens": lambda x: 9,
        "pairs": lambda x: 100,
    },
    "losses": {
        "true": lambda x: 2 - (x.loss == "dpo"),
        "true_win": lambda x: 0.5,
        "win": lambda x: 0.5,
        "kl": lambda x: 1 + (x.loss in ("simpo", "orpo")),
        "tokens": lambda x: 9,
        "rate": lambda x: 5e-4,
    },
    "length": {
        "true": lambda x: 0.5 + ["no remedy", "cut", "penalty", "normalised", "balanced",
                                 "debiased", "honest labels"].index(x.remedy) / 20,
        "longer": lambda x: 0.5,
        "by the rule": lambda x: 0.5,
        "pairs": lambda x: 100,
    },
    "elsewhere": {
        f"tiny-{letter}": lambda x, letter=letter: (
            0.9 if x.trained_on == f"tiny-{letter}" else 0.8 if "third" in x.trained_on else 0.7
        )
        for letter in "abc"
    },
    "several": {
        key: lambda x, of=of: of[["two models", "two outputs", "named in the prompt",
                                  "sum of two outputs"].index(x.way)]
        for key, of in (("better", (0.9, 0.8, 0.8, 0.8)), ("safer", (0.9, 0.8, 0.7, 0.8)),
                        ("better, conflicts", (0.9, 0.8, 0.8, 0.6)),
                        ("safer, conflicts", (0.9, 0.8, 0.8, 0.6)))
    },
    "why_lose": {
        "true_win": lambda x: (
            0.6 if x.condition == "control" else 0.2 if x.condition == "all together"
            else 0.3 + 0.1 * ("weak" not in x.condition) if "alone" in x.condition else 0.3
        ),
        "win": lambda x: 0.5,
        "elsewhere_win": lambda x: 0.1,
        "true": lambda x: 0,
        "kl": lambda x: 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", AS_GUESSED)
def test_guesses_that_are_right_are_shown(tmp_path, name):
    found = verdicts(Given(tmp_path, AS_GUESSED[name]), name)
    assert set(found.values()) == {"shown"}, found


def test_the_answer_names_what_reproduces_the_rate_and_what_repairs(tmp_path):
    figures = AS_GUESSED["why_lose"] | {
        name: lambda x: {"control": 0.6, "weak answers alone": 0.281,
                         "all but noise": 0.55}.get(x.condition, 0.45)
        for name in ("true_win", "win")
    }  # fmt: skip
    by_judge, _, repairs = why_lose.run(Given(tmp_path, figures)).notes
    assert "closest to 0.281 is that of weak answers alone (0.28" in by_judge
    assert "within the interval of: weak answers alone (0.28" in by_judge
    assert "noise alone" not in by_judge
    assert repairs.endswith(": all but noise.")


def test_independent_errors_are_averaged_out():
    """Three members that err independently: the mean errs less, in gain and in what it sees."""
    rng = np.random.default_rng(0)
    truths = rng.standard_normal((400, 16))
    rewards = truths + rng.standard_normal((3, 400, 16))
    offsets = 5 * rng.standard_normal((3, 400, 1))  # of prompts, which order nothing
    found = ensembles.curves_of(3 * rewards + offsets, truths)
    over = {j: (found[f"{j}: seen 16"] - found[f"{j}: true 16"]).mean() for j in ensembles.JUDGES}
    gain = {j: found[f"{j}: true 16"].mean() for j in ensembles.JUDGES}
    assert gain["mean of three"] > gain["one"] + 0.2
    # E[max of 16 normals] = 1.766: of one judge, deviation sqrt(2), so 2.498 seen, half of it true
    assert gain["one"] == pytest.approx(1.766 / np.sqrt(2), abs=0.05)
    assert over["one"] == pytest.approx(1.766 / np.sqrt(2), abs=0.1)
    assert over["mean of three"] == pytest.approx(
        1.766 * (np.sqrt(4 / 3) - np.sqrt(3 / 4)), abs=0.1
    )
