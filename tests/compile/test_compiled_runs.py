"""python -m pytest tests/compile/test_compiled_runs.py

--compile: curves of compiled and plain runs, through inductor's code for a CPU.
"""

import os
from pathlib import Path

from trainings import without_picture

RUNS = {
    "plain": (),
    "lora": ("--lora_rank", "2"),
    "precomputed": ("--precompute_reference",),
    "kto": ("--loss", "kto"),
    "aot": ("--loss", "aot"),
    "ld_alpha": ("--ld_alpha", "0.5"),
    "wpo": ("--wpo",),
    "checkpointing": ("--activation_checkpointing",),
    "padded": ("--no-share_prefix",),
}


def run_all(folder: str, model: Path, pairs: Path, names: list[str]) -> None:
    """All runs in one process, so that each graph is compiled once."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    argv = ["--data", pairs, "--batch_size", 7, "--lr", 1e-2, "--template", "raw"]
    for name in names:
        for compiled in ("off", "on"):
            steps = 20 if name == "plain" else 4
            without_picture(
                [
                    *map(str, argv),
                    "--model",
                    str(model),
                    "--steps",
                    str(steps),
                    "--overwrite",
                    "--out",
                    f"{folder}/{name}_{compiled}",
                    "--compile",
                    compiled,
                    *RUNS[name],
                ]
            )
            print(name, compiled, flush=True)
