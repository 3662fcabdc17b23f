"""python -m pytest tests/family/test_objectives.py

How losses are applied to batches: against the core's loss, or plain lines of a test.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preferences import (  # noqa: F401
    batches_of,
    close,
    fixture_of_logps,
    fixture_of_models,
    fixture_of_objective_of,
    fixture_of_rows,
    settings,
)
from torch.nn.functional import logsigmoid

import train_dpo
from nanoalign.batch import Row, collate
from nanoalign.errors import RunError
from nanoalign.family.losses import INCOMPATIBLE, KIND, LOSSES, has_reference
from nanoalign.family.pairs import pairs_of
from nanoalign.losses import dpo_loss
from nanoalign.packing.self_check import check_start

# --- a batch


def test_sigmoid_is_the_loss_of_the_core_with_its_metrics(models, rows, objective_of):
    """`--loss sigmoid` against loss_of_batch of train_dpo.py, which `--loss dpo` runs: bit for
    bit."""
    expected = train_dpo.loss_of_batch(*models, 0.5, 0.0, collate(rows))
    found = objective_of(*models, "--loss", "sigmoid", "--beta", 0.5)(collate(rows))
    assert torch.equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][key], expected[1][key]) for key in expected[1])


def test_dpo_with_an_add_on_is_the_loss_of_the_core_and_the_add_on(
    models, rows, logps, objective_of
):
    """The NLL is a mean over the tokens of each chosen response."""
    flags = ["--label_smoothing", 0.2, "--nll_weight", 0.3]
    found, _ = objective_of(*models, "--beta", 0.3, *flags)(collate(rows))
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    plain = dpo_loss(*(logps[name] for name in names), 0.3, 0.2)[0]
    assert close(found, plain - 0.3 * logps["policy_chosen"] / logps["chosen_lengths"])


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo", "sft"])
def test_rewards_without_a_reference_are_log_probabilities(models, rows, logps, objective_of, name):
    """Times beta, or 1; simpo, orpo and sft compare means over tokens, cpo sums."""
    objective = objective_of(models[0], None, "--loss", name)
    losses, metrics = objective(collate(rows))
    beta = {"simpo": 2.0, "cpo": 0.1}.get(name, 1.0)
    for side in ("chosen", "rejected"):
        lengths = 1 if name == "cpo" else logps[f"{side}_lengths"]
        expected = beta * logps[f"policy_{side}"] / lengths
        assert close(metrics[f"rewards/{side}"], expected)
        assert close(metrics[f"logps/{side}"], logps[f"policy_{side}"])
    if name == "simpo":
        margins = metrics["rewards/margins"]
        assert close(losses, -logsigmoid(margins - 1))
    assert not any(value.requires_grad for key, value in metrics.items() if "rewards" in key)


def test_discounted_sums_by_hand():
    """Responses of 1 and 3 tokens: of the longer one two tokens have the weight 1/2.

    Policy -1 | -2, -4, -8: -1 and -2 - 2 - 4 = -8. Reference -3 | -1, -2, -4: -3 and -1 - 1 - 2.
    """
    prompt, responses = np.array([5]), (np.array([6]), np.array([7, 8, 9]))
    batch = collate([Row("row", prompt, responses)])
    policy, reference = (
        SimpleNamespace(tokens=lambda batch, values=values: torch.tensor(values))
        for values in ([-1.0, -2.0, -4.0, -8.0], [-3.0, -1.0, -2.0, -4.0])
    )
    pairs = pairs_of(batch, policy, reference, ld_alpha=0.5)
    assert (pairs.chosen_logps.item(), pairs.rejected_logps.item()) == (-1, -8)
    assert (pairs.full_chosen_logps.item(), pairs.full_rejected_logps.item()) == (-1, -14)
    assert (pairs.chosen_logratios.item(), pairs.rejected_logratios.item()) == (2, -4)
    assert pairs.reference_gaps.item() == 1


def test_length_alpha_explains_length(models, rows, logps, objective_of):
    """-log sigmoid(beta h + alpha (|y_w| - |y_l|)); reported rewards do not depend on lengths."""
    found, metrics = objective_of(*models, "--length_alpha", 0.02)(collate(rows))
    longer = logps["chosen_lengths"] - logps["rejected_lengths"]
    margins = 0.1 * (logps["chosen"] - logps["rejected"])
    assert close(found, -logsigmoid(margins + 0.02 * longer))
    assert close(metrics["rewards/margins"], margins)


def test_ld_alpha_discounts_what_the_longer_response_has_more(models, rows, logps, objective_of):
    """The slow oracle: token by token, of policy and reference. Reported sums are not
    discounted."""
    batch = collate(rows)
    margins = torch.zeros(9)
    for model, sign in zip(models, (1, -1), strict=True):
        with torch.no_grad():
            tokens = model.tokens(batch).split(batch.lengths.tolist())
        for i in range(9):
            shared = min(len(tokens[2 * i]), len(tokens[2 * i + 1]))
            for side, of_side in ((2 * i, 1), (2 * i + 1, -1)):
                own = tokens[side]
                margins[i] += sign * of_side * (own[:shared].sum() + 0.3 * own[shared:].sum())
    found, metrics = objective_of(*models, "--ld_alpha", 0.3)(batch)
    assert close(found, -logsigmoid(0.1 * margins))
    assert close(metrics["logps/chosen"], logps["policy_chosen"])
    plain = -logsigmoid(0.1 * (logps["chosen"] - logps["rejected"]))
    assert close(objective_of(*models, "--ld_alpha", 0.999999)(batch)[0], plain)
    assert not close(found, plain)


def test_wpo_weighs_by_the_models_own_logits_without_gradient(models, rows, logps, objective_of):
    """The oracle: a forward of each sequence alone, and the softmax of all its logits.

    The gradient is that of the losses times constants.
    """
    policy, reference = models
    batch, weights = collate(rows), []
    for row in rows:
        weight = 1.0
        for response in row.responses:
            ids = torch.tensor(np.concatenate([row.prompt, response])[None].astype(np.int64))
            with torch.no_grad():
                p = policy.model(ids).logits[0, len(row.prompt) - 1 : -1].softmax(-1)
            picked = p[torch.arange(len(response)), torch.tensor(response, dtype=torch.int64)]
            weight *= (picked / p.square().sum(-1)).log().mean().exp().item()
        weights.append(weight)
    weights = torch.tensor(weights)

    def gradient(values: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(values.sum(), list(policy.parameters()))
        return torch.cat([part.flatten() for part in parts])

    found, _ = objective_of(*models, "--wpo")(batch)
    scores = policy(batch)
    ratios = scores[batch.chosen] - scores[batch.rejected]
    ratios = ratios - logps["reference_chosen"] + logps["reference_rejected"]
    expected = weights * -logsigmoid(0.1 * ratios)
    assert close(found, expected) and weights.std() > 0.01
    assert torch.allclose(gradient(found), gradient(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_another_divergence_replaces_log_ratios(models, rows, logps, objective_of, divergence):
    small = copy.deepcopy(models[0])  # a reference near the policy: ratios of some nats at most
    with torch.no_grad():
        for new, old in zip(small.parameters(), models[1].parameters(), strict=True):
            new.lerp_(old, 0.03)
        scores = small(collate(rows))
    batch = collate(rows)
    flags = ["--divergence_alpha", 0.3] if divergence == "alpha" else []
    found, metrics = objective_of(models[0], small, "--divergence", divergence, *flags)(batch)
    u = [
        (logps["policy_chosen"] - scores[batch.chosen]).exp(),
        (logps["policy_rejected"] - scores[batch.rejected]).exp(),
    ]
    seen = {
        "js": lambda u: torch.log(2 * u / (1 + u)),
        "forward_kl": lambda u: 1 - 1 / u,
        "alpha": lambda u: (1 - u**-0.3) / 0.3,
    }[divergence]
    expected = -logsigmoid(0.1 * (seen(u[0]) - seen(u[1])))
    assert torch.allclose(found, expected, rtol=1e-4)
    assert torch.allclose(metrics["rewards/chosen"], 0.1 * seen(u[0]), rtol=1e-3, atol=1e-5)


# --- the start


REFERENCED = [name for name in LOSSES if has_reference(name)]


@pytest.mark.parametrize("name", REFERENCED)
def test_the_start_is_checked_with_every_loss(models, rows, objective_of, name):
    """policy == reference passes, also with add-ons; another reference does not."""
    policy = models[0]
    add_ons = {"wpo": [], "nll_weight": [0.2], "length_alpha": [0.03], "ld_alpha": [0.5]}
    for flag, value in ({} | {None: []} | add_ons).items():
        if flag in INCOMPATIBLE[KIND[name]]:
            continue
        flags = [] if flag is None else [f"--{flag}", *value]
        same = objective_of(policy, copy.deepcopy(policy), "--loss", name, *flags)
        check_start(same, rows, batches_of(200))
    with pytest.raises(RunError, match="self-check: with policy == reference, losses"):
        check_start(objective_of(*models, "--loss", name), rows, batches_of(200))


def test_losses_at_the_start_by_hand(models, rows, objective_of):
    """ln 2; ipo_sum with beta 0.1: 5^2; sigmoid with an NLL: ln 2 and the NLL."""
    batch = collate(rows)
    policy = models[0]
    expected = {
        "sigmoid": np.log(2),
        "ipo_sum": 25.0,
        "hinge": 1.0,
        "kto": 0.5,
        "nca_pair": 2 * np.log(2),
    }
    for name, value in expected.items():
        objective = objective_of(policy, models[1], "--loss", name)
        start = objective.losses_at_start(batch)
        assert torch.allclose(start, torch.full((9,), value, dtype=torch.float32)), name
    start = objective_of(*models, "--nll_weight", 2)
    nll = -start.pairs(batch).full_chosen_logps / batch.lengths[batch.chosen]
    assert close(start.losses_at_start(batch), np.log(2) + 2 * nll)
