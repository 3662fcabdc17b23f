"""The steps of gpu_check.py: cheapest first, each a function of a module beside this file.

A function takes a Check and returns figures by name. It fails by raising. It runs in a process of
its own, which is ended after `seconds`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECTIONS = ("correctness", "compile", "speed", "changes")


@dataclass(frozen=True)
class Check:
    """What a step is given."""

    device: str  # cuda or cpu
    work: Path  # a folder that the steps share, with what earlier ones have written

    @property
    def small(self) -> bool:
        """Whether sizes are those for a CPU."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Step:
    name: str
    section: str
    seconds: float  # until it is ended
    call: str  # module.function
    args: tuple = ()
    on_cpu: bool = True  # whether it makes sense there

    def run(self, check: Check) -> dict[str, object]:
        return self.function()(check, *self.args)

    def function(self) -> Callable[..., dict[str, object]]:
        module, _, function = self.call.partition(".")
        return getattr(importlib.import_module(f"gpu.{module}"), function)


# Flags of train_dpo.py, two steps each.
VARIANTS = {
    "lora": ("--lora_rank", "4"),
    "precomputed": ("--precompute_reference",),
    "wpo": ("--wpo",),
    "ld_alpha": ("--ld_alpha", "0.5"),
    "kto": ("--loss", "kto"),
    "aot": ("--loss", "aot"),
    "checkpointing": ("--activation_checkpointing",),
}
SHAPES = ("qwen2.5-0.5b", "llama-3.2-1b")

CORRECTNESS = [
    Step("versions", "correctness", 60, "runs.versions"),
    Step("masks", "correctness", 60, "attention.masks"),
    Step("dpo", "correctness", 120, "runs.dpo"),
    Step("rm", "correctness", 120, "runs.rm"),
    Step("lengths", "correctness", 300, "attention.lengths"),
    Step("options", "correctness", 180, "attention.options"),
    Step("widths", "correctness", 300, "attention.widths"),
    Step("sequences", "correctness", 120, "varlen.varlen"),
    Step("dpo_as_on_cpu", "correctness", 150, "runs.as_on_cpu", ("dpo",), on_cpu=False),
    Step("rm_as_on_cpu", "correctness", 150, "runs.as_on_cpu", ("rm",), on_cpu=False),
    Step("waits", "correctness", 90, "runs.waits", on_cpu=False),
    Step("resume", "correctness", 150, "runs.resume"),
    *(
        Step(name, "correctness", 90, "runs.variant", flags, on_cpu=name in ("lora", "kto"))
        for name, flags in VARIANTS.items()
    ),
    Step("evaluate_rm", "correctness", 90, "runs.evaluate_rm"),
    Step("evaluate_policy", "correctness", 120, "runs.evaluate_policy"),
]
# What --compile makes, beside plain runs; tests/compile does the same on a CPU.
COMPILE = [
    Step("compiled", "compile", 240, "runs.compiled", ("5", "dpo"), on_cpu=False),
    Step("compiled_rm", "compile", 120, "runs.compiled", ("5", "rm"), on_cpu=False),
    Step("compiled_bf16", "compile", 120, "runs.compiled_start", on_cpu=False),
    Step("compiled_as_on_cpu", "compile", 180, "runs.as_on_cpu", ("dpo", "--compile", "on"), False),
    Step("compiled_waits", "compile", 120, "runs.waits", ("--compile", "on"), on_cpu=False),
    Step("compiled_resume", "compile", 180, "runs.resume", ("--compile", "on"), on_cpu=False),
    *(
        Step(f"compiled_{name}", "compile", 120, "runs.compiled", ("2", "dpo", *flags), False)
        for name, flags in VARIANTS.items()
    ),
]
# (tokens of a micro-batch, records of a step), what is most likely to be used first.
SIZES = ((16384, 64), (8192, 64), (32768, 256), (16384, 256), (32768, 64), (8192, 256))
SPEED = [Step("small", "speed", 120, "speed.speed", ("tiny", 2048, 16))]
SPEED += [
    Step(f"{shape}_{tokens}_{batch}", "speed", 150, "speed.speed", (shape, tokens, batch), False)
    for tokens, batch in SIZES
    for shape in SHAPES
]
SPEED += [
    Step(f"{shape}_16384_{batch}_plain", "speed", 150, "speed.speed",
         (shape, 16384, batch, "--compile", "off"), False)
    for batch in (64, 256)
    for shape in SHAPES
]  # fmt: skip
SPEED[3:3] = [
    Step(f"{shape}_profile", "speed", 150, "speed.profile", (shape,), False) for shape in SHAPES
]
CHANGES = [
    Step(name, "changes", 200, "changes.pair", (name,), on_cpu=name == "checkpointed_blocks")
    for name in ("plain", "varlen", "fewer_warps", "fewer_logits", "device_masks",
                 "checkpointed_blocks", "separate_rows")
]  # fmt: skip
STEPS = [*CORRECTNESS, *COMPILE, *SPEED, *CHANGES]
