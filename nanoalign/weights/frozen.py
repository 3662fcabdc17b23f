"""--base_dtype nf4: the frozen weights below the adapters are packed while they are read.

The format is in nf4.py. Each rank reads its own rows of a weight and packs them, so that no more
than one weight is in memory as the files store it.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nanoalign.distributed import print0, sum_over_ranks
from nanoalign.errors import RunError
from nanoalign.loop import Batcher
from nanoalign.model import Fill, Policy, Read, Scorer
from nanoalign.weights.nf4 import BLOCK, PackedLinear, shape_of
from nanoalign.weights.tensor_files import read_tensor, stored_tensors


def reading(read: Read, args: Namespace, dtype: torch.dtype) -> Read:
    """The `read` of Policy.load and RewardModel.load; with --base_dtype nf4 layers are packed.

    These are the linear layers of the body, not the head. dtype: of matrix products.
    The result raises RunError for a model without linear layers, and for rows that are no multiple
    of 64.
    """
    if args.base_dtype is None:
        return read

    def read_and_pack(auto: type, folder: Path, *about: object) -> tuple[nn.Module, Fill]:
        model, fill = read(auto, folder, *about)
        layers = [layer for layer in model.base_model.modules() if type(layer) is nn.Linear]
        if not layers:
            kind = type(model).__name__
            raise RunError(
                f"--base_dtype nf4: {kind} has no linear layers in its blocks; train it without"
            )
        for layer in layers:
            if layer.in_features % BLOCK:
                raise RunError(
                    f"--base_dtype nf4: a layer of '{folder}' has rows of {layer.in_features} "
                    f"weights, no multiple of {BLOCK}; train it without"
                )
            PackedLinear.become(layer, dtype)

        def fill_and_count(module: Scorer, device: torch.device) -> None:
            fill(module, device)
            module.count_parameters = partial(count_parameters, module)
            packed = [layer.weight for layer in layers]
            weights = sum(shape_of(weight).numel() for weight in packed)
            size = sum(weight.numel() for weight in packed)
            print0(
                f"{'nf4':<11} {weights:,} weights of {len(layers)} layers take {size / 1e6:,.1f} MB"
            )

        return model, fill_and_count

    return read_and_pack


@torch.no_grad()
def report(model: Scorer, folder: Path, data: object, batcher: Batcher, args: Namespace) -> None:
    """With --base_dtype prints how scores differ from those of the weights in the files.

    Of the first micro-batch of each rank: of held-out rows, or of training rows if none is held
    out. The weights are read from the files again, one layer at a time. A collective.
    """
    if args.base_dtype is None:
        return
    layers = {
        f"{name.replace('.base_layer', '')}.weight": layer
        for name, layer in model.model.named_modules()
        if isinstance(layer, PackedLinear)
    }
    stored = stored_tensors(folder)
    if layers.keys() - stored.keys():
        return print0(
            f"{'nf4':<11} the files name weights otherwise: the cost of rounding is unknown"
        )
    rows = data.held_out if len(data.held_out) else data.rows
    batch, is_policy = next(batcher.step(rows[: args.batch_size])), isinstance(model, Policy)
    unit = batch.lengths if is_policy else 1.0
    after = (model(batch) / unit).double().flatten()  # (S,), or (S * K,) of K preferences
    for name, layer in layers.items():
        layer.stored = partial(read_tensor, stored, name)
    before = (model(batch) / unit).double().flatten()
    for layer in layers.values():
        layer.stored = None
    if isinstance(model, FSDPModule):
        model.reshard()  # else an optimizer that is made after this would get the gathered copies
    sums = torch.stack([before, after, (after - before).square(), torch.ones_like(after)]).sum(1)
    if not batch.rows:  # a filler batch
        sums = torch.zeros_like(sums)
    *sums, count = sum_over_ranks(sums).tolist()
    before, after, square = (value / count for value in sums)
    score, one = "reward", "a reward"
    if is_policy:
        score, one = "log-probability of a token", "that of a response"
    print0(
        f"{'nf4':<11} by rounding, mean {score} {before:.4f} -> {after:.4f}; {one} changes by "
        f"{square**0.5:.4f} (root mean square of {count:.0f})"
    )


def count_parameters(module: nn.Module, trainable: bool = False) -> int:
    """As Scorer.count_parameters: weights that are packed count as such."""
    return sum(shape_of(p).numel() for p in module.parameters() if p.requires_grad or not trainable)
