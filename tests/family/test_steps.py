"""python -m pytest tests/family/test_steps.py

What looks at a step as a whole or remembers the steps before: against plain lines.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_llama
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

from nanoalign import loop
from nanoalign.batch import collate
from nanoalign.errors import RunError
from nanoalign.family.kto import check_kinds, check_prompts, mismatched
from nanoalign.model import Policy


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
    batcher = batches_of(60)
    for model, other, expected in ((policy, reference, kl), (reference, policy, -kl)):
        kto = objective_of(model, other, "--loss", "kto")
        kto.before_step(rows, batcher.step)
        assert kto.kl.item() == pytest.approx(max(0.0, expected.item()), rel=1e-5)
        assert not kto.kl.requires_grad
        before = kto.kl.item()
        kto.after_step(1, {"kl": before})
        kto.before_step(rows[:5], batcher.all)  # an evaluation
        assert kto.kl.item() != before or before == 0
        kto.before_step(rows[:1], batcher.step)  # an epoch's last step may be of one record
        assert kto.kl.item() == pytest.approx(before)


def test_ktos_kl_is_never_of_a_response_to_the_same_prompt(rows):
    """Six rows of two prompts, A A B B B A: each has a response of the next row of the other."""
    prompts = (rows[0].prompt, rows[1].prompt)
    repeated = [replace(rows[n], prompt=prompts[kind]) for n, kind in enumerate((0, 0, 1, 1, 1, 0))]
    others = mismatched(repeated, 1024)
    for n, (row, other) in enumerate(zip(others, (2, 2, 5, 5, 5, 2), strict=True)):
        assert np.array_equal(row.prompt, repeated[n].prompt)
        assert np.array_equal(row.responses[0], repeated[other].responses[n % 2])


def test_kto_needs_two_prompts(models, rows, objective_of):
    """Else its KL would be 0 in every step."""
    one = [replace(row, prompt=rows[0].prompt) for row in rows]
    with pytest.raises(RunError, match="file: all 9 records have one prompt; .* to other prompts"):
        check_prompts(one, "file")
    check_prompts([*one, rows[1]], "file")
    with pytest.raises(RunError, match="tiny: all 9 records have one prompt"):
        objective_of(*models, "--loss", "kto", rows=one)


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
    aot, batcher = objective_of(*models, "--loss", "aot"), batches_of(100)
    aot.before_step(rows, batcher.step)
    found = torch.empty(9)
    for batch in batcher.step(rows):
        found[batch.rows] = aot(batch)[0].detach()
    gaps = logps["policy_chosen"] - logps["policy_rejected"]
    reference = sorted((logps["reference_chosen"] - logps["reference_rejected"]).tolist())
    matched = [reference[sorted(gaps.tolist()).index(gap)] for gap in gaps.tolist()]
    assert close(found, -logsigmoid(0.1 * (gaps - torch.tensor(matched))))
    assert len(list(batcher.step(rows))) > 3
    filler = collate(rows[:1], weight=0.0)  # a batch that only fills a place has no matched pair
    assert aot(filler)[0].isfinite().all()


def test_a_reference_of_another_shape_can_not_move(models, objective_of):
    wide = Policy(tiny_llama(intermediate_size=64)).requires_grad_(False)
    with pytest.raises(RunError, match="have other shapes than"):
        objective_of(models[0], wide, "--sync_reference_every", 2)


class Trained:
    """Four steps of all rows by loop.train, with a constant rate: losses, policy and reference."""

    def __init__(self, models, rows, objective_of, *flags):
        self.policy, self.reference = copy.deepcopy(models)
        objective = objective_of(self.policy, self.reference, *flags)
        args = ["--batch_size", 9, "--steps", 4, "--lr", 0.01, "--schedule", "constant"]
        args = loop.Settings.of(settings(*args, "--warmup", 0, *flags))
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.01)
        lines = []

        def log(step: int, metrics: dict[str, float]) -> None:
            lines.append(metrics)

        loop.train(self.policy, optimizer, objective, rows, {}, batches_of(150), args, log)
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
    """Also where the reference moves."""
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


@pytest.mark.parametrize("loss", ["aot", "bco_pair", "kto"])
def test_a_reference_moves_with_losses_that_keep_something(models, objective_of, loss):
    """At a mix of 1 it is then the policy."""
    policy, reference = models[0], copy.deepcopy(models[1])
    flags = ["--loss", loss, "--sync_reference_every", 2, "--sync_reference_mix", 1]
    objective = objective_of(policy, reference, *flags)
    metrics = {"kl": 0.5, "rewards/chosen": 1.0, "rewards/rejected": 2.0}
    for step, moved in ((1, False), (2, True)):
        objective.after_step(step, metrics)
        pairs = zip(policy.parameters(), reference.parameters(), strict=True)
        assert all(torch.equal(new, old) for new, old in pairs if new.ndim > 1) == moved
    assert objective.state.get("kl", 0.5) == 0.5


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
