"""TR-DPO: after every few steps the reference moves towards the policy.

    pi_ref <- (1 - mix) * pi_ref + mix * pi

Gorbatovski et al. 2024, arXiv 2404.09656: their soft update, and with mix 1 the hard one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nanoalign.errors import RunError
from nanoalign.model import Policy


@dataclass
class Moving:
    """A reference that moves after training steps.

    Raises RunError if parameters of the reference have other shapes than those of the policy.
    """

    policy: Policy
    reference: Policy
    steps: int  # between two moves
    mix: float  # the share of the way to the policy, in (0, 1], of each move

    def __post_init__(self):
        shapes = [
            {n: p.shape for n, p in m.named_parameters()} for m in (self.policy, self.reference)
        ]
        if shapes[0] != shapes[1]:
            raise RunError(
                "--sync_reference_every moves the reference towards the policy, but the parameters "
                "of --reference have other shapes than those of --model; leave --reference out"
            )

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Changes the reference in place if `step`, the number of steps done, is a multiple."""
        if step % self.steps:
            return
        if isinstance(self.reference, FSDPModule):
            self.reference.reshard()  # else its gathered parameters would be moved
        parameters = zip(self.policy.parameters(), self.reference.parameters(), strict=True)
        for new, old in parameters:
            local(old).lerp_(local(new).to(old.dtype), self.mix)


def local(parameter: Tensor) -> Tensor:
    """The part of a sharded parameter that this rank has; the whole of one that is not sharded."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
