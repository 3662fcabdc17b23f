"""Parameters as a forward needs them: gathered from many ranks, or cast to bfloat16 on one rank.

A rank alone that computes in the dtype of its parameters has plain modules, without this file.
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
    float32. methods: names of those beside forward that use parameters. What remains stays gathered
    until the backward pass, which needs it first.
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
    """Replaces methods of a module, in place, by ones that run with its parameters cast to dtype.

    The parameters of `apart`, and of parts of these, are not cast. As for parameters that `shard`
    gathers in dtype, gradients are made in dtype and added up in the dtype of the parameters: both
    give the same numbers, bit for bit.
    """
    others = {layer for part in apart for layer in part.modules()}
    layers = [layer for layer in module.modules() if layer not in others]

    def cast_and_run(run: Callable, *args, **kwargs) -> object:
        originals = [layer._parameters for layer in layers]
        # By parameter, so that a tied one is cast once. Packed bytes (weights/nf4.py) are not cast.
        new = {p: p.to(dtype) for m in layers for p in m.parameters(False) if p.is_floating_point()}
        for layer, names in zip(layers, originals, strict=True):
            layer._parameters = {name: new.get(p, p) for name, p in names.items()}
        try:
            return run(*args, **kwargs)
        finally:
            for layer, names in zip(layers, originals, strict=True):
                layer._parameters = names

    for name in methods:
        setattr(module, name, partial(cast_and_run, getattr(module, name)))
