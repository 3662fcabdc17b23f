"""Parameters on many ranks, of which each has a shard; and on one rank, in bfloat16 while it runs.

Neither is imported where one rank computes in the dtype of its parameters: it has plain modules.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from nanoalign.distributed import World


def shard(
    module: nn.Module, blocks: Iterable[nn.Module], world: World, dtype: torch.dtype,
    trainable: bool, exact: Iterable[nn.Module], methods: Iterable[str],
) -> None:  # fmt: skip
    """Shards every block, then what remains (embedding, last norm, head), over the mesh, in place.

    The parameters of a block are gathered in dtype just before it runs and freed after it;
    gradients are reduced in float32 and averaged over ranks. exact: parts that are gathered in
    float32. What remains stays gathered until the backward pass, which needs it first.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    for part in exact:
        fully_shard(part, mesh=world.mesh, mp_policy=MixedPrecisionPolicy())
    fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=not trainable)
    for name in methods:  # beside forward
        register_fsdp_forward_method(module, name)


def cast(
    module: nn.Module, methods: Iterable[str], dtype: torch.dtype, apart: Iterable[nn.Module] = ()
) -> None:
    """Lets methods of a module run with its parameters in dtype, but for those of `apart`.

    The numbers are those of parameters that are gathered in dtype: gradients are made in it, and
    added up in the dtype of the parameters.
    """
    others = {part for each in apart for part in each.modules()}
    parts = [part for part in module.modules() if part not in others]

    def cast_and_run(run: Callable, *args, **kwargs) -> object:
        held = [(part._parameters, name) for part in parts for name in part._parameters]
        held = [(group, name, group[name]) for group, name in held if group[name] is not None]
        inside = {parameter: parameter.to(dtype) for *_, parameter in held}  # a tied one once
        for group, name, parameter in held:
            group[name] = inside[parameter]
        try:
            return run(*args, **kwargs)
        finally:
            for group, name, parameter in held:
                group[name] = parameter

    for name in methods:
        setattr(module, name, partial(cast_and_run, getattr(module, name)))
