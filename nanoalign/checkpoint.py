"""Folders that are written: a run's, with checkpoints and the way back, and an evaluation's."""

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from nanoalign.distributed import World
from nanoalign.errors import RunError, in_a_line
from nanoalign.objective import Objective

ARGS = "args.json"  # marks a folder as a run's
# All that a run writes, and so all that --overwrite removes.
WRITTEN = ("metrics.jsonl", "curves.png", "checkpoints", ".*.partial", "config.json",
           "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
           "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.*",
           "merges.txt", ARGS)  # fmt: skip
# Flags that may change when a run is continued: they do not alter its steps (or only how many there
# are). What decides over the training pairs is compared through their hash.
PAIRS = {"data", "preference", "template", "max_length", "eval_share", "data_hash"}
FREE = PAIRS | {"epochs", "steps", "micro_batch_tokens", "share_prefix", "eval_data", "eval_every",
                "activation_checkpointing", "save_every", "keep", "stop_after", "resume",
                "overwrite", "out", "audit", "cache"}  # fmt: skip


def check_folder(args: argparse.Namespace, models: list[Path]) -> None:
    """Stops where writing to --out would lose something; changes nothing."""
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file; give a folder")
    if any(out.resolve() == model.resolve() for model in models):
        raise RunError(
            f"--out {out} is the folder of a model that this run reads; give another --out"
        )
    if args.resume and args.overwrite:
        raise RunError("--resume continues a run and --overwrite replaces it; give one of them")
    is_run = (out / ARGS).is_file()
    if args.resume:
        newest(out)
    elif is_run and not args.overwrite:
        raise RunError(
            f"--out {out} holds another run; continue it with --resume, replace it with --overwrite, "
            "or give another --out"
        )
    elif not is_run and out.is_dir() and any(out.iterdir()):
        raise RunError(f"--out {out} holds files that are not a run's; give another --out")


def open_folder(args: argparse.Namespace) -> None:
    """Makes --out ready: removes what --overwrite gives up, writes the arguments. Rank 0 alone."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for pattern in WRITTEN:
            for path in out.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / ARGS).write_text(json.dumps(vars(args), indent=2) + "\n")


def save(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    step: int,
    args: argparse.Namespace,
    world: World,
) -> None:
    """Writes checkpoints/step_NNNNNN: each rank its shards. Every rank must call it."""
    final = Path(args.out) / "checkpoints" / f"step_{step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
    dist.barrier()  # the folder is there
    try:
        dcp.save(_state(policy, optimizer, objective), checkpoint_id=partial)
    except dcp.api.CheckpointException as error:  # what failed on any rank, raised on all
        raise RunError(f"{final}: the checkpoint can't be written: {_causes(error)}") from error
    if world.is_main:
        run = {"step": step, "numbers": objective.numbers, "args": vars(args)}
        (partial / "run.json").write_text(json.dumps(run, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        for old in _complete(Path(args.out))[: -args.keep]:
            shutil.rmtree(old)


def load(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    args: argparse.Namespace,
) -> int:
    """Fills policy, optimizer and objective from the newest checkpoint of --out; returns its step.

    The checkpoint may come from another number of ranks. Every rank must call it.
    """
    path = newest(Path(args.out))
    run = json.loads((path / "run.json").read_text())
    now = vars(args)
    changed = [
        f"--{name} was {run['args'].get(name)!r}, now {now.get(name)!r}"
        for name in sorted((run["args"].keys() | now.keys()) - FREE)
        if run["args"].get(name) != now.get(name)
    ]
    if run["args"]["data_hash"] != args.data_hash:
        changed.append(
            f"the training pairs are others ({', '.join(sorted(PAIRS - {'data_hash'}))} decide over them)"
        )
    if changed:
        raise RunError(
            f"--resume continues the run of {path}, but its settings differ: {'; '.join(changed)}. "
            "Give the old ones, or start anew with another --out"
        )
    state = _state(policy, optimizer, objective)
    # Parameters that get no gradient have no optimizer state in the file, and need none.
    partly = dcp.DefaultLoadPlanner(allow_partial_load=True)
    try:
        whole = {name: part for name, part in state.items() if name != "optimizer"}
        dcp.load(whole, checkpoint_id=path)
        dcp.load({"optimizer": state["optimizer"]}, checkpoint_id=path, planner=partly)
    except dcp.api.CheckpointException as error:
        raise RunError(f"{path}: the checkpoint can't be read: {_causes(error)}") from error
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    if objective.saved is not None:
        set_model_state_dict(objective.saved, state["saved"])
    objective.numbers = run["numbers"]
    return run["step"]


def newest(out: Path) -> Path:
    """The newest complete checkpoint of a run."""
    complete = _complete(out)
    if not complete:
        raise RunError(
            f"--resume: {out} holds no checkpoint; checkpoints are written with --save_every or --stop_after"
        )
    return complete[-1]


def _complete(out: Path) -> list[Path]:
    """Checkpoints, oldest first. They get this name only when they are whole."""
    return sorted((out / "checkpoints").glob("step_" + "[0-9]" * 6))


def _causes(error: dcp.api.CheckpointException) -> str:
    return "; ".join(sorted({str(cause[0]) for cause in error.failures.values()}))


def _state(
    policy: nn.Module, optimizer: torch.optim.Optimizer, objective: Objective
) -> dict[str, object]:
    model, optimizer_state = get_state_dict(policy, optimizer)
    state = {"model": model, "optimizer": optimizer_state}
    if objective.saved is not None:
        objective.saved.reshard()  # a forward without a backward pass leaves the head gathered
        state["saved"] = get_model_state_dict(objective.saved)
    return state


def check_file(flag: str, name: str, suffix: str) -> None:
    """Stops where a new file can't be written, or stands already."""
    path = Path(name)
    if path.suffix != suffix:
        raise RunError(f"{flag} {name}: give a file that ends with {suffix}")
    if path.exists():
        raise RunError(f"{flag} {name} exists; give another name, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.unlink()
    except OSError as error:
        raise RunError(f"{flag} {name} can't be written: {in_a_line(error)}") from error


def write_records(path: Path, records: Iterable[dict]) -> None:
    """One JSON object a line; the file gets its name when it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# --- results of an evaluation ---------------------------------------------------------------------


def _beside(out: Path) -> tuple[Path, Path]:
    """Where new results are written, and where old ones wait while the new ones take their place."""
    return out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")


def check_results(args: argparse.Namespace) -> None:
    """Stops where --out can't be written, or would lose anything but an older evaluation's files."""
    out = Path(args.out).resolve()
    if not out.name:
        raise RunError(f"--out {args.out} is no folder that can be replaced; give another")
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {args.out} is a file; give a folder")
    partial, old = _beside(out)
    if old.exists() and not out.exists():  # a replacement was interrupted half-way
        os.rename(old, out)
    if out.is_dir():
        own = {ARGS, *_files_of(out / ARGS)} if (out / ARGS).exists() else set()
        if foreign := sorted(path.name for path in out.iterdir() if path.name not in own):
            raise RunError(
                f"--out {args.out} holds files that are not an evaluation's ({', '.join(foreign[:3])}); "
                "give another --out"
            )
    shutil.rmtree(partial, ignore_errors=True)  # what a killed evaluation left
    partial.mkdir(parents=True)  # can it be written? Better to know before than after scoring.
    partial.rmdir()


def _files_of(path: Path) -> list[str]:
    """The files that an evaluation's arguments say it wrote."""
    try:
        return list(json.loads(path.read_text()).get("files", []))
    except (ValueError, AttributeError, TypeError) as error:
        raise RunError(
            f"{path} is not an evaluation's ({in_a_line(error)}); give another --out"
        ) from error


def read_results(folder: str) -> tuple[dict, dict]:
    """(arguments, figures) of the evaluation whose results are in a folder."""
    try:
        settings, figures = (
            json.loads((Path(folder) / name).read_text()) for name in (ARGS, "metrics.json")
        )
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} holds no results of evaluate.py: {in_a_line(error)}") from error
    if not (isinstance(settings, dict) and isinstance(figures, dict)):
        raise RunError(f"{folder} holds no results of evaluate.py: they must be JSON objects")
    return settings, figures


@contextmanager
def results_folder(args: argparse.Namespace) -> Iterator[Path]:
    """A new folder to write results into, which takes the place of --out when all are whole.

    If that fails, --out has what it had; if it is killed in between, the next evaluation sees to
    that. Rank 0 alone.
    """
    out = Path(args.out).resolve()
    partial, old = _beside(out)
    try:
        partial.mkdir(parents=True)
        yield partial
        settings = {**vars(args), "files": sorted(path.name for path in partial.iterdir())}
        (partial / ARGS).write_text(json.dumps(settings, indent=2) + "\n")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(partial, out)
        except OSError:
            os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunError(f"results can't be written to '{args.out}': {in_a_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
