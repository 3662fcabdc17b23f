"""--compile: the blocks of a model and its head run as functions that torch.compile makes.

A block is compiled before it is sharded, and all blocks of one shape share a function, those of
policy and reference alike. So both round alike. Before the first step a model computes a batch,
forward and backward: what the compiler can't do is found there, and the whole run is then plain.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nanoalign.batch import Batch, Row
from nanoalign.compile import fused_head, opaque
from nanoalign.distributed import World, print0, progress_bar
from nanoalign.errors import RunError
from nanoalign.flags import Parser
from nanoalign.logps import Head
from nanoalign.loop import Batcher
from nanoalign.model import Read, Scorer
from nanoalign.packing.self_check import one_line_errors
from nanoalign.ranks.collectives import gather

LIMIT = 64  # compilations of a function: shapes of blocks, with gradients or without
# emulate_precision_casts: a kernel rounds to bfloat16 wherever separate operations would; else
# policy and reference, one of which keeps values for its backward pass, would round differently.
OPTIONS = {"emulate_precision_casts": True}


def add_arguments(parser: Parser) -> None:
    text = (
        "join the operations of blocks and head into few kernels by torch.compile, which takes a "
        "minute at the start; auto: on a GPU"
    )
    group = parser.add_argument_group("compilation")
    group.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help=text)


class Compiler:
    """What is compiled of the models of a run.

    is_on: whether compiled functions are called.
    """

    def __init__(self, args: Namespace, world: World):
        self.world, self.starting, self.problem = world, False, None
        self.batch_size = args.batch_size
        self.is_on = args.compile == "on" or (
            args.compile == "auto" and world.device.type == "cuda"
        )
        if self.is_on:
            config = torch._dynamo.config
            config.recompile_limit = max(LIMIT, config.recompile_limit)
            config.specialize_float = True  # scales and soft caps are constants
            torch.fx.experimental._config.use_duck_shape = False  # equal sizes are a coincidence
            torch._functorch.config.force_non_lazy_backward_lowering = True
            torch._dynamo.callback.on_compile_start(self.show)
            self.run_block = self.compiled(_run_block)
            self.kernels = fused_head.Kernels(
                self.compiled(fused_head.read), self.compiled(fused_head.slopes)
            )
            self.fused_head = fused_head.fused_head(self.kernels)

    def compiled(self, function: Callable) -> Callable:
        """A function that runs as torch.compile makes it, for sizes of any length."""
        fast = torch.compile(function, dynamic=True, fullgraph=True, options=OPTIONS)
        dynamo = torch._dynamo.exc

        def run(*args: object, **options: object) -> object:
            try:
                return fast(*args, **options)
            except (dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit) as error:
                if not self.starting:
                    text = f"--compile: {reason(error)}; continue with --compile off --resume"
                    raise RunError(text) from error
                self.problem = self.problem or reason(error)
                return function(*args, **options)

        return run

    def reading(self, read: Read) -> Read:
        """The `read` of Policy.load and RewardModel.load, with compiled blocks."""
        if not self.is_on:
            return read

        def read_and_compile(*args: object) -> tuple:
            model, fill = read(*args)
            for block in Scorer(model).blocks():
                block.forward = partial(self.forward, block, opaque.windows(model))
            return model, fill

        return read_and_compile

    def forward(
        self, block: nn.Module, windows: set[int | None], hidden: Tensor, *args, **options
    ) -> object:
        """The forward of a block."""
        if not self.is_on:
            return _run_block(block, hidden, *args, **options)
        if tree := options.get("tree"):
            options["tree"] = opaque.seen(tree, windows, hidden.device)
        return self.run_block(block, hidden, *args, **options)

    def head(self, *fields: object) -> Head:
        return (self.fused_head if self.is_on else Head)(*fields)

    def plainly(self, function: Callable, *args: object) -> object:
        """Calls a function with plain blocks."""
        before, self.is_on = self.is_on, False
        try:
            return function(*args)
        finally:
            self.is_on = before

    def start(self, model: Scorer, rows: Sequence[Row], batcher: Batcher, name: str) -> None:
        """Compiles the blocks and the head of a model by the first of the rows; prints the seconds.

        If the compiler can't, it prints why, and all models of the run are plain from then on.
        name: of the model. A collective.
        """
        if not self.is_on:
            return
        opaque.use_compiled_attention(model.model)
        model.textbook = partial(self.plainly, model.textbook)
        model.HEAD = self.head
        self.starting, began = True, time.perf_counter()
        with progress_bar(None, "graph", self.world.is_main, desc=f"compiling {name}") as bar:
            self.bar = bar
            with one_line_errors(name, batcher.advice):
                self.try_out(model, next(batcher.step(rows[: self.batch_size])))
        self.starting = False
        problem = next(filter(None, gather(self.problem, self.world)), None)
        if problem:
            self.is_on = False
            print0(f"{'compile':<11} off for the whole run, which is plain: {problem}")
        else:
            print0(f"{'compile':<11} {name}: {time.perf_counter() - began:.1f} s")

    def try_out(self, model: Scorer, batch: Batch) -> None:
        """All that a run computes with a model: its scores, and gradients if it is trained."""
        with torch.no_grad():
            model(batch)
        if any(p.requires_grad for p in model.parameters()):
            model(batch).sum().backward()
            model.zero_grad(set_to_none=True)
        if isinstance(model, FSDPModule):
            model.reshard()  # else an optimizer that is made after this would get gathered copies

    def show(self, *about: object) -> None:
        """Called when a compilation begins, before the first step or later."""
        if self.starting:
            self.bar.update()
        else:
            print0(f"{'compile':<11} another graph is compiled")


def _run_block(block: nn.Module, *args: object, **options: object) -> object:
    return type(block).forward(block, *args, **options)


def reason(error: BaseException) -> str:
    """What the compiler could not do, in one line: the head of its report, and what it is about."""
    text, _, _ = str(error).partition("Set TORCHDYNAMO_VERBOSE")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    about = [line for line in lines if line.startswith("Developer debug context")]
    return f"{type(error).__name__}: {' '.join((*lines[:2], *about))[:400]}"
