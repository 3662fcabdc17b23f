"""What is in the folder of --out before a run: another run, a model, files of someone else."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

from nanoalign.checkpoints.runs import ARGS, METRICS, RECORDS
from nanoalign.checkpoints.write import TOKENIZER_FILES
from nanoalign.errors import RunError

# All that a run writes but the model card, which has a mark, and so all that --overwrite removes.
WRITTEN = (METRICS, RECORDS, "curves.png", "checkpoints", "adapter", ".*.partial", "config.json",
           ARGS, "generation_config.json", "*.safetensors", "*.safetensors.index.json",
           "tensorboard", *TOKENIZER_FILES)  # fmt: skip


def check(out: Path, above: Path, args: Namespace, models: list[Path]) -> None:
    """As runs.check_folder. above: the folder that exists, out or one that has it."""
    if not above.is_dir():
        raise RunError(f"--out {out}: {above} is a file; give a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"--out {out}: no permission to write to {above}; give another --out")
    if not out.exists():
        return
    is_run = (out / ARGS).is_file()
    if any(out.resolve() == model for model in models):
        raise RunError(f"--out {out} is the folder of a model that this run reads; give another")
    if is_run and not (args.resume or args.overwrite):
        raise RunError(
            f"--out {out} contains another run; continue it with --resume, replace it with "
            "--overwrite, or give another --out"
        )
    if not is_run and any(path.name != "README.md" for path in out.iterdir()):
        raise RunError(
            f"--out {out} contains files that are not those of a run; give another --out"
        )


def remove_run(out: Path) -> None:
    """Removes what a run wrote."""
    for pattern in WRITTEN:
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
