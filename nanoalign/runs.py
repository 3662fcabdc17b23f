"""The folder of a run: args.json, metrics.jsonl, checkpoints/, and at the end the model."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from nanoalign.distributed import World, on_main
from nanoalign.errors import RunError, in_a_line

ARGS, METRICS = "args.json", "metrics.jsonl"
# All that a run writes, and so all that --overwrite removes.
WRITTEN = (METRICS, "curves.png", "checkpoints", "adapter", ".*.partial", "config.json", ARGS,
           "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
           "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.*",
           "merges.txt")  # fmt: skip


def open_run(
    args: Namespace, world: World, versions: dict[str, str | None]
) -> Callable[[int, dict[str, float]], None]:
    """Prepares --out and writes args.json. Returns what appends a line to metrics.jsonl."""
    out = Path(args.out)

    def prepare() -> None:
        out.mkdir(parents=True, exist_ok=True)
        for pattern in () if args.resume else WRITTEN:
            for path in out.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (out / ARGS).write_text(json.dumps(vars(args) | versions, indent=2) + "\n")

    def log(step: int, metrics: dict[str, float]) -> None:
        if world.is_main and metrics:
            try:
                with (out / METRICS).open("a") as file:
                    file.write(json.dumps({"step": step, **metrics}) + "\n")
            except OSError as error:
                raise RunError(f"{out / METRICS} can't be written: {in_a_line(error)}") from error

    on_main(world, prepare)
    return log
