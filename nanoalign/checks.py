"""Self-checks before the first step. Each stops a run that would train something else than it says."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanoalign.distributed import World, max_over_ranks
from nanoalign.errors import RunError, in_a_line
from nanoalign.models import RowModel
from nanoalign.rows import Batch, Row, collate, lengths_of

CHECKED_ROWS = 4  # from the shortest to the longest
# By how much two ways to the same score may differ, in units of RowModel.rounding. In bfloat16 logits
# have 8 bits.
LAYOUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
START_TOLERANCE = 1e-4  # policy and reference run the same kernels on the same numbers


@torch.no_grad()
def check_layout(
    model: RowModel, rows: Sequence[Row], share_prefix: bool, world: World, name: str
) -> None:
    """Compares log-probabilities or rewards with those of the model's own forward on separate sequences.

    So a model whose attention can't keep a prompt's responses apart, or whose scores are made in a
    way that Policy or RewardModel does not know, is found before it is trained. All ranks check the
    same rows; `name` is the model's, for the error.
    """
    order = np.argsort(lengths_of(rows), kind="stable")
    places = [i * (len(rows) - 1) // (CHECKED_ROWS - 1) for i in range(CHECKED_ROWS)]
    picked = [rows[order[place]] for place in places]
    batch = collate(picked, share_prefix).to(world.device)
    parts = [collate([part], False).to(world.device) for row in picked for part in row.separate()]
    plain = torch.cat([model.textbook(part) for part in parts])  # (S,)
    if not plain.isfinite().all():
        ids = ", ".join(row.pair_id for row in picked)
        raise RunError(
            f"self-check: {name} gives {model.SCORES} of {plain.tolist()} on {ids}; are its weights whole?"
        )
    difference = (_fast(model, batch, name) - plain).abs()
    worst = (difference / model.rounding(plain, batch)).max().item()
    tolerance = LAYOUT_TOLERANCE[model.compute_dtype]
    if not worst <= tolerance:
        raise RunError(
            f"self-check: {name} gives {model.SCORES} that differ by up to {worst:.2g} {model.UNIT} "
            f"from those of its own forward on separate sequences, on {picked[-1].pair_id} and "
            f"others (at most {tolerance:g} allowed); {_advice(batch)}"
        )


def _fast(model: RowModel, batch: Batch, name: str) -> Tensor:
    """The model's scores; an architecture that can't attend as packed rows must says so here."""
    try:
        return model(batch)
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"self-check: {name} fails with {in_a_line(error)}; {_advice(batch)}"
        ) from error


def _advice(batch: Batch) -> str:
    if batch.tree is not None:
        return "this architecture can't share rows: use --no-share_prefix"
    return "this architecture is not supported"


def check_start(
    losses: Tensor, expected: Tensor, rewards: Tensor, pairs: int, tolerances: tuple[float, float]
) -> None:
    """With policy == reference rewards are 0 and losses (B,) as expected, or they are not one function.

    tolerances: of losses, and of rewards. Every rank must call it: they stop together.
    """
    worst = torch.stack([(losses - expected).abs().max(), rewards.abs().max()])
    loss_off, reward_off = max_over_ranks(worst.double()).tolist()
    if not (loss_off <= tolerances[0] and reward_off <= tolerances[1]):
        raise RunError(
            "self-check: before the first step, with policy == reference, losses are up to "
            f"{loss_off:.3g} from what log-ratios of 0 give ({expected[0]:.4f}) and rewards up to "
            f"{reward_off:.3g} from 0, on the first {pairs} pairs; they must be below "
            f"{tolerances[0]:g} and {tolerances[1]:g}"
        )
