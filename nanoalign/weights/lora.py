"""LoRA: small matrices beside the weights are trained, in place of the weights.

    W x + alpha / r * B A x      A (r, in) starts at random, B (out, r) at zero

Hu et al. 2021, arXiv 2106.09685. The adapters are those of the package peft. The reference of DPO
is the policy with its adapters off, so that one model is in memory. The head of a reward model is
trained whole beside its adapters, and saved with them (modules_to_save of peft).
"""

import argparse
import copy
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from nanoalign.batch import Batch
from nanoalign.distributed import World, environment_ranks, full, print0
from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line
from nanoalign.files.writing import sync, sync_tree
from nanoalign.flags import number
from nanoalign.model import Fill, Policy, Read, Scorer
from nanoalign.ranks.collectives import on_main
from nanoalign.weights import write
from nanoalign.weights.adapters import PREFIX, SETTINGS, WEIGHTS
from nanoalign.weights.folders import ADAPTER_CONFIG, public_name
from nanoalign.weights.nf4 import is_packed, unpacked
from nanoalign.weights.slices import copy_rows, places_of, tensors_of
from nanoalign.weights.tensor_files import save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("LoRA, which needs the package peft").add_argument
    text = (
        "train adapters of this rank in place of the weights; the reference of a policy is then "
        "this policy with its adapters off, and takes no memory; default: no adapters"
    )
    add("--lora_rank", type=number(int, 1), metavar="RANK", help=text)
    text = "the update of a weight is scaled by alpha / rank; default: twice the rank"
    add("--lora_alpha", type=number(int, 1), help=text)
    text = (
        "names of the layers that get adapters, such as q_proj; default: all linear layers except "
        "the head"
    )
    add("--lora_targets", nargs="+", metavar="NAME", help=text)
    text = (
        "hold the frozen weights of linear layers in 4 bits (nf4, as in QLoRA), which rounds them; "
        "default: as the files store them"
    )
    add("--base_dtype", choices=("nf4",), help=text)
    parser.derived.append(lambda args: {"lora_alpha": 2 * args.lora_rank} if args.lora_rank else {})
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """Returns why the flags of LoRA are refused, or None."""
    if args.lora_rank is None:
        for name in ("lora_alpha", "lora_targets", "base_dtype"):
            if getattr(args, name) is not None:
                return f"--{name} needs --lora_rank; give both"
        return None
    try:
        import peft  # noqa: F401
    except ImportError as error:
        return f"--lora_rank needs the package peft ({error}): pip install peft"
    flags = vars(args)
    reference = flags.get("reference")  # of policies alone, as is --sync_reference_every
    if reference not in (None, "none", args.model):
        return (
            f"--reference {reference} does not go with --lora_rank, where the reference is "
            "--model with its adapters off; leave it out"
        )
    if args.base_dtype and environment_ranks()[1] > 1 and torch.__version__ < (2, 12):
        return (
            f"--base_dtype on several ranks needs torch 2.12, because FSDP2 of {torch.__version__} "
            "can't shard bytes; install it, or train on one rank"
        )
    if args.base_dtype and flags.get("precompute_reference"):
        return (
            "--precompute_reference does not go with --base_dtype, where the reference is the "
            "rounded model, which is in memory anyway; leave it out"
        )
    if flags.get("sync_reference_every"):
        return (
            "--sync_reference_every does not go with --lora_rank, where the reference is the "
            "policy with its adapters off and can't move"
        )
    return None


FOLDER = "adapter"  # in the folder of a run
NAME = "default"  # of the adapter in peft
HALF = {torch.bfloat16, torch.float16}


# --- the start of a run ---------------------------------------------------------------------------


def reading(read: Read, args: Namespace, dtype: torch.dtype) -> Read:
    """The `read` of Policy.load and RewardModel.load, with the adapters of the flags, if any.

    A is random and B zero; a line says what is trained.
    dtype: of matrix products. Frozen weights are kept as the files store them if that type and this
        dtype have 16 bits: nothing is lost.
    The result raises RunError as add_adapters does.
    """
    if args.lora_rank is None:
        return read

    def read_and_add(
        auto: type, folder: Path, config: "transformers.PretrainedConfig", own_dtype: torch.dtype
    ) -> tuple[nn.Module, Fill]:
        stored = config.dtype  # `read` changes config
        frozen_dtype = stored if {stored, dtype} <= HALF else torch.float32
        model, fill = read(auto, folder, config, own_dtype)
        add_adapters(model, args, frozen_dtype)

        def fill_and_draw(module: Scorer, device: torch.device) -> None:
            fill(module, device)
            draw(model, args.seed)
            layers, trained = adapted(model), module.count_parameters(trainable=True)
            names = ", ".join(sorted({name.split(".")[-2] for name in layers}))
            scale = f"rank {args.lora_rank}, alpha {args.lora_alpha}"
            head = "" if isinstance(module, Policy) else " and the head"
            print0(
                f"{'adapters':<11} {scale}, on {len(layers)} layers ({names}){head}: "
                f"{trained:,} parameters are trained"
            )

        return model, fill_and_draw

    return read_and_add


def draw(model: nn.Module, seed: int) -> None:
    """Fills A of each layer with random numbers, the same on any number of ranks, and B with 0."""
    generator = torch.Generator().manual_seed(seed)
    for a, b in map(matrices, adapted(model).values()):
        bound = a.shape[1] ** -0.5  # as in the code of the paper
        copy_rows(a, torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        copy_rows(b, torch.zeros(b.shape))


def add_adapters(
    model: "transformers.PreTrainedModel", args: Namespace, frozen_dtype: torch.dtype
) -> None:
    """Puts adapters beside linear layers of a model, in place, and freezes its other parameters.

    The head of a reward model is not frozen. frozen_dtype: of the frozen parameters from then on.
    Raises RunError if a target matches no layer, the head, or a layer that is not linear.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules=args.lora_targets or "all-linear",
        task_type="CAUSAL_LM" if model.can_generate() else "SEQ_CLS",
        # A name that other machines know, if there is one.
        base_model_name_or_path=public_name(args.model) or args.model,
    )
    try:
        inject_adapter_in_model(config, model, NAME)
    except ValueError as error:
        raise RunError(f"--lora_targets: can't add adapters: {in_a_line(error)}") from error
    for target in args.lora_targets or ():  # peft takes it that some of them match nothing
        if not any(f".{name}".endswith(f".{target}.weight") for name in adapted(model)):
            raise RunError(f"--lora_targets: no linear layer has the name '{target}'; leave it out")
    heads = [part for part in model.children() if part is not model.base_model]
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (module in heads or type(module) is not Linear):
            raise RunError(
                f"--lora_targets: '{name}' is not a linear layer of a block; give others, such as "
                "q_proj k_proj v_proj o_proj"
            )
    for head in () if model.can_generate() else heads:
        head.requires_grad_(True)
    for parameter in model.parameters():
        if not (parameter.requires_grad or is_packed(parameter)):  # buffers stay as they are
            parameter.data = parameter.data.to(frozen_dtype)


# --- layers ---------------------------------------------------------------------------------------


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Maps the name that the weight of a layer has without adapters to each layer with one."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }


def matrices(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns the parameters A, (r, in), and B, (out, r), of a layer with an adapter."""
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


@torch.no_grad()
def merged(layer: nn.Module) -> Tensor:
    """Returns W + alpha / r * B A of a layer in float32, of the shape and sharding of W.

    A collective.
    """
    a, b = matrices(layer)
    update = layer.scaling[NAME] * (b @ a)
    # GPT-2 has weights of the shape (in, out).
    return unpacked(layer.base_layer.weight).float() + (
        update.T if layer.fan_in_fan_out else update
    )


# --- the reference --------------------------------------------------------------------------------


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """A context in which a model computes as if it had no adapters.

    `disable_adapters` of peft would also change requires_grad, of which sharding keeps a copy, so
    that a forward inside the context and a backward pass after it would disagree.
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
    """The policy with its adapters off, as a reference. Its results have no gradient.

    They could not have one: with activation checkpointing a backward pass would run the blocks
    again, with their adapters on.
    """

    def __init__(self, policy: Policy):
        self.policy = policy

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Computes Policy.forward with the adapters off: log pi_ref(y | x), (S,)."""
        with off(self.policy.model):
            return self.policy(batch)

    @torch.no_grad()
    def tokens(self, batch: Batch) -> Tensor:
        """Computes Policy.tokens with the adapters off: log pi_ref of every scored token, (M,)."""
        with off(self.policy.model):
            return self.policy.tokens(batch)


# --- files ----------------------------------------------------------------------------------------


def write_merged(
    scorer: Scorer, tokenizer, folder: Path, world: World | None = None, **options: str
) -> None:
    """Writes a model with its adapters merged, and these alone to adapter/ in its folder.

    The adapters, and the head of a reward model with them, are float32, as
    PeftModel.from_pretrained(base, folder / "adapter") reads them; adapters.py reads them, too.
    A collective. options: of write.write_model. Raises RunError, on all ranks, if the files can't
    be written.
    """
    model = scorer.model
    layers, tensors, adapters, heads = adapted(model), {}, {}, []
    places = places_of(model)
    for names, tensor in tensors_of(places).items():
        name = names[0].replace(".base_layer.", ".")  # as in a model without adapters
        if tensor.requires_grad:  # its name in the files of peft
            plain = f"{PREFIX}{name.replace(f'.{NAME}.', '.')}"
            adapters[plain] = full(tensor.detach()).cpu()
        if name in layers:
            tensors[name] = partial(merged, layers[name])
        elif not name.endswith((f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight")):
            # Looked up when it is written: a tensor of a gathered module is freed before.
            tensors[name] = lambda place=places[names[0]]: unpacked(getattr(*place))
            heads += [name.removesuffix(".weight")] if tensor.requires_grad else []
    write.write_model(scorer, tokenizer, folder, world, tensors, **options)
    final, temporary = folder / FOLDER, folder / f".{FOLDER}.partial"

    def write_adapters() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        config = copy.copy(model.peft_config[NAME])
        config.inference_mode = True  # as peft writes it
        config.modules_to_save = heads or None
        config.save_pretrained(temporary)
        save(adapters, temporary / WEIGHTS, temporary / ADAPTER_CONFIG)
        (settings := temporary / SETTINGS).mkdir()
        write.write_settings(model, tokenizer.eos_token_id, settings, "fp32")
        is_reward_model = not isinstance(scorer, Policy)
        write.write_tokenizer(tokenizer, settings, options.get("template", ""), is_reward_model)
        sync_tree(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)  # when it is complete
        sync(folder)

    on_main(world, write_adapters) if world else write_adapters()
