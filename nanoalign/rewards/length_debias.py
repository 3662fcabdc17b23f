"""A reward model that does not learn length, because a coefficient learns what length explains.

    minimise  -log sigmoid(r(x, y_w) - r(x, y_l) + c * (|y_w| - |y_l|))

The product of experts of Shen et al. 2023, arXiv 2310.05199, where the expert of length is the one
number c. It is trained with the model; rewards and the saved model do not have it.

Shapes: B pairs, S responses.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from nanoalign.batch import Batch, Row
from nanoalign.distributed import full, print0
from nanoalign.metrics import Metric
from nanoalign.model import RewardModel

LR_SCALE = 400.0  # the coefficient must be near its final value before the model learns length


class LengthDebiased(RewardModel):
    """A reward model with a coefficient of length beside its head."""

    METHODS = ("textbook", "lead")

    def __init__(self, model: "transformers.PreTrainedModel", dtype: torch.dtype = torch.float32):
        super().__init__(model, dtype)
        self.length = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.length.weight)
        self.unit = 1.0  # lengths are divided by so many tokens

    def lead(self, batch: Batch) -> Tensor:
        """c times the difference of lengths, chosen minus rejected, of each pair: (B,)."""
        lengths = self.length(batch.lengths.float()[:, None] / self.unit).sum(-1)  # (S,)
        return lengths[batch.chosen] - lengths[batch.rejected]

    def exact(self) -> tuple[nn.Module, ...]:
        return (*super().exact(), self.length)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        coefficient = self.length.weight
        groups = super().parameter_groups(weight_decay)
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not coefficient]
        return [*groups, {"params": [coefficient], "weight_decay": 0.0, "lr_scale": LR_SCALE}]

    def print_length(self) -> None:
        """Prints the coefficient as reward per token. A collective."""
        per_token = full(self.length.weight).item() / self.unit
        print0(f"{'length':<11} labels prefer a token by {per_token:+.4f}, left out of the reward")


def load(rows: Sequence[Row], *args, **options) -> LengthDebiased:
    """Returns LengthDebiased.load(*args, **options) with its unit.

    This is the standard deviation of |y_w| - |y_l| over all pairs of the rows, or 1 if that is 0.
    """
    model = LengthDebiased.load(*args, **options)
    pairs = [(row.responses[w], row.responses[k]) for row in rows for w, k in row.pairs]
    model.unit = float(np.std([len(w) - len(k) for w, k in pairs])) or 1.0
    return model


def loss_of_batch(
    plain: Callable, reward_model: LengthDebiased, args: Namespace, batch: Batch
) -> tuple[Tensor, dict[str, Metric]]:
    """Computes `plain`, the loss_of_batch of train_rm.py, with lengths in the loss.

    The metrics of rewards are those without lengths.
    """
    return plain(reward_model, args, batch, lead=reward_model.lead(batch))
