"""One path for 1..N processes: process group, sharding (FSDP2), autocast, exact sums, rank-0 output.

`python train_dpo.py` is a world of one rank, `torchrun --nproc_per_node N` one of N; both run the
same code. Parameters are sharded by `fully_shard` in either case: with one rank a shard is the
whole parameter.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nanoalign.errors import RunError

T = TypeVar("T")

_SPEAKS_WITHIN = 10.0  # seconds that the other ranks give rank 0 to report an error


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of a run."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup() -> World:
    """Joins the process group that torchrun describes; without torchrun, a group of one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RunError(
                f"--nproc_per_node asks for rank {local_rank} on this host, which has "
                f"{torch.cuda.device_count()} GPUs; give no more ranks than GPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        # torchrun gives each process one thread, whatever the machine has: share its cores instead.
        if "LOCAL_WORLD_SIZE" in os.environ and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    if not dist.is_initialized():
        # A group of one needs no address: its store lives in this process.
        store = None if size > 1 else dist.HashStore()
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=30)
        )
    return World(rank, size, device, init_device_mesh(device.type, (size,)))


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    compute_dtype: torch.dtype,
    trainable: bool = True,
    exact: Iterable[nn.Module] = (),
) -> None:
    """Shards every block, then what remains (embedding, last norm, head), over all ranks, in place.

    exact: parts whose parameters are gathered as they are, in float32.

    A block's parameters are gathered in compute_dtype just before it runs and freed after it;
    gradients are reduced in float32, and averaged over ranks. What remains stays gathered between
    a forward and its backward pass, which needs it at once.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    for part in exact:
        fully_shard(part, mesh=world.mesh, mp_policy=MixedPrecisionPolicy())
    fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=not trainable)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in dtype; what needs float32 (norms, softmax) stays in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place. Every rank must call it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    """The elementwise maximum of a tensor over all ranks, in place. Every rank must call it."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_lists(values: list, world: World) -> list[list]:
    """Every rank's list, on every rank. Every rank must call it."""
    everyones: list[list] = [values] * world.size
    if world.size > 1:
        dist.all_gather_object(everyones, values)
    return everyones


def full(value: Tensor) -> Tensor:
    """The whole of a sharded tensor. Every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a sharded parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def on_main(world: World, function: Callable[[], T]) -> T | None:
    """Runs a function on rank 0 alone and returns its result there, None elsewhere.

    A RunError or OSError that it raises becomes a RunError on every rank, so that none waits in
    vain.
    """
    result, problem = None, [None]
    if world.is_main:
        try:
            result = function()
        except (RunError, OSError) as error:
            problem = [str(error)]
    if world.size > 1:
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise RunError(problem[0])
    return result


def on_all(world: World, function: Callable[[], T]) -> list[T]:
    """Runs a function on every rank and returns all results, by rank, on every rank.

    A RunError or OSError of any rank becomes a RunError on every rank, so that none waits in vain.
    """
    result, problem = None, None
    try:
        result = function()
    except (RunError, OSError) as error:
        problem = str(error)
    everyones = [rank for (rank,) in gather_lists([(result, problem)], world)]
    for _, problem in everyones:
        if problem is not None:
            raise RunError(problem)
    return [result for result, _ in everyones]


def print0(*args, **kwargs) -> None:
    """print on rank 0 alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*args, **kwargs, flush=True)


def breakpoint0() -> None:
    """A debugger on rank 0, while the other ranks wait: `nanoalign.distributed.breakpoint0()`."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        breakpoint()
    if dist.is_initialized():
        dist.barrier()


def run(main: Callable[[], None]) -> None:
    """Runs a script's main; a RunError or OSError becomes one line on standard error and exit code 1.

    All ranks find most errors together, each on its own. Rank 0 speaks for them, and the others
    wait until it has: when one worker exits, torchrun ends the rest at once. An error that only one
    rank sees is printed by that rank.
    """
    try:
        main()
    except (RunError, OSError) as error:
        _say_once(f"error: {error}")
        sys.stdout.flush()
        # Not sys.exit, which would wait for collectives that a stopped rank never joins.
        os._exit(1)
    except RuntimeError:
        # A collective fails when another rank has ended: the error that rank has said is the cause.
        if dist.is_initialized() and dist.get_world_size() > 1 and _said(_store()):
            os._exit(1)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _say_once(message: str) -> None:
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    store = None if alone else _store()
    if not alone and dist.get_rank() != 0 and _said(store):
        return
    print(message, file=sys.stderr, flush=True)
    if not alone:
        store.set("nanoalign/error", "said")


def _store() -> dist.Store:
    """The key-value store through which the ranks found each other."""
    return dist.distributed_c10d._get_default_store()


def _said(store: dist.Store) -> bool:
    """Whether rank 0 has reported an error, or does so within its time."""
    deadline = time.monotonic() + _SPEAKS_WITHIN
    while time.monotonic() < deadline:
        try:
            if store.check(["nanoalign/error"]):
                return True
        except dist.DistNetworkError:  # rank 0 kept the store: it has spoken and ended
            return True
        time.sleep(0.05)
    return False
