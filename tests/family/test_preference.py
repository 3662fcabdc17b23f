"""python -m pytest tests/family/test_preference.py

How losses are applied to batches and steps: against the core's loss, or plain lines of a test.
"""

import argparse
import copy
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import records, tiny_llama, write_pairs
from ranks import run_ranks
from torch.nn.functional import logsigmoid

import train_dpo
from nanoalign import loop
from nanoalign.batch import collate
from nanoalign.checks import check_start
from nanoalign.distributed import full, run, setup
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.family import is_used, losses, objectives
from nanoalign.family.kto import check_kinds, mismatched
from nanoalign.family.losses import FIELDS, INCOMPATIBLE, KIND, LOSSES, has_reference, match_by_rank
from nanoalign.family.pairs import pairs_of
from nanoalign.hosts.report import report
from nanoalign.losses import dpo_loss
from nanoalign.model import Policy


def settings(*flags: object) -> argparse.Namespace:
    return train_dpo.parse_args([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def models() -> tuple[Policy, Policy]:
    return Policy(tiny_llama(0)), Policy(tiny_llama(1)).requires_grad_(False)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode_all(records(9), tokenizer, template="raw")


@pytest.fixture(scope="module")
def objective_of(rows):
    def objective(policy: Policy, reference: Policy | None, *flags: object):
        return objectives.objective_of(policy, reference, rows, settings(*flags), setup())

    return objective


def batches_of(tokens: int) -> loop.Batches:
    return loop.Batches(setup(), tokens)


@pytest.fixture(scope="module")
def logps(models, rows) -> dict[str, torch.Tensor]:
    """Log-probabilities and log-ratios of the 9 pairs: (9,) each."""
    batch, found = collate(rows), {}
    with torch.no_grad():
        for name, model in zip(("policy", "reference"), models, strict=True):
            both = model(batch)
            found[f"{name}_chosen"] = both[batch.chosen]
            found[f"{name}_rejected"] = both[batch.rejected]
    for side in ("chosen", "rejected"):
        found[side] = found[f"policy_{side}"] - found[f"reference_{side}"]
        found[f"{side}_lengths"] = batch.lengths[getattr(batch, side)].float()
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- a batch


def test_sigmoid_is_the_loss_of_the_core_with_its_metrics(models, rows, objective_of):
    """`--loss sigmoid` against loss_of_batch of train_dpo.py, which `--loss dpo` runs: bit for
    bit."""
    expected = train_dpo.loss_of_batch(*models, 0.5, 0.0, collate(rows))
    found = objective_of(*models, "--loss", "sigmoid", "--beta", 0.5)(collate(rows))
    assert torch.equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][key], expected[1][key]) for key in expected[1])


@pytest.mark.parametrize("smoothing", [0, 0.2])
def test_dpo_with_an_add_on_is_the_loss_of_the_core_and_the_add_on(
    models, rows, logps, objective_of, smoothing
):
    flags = ["--label_smoothing", smoothing, "--nll_weight", 0]
    found, _ = objective_of(*models, "--beta", 0.3, *flags)(collate(rows))
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    assert close(found, dpo_loss(*(logps[name] for name in names), 0.3, smoothing)[0])


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo", "sft"])
def test_rewards_without_a_reference_are_log_probabilities(models, rows, logps, objective_of, name):
    """Times beta, or 1; simpo, orpo and sft compare means over tokens, cpo sums."""
    objective = objective_of(models[0], None, "--loss", name)
    _, metrics = objective(collate(rows))
    beta = {"simpo": 2.0, "cpo": 0.1}.get(name, 1.0)
    for side in ("chosen", "rejected"):
        lengths = 1 if name == "cpo" else logps[f"{side}_lengths"]
        expected = beta * logps[f"policy_{side}"] / lengths
        assert close(metrics[f"rewards/{side}"], expected)
        assert close(metrics[f"logps/{side}"], logps[f"policy_{side}"])
    assert not any(value.requires_grad for key, value in metrics.items() if "rewards" in key)


def test_pairs_are_of_anything_that_maps_a_batch_to_log_probabilities(rows):
    """A policy and a reference without values of tokens, as where these were computed before."""
    batch, scores = collate(rows[:2]), torch.tensor([-1.0, -2.0, -3.0, -5.0])
    reference = torch.tensor([-4.0, -4.0, -7.0, -6.0])
    pairs = pairs_of(batch, lambda batch: scores, lambda batch: reference)
    assert pairs.chosen_logps.tolist() == pairs.full_chosen_logps.tolist() == [-1, -3]
    assert pairs.rejected_logps.tolist() == pairs.full_rejected_logps.tolist() == [-2, -5]
    assert pairs.chosen_logratios.tolist() == [3, 4] and pairs.rejected_logratios.tolist() == [2, 1]
    assert pairs.reference_gaps.tolist() == [0, -1] and pairs.wpo_weights is None
    assert pairs.chosen_lengths.tolist() == [len(row.responses[0]) for row in rows[:2]]
    alone = pairs_of(batch, lambda batch: scores, None)
    assert alone.chosen_logps.tolist() == [-1, -3] and alone.shift == 0
    unknown = ("chosen_logratios", "rejected_logratios", "reference_gaps", "wpo_weights",
               "matched_gaps", "kl", "has_chosen", "has_rejected")  # fmt: skip
    assert [getattr(alone, name) for name in unknown] == [None] * 8


def test_simpo_takes_means_over_tokens(models, rows, logps, objective_of):
    found, _ = objective_of(models[0], None, "--loss", "simpo")(collate(rows))
    sides = ("chosen", "rejected")
    chosen, rejected = (logps[f"policy_{side}"] / logps[f"{side}_lengths"] for side in sides)
    assert close(found, -logsigmoid(2 * (chosen - rejected) - 1))


def test_nll_is_a_mean_for_every_response(models, rows, logps, objective_of):
    found, _ = objective_of(*models, "--nll_weight", 0.3)(collate(rows))
    plain = -logsigmoid(0.1 * (logps["chosen"] - logps["rejected"]))
    assert close(found, plain - 0.3 * logps["policy_chosen"] / logps["chosen_lengths"])


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
    u = [(logps["policy_chosen"] - scores[batch.chosen]).exp(),
         (logps["policy_rejected"] - scores[batch.rejected]).exp()]  # fmt: skip
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


# --- a step as a whole


def test_ktos_kl_is_of_responses_to_other_prompts(models, rows, objective_of):
    """Row i has a response of row i + 1, the last one of the first; the mean is cut at 0."""
    others = mismatched(rows, 1024)
    for i, row in enumerate(others):
        assert np.array_equal(row.prompt, rows[i].prompt) and len(row.responses) == 1
        assert np.array_equal(row.responses[0], rows[(i + 1) % 9].responses[i % 2])
    assert len(mismatched(rows, len(rows[0].prompt) + 1)[0].responses[0]) == 1
    valued = [replace(row, extra={"margins": np.ones(1)}) for row in rows[:2]]
    assert [(row.extra, row.pairs) for row in mismatched(valued, 1024)] == [({}, ())] * 2
    assert objective_of(*models, "--loss", "kto").state == {"kl": 0.0}
    policy, reference = models
    with torch.no_grad():
        kl = (policy(collate(others)) - reference(collate(others))).mean()
    batches = batches_of(60)
    for model, other, expected in ((policy, reference, kl), (reference, policy, -kl)):
        kto = objective_of(model, other, "--loss", "kto")
        kto.before_step(rows, batches.step)
        assert kto.kl.item() == pytest.approx(max(0.0, expected.item()), rel=1e-5)
        assert not kto.kl.requires_grad
        before = kto.kl.item()
        kto.after_step(1, {"kl": before})
        kto.before_step(rows[:5], batches.all)  # an evaluation
        assert kto.kl.item() != before or before == 0
        kto.before_step(rows[:1], batches.step)  # an epoch's last step may be of one record
        assert kto.kl.item() == pytest.approx(before)


def test_kto_of_a_pair_is_the_mean_of_its_responses(models, rows, logps, objective_of):
    kto = objective_of(*models, "--loss", "kto", "--undesirable_weight", 1.5, "--nll_weight", 0.2)
    kto.kl = torch.tensor(0.7)
    found, metrics = kto(collate(rows))
    desirable = torch.sigmoid(0.1 * (0.7 - logps["chosen"]))
    undesirable = 1.5 * torch.sigmoid(0.1 * (logps["rejected"] - 0.7))
    nll = -logps["policy_chosen"] / logps["chosen_lengths"]
    assert close(found, (desirable + undesirable) / 2 + 0.2 * nll)
    assert close(metrics["rewards/margins"][0], 0.1 * (logps["chosen"] - logps["rejected"]))
    assert metrics["rewards/margins"][1].all() and torch.equal(metrics["kl"], torch.full((9,), 0.7))


def test_unpaired_records_are_single_responses(models, rows, logps, objective_of):
    """Chosen responses of even pairs as desirable, rejected ones of odd pairs as undesirable."""
    single = [
        replace(
            row,
            responses=row.responses[i % 2 : i % 2 + 1],
            pairs=((0, 0),),
            extra={"desirable": np.array([i % 2 == 0])},
        )
        for i, row in enumerate(rows)
    ]
    kto = objective_of(*models, "--loss", "kto", "--nll_weight", 0.3)
    kto.kl = torch.tensor(0.7)
    found, metrics = kto(collate(single))
    desirable = torch.arange(9) % 2 == 0
    nll = -logps["policy_chosen"] / logps["chosen_lengths"]
    expected = torch.where(
        desirable,
        torch.sigmoid(0.1 * (0.7 - logps["chosen"])) + 0.3 * nll,
        torch.sigmoid(0.1 * (logps["rejected"] - 0.7)),  # undesirable: without an NLL
    )
    assert close(found, expected)
    masks = {key: value[1].tolist() for key, value in metrics.items() if isinstance(value, tuple)}
    assert masks["rewards/chosen"] == masks["logps/chosen"] == desirable.tolist()
    assert masks["rewards/rejected"] == masks["logps/rejected"] == (~desirable).tolist()
    assert not any(masks["rewards/margins"]) and not any(masks["rewards/accuracies"])
    assert all(masks["loss"])
    found.sum().backward()


def test_ranked_responses_are_of_both_kinds(rows):
    """A record of several pairs without labels; singles need a desirable and an undesirable one."""
    ranked = replace(rows[0], pairs=((0, 1), (1, 0)))
    check_kinds([ranked], "file")
    one, other = (
        replace(rows[0], pairs=((0, 0),), extra={"desirable": np.array([good])})
        for good in (True, False)
    )
    check_kinds([one, one, other], "file")
    with pytest.raises(RunError, match="file: all 2 responses have one label, true; .* undes"):
        check_kinds([one, one], "file")
    with pytest.raises(RunError, match="all 1 responses have one label, false; .*add desirable"):
        check_kinds([other], "file")


def test_aots_order_is_that_of_the_whole_step(models, rows, logps, objective_of):
    """In micro-batches of a row or two, the pairs are matched as in one sort of all nine."""
    aot, batches = objective_of(*models, "--loss", "aot"), batches_of(100)
    aot.before_step(rows, batches.step)
    found = torch.empty(9)
    for batch in batches.step(rows):
        found[batch.rows] = aot(batch)[0].detach()
    gaps = logps["policy_chosen"] - logps["policy_rejected"]
    reference = sorted((logps["reference_chosen"] - logps["reference_rejected"]).tolist())
    matched = [reference[sorted(gaps.tolist()).index(gap)] for gap in gaps.tolist()]
    assert close(found, -logsigmoid(0.1 * (gaps - torch.tensor(matched))))
    assert len(list(batches.step(rows))) > 3
    filler = collate(rows[:1], weight=0.0)  # a batch that only fills a place has no matched pair
    assert aot(filler)[0].isfinite().all()


def test_a_reference_of_another_shape_can_not_move(models, objective_of):
    wide = Policy(tiny_llama(intermediate_size=64)).requires_grad_(False)
    with pytest.raises(RunError, match="is of another shape"):
        objective_of(models[0], wide, "--sync_reference_every", 2)


def test_an_objective_whose_reference_moves_is_itself_otherwise(models, rows, objective_of):
    """Its losses, those at the start, what it looks at before a step, and its state."""
    plain = objective_of(*models, "--loss", "kto")
    moving = objective_of(*models, "--loss", "kto", "--sync_reference_every", 2)
    for objective in (plain, moving):
        objective.before_step(rows[:7], batches_of(100).step)
    assert plain.kl > 0.1
    for found, expected in (
        (moving(collate(rows)), plain(collate(rows))),
        ([moving.losses_at_start(collate(rows))], [plain.losses_at_start(collate(rows))]),
    ):
        assert torch.equal(found[0], expected[0])
    moving.after_step(1, {"kl": 0.5})
    assert moving.state == {"kl": 0.5}


class Trained:
    """Four steps of all rows by loop.train, with a constant rate: losses, policy and reference."""

    def __init__(self, models, rows, objective_of, *flags):
        self.policy, self.reference = copy.deepcopy(models)
        objective = objective_of(self.policy, self.reference, *flags)
        args = settings("--batch_size", 9, "--steps", 4, "--lr", 0.01, "--schedule", "constant",
                        "--warmup", 0, *flags)  # fmt: skip
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.01)
        lines = []
        loop.train(self.policy, optimizer, objective, rows, {}, batches_of(150), args,
                   lambda step, metrics: lines.append(metrics))  # fmt: skip
        self.losses = [line["loss"] for line in lines if "loss" in line]


def plain_training(models, rows, loss, after_step):
    """The same four steps in plain lines. loss: of (chosen, rejected) log-ratios, (9,) each."""
    policy, reference = copy.deepcopy(models)
    optimizer, batch, found = torch.optim.AdamW(policy.parameters(), lr=0.01), collate(rows), []
    for step in range(1, 5):
        ratios = policy(batch) - reference(batch)
        chosen, rejected = ratios[batch.chosen], ratios[batch.rejected]
        losses = loss(chosen, rejected)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after_step(step, policy, reference, chosen, rejected)
        found.append(losses.mean().item())
    return found, reference


def test_the_reference_moves_towards_the_policy_when_it_is_time(models, rows, objective_of):
    flags = ["--sync_reference_every", 2, "--sync_reference_mix", 0.25, "--beta", 0.05]
    trained = Trained(models, rows, objective_of, *flags)

    def move(step, policy, reference, chosen, rejected):
        if step in (2, 4):
            for new, old in zip(policy.parameters(), reference.parameters(), strict=True):
                old.copy_(0.75 * old + 0.25 * new)

    expected, reference = plain_training(
        models, rows, lambda w, r: -logsigmoid(0.05 * (w - r)), move
    )
    assert trained.losses == pytest.approx(expected, rel=1e-4)
    for new, old in zip(trained.reference.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(new, old, atol=1e-4)
    still, _ = plain_training(models, rows, lambda w, r: -logsigmoid(0.05 * (w - r)), lambda *_: 0)
    assert still[2] != pytest.approx(expected[2], rel=1e-3)  # so that a move shows


def test_bcos_shift_is_the_mean_reward_of_the_steps_before(models, rows, objective_of):
    """Also where the reference moves, in whose objective the mean is kept."""
    means = []

    def loss(chosen, rejected):
        shift = sum(means) / len(means) if means else 0.0
        return -logsigmoid(0.1 * chosen - shift) - logsigmoid(-(0.1 * rejected - shift))

    def keep(step, policy, reference, chosen, rejected):
        means.append(0.1 * (chosen.mean() + rejected.mean()).item() / 2)

    expected, _ = plain_training(models, rows, loss, keep)
    found = Trained(models, rows, objective_of, "--loss", "bco_pair").losses
    assert found == pytest.approx(expected, rel=1e-4)
    moving = ["--loss", "bco_pair", "--sync_reference_every", 9]
    assert Trained(models, rows, objective_of, *moving).losses == pytest.approx(expected, rel=1e-4)
    objective = objective_of(*models, *moving)
    objective.state = {"steps": 3.0, "mean_reward": 0.5}  # as after a resume
    objective.after_step(4, {"rewards/chosen": 1.0, "rewards/rejected": 2.0})
    assert objective.state == {"steps": 4.0, "mean_reward": 0.75}
    assert objective.modules == {"reference": models[1]}


def test_a_reference_in_bfloat16_moves_in_bfloat16(models, objective_of):
    policy, reference = models[0], copy.deepcopy(models[1]).bfloat16()
    expected = [
        (0.4 * old.float() + 0.6 * new).bfloat16()
        for new, old in zip(policy.parameters(), reference.parameters(), strict=True)
    ]
    objective = objective_of(policy, reference, "--sync_reference_every", 1)
    objective.after_step(1, {})
    for found, value in zip(reference.parameters(), expected, strict=True):
        assert found.dtype == torch.bfloat16 and torch.allclose(found, value, rtol=0.02, atol=1e-3)


# --- flags


BAD_FLAGS = {
    "unknown loss": (["--loss", "nope"], r"invalid choice: 'nope' \(choose from .*sigmoid.*aot"),
    "robust at a half": (["--loss", "robust", "--label_smoothing", 0.5], "below 0.5, got '0.5'"),
    "exo_pair at 0": (["--loss", "exo_pair", "--label_smoothing", 0], "must be above 0"),
    "gamma without simpo": (["--loss", "hinge", "--gamma_beta_ratio", 1],
                            "no hyperparameter of --loss hinge, .* --beta$"),
    "tau with dpo": (["--loss", "dpo", "--tau", 1], "no hyperparameter of --loss dpo"),
    "tau without a loss": (["--tau", 1], "unrecognized arguments: --tau 1"),
    "smoothing without cdpo": (["--loss", "sigmoid", "--label_smoothing", 0.1],
                               "no hyperparameter of --loss sigmoid"),
    "beta with sft": (["--loss", "sft", "--beta", 0.1], "takes none"),
    "tau of 0": (["--loss", "discopop", "--tau", 0], "a number above 0"),
    "reference with simpo": (["--loss", "simpo", "--reference", "tiny"], "has no reference"),
    "no reference with dpo": (["--reference", "none"], "--loss dpo needs a --reference"),
    "divergence with cpo": (["--loss", "cpo", "--divergence", "js"], "cpo: it has no reference"),
    "sync with orpo": (["--loss", "orpo", "--sync_reference_every", 2], "it has no reference"),
    "alpha without the divergence": (["--divergence_alpha", 0.5], "belong together"),
    "the divergence without alpha": (["--divergence", "alpha"], "belong together"),
    "divergence_alpha of 1": (["--divergence", "alpha", "--divergence_alpha", 1], "below 1"),
    "divergence_alpha of 0": (["--divergence", "alpha", "--divergence_alpha", 0], "at least 1e-06"),
    "unknown divergence": (["--divergence", "kl"], "invalid choice: 'kl'"),
    "ld_alpha of 1": (["--ld_alpha", 1], "below 1"),
    "negative ld_alpha": (["--ld_alpha", -0.1], "at least 0"),
    "negative nll_weight": (["--nll_weight", -0.1], "at least 0"),
    "negative length_alpha": (["--length_alpha", -0.1], "at least 0"),
    "negative odds_weight": (["--loss", "orpo", "--odds_weight", -1], "at least 0"),
    "sync every 0 steps": (["--sync_reference_every", 0], "at least 1"),
    "mix of 0": (["--sync_reference_every", 2, "--sync_reference_mix", 0], "above 0"),
    "mix without when": (["--sync_reference_mix", 0.5], "give both"),
    "wpo with kto": (["--loss", "kto", "--wpo"], "single responses"),
    "ld_alpha with sft": (["--loss", "sft", "--ld_alpha", 0], "does not go with --loss sft"),
    "too far a mix": (["--sync_reference_every", 2, "--sync_reference_mix", 2], "give 1 or less"),
    "kto of single records": (["--loss", "kto", "--batch_size", 1], "raise --batch_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_flags_that_the_loss_does_not_use_are_errors(case):
    flags, message = BAD_FLAGS[case]
    with pytest.raises(RunError, match=message):
        settings(*flags)


def test_flags_at_their_limits():
    for flags in (
        ["--loss", "kto", "--batch_size", 2],
        ["--sync_reference_every", 1, "--sync_reference_mix", 1],
        ["--divergence", "alpha", "--divergence_alpha", 1e-6],
        ["--nll_weight", 0, "--length_alpha", 0, "--ld_alpha", 0],
        ["--loss", "orpo", "--odds_weight", 0],
    ):
        settings(*flags)


def of_the_margin(name: str) -> bool:
    """Whether a constant added to both log-ratios changes nothing."""
    if name == "dpo" or "shift" in FIELDS[name]:
        return name == "dpo"
    values = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.allclose(LOSSES[name](*values), LOSSES[name](*(values + 3)), rtol=1e-9)


ALL = {"dpo", *LOSSES}
OF_MEANS = {name for name in LOSSES if "lengths" in " ".join(FIELDS[name])}
OF_SUMS = {"dpo"} | {name for name in LOSSES if "chosen_logratios" in FIELDS[name]} - OF_MEANS
FITS = {  # by what a loss is a function of: one of means has no sums that an add-on could change
    ("--length_alpha", "0.1"): {name for name in OF_SUMS if of_the_margin(name)},
    ("--divergence", "js"): OF_SUMS,
    ("--ld_alpha", "0.5"): ALL - OF_MEANS - {"kto"},
    ("--wpo",): ALL - {"kto"},
    ("--nll_weight", "1"): ALL,
    ("--sync_reference_every", "2"): OF_SUMS | {"ipo", "sigmoid_norm", "kto", "aot"},
}


@pytest.mark.parametrize("flags", FITS, ids=lambda flags: flags[0])
def test_an_add_on_goes_with_the_losses_that_it_fits(flags):
    accepted = set()
    for name in ("dpo", *LOSSES):
        try:
            settings("--loss", name, *flags)
            accepted.add(name)
        except RunError as error:
            assert f"{flags[0]} does not go with --loss {name}: " in str(error)
    assert accepted == FITS[flags]


def test_defaults_are_those_of_the_papers():
    assert settings("--loss", "simpo").beta == 2.0
    assert settings("--loss", "simpo", "--beta", "1").beta == 1.0
    assert settings("--loss", "sppo_hard").beta == 1e-3
    args = settings("--loss", "kto", "--desirable_weight", 2)
    assert (args.beta, args.desirable_weight, args.undesirable_weight) == (0.1, 2.0, 1.0)
    args = settings("--loss", "sft")
    assert (args.beta, args.label_smoothing, args.reference) == (None, None, "none")
    args = settings()
    assert (args.beta, args.label_smoothing, args.reference) == (0.1, 0.0, None)
    assert settings("--loss=dpop").dpop_lambda == 50
    assert settings("--sync_reference_every", 3).sync_reference_mix == 0.6


def test_a_plain_run_needs_nothing_of_the_family():
    assert not is_used(settings()) and not is_used(settings("--label_smoothing", 0.1))
    for flags in (["--loss", "sigmoid"], ["--nll_weight", 0], ["--ld_alpha", 0], ["--wpo"]):
        assert is_used(settings(*flags))


def test_the_help_has_every_hyperparameter_with_its_default(capsys):
    with pytest.raises(SystemExit):
        settings("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, takes in losses.DEFAULTS.items():
        assert name in text
        for flag, value in takes.items():
            assert f"--{flag}" in text
            assert flag in ("beta", "label_smoothing") or f"{name}, default: {value:g}" in text
    assert "default of --beta: 0.1, but sigmoid_norm 5, sppo_hard 0.001, dpop 0.3, simpo 2" in text
    assert "default of --label_smoothing: 0, but cdpo 0.1, robust 0.1, exo_pair 0.001" in text


# --- data


def train_and_report(argv: list[str]) -> None:
    train_dpo.finish = lambda *args: None  # the picture takes longer than the training
    run(partial(train_dpo.main, argv), report)


def argv(folder: Path, pairs: Path, out: Path, *flags: object) -> list[str]:
    base = ["--model", folder, "--data", pairs, "--out", out, "--batch_size", 7, "--lr", 1e-2,
            "--template", "raw", *flags]  # fmt: skip
    return [str(flag) for flag in base]


def test_data_that_a_loss_can_not_use_are_errors(llama_folder, tmp_path, subtests):
    record = {"prompt": "p", "completion": "c", "label": True}
    files = {
        "desirable": [record, record | {"completion": "d"}],
        "undesirable": [record | {"label": False}],
        "both": [record, record | {"label": False}],
    }
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    for name, flags, message in (
        ("desirable", ["--loss", "kto"], "all 2 responses have one label, true; .* undesirable"),
        ("undesirable", ["--loss", "kto"], "all 1 responses have one label, false; .* desirable"),
        ("both", [], "both.jsonl:1: a completion with a label, where pairs are needed"),
    ):
        with subtests.test(name):
            data = tmp_path / f"{name}.jsonl"
            flags = argv(llama_folder, data, tmp_path / "out", "--eval_data", data, *flags)
            outcome = run_ranks(1, train_and_report, flags)
            assert outcome.codes == [1], outcome.stderr
            assert re.search(f"error: .*{message}", outcome.stderr), outcome.stderr


def test_paired_and_unpaired_records_train_together(llama_folder, tmp_path):
    """From two files: a pair is two responses, an unpaired record one."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 6)
    lines = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(6)]
    (tmp_path / "single.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    outcome = run_ranks(1, train_and_report, [
        "--model", str(llama_folder), "--data", str(pairs), str(tmp_path / "single.jsonl"),
        "--out", str(tmp_path / "out"), "--batch_size", "4", "--template", "raw", "--loss", "kto",
        "--steps", "2",
    ])  # fmt: skip
    assert outcome.codes == [0], outcome.stderr


# --- ranks


def _look_at_a_step(folders: list[Path], rows: list) -> dict:
    """What each objective makes of a step of all rows on this rank, with sharded models."""
    world = setup()
    policy = Policy.load(folders[0], world)
    reference = Policy.load(folders[1], world, trainable=False)
    make = partial(objectives.objective_of, policy, reference, rows)
    kto, batches = make(settings("--loss", "kto"), world), loop.Batches(world, 120)
    assert [] in batches.plan(mismatched(rows[:7], 1024))[-1]  # a batch that fills a place
    kto.before_step(rows[:7], batches.step)
    aot, batches = make(settings("--loss", "aot"), world), loop.Batches(world, 60)
    assert [] in batches.plan(rows)[-1]
    aot.before_step(rows, batches.step)
    losses = {}
    for batch in batches.step(rows):
        values = aot(batch)[0]
        values.sum().backward()  # after which the policy is sharded again
        losses |= dict(zip(batch.rows, values.tolist(), strict=False))  # a filler has no rows
    moving = make(settings("--sync_reference_every", 2, "--sync_reference_mix", 0.25), world)
    moving.after_step(1, {})
    with torch.no_grad():
        before, _ = reference(collate(rows)), moving.after_step(2, {})
    moved = [full(parameter).tolist() for parameter in reference.parameters()]
    return {"kl": kto.kl.item(), "aot": losses, "logps": before.tolist(), "moved": moved}


def test_a_step_is_the_same_on_two_ranks(models, rows, logps, tmp_path):
    """The KL, matched gaps and moved reference are those of one rank: of plain lines."""
    policy, reference = models
    folders = [tmp_path / "policy", tmp_path / "reference"]
    for model, folder in zip(models, folders, strict=True):
        model.model.save_pretrained(folder)
    outcome = run_ranks(2, _look_at_a_step, folders, rows)
    assert outcome.codes == [0, 0], outcome.stderr
    with torch.no_grad():
        others = collate(mismatched(rows[:7], 1024))
        kl = (policy(others) - reference(others)).mean().item()
    gaps = logps["policy_chosen"] - logps["policy_rejected"]
    matched = match_by_rank(gaps, logps["reference_chosen"] - logps["reference_rejected"])
    aot = -logsigmoid(0.1 * (gaps - matched))
    losses = {}
    for found in outcome.results:
        assert kl > 0.1 and found["kl"] == pytest.approx(kl, rel=1e-4)
        losses |= found["aot"]
        assert found["logps"] == pytest.approx(reference(collate(rows)).tolist(), rel=1e-4)
        pairs = zip(found["moved"], policy.parameters(), reference.parameters(), strict=True)
        for moved, new, old in pairs:
            assert torch.allclose(torch.tensor(moved), 0.75 * old + 0.25 * new, atol=1e-6)
    assert close(torch.tensor([losses[i] for i in range(9)]), aot)
