"""python -m pytest tests/lab/test_golden.py

Golden values against the formulas in plain Python, and against differences of losses.
"""

import json
import math

import numpy as np
import pytest
import torch

from nanoalign import losses
from nanoalign.family import losses as family
from nanoalign.lab import __main__ as lab
from nanoalign.lab.golden import RANDOM, dpo_loss


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("golden") / "a" / "golden.json"
    lab.main(["golden", "--out", str(path)])
    first = path.read_bytes()
    lab.main(["golden", "--out", str(path)])
    assert path.read_bytes() == first
    content = json.loads(first)
    assert content["format"] == 1
    return content["losses"]


def softplus(x: float) -> float:
    """log(1 + exp(x)) = -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


def log_odds(mean: float) -> float:
    return mean - math.log(-math.expm1(mean))


# The formulas of the papers, in plain Python.
PLAIN = {
    "dpo_loss": lambda w, v, rw, rl, beta, **_: softplus(-beta * (w - rw - (v - rl))),
    "pairwise_reward_loss": lambda w, v, **_: softplus(v - w),
    "dpo": lambda w, v, beta, **_: softplus(-beta * (w - v)),
    "sigmoid": lambda w, v, beta: softplus(-beta * (w - v)),
    "cdpo": lambda w, v, beta, label_smoothing: (
        (1 - label_smoothing) * softplus(beta * (v - w))
        + label_smoothing * softplus(beta * (w - v))
    ),
    "hinge": lambda w, v, beta: max(0.0, 1 - beta * (w - v)),
    "ipo_sum": lambda w, v, beta: (w - v - 1 / (2 * beta)) ** 2,
    "ipo": lambda w, v, a, b, beta: (w / a - v / b - 1 / (2 * beta)) ** 2,
    "sigmoid_norm": lambda w, v, a, b, beta: softplus(-beta * (w / a - v / b)),
    "apo_zero": lambda w, v, beta: sigmoid(-beta * w) + sigmoid(beta * v),
    "apo_down": lambda w, v, beta: sigmoid(beta * w) + sigmoid(-beta * (w - v)),
    "sppo_hard": lambda w, v, beta: (w - 0.5 / beta) ** 2 + (v + 0.5 / beta) ** 2,
    "nca_pair": lambda w, v, beta: (
        softplus(-beta * w) + softplus(beta * w) / 2 + softplus(beta * v) / 2
    ),
    "bco_pair": lambda w, v, d, beta: softplus(d - beta * w) + softplus(beta * v - d),
    "dpop": lambda w, v, beta, dpop_lambda: softplus(-beta * (w - v - dpop_lambda * max(0, -w))),
    "kto": lambda r, good, kl, beta, **_: sigmoid(beta * (kl - r) if good else beta * (r - kl)),
    "simpo": lambda w, v, a, b, beta, gamma_beta_ratio: softplus(
        -beta * (w / a - v / b - gamma_beta_ratio)
    ),
    "orpo": lambda w, v, a, b, odds_weight: (
        -w / a + odds_weight * softplus(log_odds(v / b) - log_odds(w / a))
    ),
    "sft": lambda w, a: -w / a,
}


def test_every_loss_has_its_cases(found):
    assert set(found) == {"dpo_loss", "pairwise_reward_loss", *family.LOSSES}
    assert {len(each["cases"]) for each in found.values()} == {RANDOM + 5}
    assert PLAIN.keys() <= found.keys() and len(PLAIN) >= 19


@pytest.mark.parametrize("name", PLAIN)
def test_losses_are_those_of_plain_python(found, name):
    of = found[name]
    for case in of["cases"]:
        expected = PLAIN[name](*(case["inputs"][f] for f in of["fields"]), **of["hyperparameters"])
        assert case["loss"] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["dpo_loss", "pairwise_reward_loss", *family.LOSSES])
def test_gradients_are_differences_of_losses(found, name):
    """Of random cases: central differences, with steps of 1e-6 nats."""
    core = {"dpo_loss": dpo_loss, "pairwise_reward_loss": losses.pairwise_reward_loss}
    function, of = core.get(name) or family.LOSSES[name], found[name]

    def total(inputs: dict) -> float:
        values = [np.array(inputs[field]).reshape(-1) for field in of["fields"]]
        tensors = [torch.from_numpy(x if x.dtype == bool else x.astype(float)) for x in values]
        return function(*tensors, **of["hyperparameters"]).sum().item()

    for case in of["cases"][:RANDOM]:
        for field, gradient in case["gradients"].items():
            values = torch.tensor(case["inputs"][field], dtype=torch.float64).reshape(-1)
            for n, slope in enumerate(torch.tensor(gradient).reshape(-1).tolist()):
                step = torch.zeros_like(values)
                step[n] = 1e-6
                up, down = (total(case["inputs"] | {field: (values + s).tolist()})
                            for s in (step, -step))  # fmt: skip
                assert slope == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-4)
