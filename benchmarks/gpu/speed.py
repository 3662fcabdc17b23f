"""Steps of gpu_check.py that measure DPO in known shapes, on rows of the lengths of HH-RLHF."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers
from plan import HH
from roofline import kind_of
from shapes import write
from throughput import _memory, forward_flops

import train_dpo
from gpu.steps import Check
from nanoalign import loop
from nanoalign.model import Policy
from nanoalign.packing import packed
from nanoalign.runs import log, result

PEAK = 989e12  # operations per second: bfloat16 on an H100 or H200, without sparsity
WARM_STEPS, TIMED_STEPS = 2, 3


def model_of(check: Check, shape: str) -> str:
    folder = check.work / shape
    if shape != "tiny" and not (folder / "config.json").exists():
        write(shape, folder)
    return "tiny" if shape == "tiny" else str(folder)


def write_pairs(path: Path, pairs: int) -> None:
    """Pairs of random letters; the embedded tokenizer makes about one token of each."""
    draw = np.random.default_rng(0)
    (prompt, response), letters = HH, list("bcdfghjklmnpqrstvwxz")
    longest = 700  # so that a pair fits the 1,024 positions of the embedded model, too
    with path.open("w") as file:
        for _ in range(pairs):
            texts = [
                "".join(draw.choice(letters, int(np.exp(draw.normal(*shape)).clip(1, longest))))
                for shape in (prompt, response, response)
            ]
            names = ("prompt", "chosen", "rejected")
            file.write(json.dumps(dict(zip(names, texts, strict=True))) + "\n")


class Steps:
    """What is seen of the optimizer steps of a run: when each began, tokens, operations a pair."""

    def __init__(self, profiler: torch.profiler.profile | None = None):
        self.begun: list[float] = []
        self.tokens: list[int] = []  # computed in each step
        self.flops = 0.0
        self.profiler = profiler  # of the last step

    def begin(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.begun.append(time.perf_counter())
        self.tokens.append(0)
        if self.profiler and len(self.begun) == WARM_STEPS + 1:
            self.profiler.start()
        if self.profiler and len(self.begun) == WARM_STEPS + 2:
            self.profiler.stop()

    def look(self, policy, rows, *rest: object) -> None:
        """In place of `describe`: the operations of a pair."""
        with torch.device("meta"):  # whole: sharding has renamed the classes of blocks
            whole = Policy(transformers.AutoModelForCausalLM.from_config(policy.model.config))
        # The policy forward and backward, which is three forwards, and the reference.
        self.flops = float(np.mean([4 * sum(forward_flops(whole, row)) for row in rows[:256]]))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        get_lr, collate = loop.get_lr, packed.collate

        def begin(*args: object) -> float:
            self.begin()
            return get_lr(*args)

        def count(*args: object) -> object:
            batch = collate(*args)
            if self.tokens:
                self.tokens[-1] += batch.inputs["input_ids"].numel()
            return batch

        with (
            patch.object(loop, "get_lr", begin),
            patch.object(packed.PackedBatcher, "collate", staticmethod(count)),
            patch.object(log, "describe", self.look),
            patch.object(train_dpo, "write_model", lambda *_, **__: None),
            patch.object(result, "finish", lambda *_: None),
        ):
            yield


def run(
    check: Check,
    shape: str,
    tokens: int,
    batch: int,
    *flags: str,
    profiler: torch.profiler.profile | None = None,
) -> Steps:
    """Trains some steps; the last one that begins is not measured."""
    count = WARM_STEPS + TIMED_STEPS + 1
    data = check.work / f"pairs_{batch}.jsonl"
    if not data.exists():
        write_pairs(data, batch * count)
    steps = Steps(profiler)
    argv = ["--model", model_of(check, shape), "--data", str(data), "--eval_share", "0",
            "--template", "raw", "--max_length", "1024", "--batch_size", str(batch), "--steps",
            str(count), "--micro_batch_tokens", str(tokens), "--lr", "1e-6", "--overwrite",
            "--out", str(check.work / "speed"), *flags]  # fmt: skip
    with steps.watch():
        train_dpo.main(argv)
    return steps


def figures(steps: Steps, batch: int) -> dict[str, object]:
    begun = steps.begun[WARM_STEPS:]
    seconds = (begun[-1] - begun[0]) / (len(begun) - 1)
    tokens = sum(steps.tokens[WARM_STEPS:-1]) / (len(begun) - 1)
    rate = steps.flops * batch / seconds
    share = {"share of peak": f"{rate / PEAK:.1%}"} if torch.cuda.is_available() else {}
    return {
        "ms a step": round(1e3 * seconds, 1),
        "tokens/s": round(tokens / seconds),
        "TFLOP/s": round(rate / 1e12, 3),
        **share,
        "GB": round(_memory() / 1e9, 2),
    }


def speed(check: Check, shape: str, tokens: int, batch: int, *flags: str) -> dict[str, object]:
    return figures(run(check, shape, tokens, batch, *flags), batch)


def profile(check: Check, shape: str) -> dict[str, object]:
    """The share of a step in which the GPU computes, and the kernels that take most of it."""
    profiler = torch.profiler.profile()
    steps = run(check, shape, 16384, 64, profiler=profiler)
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == on_gpu
    )
    busy, until = 0.0, 0.0
    for start, end in kernels:  # in microseconds; they overlap where streams do
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    table = profiler.key_averages()
    print(table.table(sort_by="self_device_time_total", row_limit=40), file=sys.stdout)
    top = sorted(table, key=lambda event: -event.self_device_time_total)[:8]
    kinds: dict[str, float] = {}  # milliseconds, for roofline.py
    for event in table:
        if event.device_type == on_gpu and not event.is_user_annotation:  # which spans kernels
            kind = kind_of(event.key)
            kinds[kind] = kinds.get(kind, 0.0) + event.self_device_time_total / 1e3
    seconds = steps.begun[WARM_STEPS + 1] - steps.begun[WARM_STEPS]
    shares = {event.key[:60]: event.self_device_time_total / 1e6 / seconds for event in top}
    return {
        "step ms, with the profiler": round(1e3 * seconds),
        "busy": f"{busy / 1e6 / seconds:.1%}",
        "ms of kinds": {kind: round(ms, 1) for kind, ms in kinds.items()},
        **{name: f"{share:.1%}" for name, share in shares.items()},
    }
