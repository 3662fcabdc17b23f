"""TR-DPO: after every few steps the reference moves towards the policy.

    pi_ref <- (1 - mix) * pi_ref + mix * pi

Gorbatovski et al. 2024, arXiv 2404.09656: their soft update, and with mix 1 the hard one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nanoalign.batch import Batch, Row
from nanoalign.errors import RunError
from nanoalign.loop import MakeBatches, Objective
from nanoalign.model import Policy


class Moving(Objective):
    """Wraps an objective whose reference moves by the share `mix` after every `steps` steps."""

    def __init__(
        self, objective: Objective, policy: Policy, reference: Policy, steps: int, mix: float
    ):
        """Raises RunError if parameters of the reference have other shapes than the policy's."""
        shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (policy, reference)]
        if shapes[0] != shapes[1]:
            raise RunError(
                "--sync_reference_every moves the reference towards the policy, but --reference is "
                "of another shape than --model"
            )
        self.objective, self.policy, self.reference = objective, policy, reference
        self.steps, self.mix = steps, mix
        self.modules = {"reference": reference}

    @property
    def state(self) -> dict[str, float]:
        return self.objective.state

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        self.objective.state = state

    def __call__(self, batch: Batch) -> tuple[Tensor, dict]:
        return self.objective(batch)

    def losses_at_start(self, batch: Batch) -> Tensor | float:
        return self.objective.losses_at_start(batch)

    def before_step(self, rows: Sequence[Row], batches: MakeBatches) -> None:
        self.objective.before_step(rows, batches)

    @torch.no_grad()
    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        self.objective.after_step(step, metrics)
        if step % self.steps:
            return
        if isinstance(self.reference, FSDPModule):
            self.reference.reshard()  # else its gathered parameters would be moved
        parameters = zip(self.policy.parameters(), self.reference.parameters(), strict=True)
        for new, old in parameters:
            local(old).lerp_(local(new).to(old.dtype), self.mix)


def local(parameter: Tensor) -> Tensor:
    """The part of a sharded parameter that this rank has."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
