"""--save_dtype bf16: what rounding to bfloat16 leaves of a training.

bfloat16 has 8 bits of precision: a weight of 0.02 has neighbours at a distance of 0.0001. Steps of
a small learning rate move many weights by less, and rounding takes them back to where they started.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanoalign.batch import Row
from nanoalign.checkpoints.slices import stored_tensors
from nanoalign.checkpoints.write import FileWriter
from nanoalign.distributed import print0
from nanoalign.loop import Batches, Objective, evaluate

CHUNK = 2**24  # values that are compared at a time


class RoundingWriter(FileWriter):
    """A FileWriter of tensors in bfloat16, which counts the changes that survive. On rank 0.

    start: the folder of the model that was trained. Tensors that it does not have under the same
        name (the head of a new reward model) are not counted.
    """

    def __init__(self, folder: Path, start: Path):
        super().__init__(folder)
        self.stored = stored_tensors(start)
        self.changed = self.survived = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """tensor: float32."""
        if tensor.is_floating_point():
            path, shape = self.stored.get(name, (None, None))
            if shape == tuple(tensor.shape):
                with safe_open(path, framework="pt") as file:
                    self.count(tensor, file.get_tensor(name))
            tensor = tensor.bfloat16()
        super().add(name, tensor)

    def count(self, tensor: Tensor, before: Tensor) -> None:
        """Adds the values that were changed by the training, and those that rounding keeps so."""
        both = zip(tensor.flatten().split(CHUNK), before.flatten().split(CHUNK), strict=True)
        for new, old in both:
            self.changed += int((new != old.float()).sum())
            self.survived += int((new.bfloat16() != old.bfloat16()).sum())

    def close(self) -> None:
        super().close()
        if self.changed:
            print0(
                f"{'bfloat16':<11} {self.survived / self.changed:.1%} of {self.changed:,} changed "
                "weights differ from those of the start after rounding"
            )


@torch.no_grad()
def report_loss(
    model: nn.Module, objective: Objective, held_out: dict[str, Sequence[Row]], batches: Batches,
    args: Namespace,
) -> None:  # fmt: skip
    """Rounds the model, and prints its held-out loss and accuracy before and after. A collective.

    The model remains rounded.
    """
    held_out = {name: rows for name, rows in held_out.items() if name == "eval" and len(rows)}
    if not held_out:
        return
    if getattr(args, "lora_rank", None):  # the adapters of the model are not those of its files
        return print0(f"{'bfloat16':<11} {args.out}: evaluate.py policy measures the merged model")
    before = evaluate(objective, held_out, batches)
    for tensor in model.parameters():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.copy_(local.bfloat16())
    after = evaluate(objective, held_out, batches)
    keys = [key for key in ("loss", "accuracy", "rewards/accuracies") if f"eval/{key}" in before]
    changes = [f"{key} {before[f'eval/{key}']:.4f} -> {after[f'eval/{key}']:.4f}" for key in keys]
    print0(f"{'bfloat16':<11} held out, by rounding: {', '.join(changes)}")
