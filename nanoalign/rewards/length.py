"""A reward that does not learn length: a coefficient beside the head learns what length explains.

    minimise  -log sigmoid(r(x, y_w) - r(x, y_l) + c * (|y_w| - |y_l|))

As the product of experts of Shen et al. 2023, arXiv 2310.05199, with one number for the expert of
length. c is trained with the model and left out of the reward, and of what is written.

Shapes: B pairs, S responses.
"""

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanoalign.batch import Batch, Row
from nanoalign.distributed import full, print0
from nanoalign.losses import pairwise_reward_loss
from nanoalign.metrics import Metric, hits
from nanoalign.reward_model import RewardModel

# The coefficient must be near its final value before the model learns length by itself.
LR_SCALE = 400.0


class LengthDebiased(RewardModel):
    """A reward model with a coefficient of length beside its head."""

    METHODS = ("textbook", "with_length")

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype = torch.float32):
        super().__init__(model, dtype)
        self.length = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.length.weight)
        self.unit = 1.0  # tokens by which lengths are divided

    def with_length(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(rewards of the responses, what the coefficient adds for their lengths), (S,) each."""
        lengths = batch.lengths.float()[:, None] / self.unit  # (S, 1)
        return self.reward_of(self.outputs(batch)), self.length(lengths).sum(-1)

    def exact(self) -> tuple[nn.Module, ...]:
        return (*super().exact(), self.length)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        own, groups = self.length.weight, super().parameter_groups(weight_decay)
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not own]
        return [*groups, {"params": [own], "weight_decay": 0.0, "lr_scale": LR_SCALE}]

    def print_length(self) -> None:
        """Prints the learned coefficient: reward per token of length. A collective."""
        per_token = full(self.length.weight).item() / self.unit
        print0(f"{'length':<11} labels prefer a token by {per_token:+.4f}, left out of the reward")


def load(rows: Sequence[Row], *args, **options) -> LengthDebiased:
    """LengthDebiased.load, with the spread of the differences of length as the unit of length."""
    model = LengthDebiased.load(*args, **options)
    model.unit = spread_of_lengths(rows)
    return model


def spread_of_lengths(rows: Sequence[Row]) -> float:
    """The standard deviation of |y_w| - |y_l| over all pairs, in tokens; 1 if it is 0."""
    differences = [
        len(row.responses[w]) - len(row.responses[r]) for row in rows for w, r in row.pairs
    ]
    return float(np.std(differences)) or 1.0


def loss_of_batch(
    reward_model: LengthDebiased, args: Namespace, batch: Batch
) -> tuple[Tensor, dict[str, Metric]]:
    """As that of train_rm.py, with the lengths in the loss and not in the rewards."""
    rewards, lengths = reward_model.with_length(batch)  # (S,) each
    chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]  # (B,)
    longer = lengths[batch.chosen] - lengths[batch.rejected]  # (B,)
    margins = args.margin * batch.extra.get("margins", 1.0)
    losses = pairwise_reward_loss(chosen + longer, rejected, margins, args.label_smoothing)
    losses = losses + args.center_rewards_coefficient * (chosen + rejected) ** 2
    return losses, {
        "loss": losses,
        "accuracy": hits(chosen, rejected),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "reward_mean": (chosen + rejected) / 2,
        "reward_std": torch.stack([chosen, rejected], dim=1),
    }
