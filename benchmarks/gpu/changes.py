"""Steps of gpu_check.py that run a change beside what is there, in pairs."""

import contextlib
import statistics
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch.nn.attention.flex_attention import create_block_mask

from gpu.speed import WARM_STEPS, run
from gpu.steps import Check
from gpu.varlen import in_place_of_flex
from nanoalign import model
from nanoalign.packing import flex

PAIRS = 2


def _device_mask(rows, window: int | None, device: torch.device):
    """The same mask; its blocks are found among all T x T places, on the device."""
    attends, tokens = block_mask(rows, window, device).mask_mod, sum(map(sum, rows))
    return create_block_mask(attends, None, None, tokens, tokens, device=device)


FEWER_LOGITS = {kind: count // 8 for kind, count in model.CHUNK_LOGITS.items()}
block_mask = flex.block_mask
# By name: flags of the changed run, and what is patched in it.
CHANGES: dict[str, tuple[tuple[str, ...], Callable[[], contextlib.AbstractContextManager]]] = {
    "fewer_logits": ((), lambda: patch.object(model, "CHUNK_LOGITS", FEWER_LOGITS)),
    "checkpointed_blocks": (("--activation_checkpointing",), contextlib.nullcontext),
    "separate_rows": (("--no-share_prefix",), contextlib.nullcontext),
    "device_masks": ((), lambda: patch.object(flex, "block_mask", _device_mask)),
    "plain": (("--compile", "off"), contextlib.nullcontext),
    "varlen": ((), in_place_of_flex),
    "fewer_warps": ((), lambda: patch.object(flex, "MORE_WARPS", {})),
}


def pair(check: Check, name: str) -> dict[str, object]:
    """Seconds of a step as it is, and with the change, in alternating runs of one process."""
    flags, change = CHANGES[name]
    size = ("tiny", 2048, 8) if check.small else ("qwen2.5-0.5b", 16384, 64)
    plain, changed = [], []
    for n in range(1 if check.small else PAIRS):
        for is_changed in (False, True) if n % 2 == 0 else (True, False):
            with change() if is_changed else contextlib.nullcontext():
                begun = run(check, *size, *(flags if is_changed else ())).begun[WARM_STEPS:]
            seconds = (begun[-1] - begun[0]) / (len(begun) - 1)
            (changed if is_changed else plain).append(seconds)
    before, after = statistics.median(plain), statistics.median(changed)
    return {
        "ms a step": round(1e3 * before, 1),
        "changed": round(1e3 * after, 1),
        "times as fast": round(before / after, 3),
    }
