"""When the parameters of sharded blocks are gathered, and in which memory; when copies are better.

FSDP2 by itself starts to gather a block in the forward pass when the host reaches that block. Where
the host is not far ahead of the GPU, the GPU then waits for the network. Here the next block is
gathered from when a block has its parameters, before the operations of this block are queued.
"""

import os
from argparse import Namespace
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nanoalign.distributed import World, environment_ranks
from nanoalign.model import Fill, Read, Scorer

# Parameters from which a copy on each GPU is not advised, and bytes that one takes. Each trained
# one: float32 of itself, of its gradient and of AdamW's two means. Each of all: bfloat16 of itself
# and of the reference's.
MOST_PARAMETERS, OF_TRAINED, OF_ALL = 3e9, 16, 4
SHARE = 0.5  # of a GPU's memory that these bytes may take; activations and logits need the rest


def reading(read: Read, args: Namespace) -> Read:
    """The `read` of Policy.load and RewardModel.load, for a model that is sharded in training."""

    def read_and_set(*about: object) -> tuple[nn.Module, Fill]:
        model, fill = read(*about)

        def fill_and_set(module: Scorer, device: torch.device) -> None:
            fill(module, device)
            if isinstance(module, FSDPModule):
                prefetch(module)
                if args.symmetric_memory:
                    use_symmetric_memory(module)

        return model, fill_and_set

    return read_and_set


def prefetch(model: Scorer) -> None:
    """Lets a sharded model gather one block ahead in the forward pass; results do not change.

    In the backward pass FSDP2 does so by itself. Two blocks ahead would take more memory.
    """
    # The model itself gathers embedding, last norm and head.
    for part, following in pairwise([model, *model.blocks()]):
        part.set_modules_to_forward_prefetch([following])


def use_symmetric_memory(model: nn.Module) -> None:
    """Lets NCCL gather the parameters of a sharded model into symmetric memory. A collective."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_symm_mem_for_comm()


def refusal(args: Namespace) -> str | None:
    """Returns why --symmetric_memory is refused, or None."""
    if not args.symmetric_memory:
        return None
    if not hasattr(FSDPModule, "set_symm_mem_for_comm"):
        return f"--symmetric_memory needs torch 2.13; this is torch {torch.__version__}"
    if not torch.cuda.is_available():
        return "--symmetric_memory is of NVIDIA's GPUs, and this host has none; leave it out"
    _, ranks, _ = environment_ranks()
    if 1 in (ranks, args.shard_size):
        return "--symmetric_memory: one rank, or --shard_size 1, gathers nothing; leave it out"
    return None


def advice(model: Scorer, world: World, args: Namespace) -> str | None:
    """Returns the line that advises a copy on each GPU of one host, where a copy fits, or None."""
    of_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world.device.type != "cuda" or not 1 < world.size == of_host or args.shard_size:
        return None
    parameters, trained = model.count_parameters(), model.count_parameters(trainable=True)
    memory = torch.cuda.get_device_properties(world.device).total_memory
    needed = OF_TRAINED * trained + OF_ALL * parameters
    if parameters >= MOST_PARAMETERS or needed > SHARE * memory:
        return None
    return (
        f"--shard_size 1 should be faster: a copy on each GPU takes {needed / 1e9:.0f} of "
        f"{memory / 1e9:.0f} GB, and then no parameters are sent"
    )
