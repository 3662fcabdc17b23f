"""Groups of ranks that each have a copy of the parameters (HSDP), and when gradients are summed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from nanoalign.batch import Batch, Row
from nanoalign.distributed import World
from nanoalign.loop import Batches


def divide(world: World, shard_size: int, timeout: float) -> World:
    """The World with a mesh of (groups, shard_size): each group has a copy of the parameters.

    shard_size: ranks of a group, a divisor of world.size.
    timeout: seconds that a rank waits for another one of its group.
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


class SyncedBatches:
    """Batches that set, before each is returned, what its backward pass does with gradients.

    Groups sum their gradients in the last batch of a step alone. gradient_sync: when the ranks of a
    group sum theirs: "micro_batch", or "step", for which each keeps all gradients in float32.
    """

    def __init__(self, batches: Batches, model: FSDPModule, gradient_sync: str):
        self.batches, self.model, self.gradient_sync = batches, model, gradient_sync

    def __getattr__(self, name: str) -> object:
        return getattr(self.batches, name)

    def step(self, rows: Sequence[Row]) -> Iterator[Batch]:
        return self.synced(self.batches.step(rows))  # whose first batch is made at once

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
