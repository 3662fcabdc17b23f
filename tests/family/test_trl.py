"""python -m pytest tests/family/test_trl.py

Losses whose conventions differ against TRL's, where trl is installed (pip install trl==1.16.0
datasets accelerate). tests/lab/test_golden_trl.py compares the others.

How the conventions differ:
    simpo       TRL's simpo_gamma is gamma itself: our gamma_beta_ratio times beta
    cpo, orpo   TRL adds its NLL elsewhere, as a token mean of the batch (orpo: of the prompt too);
                ours is a mean for every sequence, of the response: compared without it
    bco_pair    TRL has no running mean: D = 0
    alpha       TRL's coefficient is 1 - alpha, and its scores differ from ours by no constant
    wpo         TRL's is a token mean of the batch; equal for one pair at a time
    kto         TRL's z is of one GPU's batch and is not part of a formula of pairs: not compared
    cdpo, ipo_sum are not in TRL 1.16
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from nanoalign.family import losses
from nanoalign.family.losses import FIELDS, match_by_rank
from nanoalign.family.pairs import divergence_scores
from nanoalign.family.tokens import discounted_sums

trl = pytest.importorskip(
    "trl", reason="trl is not installed: losses are not compared with its own"
)
B, T = 24, 30


def _same(value):
    return value


class Data:
    """Random log-probabilities of tokens: chosen sequences, then rejected ones, as TRL stacks
    them."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(2, T - 1, (2 * B,), generator=draw)
        self.mask = torch.zeros(2 * B, T, dtype=torch.long)
        for row, length in enumerate(lengths):
            self.mask[row, T - length :] = 1
        scored = self.mask[:, 1:]
        self.policy = -torch.rand(2 * B, T - 1, generator=draw) * 3 * scored
        self.reference = -torch.rand(2 * B, T - 1, generator=draw) * 3 * scored
        self.collisions = -torch.rand(2 * B, T - 1, generator=draw) * 3
        self.lengths = lengths.float()
        policy, reference = self.policy.sum(1), self.reference.sum(1)
        self.inputs = {
            "chosen_logps": policy[:B],
            "rejected_logps": policy[B:],
            "chosen_logratios": (policy - reference)[:B],
            "rejected_logratios": (policy - reference)[B:],
            "chosen_lengths": self.lengths[:B],
            "rejected_lengths": self.lengths[B:],
            "shift": 0.0,
        }
        gaps = policy[:B] - policy[B:]
        self.inputs["matched_gaps"] = match_by_rank(gaps, reference[:B] - reference[B:])


@pytest.fixture(scope="module")
def data() -> Data:
    return Data()


def trl_loss(data: Data, pairs: list[int], loss: str, **settings: object) -> float:
    """TRL's mean loss of some pairs: its own method, on a trainer that is no more than numbers."""
    rows = [*pairs, *(B + i for i in pairs)]
    some = torch.zeros(len(rows), T - 1)
    outputs = SimpleNamespace(
        log_probs=data.policy[rows],
        log_sum_sq_probs=data.collisions[rows],
        entropy=some,
        mean_logits=some,
        is_top1=some.bool(),
    )
    reference = data.reference.sum(1)
    if settings.get("ld_alpha") is not None:
        reference = discounted(data, data.reference, settings["ld_alpha"])
    inputs = {
        "input_ids": torch.zeros(len(rows), T, dtype=torch.long),
        "completion_mask": data.mask[rows],
        "attention_mask": torch.ones(len(rows), T, dtype=torch.long),
        "ref_chosen_logps": reference[pairs],
        "ref_rejected_logps": reference[[B + i for i in pairs]],
    }
    trainer = SimpleNamespace(
        **{
            "model": SimpleNamespace(training=False),
            "aux_loss_enabled": False,
            "ld_alpha": None,
            "precompute_ref_logps": True,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "loss_types": [loss],
            "loss_weights": [1.0],
            "beta": 0.1,
            "label_smoothing": 0.0,
            "args": SimpleNamespace(discopop_tau=0.05),
            "use_weighting": False,
            "_total_train_tokens": 0,
            "_metrics": defaultdict(lambda: defaultdict(list)),
            "_tp_size": 1,
            "accelerator": SimpleNamespace(
                device=torch.device("cpu"), gather=_same, gather_for_metrics=_same
            ),
        }
        | settings
    )
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False).item()


def discounted(data: Data, tokens: torch.Tensor, alpha: float) -> torch.Tensor:
    """Our LD-DPO sums of all 2 B sequences."""
    values = tokens[data.mask[:, 1:].bool()]
    lengths = data.lengths.long()
    shared = torch.minimum(lengths[:B], lengths[B:]).repeat(2)
    return discounted_sums(values, lengths, torch.arange(2 * B), shared, alpha)


def test_bco_pair_without_a_shift(data):
    found = losses.bco_pair(*(data.inputs[key] for key in FIELDS["bco_pair"]), beta=0.3)
    expected = [trl_loss(data, [i], "bco_pair", beta=0.3) for i in range(B)]
    assert found.tolist() == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_aot_of_the_whole_batch(data):
    inputs = [data.inputs[key] for key in ("chosen_logps", "rejected_logps", "matched_gaps")]
    found = losses.aot(*inputs, beta=0.3).mean().item()
    assert found == pytest.approx(trl_loss(data, list(range(B)), "aot", beta=0.3), rel=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("forward_kl", "forward_kl"), ("js", "js_divergence"), ("alpha", "alpha_divergence")],
)
def test_divergences(data, ours, theirs):
    """Log-ratios of a few nats, so that neither clamp is met; alpha 0.3 is TRL's coefficient
    0.7."""
    small = Data()
    small.reference = small.policy + (small.reference - small.policy) / 20
    ratios = (small.policy - small.reference).sum(1)
    scores = divergence_scores(ratios, ours, 0.3)
    found = losses.sigmoid(scores[:B], scores[B:], 0.3)
    settings = {"beta": 0.3, "f_divergence_type": theirs, "f_alpha_divergence_coef": 0.7}
    expected = [trl_loss(small, [i], "sigmoid", **settings) for i in range(B)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_ld_dpo(data):
    logps = [discounted(data, tokens, 0.4) for tokens in (data.policy, data.reference)]
    ratios = logps[0] - logps[1]
    found = losses.sigmoid(ratios[:B], ratios[B:], 0.3)
    expected = [trl_loss(data, [i], "sigmoid", beta=0.3, ld_alpha=0.4) for i in range(B)]
    assert found.tolist() == pytest.approx(expected, rel=2e-5)


def test_wpo(data):
    scored = data.mask[:, 1:]
    means = ((data.policy - data.collisions) * scored).sum(1) / data.lengths
    weights = means.exp()
    ratios = data.inputs["chosen_logratios"], data.inputs["rejected_logratios"]
    found = losses.sigmoid(*ratios, 0.3) * weights[:B] * weights[B:]
    expected = [trl_loss(data, [i], "sigmoid", beta=0.3, use_weighting=True) for i in range(B)]
    assert found.tolist() == pytest.approx(expected, rel=2e-5)


def test_simpo_and_cpo(data):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        loss_type="simpo",
        beta=2.0,
        simpo_gamma=1.0,
        label_smoothing=0.0,
    )
    inputs = data.inputs
    means = [inputs[f"{side}_logps"] / inputs[f"{side}_lengths"] for side in ("chosen", "rejected")]
    lengths = inputs["chosen_lengths"], inputs["rejected_lengths"]
    logps = inputs["chosen_logps"], inputs["rejected_logps"]
    found = losses.simpo(*logps, *lengths, beta=2.0, gamma_beta_ratio=0.5)
    assert torch.allclose(found, CPOTrainer.cpo_loss(trainer, *means)[0], rtol=1e-5)
    trainer.loss_type, trainer.beta = "sigmoid", 0.1
    found = losses.cpo(*logps, lengths[0], beta=0.1, cpo_alpha=0.0)
    assert torch.allclose(found, CPOTrainer.cpo_loss(trainer, *logps)[0], rtol=1e-5)


def test_orpos_odds_ratio(data):
    from trl.experimental.orpo import ORPOTrainer

    inputs = data.inputs
    means = [inputs[f"{side}_logps"] / inputs[f"{side}_lengths"] for side in ("chosen", "rejected")]
    lengths = inputs["chosen_lengths"], inputs["rejected_lengths"]
    trainer = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device=torch.device("cpu")))
    ratio = ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    found = losses.orpo(
        inputs["chosen_logps"], inputs["rejected_logps"], *lengths, odds_weight=0.25
    )
    assert torch.allclose(found + means[0], -ratio, rtol=1e-4, atol=1e-6)
