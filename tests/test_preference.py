"""python -m pytest tests/test_preference.py

How losses meet batches, steps, ranks and checkpoints: every loss of the family through train_dpo.py.
"""

import argparse
import copy
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import examples, tiny_llama, write_pairs
from ranks import run_ranks

import train_dpo
from nanoalign import loop, losses
from nanoalign.data import read_examples
from nanoalign.distributed import run, setup
from nanoalign.models import Policy
from nanoalign.preference import Preference, mismatched
from nanoalign.rows import collate, encode_all


def settings(*flags: object) -> argparse.Namespace:
    return train_dpo.parse_args([str(flag) for flag in flags])


def objective_of(policy: Policy, reference: Policy | None, *flags: object) -> Preference:
    return Preference(policy, reference, settings(*flags), setup())


def batches_of(args: argparse.Namespace):
    return partial(loop.rank_batches, args=args, world=setup())


@pytest.fixture(scope="module")
def models() -> tuple[Policy, Policy]:
    return Policy(tiny_llama(0)), Policy(tiny_llama(1)).requires_grad_(False)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode_all(examples(9), tokenizer, "raw")[0]


@pytest.fixture(scope="module")
def logps(models, rows) -> dict[str, torch.Tensor]:
    """What both models say of the 9 pairs: (9,) each."""
    batch, found = collate(rows), {}
    with torch.no_grad():
        for name, model in zip(("policy", "reference"), models, strict=True):
            both = model(batch)
            found |= {
                f"{name}_chosen": both[batch.chosen],
                f"{name}_rejected": both[batch.rejected],
            }
    for side in ("chosen", "rejected"):
        found[side] = found[f"policy_{side}"] - found[f"reference_{side}"]
        found[f"{side}_lengths"] = batch.lengths[getattr(batch, side)].float()
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- a batch


def test_what_is_reported_are_the_losss_own_numbers(models, rows, logps):
    found, values = objective_of(*models, "--beta", 0.5)(collate(rows))
    zero = torch.zeros(9)
    expected, chosen, rejected = losses.dpo_loss(
        logps["chosen"], logps["rejected"], zero, zero, 0.5
    )
    assert close(found, expected)
    assert close(values["rewards/chosen"][0], chosen) and close(
        values["rewards/margins"][0], chosen - rejected
    )
    assert close(values["logps/rejected"][0], logps["policy_rejected"])
    assert all(values[key][1].all() for key in values if isinstance(values[key], tuple))


def test_losses_without_a_reference_take_the_policys_own(models, rows, logps):
    found, values = objective_of(models[0], None, "--loss", "simpo")(collate(rows))
    chosen, rejected = (
        logps[f"policy_{side}"] / logps[f"{side}_lengths"] for side in ("chosen", "rejected")
    )
    assert close(found, -torch.nn.functional.logsigmoid(2 * (chosen - rejected) - 1))
    assert close(values["rewards/chosen"][0], 2 * chosen)


def test_nll_is_a_mean_for_every_sequence(models, rows, logps):
    plain, _ = objective_of(*models)(collate(rows))
    found, _ = objective_of(*models, "--nll_weight", 0.3)(collate(rows))
    assert close(found, plain - 0.3 * logps["policy_chosen"] / logps["chosen_lengths"])


def test_length_alpha_explains_length(models, rows, logps):
    """-log sigmoid(beta h + alpha (|y_w| - |y_l|)); the reported rewards are those of the policy alone."""
    found, values = objective_of(*models, "--length_alpha", 0.02)(collate(rows))
    longer = logps["chosen_lengths"] - logps["rejected_lengths"]
    margins = 0.1 * (logps["chosen"] - logps["rejected"])
    assert close(found, -torch.nn.functional.logsigmoid(margins + 0.02 * longer))
    assert close(values["rewards/margins"][0], margins)


def test_ld_alpha_discounts_what_the_longer_response_has_more(models, rows, logps):
    """The slow oracle: token by token, of policy and reference alike. With 1 nothing is discounted."""
    batch = collate(rows)
    margins = torch.zeros(9)
    for model, sign in zip(models, (1, -1), strict=True):
        with torch.no_grad():
            tokens = model(batch, per_token=True).logps.split(batch.lengths.tolist())
        for i in range(9):
            shared = min(len(tokens[2 * i]), len(tokens[2 * i + 1]))
            for side, of_side in ((2 * i, 1), (2 * i + 1, -1)):
                own = tokens[side]
                margins[i] += sign * of_side * (own[:shared].sum() + 0.3 * own[shared:].sum())
    found, values = objective_of(*models, "--ld_alpha", 0.3)(batch)
    assert close(found, -torch.nn.functional.logsigmoid(0.1 * margins))
    assert close(values["logps/chosen"][0], logps["policy_chosen"])
    plain = objective_of(*models)(batch)[0]
    assert close(objective_of(*models, "--ld_alpha", 0.999999)(batch)[0], plain)


def test_wpo_weighs_by_the_models_own_logits(models, rows):
    """The oracle: a forward of each sequence alone, softmax of all its logits."""
    policy, batch, expected = models[0], collate(rows), []
    for row in rows:
        weight = 1.0
        for response in row.responses:
            ids = torch.tensor(np.concatenate([row.prompt, response])[None].astype(np.int64))
            with torch.no_grad():
                p = policy.model(ids).logits[0, len(row.prompt) - 1 : -1].softmax(-1)
            picked = p[torch.arange(len(response)), torch.tensor(response, dtype=torch.int64)]
            weight *= (picked / p.square().sum(-1)).log().mean().exp().item()
        expected.append(weight)
    plain, _ = objective_of(*models)(batch)
    found, _ = objective_of(*models, "--wpo")(batch)
    assert close(found / plain, torch.tensor(expected))


def test_another_divergence_sees_log_ratios_otherwise(models, rows, logps):
    found, values = objective_of(*models, "--divergence", "js")(collate(rows))
    seen = [torch.log(2 * x.exp() / (1 + x.exp())) for x in (logps["chosen"], logps["rejected"])]
    assert torch.allclose(
        found, -torch.nn.functional.logsigmoid(0.1 * (seen[0] - seen[1])), rtol=1e-4
    )
    assert torch.allclose(values["rewards/chosen"][0], 0.1 * seen[0], rtol=1e-4, atol=1e-5)


# --- a step as a whole


def test_ktos_kl_is_of_responses_to_other_prompts(models, rows):
    """Row i has a response of row i + 1, the last one of the first; the mean is cut at 0."""
    others = mismatched(rows, 1024)
    for i, row in enumerate(others):
        assert np.array_equal(row.prompt, rows[i].prompt) and len(row.responses) == 1
        assert np.array_equal(row.responses[0], rows[(i + 1) % 9].responses[i % 2])
    assert len(mismatched(rows, len(rows[0].prompt) + 1)[0].responses[0]) == 1
    policy, reference = models
    with torch.no_grad():
        kl = (policy(collate(others)) - reference(collate(others))).mean()
    for model, other, expected in ((policy, reference, kl), (reference, policy, -kl)):
        kto = objective_of(model, other, "--loss", "kto", "--micro_batch_tokens", 60)
        kto.survey(rows, batches_of(kto.args))
        assert kto.kl.item() == pytest.approx(max(0.0, expected.item()), rel=1e-5)
        assert not kto.kl.requires_grad
        before = kto.kl.item()
        kto.stepped(1, {"kl": before})
        kto.survey(rows[:5], batches_of(kto.args))  # an evaluation
        assert kto.kl.item() != before or before == 0
        kto.survey(rows[:1], batches_of(kto.args))  # an epoch's last step may be of one record
        assert kto.kl.item() == pytest.approx(before)


def test_kto_of_a_pair_is_the_mean_of_its_examples(models, rows, logps):
    kto = objective_of(*models, "--loss", "kto", "--undesirable_weight", 1.5)
    kto.kl = torch.tensor(0.7)
    found, _ = kto(collate(rows))
    both = [
        losses.kto(logps[side], torch.full((9,), good), 0.7, 0.1, 1.0, 1.5)
        for side, good in (("chosen", True), ("rejected", False))
    ]
    assert close(found, (both[0] + both[1]) / 2)


def test_unpaired_records_are_single_examples(models, tmp_path, tokenizer, logps):
    """The chosen responses of even pairs as desirable, the rejected ones of odd pairs as undesirable."""
    records = [
        {"prompt": e.prompt, "completion": e.responses[i % 2], "label": i % 2 == 0}
        for i, e in enumerate(examples(9))
    ]
    path = tmp_path / "unpaired.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    batch = collate(encode_all(read_examples(str(path)), tokenizer, "raw")[0])
    assert batch.sides.tolist() == [[i % 2 == 0 for i in range(9)], [i % 2 == 1 for i in range(9)]]
    kto = objective_of(*models, "--loss", "kto")
    kto.kl = torch.tensor(0.7)
    found, values = kto(batch)
    desirable = torch.arange(9) % 2 == 0
    ratios = torch.where(desirable, logps["chosen"], logps["rejected"])
    assert close(found, losses.kto(ratios, desirable, 0.7))
    assert values["rewards/chosen"][1].tolist() == desirable.tolist()
    assert not values["rewards/margins"][1].any()
    found.sum().backward()


def test_aots_order_is_that_of_the_whole_step(models, rows, logps):
    """In micro-batches of a row or two, the pairs are matched as in one sort of all nine."""
    aot = objective_of(*models, "--loss", "aot", "--micro_batch_tokens", 100)
    batches = batches_of(aot.args)
    aot.survey(rows, batches)
    found = torch.empty(9)
    for group, batch in batches(rows):
        found[group] = aot(batch)[0].detach()
    gaps = logps["policy_chosen"] - logps["policy_rejected"]
    matched = losses.match_by_rank(gaps, logps["reference_chosen"] - logps["reference_rejected"])
    assert close(found, -torch.nn.functional.logsigmoid(0.1 * (gaps - matched)))
    assert len(list(batches(rows))) > 3 and not aot.matched


def test_bcos_shift_is_the_mean_reward_of_the_steps_before(models, rows, logps):
    bco = objective_of(*models, "--loss", "bco_pair")
    for step, (chosen, rejected) in enumerate(((1.0, 3.0), (0.0, 4.0), (7.0, 7.0)), start=1):
        bco.stepped(step, {"rewards/chosen": chosen, "rewards/rejected": rejected})
    found, _ = bco(collate(rows))
    assert close(found, losses.bco_pair(logps["chosen"], logps["rejected"], (2 + 2 + 7) / 3))


def test_a_reference_of_another_shape_can_not_move(models):
    wide = Policy(tiny_llama(intermediate_size=64)).requires_grad_(False)
    with pytest.raises(ValueError, match="is of another shape"):
        objective_of(models[0], wide, "--sync_reference_every", 2)


def test_the_reference_moves_towards_the_policy_when_it_is_time():
    policy, reference = Policy(tiny_llama(0)), Policy(tiny_llama(1)).requires_grad_(False)
    reference.reshard = lambda: None
    before = copy.deepcopy(dict(reference.named_parameters()))
    flags = ("--sync_reference_every", 2, "--sync_reference_mix", 0.25)
    objective = objective_of(policy, reference, *flags)
    for step in (1, 2):
        objective.stepped(step, {})
        share = 0.25 * (step == 2)
        for (name, p), q in zip(reference.named_parameters(), policy.parameters(), strict=True):
            assert torch.allclose(p, (1 - share) * before[name] + share * q.detach(), atol=1e-6)


# --- bad input


def train_and_say(argv: list[str]) -> None:
    train_dpo.curves = lambda *args: None
    run(partial(train_dpo.main, argv))


def argv(folder: Path, pairs: Path, out: Path, *flags: object) -> list[str]:
    base = ["--model", folder, "--data", pairs, "--out", out, "--batch_size", 7, "--lr", 1e-2,
            "--template", "raw", *flags]  # fmt: skip
    return [str(flag) for flag in base]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 25)


BAD_FLAGS = {
    "unknown loss": (["--loss", "nope"], r"invalid choice: 'nope' \(choose from .*sigmoid.*aot"),
    "robust at a half": (["--loss", "robust", "--label_smoothing", 0.5], "below 0.5, got '0.5'"),
    "exo_pair at 0": (["--loss", "exo_pair", "--label_smoothing", 0], "must be above 0"),
    "gamma without simpo": (
        ["--gamma_beta_ratio", 1],
        "no hyperparameter of --loss sigmoid, .* --beta$",
    ),
    "smoothing without cdpo": (["--label_smoothing", 0.1], "no hyperparameter of --loss sigmoid"),
    "beta with sft": (["--loss", "sft", "--beta", 0.1], "takes none"),
    "reference with simpo": (
        ["--loss", "simpo", "--reference", "tiny"],
        "has no reference, and so no --ref",
    ),
    "divergence with cpo": (["--loss", "cpo", "--divergence", "js"], "so no --divergence"),
    "alpha without the divergence": (["--divergence_alpha", 0.5], "belong together"),
    "the divergence without alpha": (["--divergence", "alpha"], "belong together"),
    "mix without when": (["--sync_reference_mix", 0.5], "give both"),
    "wpo with kto": (["--loss", "kto", "--wpo"], "single examples"),
    "length_alpha with ipo": (
        ["--loss", "ipo", "--length_alpha", 0.1],
        "does not go with --loss ipo",
    ),
    "ld_alpha with sft": (["--loss", "sft", "--ld_alpha", 0], "does not go with --loss sft"),
    "divergence with kto": (["--loss", "kto", "--divergence", "js"], "does not go with --loss kto"),
    "too far a mix": (
        ["--sync_reference_every", 2, "--sync_reference_mix", 2],
        "all the way, or less",
    ),
    "kto of single records": (["--loss", "kto", "--batch_size", 1], "raise --batch_size"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_flags_that_the_loss_does_not_use_are_errors(case):
    flags, message = BAD_FLAGS[case]
    with pytest.raises(ValueError, match=message):
        settings(*flags)


def test_defaults_are_those_of_the_papers():
    assert settings("--loss", "simpo").beta == 2.0
    assert settings("--loss", "sppo_hard").beta == 1e-3
    args = settings("--loss", "kto", "--desirable_weight", 2)
    assert (args.beta, args.desirable_weight, args.undesirable_weight) == (0.1, 2.0, 1.0)
    assert args.tau is None and settings("--loss", "sft").reference is None


def test_data_that_a_loss_can_not_use_are_errors(llama_folder, pairs, tmp_path):
    record = {"prompt": "p", "completion": "c", "label": True}
    files = {
        "desirable": [record, record | {"completion": "d"}],
        "mixed": [record, record | {"label": False}],
        "no label": [record | {"label": 1}],
    }
    for name, records in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "out"
    for name, flags, message in (
        ("desirable", ["--loss", "kto"], "2 desirable examples and 0 undesirable ones"),
        ("mixed", [], "mixed:1: a completion with a label, where pairs are wanted"),
        (
            "no label",
            ["--loss", "kto"],
            "no label.jsonl:1: the label must be true or false, found 1",
        ),
        ("mixed", ["--loss", "kto", "--batch_size", 1], "raise --batch_size"),
    ):
        data = tmp_path / f"{name}.jsonl"
        outcome = run_ranks(
            1, train_and_say, argv(llama_folder, data, out, "--eval_data", data, *flags)
        )
        assert outcome.codes == [1], outcome.stderr
        assert re.search(f"error: .*{re.escape(message)}", outcome.stderr), outcome.stderr
