"""Shared by the tests of whole runs: train_dpo.py on some ranks, its curve, and damaged models."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from processes import run_ranks

import train_dpo
import train_rm
from nanoalign.distributed import run
from nanoalign.ranks.report import report
from nanoalign.runs import result, speed


def script(argv: list[str]) -> None:
    """As `python train_dpo.py`: errors are printed, and end the process with exit code 1."""
    sys.argv = ["train_dpo.py", *argv]
    run(train_dpo.main, report)


def rm_script(argv: list[str]) -> None:
    """As `python train_rm.py`: see script."""
    run(partial(train_rm.main, argv), report)


def without_picture(argv: list[str]) -> None:
    """train_dpo.main, but for the picture, which takes half of the time of a run this small."""
    result.finish = lambda *args: None
    train_dpo.main(argv)


def rm_without_picture(argv: list[str]) -> None:
    """train_rm.main, but for the picture."""
    result.finish = lambda *args: None
    train_rm.main(argv)


def train(
    model: Path, pairs: Path, out: Path, *flags: object, ranks: int = 1, steps: int | None = 10,
    main=without_picture,
) -> list[dict]:  # fmt: skip
    """Runs train_dpo.py; the lines of metrics.jsonl. 10 steps of 7 pairs unless flags differ."""
    argv = ["--model", model, "--data", pairs, "--out", out, "--batch_size", 7, "--lr", 1e-2,
            "--template", "raw", *(("--steps", steps) if steps else ()), *flags]  # fmt: skip
    outcome = run_ranks(ranks, main, [str(arg) for arg in argv])
    assert outcome.codes == [0] * ranks, outcome.stderr
    return metrics_of(out)


def metrics_of(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, without speed and memory, which differ from run to run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in speed.KEYS} for line in lines]


def losses(metrics: list[dict]) -> list[float]:
    return [line["loss"] for line in metrics if "loss" in line]


def assert_same_curve(a: list[dict], b: list[dict]) -> None:
    """Losses to 1e-5 relative; rewards and accuracies follow from log-probabilities near -100."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            absolute = 0 if key in ("loss", "lr", "epoch") else 1e-4
            assert y[key] == pytest.approx(x[key], rel=1e-5, abs=absolute), key


def damaged_model(model: Path, folder: Path, damage: str) -> Path:
    """A copy of a model's folder with some damage; any other word: without damage."""
    shutil.copytree(model, folder)
    config = folder / "config.json"
    settings, weights = json.loads(config.read_text()), folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "other architecture":
        settings |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        config.write_text(json.dumps(settings))
    elif damage == "other shape":
        config.write_text(json.dumps(settings | {"intermediate_size": 64}))
    elif damage == "torn file":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "no language model":
        config.write_text('{"model_type": "clip"}')
    elif damage == "unknown":
        config.write_text('{"model_type": "nonsense"}')
    elif damage == "quantized":
        method = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        config.write_text(json.dumps(settings | method))
    elif damage == "missing shard":
        index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "torn index":
        (folder / "model.safetensors.index.json").write_text("{")
    return folder
