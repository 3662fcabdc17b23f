"""What the loop asks of a loss."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from nanoalign.metrics import Reported
from nanoalign.rows import Batch, Row

# A batch's losses (B,), which are minimised, and what is reported of it by name, as Means.add takes it.
LossOfBatch = Callable[[Batch], tuple[Tensor, dict[str, Reported]]]
# Rows -> this rank's batches of them, each with which of the rows it holds.
Batches = Callable[[list[Row]], Iterator[tuple[list[int], Batch]]]


class Objective:
    """What is minimised: the loss of a batch, where that is all; a subclass may look at more.

    numbers and saved are what a checkpoint keeps beside model and optimizer.
    """

    numbers: dict[str, float] = {}
    saved: nn.Module | None = None

    def __init__(self, loss_of_batch: LossOfBatch):
        self.loss_of_batch = loss_of_batch

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Reported]]:
        return self.loss_of_batch(batch)

    def survey(self, rows: list[Row], batches: Batches) -> None:
        """Before the batches of a step, or of an evaluation: what they must know of all its rows."""

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        """After an optimizer step, of which `step` are done now."""
