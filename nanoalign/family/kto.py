"""KTO: a loss of single responses, with one estimate of the KL for a whole step.

Ethayarajh et al. 2024, arXiv 2402.01306. A pair is a desirable and an undesirable response; an
unpaired record is one response, with its kind in extra["desirable"].

Shapes: B pairs, or records of one response.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nanoalign.batch import Batch, Row
from nanoalign.distributed import World, sum_over_ranks
from nanoalign.errors import RunError
from nanoalign.family.losses import kto
from nanoalign.family.paired import Paired
from nanoalign.family.pairs import PairLoss, Pairs, PairsOf
from nanoalign.loop import MakeBatches
from nanoalign.metrics import Metric
from nanoalign.model import Policy


class Kto(Paired):
    """The objective of kto. Each step has one more forward of policy and reference, for the KL."""

    def __init__(
        self,
        policy: Policy,
        reference: Callable[[Batch], Tensor],
        max_length: int,
        world: World,
        pairs_of: PairsOf,
        loss: PairLoss,
        beta: float,
    ):
        super().__init__(pairs_of, loss, beta)
        self.policy, self.reference = policy, reference
        self.max_length, self.world = max_length, world
        self.kl = torch.zeros((), device=world.device)
        self.state = {"kl": 0.0}  # of the last step

    @torch.no_grad()
    def before_step(self, rows: Sequence[Row], batches: MakeBatches) -> None:
        """Sets `kl`, (): the mean log-ratio of prompts with responses to other prompts, or 0.

        It is 0 if the mean is negative. Where all rows have one prompt (as in a last step of one
        record), it is the estimate of the step before; in the first step 0. A collective.
        """
        others = mismatched(rows, self.max_length)
        if not others:
            self.kl = torch.tensor(self.state["kl"], device=self.world.device)
            return
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in batches(others):
            logratios = self.policy(batch) - self.reference(batch)  # (S,)
            total += logratios.double().sum() * bool(batch.rows)
        self.kl = (sum_over_ranks(total) / len(rows)).clamp(min=0).float()

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        super().after_step(step, metrics)
        self.state["kl"] = metrics["kl"]

    def pairs(self, batch: Batch) -> Pairs:
        chosen, rejected = present(batch)
        return replace(self.pairs_of(batch), kl=self.kl, has_chosen=chosen, has_rejected=rejected)

    def loss_of_pairs(self, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        losses, metrics = super().loss_of_pairs(batch)
        chosen, rejected = present(batch)
        masks = {"loss": torch.ones_like(chosen), "chosen": chosen, "rejected": rejected}
        pairs = chosen & rejected  # other metrics compare the two responses of a pair
        masked = {k: (value, masks.get(k.split("/")[-1], pairs)) for k, value in metrics.items()}
        return losses, masked | {"kl": self.kl.expand_as(losses)}


def loss_of_responses(pairs: Pairs, **hyperparameters: float) -> Tensor:
    """The mean loss of the responses of each record, two of a pair or one unpaired: (B,)."""
    total = torch.zeros_like(pairs.chosen_logratios)
    for logratios, has, desirable in (
        (pairs.chosen_logratios, pairs.has_chosen, True),
        (pairs.rejected_logratios, pairs.has_rejected, False),
    ):
        kind = torch.full_like(has, desirable)
        total = total + has * kto(logratios, kind, pairs.kl, **hyperparameters)
    return total / (pairs.has_chosen.int() + pairs.has_rejected.int())


def present(batch: Batch) -> tuple[Tensor, Tensor]:
    """Whether each record has a chosen, and a rejected response: (B,) bool each."""
    unpaired = batch.chosen == batch.rejected
    desirable = batch.extra.get("desirable", torch.ones_like(unpaired)).bool()
    return ~unpaired | desirable, ~unpaired | ~desirable


def mismatched(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Returns a row for each row: its prompt with a response to another prompt, without pairs.

    The response is from the next row that has other prompt tokens; after the last row comes the
    first. It is cut, to one token at least, where both have more than max_length tokens. The list
    is empty if all rows have one prompt.
    """
    prompts = [row.prompt for row in rows]
    others = [-1] * len(rows)  # indices of rows
    for i in (*reversed(range(len(rows))),) * 2:  # from the end; again, because rows are a circle
        following = (i + 1) % len(rows)
        same = np.array_equal(prompts[i], prompts[following])
        others[i] = others[following] if same else following
    if -1 in others:
        return []
    result = []
    for i, (row, other) in enumerate(zip(rows, others, strict=True)):
        responses = rows[other].responses
        response = responses[i % len(responses)][: max(1, max_length - len(row.prompt))]
        result.append(replace(row, responses=(response,), pairs=(), extra={}))
    return result


def check_prompts(rows: Sequence[Row], source: str) -> None:
    """Raises RunError if all rows have one prompt: the KL would be 0 in every step."""
    if all(np.array_equal(row.prompt, rows[0].prompt) for row in rows):
        raise RunError(
            f"--data {source}: all {len(rows):,} records have one prompt; --loss kto compares with "
            "responses to other prompts: add records of other prompts"
        )


def check_kinds(rows: Sequence[Row], source: str) -> None:
    """Raises RunError if all responses are desirable, or none: all would move the same way.

    source: the words of --data, for the error.
    """
    kinds = set()
    for row in rows:
        desirable = row.extra.get("desirable", (True,))
        for (chosen, rejected), good in zip(row.pairs, desirable, strict=False):
            kinds |= {True, False} if chosen != rejected else {bool(good)}
        if len(kinds) == 2:
            return
    missing = "undesirable" if kinds == {True} else "desirable"
    raise RunError(
        f"--data {source}: all {len(rows):,} responses have one label, "
        f"{str(True in kinds).lower()}; --loss kto learns from both kinds: add {missing} ones"
    )
