"""LoRA: in place of a linear layer's weight, train two thin matrices beside it, through peft.

    y = W x + alpha / r * B A x

Hu et al. 2021, arXiv 2106.09685, equation 3. W (out, in) is frozen; A (r, in) and B (out, r) are an
adapter of rank r. B starts as zeros: so the policy starts as the model, and with its adapters off it
stays it. That is the reference, for which no second model is held.

peft is optional, and imported where an adapter is made.
"""

import argparse
import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanoalign.distributed import World, full, on_main
from nanoalign.errors import RunError, in_a_line

FOLDER = "adapter"  # of a run's
NAME = "default"  # of the adapter, peft's own choice


def settle(args: argparse.Namespace) -> None:
    """Gives the flags of LoRA their defaults; what does not go with it, or without it, is an error."""
    if args.lora_rank is None:
        for name in ("lora_alpha", "lora_targets"):
            if getattr(args, name) is not None:
                raise RunError(f"--{name} belongs to --lora_rank; give both")
        return
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise RunError(
            f"--lora_rank needs the package peft ({in_a_line(error)}): pip install peft"
        ) from error
    if args.reference not in (None, args.model):
        raise RunError(
            f"--reference {args.reference} does not go with --lora_rank, where the reference is --model "
            "with its adapters off; leave it out"
        )
    if args.sync_reference_every:
        raise RunError(
            "--sync_reference_every does not go with --lora_rank, where the reference is the policy with "
            "its adapters off, and can't move"
        )
    args.lora_alpha = args.lora_alpha or 2 * args.lora_rank


@dataclass(frozen=True)
class Adapters:
    """Which adapters a policy gets: Policy.load("tiny", adapters=Adapters(rank=8, alpha=16))."""

    rank: int  # r
    alpha: int  # an update is scaled by alpha / r
    targets: tuple[str, ...] | None = None  # how layers' names end; None: all linear but the head
    seed: int = 0  # A is drawn from
    base: str | None = None  # the model that adapter_config.json names

    def put_into(self, model: PreTrainedModel) -> None:
        """Wraps the linear layers of a model on the meta device; what it had is frozen from now on.

        Raises RunError for names that no layer has, or that belong to the embedding or the head.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear, LoraLayer

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets) if self.targets else "all-linear",
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base,
        )
        try:
            inject_adapter_in_model(config, model, NAME)
        except ValueError as error:
            raise RunError(f"adapters can't be put into the model: {in_a_line(error)}") from error
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and (module is head or type(module) is not Linear):
                raise RunError(
                    f"adapters belong on linear layers of the blocks, not on '{name}'; name others, such as "
                    "--lora_targets q_proj k_proj v_proj o_proj"
                )

    def initial(self, model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, its whole initial value), layer by layer; the same on any number of ranks.

        As in the paper's code: A uniform within 1 / sqrt(in), B zero.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for layer in adapted(model).values():
            a, b = matrices(layer)
            bound = a.shape[1] ** -0.5
            yield a, torch.empty(a.shape).uniform_(-bound, bound, generator=generator)
            yield b, torch.zeros(b.shape)


def plain_name(name: str) -> str:
    """A parameter's name as the model without adapters, and its files, have it."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.endswith((f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"))


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have an adapter, by the plain name of their weight."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }


def matrices(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of a layer."""
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


@torch.no_grad()
def merged(layer: nn.Module) -> Tensor:
    """W + alpha / r * B A, in float32 and sharded as W is. Every rank must call it."""
    a, b = matrices(layer)
    update = layer.scaling[NAME] * (b @ a)
    # GPT-2 keeps its weights as (in, out).
    return layer.base_layer.weight.float() + (update.T if layer.fan_in_fan_out else update)


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Within it, the model's layers are as they were before they got adapters.

    peft's own way (`enable_adapters`) also takes their gradient away, and sharding, which has noted
    who needs one, would be misled between a forward and its backward pass.
    """
    layers = adapted(model).values()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class Base:
    """A policy with its adapters off, in the place of a reference."""

    def __init__(self, policy: nn.Module):
        self.policy = policy

    # With activation checkpointing a backward pass would run the blocks again, adapters and all.
    @torch.no_grad()
    def __call__(self, *args, **options):
        """What Policy.forward says, without gradient."""
        with off(self.policy.model):
            return self.policy(*args, **options)


def describe(policy: nn.Module) -> str:
    """What is trained, and where, for the block that is printed before training."""
    layers = adapted(policy.model)
    names = sorted({name.split(".")[-2] for name in layers})
    config = policy.model.peft_config[NAME]
    return (
        f"rank {config.r}, alpha {config.lora_alpha}, on {len(layers)} layers ({', '.join(names)}): "
        f"{policy.count_parameters(trainable=True):,} parameters are trained"
    )


def save(model: PreTrainedModel, folder: Path, world: World | None = None) -> None:
    """Writes the adapters as peft does, float32: PeftModel.from_pretrained(base, folder) reads them.

    Every rank must call it. The folder gets its name when it is whole.
    """
    tensors = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": full(parameter.detach()).cpu()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }
    write = partial(_write, copy.copy(model.peft_config[NAME]), tensors, folder)
    write() if world is None else on_main(world, write)


def _write(config: object, tensors: dict[str, Tensor], folder: Path) -> None:
    partly = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partly, ignore_errors=True)
    partly.mkdir(parents=True)
    config.inference_mode = True  # as peft saves it: who loads it does not train it
    config.save_pretrained(partly)
    path = partly / "adapter_model.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise RunError(f"the adapter could not be written to '{folder}': {error}") from error
    path.chmod((partly / "adapter_config.json").stat().st_mode)  # else its owner alone can read it
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partly, folder)
