"""Which rows of a parameter a rank has, of several ranks."""

import math

from torch.distributed.tensor import DTensor


def rows_of_rank(tensor: DTensor) -> range:
    """The rows of dimension 0 that this rank has: FSDP2 divides them as torch.chunk does."""
    mesh = tensor.device_mesh  # parameters are sharded over its last dimension
    size = tensor.shape[0]
    chunk = math.ceil(size / mesh.shape[-1])
    start = min(mesh.get_coordinate()[-1] * chunk, size)
    rows = range(start, min(start + chunk, size))
    assert len(rows) == tensor.to_local().shape[0], "FSDP2 shards as torch.chunk does"
    return rows
