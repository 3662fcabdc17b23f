"""The folder of a run: args.json, metrics.jsonl, checkpoints/, and at the end the model."""

import json
import platform
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import nanoalign
from nanoalign.distributed import World, on_main
from nanoalign.errors import RunError, in_a_line

ARGS, METRICS = "args.json", "metrics.jsonl"
# All that a run writes, and so all that --overwrite removes.
WRITTEN = (METRICS, "curves.png", "checkpoints", "adapter", ".*.partial", "*.safetensors", "*.json",
           "tokenizer*", "chat_template.jinja", "vocab.*", "merges.txt")  # fmt: skip


def check_folder(args: Namespace, models: list[Path]) -> None:
    """Raises RunError where writing to --out would lose something; changes nothing."""
    out = Path(args.out)
    is_run = (out / ARGS).is_file()
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file; give a folder")
    if any(out.resolve() == model for model in models):
        raise RunError(f"--out {out} is the folder of a model that this run reads; give another")
    if args.resume and args.overwrite:
        raise RunError("--resume continues a run and --overwrite replaces it; give one of them")
    if is_run and not (args.resume or args.overwrite):
        raise RunError(
            f"--out {out} holds another run; continue it with --resume, replace it with --overwrite, "
            "or give another --out"
        )
    if not is_run and out.is_dir() and any(out.iterdir()):
        raise RunError(f"--out {out} holds files that are not those of a run; give another --out")


def open_run(args: Namespace, world: World) -> Callable[[int, dict[str, float]], None]:
    """Prepares --out and writes args.json. Returns what appends a line to metrics.jsonl."""
    out = Path(args.out)

    def prepare() -> None:
        out.mkdir(parents=True, exist_ok=True)
        for pattern in () if args.resume else WRITTEN:
            for path in out.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (out / ARGS).write_text(json.dumps(vars(args) | versions(), indent=2) + "\n")

    def log(step: int, metrics: dict[str, float]) -> None:
        if world.is_main and metrics:
            try:
                with (out / METRICS).open("a") as file:
                    file.write(json.dumps({"step": step, **metrics}) + "\n")
            except OSError as error:
                raise RunError(f"{out / METRICS} can't be written: {in_a_line(error)}") from error

    on_main(world, prepare)
    return log


def versions() -> dict[str, str | None]:
    """What else decides over a result: versions, and the commit where the package is in git."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return {"nanoalign": nanoalign.__version__, "commit": commit, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version()}  # fmt: skip
