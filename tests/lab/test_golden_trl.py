"""python -m pytest tests/lab/test_golden_trl.py

Golden values against TRL's own losses and gradients, in float64, where trl is installed
(pip install trl==1.16.0 datasets accelerate): the random cases and the extremes.
tests/family/test_trl.py has losses whose conventions differ.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from nanoalign.lab.golden import golden

trl = pytest.importorskip("trl", reason="trl is not installed: golden values are not compared")
ALIKE = ["sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "sppo_hard", "apo_zero",
         "apo_down", "discopop", "sigmoid_norm", "sft"]  # fmt: skip
# TRL takes the logarithms of its label smoothing in float32.
CLOSE = {"exo_pair": 1e-7}


@pytest.fixture(scope="module")
def found() -> dict:
    return golden()["losses"]


def trl_case(name: str, inputs: dict, settings: dict) -> tuple[float, list[float]]:
    """TRL's loss of a golden case, and its gradients by what is chosen and rejected.

    The log-probability of a sequence is spread over as many tokens as it has, or one. The
    reference's are 0, so that a policy's are the log-ratios.
    """
    sums, lengths = [], []
    for side in ("chosen", "rejected"):
        sums.append(inputs.get(f"{side}_logratios", inputs.get(f"{side}_logps", 0.0)))
        lengths.append(int(inputs.get(f"{side}_lengths", 1)))
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])  # (2, T)
    values = torch.tensor(sums, dtype=torch.float64, requires_grad=True)
    tokens = (values / torch.tensor(lengths))[:, None] * mask
    unused = torch.zeros_like(tokens)
    outputs = SimpleNamespace(
        log_probs=tokens, log_sum_sq_probs=unused, entropy=unused, mean_logits=unused,
        is_top1=unused.bool(),
    )  # fmt: skip
    batch = {
        "input_ids": torch.zeros(2, longest + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(2, 1, dtype=torch.long), mask], 1),
        "attention_mask": torch.ones(2, longest + 1, dtype=torch.long),
        "ref_chosen_logps": torch.zeros(1, dtype=torch.float64),
        "ref_rejected_logps": torch.zeros(1, dtype=torch.float64),
    }
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5,
        loss_types=[name], loss_weights=[1.0], beta=settings.get("beta", 0.1),
        label_smoothing=settings.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=settings.get("tau", 0.05)), use_weighting=False,
        _total_train_tokens=0, _metrics=defaultdict(lambda: defaultdict(list)), _tp_size=1,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x,
                                    gather_for_metrics=lambda x: x),
    )  # fmt: skip
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)
    (gradient,) = torch.autograd.grad(loss, values)
    return loss.item(), gradient.tolist()


@pytest.mark.parametrize("name", ALIKE)
def test_golden_values_are_those_of_trl(found, name):
    of = found[name]
    for n, case in enumerate(of["cases"]):
        loss, gradients = trl_case(name, case["inputs"], of["hyperparameters"])
        own = [case["gradients"].get(f"{side}_logratios", case["gradients"].get(f"{side}_logps"))
               for side in ("chosen", "rejected")]  # fmt: skip
        close = {"rel": CLOSE.get(name, 1e-10), "abs": 1e-12}
        assert case["loss"] == pytest.approx(loss, **close), (n, case)
        for ours, theirs in zip(own, gradients, strict=True):
            assert ours is None or ours == pytest.approx(theirs, **close), (n, case)
