"""--precision fp16: the loss is multiplied by a scale before gradients are computed.

float16 has no number between 0 and 6e-8, so small gradients of activations would become 0, and
none above 65,504. Multiplied by a power of two they keep all their bits, and gradients of
parameters, which are float32, are divided by it again before the loop clips them. Micikevicius et
al. 2018, arXiv 1710.03740.

A scale is too large if a gradient becomes infinite or NaN. torch.amp.GradScaler then skips the
step. Here all micro-batches of the step are computed again with half the scale, on all ranks, so
that the curve has every step. A gradient that is not finite with a scale of 1 is an error of the
loop.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nanoalign.batch import Batch, Row
from nanoalign.distributed import full
from nanoalign.loop import Batcher, Objective

FIRST = 2.0**16  # the scale at the start
GROWTH = 2000  # the scale is doubled at each step whose number is a multiple of this
STATE = "loss_scale"  # in Objective.state, which checkpoints keep, and in the metrics of a step


class ScaledBatcher:
    """A Batcher that multiplies the weights of a step's batches, and so the loss, by the scale.

    Means of metrics, which are weighted in the same way, do not change. When the loop asks for the
    batch after the last one, all gradients of the step are there: they are divided by the scale,
    or dropped, and all batches come again.
    """

    def __init__(self, batcher: Batcher, model: nn.Module, objective: Objective):
        self.batcher, self.model, self.objective = batcher, model, objective
        self.own_after_step = objective.after_step
        objective.after_step = self.after_step
        objective.state[STATE] = FIRST

    def __getattr__(self, name: str) -> object:
        return getattr(self.batcher, name)

    @property
    def tokens(self) -> int:
        return self.batcher.tokens

    @tokens.setter
    def tokens(self, tokens: int) -> None:  # by packing/fitting.py
        self.batcher.tokens = tokens

    def step(self, rows: Sequence[Row]) -> Iterator[Batch]:
        return self.until_finite(rows, self.batcher.step(rows))  # which makes its first batch now

    def until_finite(self, rows: Sequence[Row], batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            for batch in batches:
                batch.weights = batch.weights * self.objective.state[STATE]
                yield batch
            if self.unscale():
                return
            batches = self.batcher.step(rows)

    @torch.no_grad()
    def unscale(self) -> bool:
        """Divides the gradients by the scale. If one is not finite, drops them, and halves it.

        At a scale of 1 gradients that are not finite are kept, for the loop to raise its error.
        Returns whether the gradients are left. A collective.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        is_finite = math.isfinite(full(nn.utils.get_total_norm(gradients)).item())
        scale = self.objective.state[STATE]
        if is_finite or scale <= 1:
            for gradient in gradients:
                gradient /= scale
            return True
        self.model.zero_grad()
        self.objective.state[STATE] = scale / 2
        return False

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        self.own_after_step(step, metrics)
        metrics[STATE] = self.objective.state[STATE]
        if step % GROWTH == 0:
            self.objective.state[STATE] *= 2


def scaled(batcher: Batcher, model: nn.Module, objective: Objective) -> Batcher | ScaledBatcher:
    """Returns the batcher, as a ScaledBatcher if products of the model are in float16."""
    return ScaledBatcher(batcher, model, objective) if model.dtype == torch.float16 else batcher
