"""python -m pytest tests/lab/test_golden.py

Golden values by hand, and gradients against differences of losses. The losses themselves are those
of tests/family/test_loss_family.py.
"""

import json

import numpy as np
import pytest
import torch

from nanoalign import losses
from nanoalign.family import losses as family
from nanoalign.lab import execute as lab
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


def test_every_loss_has_its_cases(found):
    assert set(found) == {"dpo_loss", "pairwise_reward_loss", *family.LOSSES}
    assert {len(each["cases"]) for each in found.values()} == {RANDOM + 5}


def test_a_case_by_hand(found):
    """Log-ratios of 1000 and -1000, which is right, or wrong: the loss is 0, or beta * 2000."""
    of = found["sigmoid"]
    assert of["fields"] == ["chosen_logratios", "rejected_logratios"]
    assert of["hyperparameters"] == {"beta": 0.1}
    right, wrong = of["cases"][RANDOM + 1 : RANDOM + 3]
    assert right["inputs"] == {"chosen_logratios": 1e3, "rejected_logratios": -1e3}
    assert right["loss"] == pytest.approx(0) and wrong["loss"] == pytest.approx(200)
    assert wrong["gradients"] == {"chosen_logratios": -0.1, "rejected_logratios": 0.1}


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
