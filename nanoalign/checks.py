"""Self-checks before the first step. Each stops a run that would train something else than it says."""

import math

import torch
from torch import Tensor, nn

from nanoalign.distributed import World, sum_over_ranks
from nanoalign.errors import RunError
from nanoalign.rows import Batch, Row, collate

CHECKED_ROWS = 4  # from the shortest to the longest
# Nats a token by which two ways to the same log-probability may differ. In bfloat16 logits have 8
# bits.
LAYOUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
START_TOLERANCE = 1e-4  # policy and reference run the same kernels on the same numbers


@torch.no_grad()
def check_layout(policy: nn.Module, rows: list[Row], share_prefix: bool, world: World) -> None:
    """Compares the policy's log-probabilities with those of the model's own forward on separate sequences.

    So a model whose attention can't keep a prompt's responses apart, or whose logits are made in a
    way that Policy does not know, is found before it is trained. All ranks check the same rows.
    """
    ordered = sorted(rows, key=len)
    tolerance = LAYOUT_TOLERANCE[policy.compute_dtype]
    for i in range(CHECKED_ROWS):
        row = ordered[i * (len(ordered) - 1) // max(1, CHECKED_ROWS - 1)]
        batch = collate([row], share_prefix).to(world.device)
        fast = policy(batch)  # (K,)
        parts = [collate([part], share_prefix=False).to(world.device) for part in row.separate()]
        plain = torch.cat([policy.textbook_logps(part) for part in parts])  # (K,)
        difference = ((fast - plain).abs() / batch.lengths).max().item()
        if not difference <= tolerance:
            layout = "a row shared by the responses" if share_prefix else "rows of one response"
            advice = (
                "this architecture can't share rows: use --no-share_prefix"
                if share_prefix
                else "this architecture is not supported"
            )
            raise RunError(
                f"self-check: on {row.pair_id} {layout} gives log-probabilities {fast.tolist()}, "
                f"the model's own forward {plain.tolist()} ({difference:.2g} nats a token apart, at "
                f"most {tolerance:g} allowed); " + advice
            )


def check_start(losses: Tensor, rewards: Tensor, batch: Batch) -> None:
    """With policy == reference every loss is ln 2 and every reward 0, or they are not one function.

    Every rank must call it: they stop together.
    """
    worst = torch.stack([(losses - math.log(2)).abs().max(), rewards.abs().max()])
    failed = sum_over_ranks((~(worst <= START_TOLERANCE)).any().double()).item()
    if failed:
        raise RunError(
            "self-check: before the first step, with policy == reference, losses are up to "
            f"{worst[0].item():.3g} from ln 2 and rewards up to {worst[1].item():.3g} from 0, on "
            f"{len(batch.weights)} pairs; both must be below {START_TOLERANCE:g}"
        )
