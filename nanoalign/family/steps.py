"""Objectives of losses that depend on the whole step (AOT) or on the steps before (BCO).

AOT (Melnyk et al. 2024, arXiv 2406.05882) compares each gap of the policy with the gap of the
reference that has the same place in sorted order. All pairs of a step are sorted together, whatever
the micro-batches and processes. KTO has a file of its own.

Shapes: B pairs of a batch, P pairs of a step.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nanoalign.batch import Batch, Row
from nanoalign.distributed import World
from nanoalign.family.losses import match_by_rank
from nanoalign.family.paired import Paired
from nanoalign.family.pairs import PairLoss, Pairs, PairsOf
from nanoalign.loop import MakeBatches
from nanoalign.ranks.collectives import gather


class Aot(Paired):
    """The objective of aot. Each step costs one more forward of policy and reference."""

    def __init__(self, world: World, pairs_of: PairsOf, loss: PairLoss, beta: float):
        super().__init__(pairs_of, loss, beta)
        self.world = world
        self.rows = np.zeros(0, dtype=np.int64)  # (P,) the row of each pair, in ascending order
        self.matched = torch.zeros(0)  # (P,) its matched gap

    @torch.no_grad()
    def before_step(self, rows: Sequence[Row], batches: MakeBatches) -> None:
        """Sets `rows` and `matched`, by the gaps of all pairs of a step. A collective.

        A gap is log pi(y_w | x) - log pi(y_l | x), of the policy or of the reference.
        """
        # of this process: the row of each pair, and the gaps of policy and reference
        owners, gaps = [], [torch.zeros(2, 0)]
        for batch in batches(rows):
            pairs = self.pairs_of(batch)
            if batch.rows:  # a filler batch has none
                owners += [i for i in batch.rows for _ in rows[i].pairs]
                policy_gaps = pairs.chosen_logps - pairs.rejected_logps
                gaps.append(torch.stack([policy_gaps, pairs.reference_gaps]).cpu())
        parts = gather((np.array(owners, dtype=np.int64), torch.cat(gaps, dim=1)), self.world)
        owners = np.concatenate([part[0] for part in parts])
        order = np.argsort(owners, kind="stable")
        self.rows = owners[order]
        self.matched = match_by_rank(*torch.cat([part[1] for part in parts], dim=1)[:, order])

    def pairs(self, batch: Batch) -> Pairs:
        return replace(self.pairs_of(batch), matched_gaps=self.matched_of(batch))

    def matched_of(self, batch: Batch) -> Tensor:
        """The matched gaps of the pairs of a batch, (B,); of a filler batch, zeros."""
        if not batch.rows:
            return torch.zeros(len(batch.chosen), device=batch.chosen.device)
        first = np.searchsorted(self.rows, batch.rows, side="left")
        last = np.searchsorted(self.rows, batch.rows, side="right")
        places = np.concatenate([np.arange(*ends) for ends in zip(first, last, strict=True)])
        return self.matched[places].to(batch.chosen.device)


class Bco(Paired):
    """The objective of bco_pair. A checkpoint keeps the running mean of the rewards."""

    def __init__(self, pairs_of: PairsOf, loss: PairLoss, beta: float):
        super().__init__(pairs_of, loss, beta)
        self.state = {"steps": 0.0, "mean_reward": 0.0}

    def pairs(self, batch: Batch) -> Pairs:
        return replace(self.pairs_of(batch), shift=self.state["mean_reward"])

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        super().after_step(step, metrics)
        steps, mean = self.state["steps"], self.state["mean_reward"]
        reward = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        self.state |= {"steps": steps + 1, "mean_reward": mean + (reward - mean) / (steps + 1)}
