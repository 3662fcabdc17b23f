"""One reward model of several preferences: an output for each, trained on its own labels.

Shapes: B pairs, S responses, K preferences.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nanoalign.batch import Batch
from nanoalign.errors import RunError
from nanoalign.metrics import Metric
from nanoalign.model import RewardModel
from nanoalign.rewards.rule import rule_of


class SeveralRewards(RewardModel):
    """A reward model with an output for each preference: its rewards are (S, K)."""

    skips_pads = True  # whether its program reads no reward at the pad token of the config

    def reward_of(self, outputs: Tensor) -> Tensor:
        return outputs


class Mixed:
    """A reward model of one reward: the weighted sum of its rewards by preference, Batch -> (S,).

    An attribute that it does not have is that of the SeveralRewards that it was made of, so it can
    take that one's place where responses are scored.
    """

    def __init__(self, reward_model: SeveralRewards, shares: dict[str, float]):
        """shares: by the name of a preference its weight; of others the weight is 0.

        For a conditioned model they are not used. Raises RunError if the model lacks one of them.
        """
        names = preferences_of(reward_model)
        if unknown := sorted(shares.keys() - set(names)):
            raise RunError(
                f"the reward model has no preference {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(names)}"
            )
        self.reward_model = reward_model
        weights = [shares.get(name, 0.0) for name in names]
        if is_conditioned(reward_model):  # one output, and a prompt names the preference
            weights = [1.0]
        self.shares = torch.tensor(weights)  # (K,)

    def __call__(self, batch: Batch) -> Tensor:
        return self.mixed(self.reward_model(batch))

    def textbook(self, batch: Batch) -> Tensor:
        return self.mixed(self.reward_model.textbook(batch))

    def mixed(self, rewards: Tensor) -> Tensor:
        assert rewards.ndim == 2, "of a SeveralRewards, which has an output for each preference"
        return (rewards * self.shares.to(rewards)).sum(-1)

    def __getattr__(self, name: str) -> object:
        return getattr(self.reward_model, name)


def preferences_of(model: RewardModel) -> list[str]:
    """The names of a reward model's preferences: those of its rule, else the labels of its outputs.

    Of a single output without a rule: ["better"].
    """
    config = model.model.config
    labels = list(config.id2label.values()) if config.num_labels > 1 else None
    return rule_of(model).get("preferences", labels or ["better"])


def is_conditioned(model: RewardModel) -> bool:
    """Whether a prompt names the preference by which its responses are scored."""
    return bool(rule_of(model).get("condition"))


# --- the loss -------------------------------------------------------------------------------------


def loss_of_batch(
    plain: Callable, reward_model: SeveralRewards, args: Namespace, batch: Batch
) -> tuple[Tensor, dict[str, Metric]]:
    """Computes `plain`, the loss_of_batch of train_rm.py, for a model with several outputs.

    A pair compares the rewards of its responses by its own preference. The metrics get an accuracy
    for each preference.
    """
    preferences, dimensions = args.preference, batch.extra["dimensions"]  # (B,)
    # Reward d of response s is at s * K + d in the flat rewards, (S * K,).
    chosen, rejected = (
        responses * len(preferences) + dimensions for responses in (batch.chosen, batch.rejected)
    )
    of_outputs = replace(batch, chosen=chosen, rejected=rejected)
    losses, metrics = plain(lambda _: reward_model(batch).flatten(), args, of_outputs)
    for d, name in enumerate(preferences):
        metrics[f"accuracy/{name}"] = (metrics["accuracy"], dimensions == d)
    return losses, metrics
