"""Self-checks before the first step. Each stops a run that would train something else than it says."""

import math

import torch
from torch import Tensor, nn

from nanoalign.distributed import World, max_over_ranks
from nanoalign.errors import RunError, in_a_line
from nanoalign.rows import Batch, Row, collate

CHECKED_ROWS = 4  # from the shortest to the longest
# Nats a token by which two ways to the same log-probability may differ. In bfloat16 logits have 8 bits.
LAYOUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
SPARE_TOKENS = 5  # added to a response's length: a single token has nothing to average its rounding
START_TOLERANCE = 1e-4  # policy and reference run the same kernels on the same numbers


@torch.no_grad()
def check_layout(
    policy: nn.Module, rows: list[Row], share_prefix: bool, world: World, name: str
) -> None:
    """Compares log-probabilities with those of the model's own forward on separate sequences.

    So a model whose attention can't keep a prompt's responses apart, or whose logits are made in a
    way that Policy does not know, is found before it is trained. All ranks check the same rows;
    `name` is the model's, for the error.
    """
    ordered = sorted(rows, key=len)
    picked = [ordered[i * (len(rows) - 1) // (CHECKED_ROWS - 1)] for i in range(CHECKED_ROWS)]
    worst = 0.0
    for row in picked:
        batch = collate([row], share_prefix).to(world.device)
        parts = [collate([part], share_prefix=False).to(world.device) for part in row.separate()]
        plain = torch.cat([policy.textbook_logps(part) for part in parts])  # (K,)
        if not plain.isfinite().all():
            raise RunError(
                f"self-check: {name} gives log-probabilities of {plain.tolist()} on {row.pair_id}; "
                "are its weights whole?"
            )
        difference = (_fast_logps(policy, batch, name) - plain).abs()
        worst = max(worst, (difference / (batch.lengths + SPARE_TOKENS)).max().item())
    tolerance = LAYOUT_TOLERANCE[policy.compute_dtype]
    if not worst <= tolerance:
        raise RunError(
            f"self-check: {name} gives log-probabilities that are up to {worst:.2g} nats a "
            f"token from those of its own forward on separate sequences, on {picked[-1].pair_id} and "
            f"others (at most {tolerance:g} allowed); {_advice(batch)}"
        )


def _fast_logps(policy: nn.Module, batch: Batch, name: str) -> Tensor:
    """The policy's log-probabilities; an architecture that refuses a mask does so here."""
    try:
        return policy(batch)
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"self-check: {name} fails with {in_a_line(error)}; {_advice(batch)}"
        ) from error


def _advice(batch: Batch) -> str:
    if batch.shared:
        return "this architecture can't share rows: use --no-share_prefix"
    return "this architecture is not supported"


def check_start(losses: Tensor, rewards: Tensor, pairs: int) -> None:
    """With policy == reference every loss is ln 2 and every reward 0, or they are not one function.

    Every rank must call it: they stop together.
    """
    worst = torch.stack([(losses - math.log(2)).abs().max(), rewards.abs().max()])
    loss_off, reward_off = max_over_ranks(worst.double()).tolist()
    if not (loss_off <= START_TOLERANCE and reward_off <= START_TOLERANCE):
        raise RunError(
            "self-check: before the first step, with policy == reference, losses are up to "
            f"{loss_off:.3g} from ln 2 and rewards up to {reward_off:.3g} from 0, on the first {pairs} "
            f"pairs; both must be below {START_TOLERANCE:g}"
        )
