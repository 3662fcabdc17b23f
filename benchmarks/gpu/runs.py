"""Steps of gpu_check.py that run the project's scripts, on the embedded model and data."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

import evaluate
import train_dpo
import train_rm
from gpu.steps import Check
from nanoalign import loop

ROOT = Path(__file__).resolve().parents[2]
# Largest relative difference of a loss on the two devices, in float32 over 5 steps.
CURVE_TOLERANCE = 1e-3
COMMON = ("--data", "tiny:test", "--eval_share", "0", "--batch_size", "16", "--overwrite",
          "--compile", "off")  # fmt: skip
SCRIPTS = {"dpo": train_dpo, "rm": train_rm}


def train(kind: str, out: Path, *flags: str) -> list[float]:
    """Runs train_dpo.py or train_rm.py in this process; the losses of its steps."""
    SCRIPTS[kind].main([*COMMON, "--out", str(out), *flags])
    return losses(out)


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]
    assert found and all(map(math.isfinite, found)), found
    return found


def versions(check: Check) -> dict[str, object]:
    facts = {"torch": torch.__version__, "transformers": transformers.__version__}
    if check.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "count": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "GB": round(properties.total_memory / 1e9, 1),
            "shared_memory": properties.shared_memory_per_block_optin,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    a, b = torch.randn(2, 256, 256, dtype=torch.float64)
    on_device = (a.float().to(check.device) @ b.float().to(check.device)).cpu()
    off = (on_device - a @ b).abs().max().item()
    assert off < 1e-3, f"a product of matrices is off by {off}"
    return facts


def dpo(check: Check) -> dict[str, object]:
    found = train("dpo", check.work / "dpo", "--steps", "2" if check.small else "5")
    assert abs(found[0] - math.log(2)) < 1e-3, f"the first loss is {found[0]}, not ln 2"
    return {"first": round(found[0], 6), "last": round(found[-1], 6)}


def rm(check: Check) -> dict[str, object]:
    found = train("rm", check.work / "rm", "--steps", "2" if check.small else "5")
    return {"first": round(found[0], 6), "last": round(found[-1], 6)}


def as_on_cpu(check: Check, kind: str, *more: str) -> dict[str, object]:
    """Five steps in float32 on the GPU, and on the CPU in a process that sees no GPU.

    more: flags of the run on the GPU.
    """
    flags = ("--steps", "5", "--precision", "fp32", "--micro_batch_tokens", "2048")
    here = train(kind, check.work / f"{kind}_fp32", *flags, *more)
    other = check.work / f"{kind}_fp32_cpu"
    command = [sys.executable, SCRIPTS[kind].__file__, *COMMON, "--out", str(other), *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return _difference(here, losses(other))


def _difference(found: list[float], expected: list[float]) -> dict[str, object]:
    off = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    assert off < CURVE_TOLERANCE, f"losses differ by {off:.1e}: {found}, {expected}"
    return {"largest relative difference": f"{off:.1e}"}


def compiled(check: Check, steps: str, kind: str, *flags: str) -> dict[str, object]:
    """Steps in float32, compiled and plain."""
    out = check.work / "_".join(["compiled", kind, *(x.strip("-") for x in flags)])
    flags = ("--steps", steps, "--precision", "fp32", *flags)
    return _difference(train(kind, out, *flags, "--compile", "on"), train(kind, out, *flags))


def compiled_start(check: Check) -> dict[str, object]:
    """In bfloat16 the policy of the first step rounds as its reference does."""
    found = train("dpo", check.work / "start", "--steps", "1", "--compile", "on")
    assert abs(found[0] - math.log(2)) < 1e-4, f"the first loss is {found[0]}, not ln 2"
    return {"first": round(found[0], 6)}


def resume(check: Check, *flags: str) -> dict[str, object]:
    """Two equal runs, and one that is stopped and continued: all metrics bit for bit."""
    texts = []
    for name, stops in (("straight", ()), ("again", ()), ("stopped", ("--stop_after", "2"))):
        out = check.work / name
        train("dpo", out, "--steps", "4", *stops, *flags)
        if stops:
            continued = [flag for flag in COMMON if flag != "--overwrite"]
            train_dpo.main([*continued, "--out", str(out), "--steps", "4", "--resume", *flags])
        texts.append((out / "metrics.jsonl").read_bytes())
    assert texts[1] == texts[0], "two equal runs differ"
    assert texts[2] == texts[0], "a run that was stopped and continued differs"
    return {"bytes": len(texts[0])}


def waits(check: Check, *flags: str) -> dict[str, object]:
    """How often the host waits for the GPU in one optimizer step: for the norm and the metrics."""
    get_lr, seen, found = loop.get_lr, [], []

    def at_step(step: int, *rest: object) -> float:
        if step in (3, 4):
            torch.cuda.set_sync_debug_mode("warn" if step == 3 else "default")
        if step == 4:
            found.extend(seen)
        seen.clear()
        return get_lr(step, *rest)

    def show(message: object, category: type, filename: str, line: int, *rest: object) -> None:
        if "synchroniz" in str(message):
            seen.append(f"{Path(filename).name}:{line}")

    with (
        warnings.catch_warnings(),
        patch.object(loop, "get_lr", at_step),
        patch.object(warnings, "showwarning", show),
    ):
        warnings.simplefilter("always")
        train("dpo", check.work / "waits", "--steps", "6", *flags)
    assert len(found) == 2, f"{len(found)} waits in a step, at {found}"
    return {"waits": len(found), "at": " ".join(found)}


def variant(check: Check, *flags: str) -> dict[str, object]:
    name = "variant" + "".join(flags).replace("--", "_").replace(".", "")
    found = train("dpo", check.work / name, "--steps", "2", *flags)
    return {"losses": " ".join(f"{loss:.5f}" for loss in found)}


def _reward_model(folder: Path) -> Path:
    """A reward model, trained for a step."""
    train("rm", folder, "--steps", "1")
    return folder


def evaluate_rm(check: Check) -> dict[str, object]:
    out = check.work / "rm_eval"
    model = _reward_model(check.work / "rm_eval_model")
    evaluate.main(["rm", "--model", str(model), "--data", "tiny:test", "--out", str(out)])
    return _numbers(json.loads((out / "metrics.json").read_text())["all"], "pairs", "accuracy")


def evaluate_policy(check: Check) -> dict[str, object]:
    prompts = check.work / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": f"What is {n} plus {n}?"}) for n in range(8 if check.small else 64)
    ]
    prompts.write_text("\n".join(lines) + "\n")
    out, reward = check.work / "policy_eval", _reward_model(check.work / "policy_eval_model")
    evaluate.main(["policy", "--policy", "tiny", "--baseline", "tiny", "--reward", str(reward),
                   "--data", str(prompts), "--max_new_tokens", "16",
                   "--out", str(out)])  # fmt: skip
    found = json.loads((out / "metrics.json").read_text())
    return _numbers(found, "win_rate", "kl_per_answer", "policy_tokens_mean")


def _numbers(found: dict, *names: str) -> dict[str, object]:
    return {name: round(found[name], 4) for name in names}
