"""One path for 1..N processes: process group, sharding (FSDP2), autocast, exact sums, rank-0 output.

`python train_dpo.py` is a world of one rank, `torchrun --nproc_per_node N` one of N, on one host or
several; all run the same code. Parameters are sharded by `fully_shard` in any case: with one rank a
shard is the whole parameter.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nanoalign.errors import RunError, in_a_line

T = TypeVar("T")

TIMEOUT = 600.0  # seconds that a rank waits for the others in training
PATIENCE = (
    1800.0  # in evaluation, where ranks may be busy apart for long: each samples its own prompts
)
_SPEAKS_WITHIN = 10.0  # seconds that the other ranks give rank 0 to report an error
_ANSWERS_WITHIN = 2.0  # seconds in which the store says whether an error has been reported
_TURN = 0.5  # seconds between the ranks of a host that would say the same
# How gloo, nccl and the store say that another process is gone, among all that a RuntimeError says.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out|remote ?(process|error)"
    r"|no route to host|network is unreachable|communicator was aborted",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of a run.

    mesh: (size,) where all ranks share one copy of the parameters, else (groups, ranks of a group),
        of which each group holds a copy; its last dimension is the one that parameters are cut over.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _place() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this host), as torchrun gives them."""
    read = os.environ.get
    return int(read("RANK", 0)), int(read("WORLD_SIZE", 1)), int(read("LOCAL_RANK", 0))


def setup(shard_size: int | None = None, timeout: float = PATIENCE) -> World:
    """Joins the process group that torchrun describes; without torchrun, a group of one.

    shard_size: ranks that share one copy of the parameters; None: all.
    timeout: seconds after which a rank that waits for another gives up.

    Raises RunError where there are fewer GPUs than ranks, or shard_size does not divide the ranks.
    """
    rank, size, local_rank = _place()
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
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
    return World(rank, size, device, _make_mesh(device, size, shard_size or size, timeout))


def _make_mesh(device: torch.device, size: int, shard_size: int, timeout: float) -> DeviceMesh:
    if size % shard_size:
        raise RunError(
            f"--shard_size {shard_size} does not divide the {size} ranks of this run into equal groups"
        )
    if shard_size == size:
        return init_device_mesh(device.type, (size,))
    ranks = torch.arange(size).view(-1, shard_size)
    # Not init_device_mesh: its groups of a part of the ranks would wait as long as torch likes.
    replicate, shard = (
        dist.new_subgroups_by_enumeration(lines.tolist(), timeout=timedelta(seconds=timeout))[0]
        for lines in (ranks.T, ranks)
    )
    return DeviceMesh.from_group(
        [replicate, shard], device.type, mesh=ranks, mesh_dim_names=("replicate", "shard")
    )


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    compute_dtype: torch.dtype,
    trainable: bool = True,
    exact: Iterable[nn.Module] = (),
) -> None:
    """Shards every block, then what remains (embedding, last norm, head), over the mesh, in place.

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


def synchronise_gradients(module: FSDPModule, last: bool, each: bool) -> None:
    """Says what the next backward pass of a sharded module does with its gradients.

    last: whether it is the step's last. Only then groups of ranks exchange their sums.
    each: whether gradients are summed over a group and cut in every backward pass; otherwise each
        rank keeps them whole, in float32, until the last.
    """
    module.set_requires_gradient_sync(last or each)
    module.set_requires_all_reduce(last)


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

    A collective that failed since another rank has ended, or did not answer in time, is one line
    from one rank of each host, and exit code 1; any other exception keeps its traceback.
    """
    try:
        main()
    except (RunError, OSError) as error:
        _say_once(f"error: {error}")
        sys.stdout.flush()
        # Not sys.exit, which would wait for collectives that a stopped rank never joins.
        os._exit(1)
    except RuntimeError as error:
        rank, size, local_rank = _place()
        # Another rank may have said why it has ended. If not, and the store has ended with it: lost.
        said = size > 1 and _said(_ANSWERS_WITHIN, if_gone=False)
        if not said and not _lost_contact(error):
            raise
        if not said:
            # In turn: when the first one exits, torchrun ends the others before they say the same.
            time.sleep(local_rank * _TURN)
            print(
                f"error: rank {rank} has lost contact with another rank, or waited for it in vain; see what "
                "that one said last, if its host still answers. A training run continues from its newest "
                f"checkpoint with --resume, on any number of ranks ({in_a_line(error)})",
                file=sys.stderr,
                flush=True,
            )
        sys.stdout.flush()
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _lost_contact(error: RuntimeError) -> bool:
    """Whether this is a collective's failure, or the store's, for want of another rank."""
    if isinstance(error, dist.DistNetworkError):
        return True
    of_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    return of_collective and _LOST.search(str(error)) is not None


def _say_once(message: str) -> None:
    rank, size, _ = _place()
    if rank != 0 and _said(_SPEAKS_WITHIN, if_gone=True):
        return
    print(message, file=sys.stderr, flush=True)
    if size > 1:
        _store().set("nanoalign/error", "said")


def _store() -> dist.Store:
    """The key-value store through which the ranks find each other."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    return next(dist.rendezvous("env://"))[0]


def _said(within: float, if_gone: bool) -> bool:
    """Whether a rank has reported an error, or does so within some seconds.

    if_gone: the answer where the store has ended. Where rank 0 kept it, rank 0 has ended, too.
    """
    found = False

    def ask() -> None:
        nonlocal found
        deadline = time.monotonic() + within
        try:
            store = _store()
            while not found and time.monotonic() < deadline:
                found = store.check(["nanoalign/error"])
                time.sleep(0.05)
        except dist.DistNetworkError:
            found = if_gone

    # In a thread, since a question to a host that has vanished is never answered.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(within)
    return found
