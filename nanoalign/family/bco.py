"""BCO: rewards are compared with their mean over all steps that are done.

Jung et al. 2024, arXiv 2404.04656. Both kinds of responses weigh the same in the mean.
"""

from dataclasses import replace

from nanoalign.batch import Batch
from nanoalign.family.paired import Paired
from nanoalign.family.pairs import PairLoss, Pairs, PairsOf


class Bco(Paired):
    """The objective of bco_pair, with a running mean of the rewards that checkpoints keep."""

    def __init__(self, pairs_of: PairsOf, loss: PairLoss, beta: float):
        super().__init__(pairs_of, loss, beta)
        self.state = {"steps": 0.0, "mean_reward": 0.0}

    def pairs(self, batch: Batch) -> Pairs:
        return replace(self.pairs_of(batch), shift=self.state["mean_reward"])

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        steps, mean = self.state["steps"], self.state["mean_reward"]
        reward = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        self.state = {"steps": steps + 1, "mean_reward": mean + (reward - mean) / (steps + 1)}
