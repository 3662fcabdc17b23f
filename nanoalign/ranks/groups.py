"""Groups of ranks that each have a copy of the parameters (HSDP), and sums of gradients.

docs/hosts.md says how many ranks are started, on one host or several.
"""

import argparse
import ctypes
import logging
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

import nanoalign
from nanoalign import distributed
from nanoalign.batch import Batch, Row
from nanoalign.distributed import World, environment_ranks
from nanoalign.files.text import printable, printable_output
from nanoalign.flags import number
from nanoalign.loop import Batcher
from nanoalign.ranks import gathers
from nanoalign.ranks.collectives import check_equal

# Flags that may differ between hosts: paths of equal copies, and a date at midnight.
OF_HOST = ("model", "reference", "policy", "baseline", "reward", "data", "eval_data", "cache",
           "template_date")  # fmt: skip
VERSIONS = {f"the version of {m.__name__}": m.__version__ for m in (nanoalign, torch, transformers)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("many ranks").add_argument
    text = (
        "number of ranks among which one copy of parameters, gradients and optimizer state is "
        "divided, usually the GPUs of a host; default: all ranks"
    )
    add("--shard_size", type=number(int, 1), metavar="RANKS", help=text)
    text = (
        "when the ranks that share one copy sum their gradients: after every micro-batch, or once "
        "per step (less communication, but each rank holds all gradients in float32)"
    )
    add("--gradient_sync", choices=("micro_batch", "step"), default="micro_batch", help=text)
    text = (
        "gather parameters of other GPUs into NCCL's symmetric memory, which may be faster (torch "
        "2.13); with NCCL_CTA_POLICY=2 in the environment, copy engines do it inside a host"
    )
    add("--symmetric_memory", action="store_true", help=text)
    text = (
        "the run ends if a rank waits this long for another one; must be more than rank 0 takes to "
        "read or write a model"
    )
    seconds = number(float, above=0, below=1e9)
    add("--timeout", type=seconds, default=600.0, metavar="SECONDS", help=text)
    parser.refusals += [refusal, gathers.refusal]


def refusal(args: Namespace) -> str | None:
    """Returns why --shard_size is refused, or None."""
    _, ranks, _ = environment_ranks()
    if args.shard_size and ranks % args.shard_size:
        return (
            f"--shard_size {args.shard_size} does not divide the {ranks} ranks of this run into "
            "equal groups; give a divisor of their number"
        )
    return None


def setup(args: Namespace) -> World:
    """Joins the process group and returns the World of a script.

    With --shard_size, so many ranks share a copy of the parameters. Under torchrun the process ends
    when torchrun does. Standard output can write any text from then on. Raises RunError if ranks
    have other flags, or other versions of a package.
    """
    printable_output()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(printable)  # what it prints of a config may have escape sequences
    if distributed.environment_ranks()[1] > 1:
        end_with_parent()
    is_training = hasattr(args, "shard_size")  # else evaluate.py
    timeout = args.timeout if is_training else 1800.0
    world = distributed.setup(timeout, meet(timeout))
    flags = {f"--{name}": value for name, value in vars(args).items() if name not in OF_HOST}
    check_equal(VERSIONS | flags, "Start every rank with the same flags and packages", world)
    if is_training and args.shard_size:
        world = divide(world, args.shard_size, args.timeout)
    return world


def meet(timeout: float) -> dist.Store | None:
    """Returns a store that these ranks alone have; None for one process. A collective.

    torchrun keeps one store for all attempts of a job (--max-restarts). In it ranks would find the
    addresses of the ranks before them, which have ended. So each attempt uses names of its own,
    which rank 0 draws. Another rank asks for them under a name that it draws itself: only the rank
    0 of its own attempt can answer that. torchrun's count of restarts would not do, because hosts
    count differently.
    timeout: of the wait for other ranks, in seconds. Raises DistStoreError after it.
    """
    rank, size, _ = environment_ranks()
    if size == 1:
        return None
    store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    name = uuid4().hex
    if rank > 0:
        store.set(f"nanoalign/asks/{rank}", name)
        name = store.get(f"nanoalign/answer/{name}").decode()
        store.set(f"{name}/{rank}", "has met rank 0")
        return dist.PrefixStore(name, store)
    deadline, away = time.monotonic() + timeout, range(1, size)
    while away := [other for other in away if not store.check([f"{name}/{other}"])]:
        for other in away:
            if store.check([f"nanoalign/asks/{other}"]):
                asked = store.get(f"nanoalign/asks/{other}").decode()
                store.set(f"nanoalign/answer/{asked}", name)
        time.sleep(0.02)
        if time.monotonic() > deadline:
            store.wait([f"{name}/{other}" for other in away], timedelta(seconds=1))  # raises
    return dist.PrefixStore(name, store)


def divide(world: World, shard_size: int, timeout: float) -> World:
    """Returns the World with a mesh of (groups, shard_size), each with a copy of the parameters.

    If all ranks are one group, it is returned unchanged. A collective.
    shard_size: ranks of a group, a divisor of world.size.
    timeout: seconds that a rank waits for another one in a collective of the mesh.
    """
    assert world.size % shard_size == 0, f"{world.size} ranks in groups of {shard_size}"
    if shard_size == world.size:
        return world
    ranks = torch.arange(world.size).view(-1, shard_size)
    # init_device_mesh would give these process groups torch's own timeout.
    replicate, shard = (
        dist.new_subgroups_by_enumeration(lines.tolist(), timeout=timedelta(seconds=timeout))[0]
        for lines in (ranks.T, ranks)
    )
    mesh = DeviceMesh.from_group(
        [replicate, shard], world.device.type, mesh=ranks, mesh_dim_names=("replicate", "shard")
    )
    return replace(world, mesh=mesh)


class SyncedBatcher:
    """A Batcher that sets in a model, before each batch of a step, whether ranks sum gradients.

    The groups sum theirs in the last batch of a step. gradient_sync: when the ranks inside a group
    sum theirs: "micro_batch", in each batch; "step", in the last one, until which each rank keeps
    gradients in float32.
    """

    def __init__(self, batcher: Batcher, model: FSDPModule, gradient_sync: str):
        self.batcher, self.model, self.gradient_sync = batcher, model, gradient_sync

    def __getattr__(self, name: str) -> object:
        return getattr(self.batcher, name)

    def step(self, rows: Sequence[Row]) -> Iterator[Batch]:
        return self.synced(self.batcher.step(rows))  # whose first batch is made at once

    def synced(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        batch = next(batches)
        for following in batches:
            self.set_sync(last=False)
            yield batch
            batch = following
        self.set_sync(last=True)
        yield batch

    def set_sync(self, last: bool) -> None:
        self.model.set_requires_gradient_sync(last or self.gradient_sync == "micro_batch")
        self.model.set_requires_all_reduce(last)


def synced(batcher: Batcher, model: nn.Module, args: Namespace) -> Batcher | SyncedBatcher:
    """Returns the batcher, as a SyncedBatcher if --shard_size or --gradient_sync needs one."""
    if batcher.world.size > 1 and (args.shard_size or args.gradient_sync == "step"):
        return SyncedBatcher(batcher, model, args.gradient_sync)
    return batcher


PR_SET_PDEATHSIG = 1  # of prctl(2), Linux


def end_with_parent() -> None:
    """Under torchrun, on Linux: the kernel sends this process SIGTERM when torchrun ends.

    A training run then writes a checkpoint.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
