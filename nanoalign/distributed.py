"""One path for 1..N processes: process group, autocast, sums, output of rank 0.

`python train_dpo.py` has one rank, `torchrun --nproc_per_node N train_dpo.py` has N, of which each
has a shard of the parameters: see sharding.py. nanoalign/ranks has what several hosts need.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from nanoalign.errors import RunError, check_versions


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of a run."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # (size,); or (copies of the parameters, ranks that share one)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup(timeout: float = 1800.0, store: dist.Store | None = None) -> World:
    """Joins torchrun's process group, or makes a group of one; returns the place of this process.

    timeout: of a wait for other ranks, in seconds. store: where they meet; None: torchrun's own.
    Raises RunError if this host has fewer GPUs than ranks.
    """
    rank, size, local_rank = environment_ranks()
    if torch.cuda.is_available():
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise RunError(f"--nproc_per_node: this host has {gpus} GPUs; give {gpus} or less")
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # torchrun gives each process one thread, whatever the machine has: share its cores instead.
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
        if local_size and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if not dist.is_initialized():
        store = dist.HashStore() if size == 1 else store  # a group of one needs no address
        dist.init_process_group(backend, None, timedelta(seconds=timeout), size, rank, store)
    return World(rank, size, device, init_device_mesh(device.type, (size,)))


def environment_ranks() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this host) of torchrun's environment, else (0, 1, 0)."""
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    return tuple(int(os.environ.get(name, default)) for name, default in names)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for --precision. auto: bfloat16 on a GPU that has it, else fp32.

    Raises RunError for bf16 on a GPU that does not have it.
    """
    has = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and device.type == "cuda" and not has:
        raise RunError("--precision bf16: this GPU has no bfloat16; use --precision fp32 or fp16")
    precision = ("bf16" if has else "fp32") if precision == "auto" else precision
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products run in dtype, and norms and softmax in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def sum_over_ranks(values: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """Replaces a tensor in place by its sum over all ranks, or by what `op` says; returns it.

    A collective.
    """
    if dist.is_initialized():
        dist.all_reduce(values, op=op)
    return values


def full(value: Tensor) -> Tensor:
    """The whole of a sharded tensor; a tensor that is not sharded as it is. A collective."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def print0(*args, **kwargs) -> None:
    """print on rank 0 alone."""
    if environment_ranks()[0] == 0:
        print(*args, **kwargs, flush=True)


LINE_SECONDS = 10.0  # between two lines of a progress bar, where standard error is a file


class Lines:
    """A file for the bar where standard error is no terminal: each new count becomes a line."""

    shown = ""  # the count of the last line, which tqdm writes again when a bar is closed

    def write(self, text: str) -> None:
        count, _, _ = text.strip().partition(" [")
        if count not in ("", self.shown):
            self.shown = count
            print(text.strip(), file=sys.stderr, flush=True)


def progress_bar(total: int | None, unit: str, shown: bool = True, **options: object) -> tqdm:
    """A bar on a terminal; elsewhere a line each 10 s at most, and one at the end of a longer run.

    total: units in all; None: unknown. shown: False makes a bar that prints nothing. options:
        further ones of tqdm.
    """
    if not sys.stderr.isatty():
        options |= dict(file=Lines(), miniters=1, delay=LINE_SECONDS, mininterval=LINE_SECONDS)
    return tqdm(total=total, unit=unit, disable=not shown, dynamic_ncols=True, **options)


def run(main: Callable[[], None], report: Callable[[BaseException], int]) -> None:
    """Runs the main of a script.

    report: prints an expected error and returns the exit code; returns 0 for a defect, which is
        raised again with its traceback.
    """
    code = 0
    try:
        check_versions()
        main()
    except (Exception, KeyboardInterrupt) as error:
        if not (code := report(error)):
            raise  # below: without waiting for collectives that a stopped rank never joins
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    if code or environment_ranks()[1] > 1:
        # Ends without finalizing Python: a thread of gloo that frees a tensor then would abort.
        sys.stdout.flush()
        os._exit(code)
