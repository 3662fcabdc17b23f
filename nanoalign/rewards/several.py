"""One reward model of several preferences: an output for each, trained on its own labels.

Shapes: B pairs, S responses, K preferences.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from nanoalign.batch import Batch
from nanoalign.encode import Record
from nanoalign.errors import RunError
from nanoalign.formats.records import PKU, complete, from_messages
from nanoalign.losses import pairwise_reward_loss
from nanoalign.metrics import Metric, hits
from nanoalign.reward_model import RewardModel
from nanoalign.rewards.rule import rule_of


class SeveralRewards(RewardModel):
    """A reward model whose rewards are (S, K), an output for each preference."""

    def reward_of(self, outputs: Tensor) -> Tensor:
        return outputs


class Mixed:
    """The sum of the rewards by several preferences, each with its share: Batch -> (S,).

    It has the attributes of the model that it is made of, and takes its place where responses are
    scored.
    """

    def __init__(self, reward_model: SeveralRewards, shares: dict[str, float]):
        """Raises RunError for a preference that the model does not have."""
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
    """The preferences of a reward model, by output; of one output those that a prompt may name."""
    labels = list(model.model.config.id2label.values()) if model.head.out_features > 1 else None
    return rule_of(model).get("preferences", labels or ["better"])


def is_conditioned(model: RewardModel) -> bool:
    """Whether a prompt names the preference by which its responses are scored."""
    return bool(rule_of(model).get("condition"))


# --- records --------------------------------------------------------------------------------------


def formats(preferences: Sequence[str]) -> dict[tuple[str, ...], Callable[[dict], Record]]:
    """The formats, by their keys, of records that have a label for each of these preferences."""
    refuse = partial(has_one_label, preferences=preferences)
    return {PKU: partial(complete, PKU, partial(labelled, preferences=preferences)), (): refuse}


def labelled(record: dict, preferences: Sequence[str]) -> Record:
    """PKU-SafeRLHF: a pair for each preference, with its number in extra["dimensions"].

    The response that is best by the first preference is the first one.
    """
    best = [record.get(f"{name}_response_id") for name in preferences]
    for name, each in zip(preferences, best, strict=True):
        if isinstance(each, bool) or each not in (0, 1):
            raise ValueError(
                f"{name}_response_id is {each!r}; --preference {' '.join(preferences)} needs 0 or 1"
            )
    responses = (record["response_0"], record["response_1"])[:: -1 if best[0] else 1]
    pairs = tuple((int(each != best[0]), int(each == best[0])) for each in best)
    found = Record(record["prompt"], responses, pairs, {"dimensions": list(range(len(best)))})
    return from_messages(found, "response")


def has_one_label(record: dict, preferences: Sequence[str]) -> Record:
    raise ValueError(
        f"a record with the keys {' + '.join(sorted(map(str, record)))} has one label; "
        f"--preference {' '.join(preferences)} needs {' + '.join(PKU)}, with a label for each"
    )


# --- the loss -------------------------------------------------------------------------------------


def loss_of_batch(
    reward_model: RewardModel, args: Namespace, batch: Batch
) -> tuple[Tensor, dict[str, Metric]]:
    """The losses of train_rm.py; a pair takes that of the K rewards which is of its preference."""
    rewards, dimensions = reward_model(batch), batch.extra["dimensions"]  # (S, K), (B,)
    chosen, rejected = rewards[batch.chosen, dimensions], rewards[batch.rejected, dimensions]
    margins = args.margin * batch.extra.get("margins", 1.0)
    losses = pairwise_reward_loss(chosen, rejected, margins, args.label_smoothing)
    losses = losses + args.center_rewards_coefficient * (chosen + rejected) ** 2
    correct = hits(chosen, rejected)
    return losses, {
        "loss": losses,
        "accuracy": correct,
        **{
            f"accuracy/{name}": (correct, dimensions == d) for d, name in enumerate(args.preference)
        },
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "reward_mean": (chosen + rejected) / 2,
        "reward_std": torch.stack([chosen, rejected], dim=1),
    }
