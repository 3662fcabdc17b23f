"""Checkpoints of a run: each rank writes its shards, and any number of ranks can read them.

    checkpoints/step_000100/run.json        format version, step, flags, fingerprint of the data,
                                            digests of the models
    checkpoints/step_000100/*.distcp        shards of parameters and optimizer state
    checkpoints/step_000100/checksums.json  of all of these: see checksums.py

A checkpoint is written to a hidden folder, which is renamed when it is complete.
"""

import json
import os
import shutil
import zlib
from argparse import Namespace
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from nanoalign.batch import Row
from nanoalign.data.split import fingerprint
from nanoalign.distributed import World
from nanoalign.errors import RunError
from nanoalign.files import checksums
from nanoalign.files.run_folder import (
    METRICS,
    checkpoint_of,
    complete_checkpoints,
    restore_metrics,
)
from nanoalign.files.text import in_a_line, read_json
from nanoalign.files.writing import sync, write_text
from nanoalign.loop import Objective, check_parameters
from nanoalign.model import Scorer
from nanoalign.ranks.collectives import gather, on_every, on_main
from nanoalign.runs.unpickle import Planner, Reader

FORMAT = 3  # version of a checkpoint; another one is refused
ABOUT = "run.json"
# Types of the values in run.json beside the format.
KINDS = {"step": int, "state": dict, "rows": str, "models": dict, "args": dict, "metrics": list}
# Flags that select the training rows. The rows are compared by their fingerprint instead.
DATA = {"data", "keys", "preference", "template", "template_args", "template_date", "max_length",
        "eval_share"}  # fmt: skip
# Flags that may differ: they do not alter the steps of a run, or only how many there are.
FREE = DATA | {"activation_checkpointing", "audit", "cache", "compile", "epochs", "eval_data",
               "eval_every", "gradient_sync", "keep", "micro_batch_tokens", "out", "overwrite",
               "precompute_reference", "resume", "save_every", "shard_size", "share_prefix",
               "steps", "stop_after", "symmetric_memory", "timeout", "track",
               "track_project"}  # fmt: skip


@dataclass(eq=False)
class Checkpoints:
    """Writes checkpoints of a run, and continues it from the newest one."""

    model: Scorer
    optimizer: torch.optim.Optimizer
    objective: Objective
    rows: Sequence[Row]  # the training rows
    args: Namespace
    world: World
    folders: dict[str, Path]  # of the models that the run starts from, by the flag that names each
    inputs: dict[str, object] = field(default_factory=dict, init=False)  # see read_inputs

    def read_inputs(self) -> dict[str, object]:
        """Returns what the run computes from: a hash of its rows ("rows"), and hashes ("models").

        "models" has one of each model's files, by its flag. A collective. The files, perhaps of
        many gigabytes, are read in the first call.
        """

        def digests() -> dict[str, str]:
            return {k: checksums.digest_of_weights(folder) for k, folder in self.folders.items()}

        if not self.inputs:
            models = gather(on_main(self.world, digests), self.world)[0]
            self.inputs = {"rows": fingerprint(self.rows), "models": models}
        return self.inputs

    def write_checkpoint(self, step: int) -> None:
        """Writes checkpoints/step_NNNNNN, and removes all but the newest --keep. A collective.

        Raises RunError if a parameter is not finite, or the checkpoint can't be written.
        """
        check_parameters(self.model, step)
        inputs, final = self.read_inputs(), checkpoint_of(Path(self.args.out), step)
        folder, temporary = final.parent, final.with_name(f".{final.name}.partial")

        def prepare() -> None:
            for path in folder.glob(".*.partial"):  # of a run that was killed
                shutil.rmtree(path)
            folder.mkdir(exist_ok=True)  # not --out, which someone may have removed
            sync(folder.parent)
            temporary.mkdir()

        def complete() -> None:
            path, lines = Path(self.args.out, METRICS), b""
            if path.exists():
                lines = path.read_bytes()
                sync(path)
            about = {
                "format": FORMAT,
                "step": step,
                "state": self.objective.state,
                **inputs,
                "args": vars(self.args),
                "metrics": [len(lines), zlib.crc32(lines)],
            }
            write_text(temporary / ABOUT, json.dumps(about, indent=2))
            of_files = checksums.checksums([temporary / ABOUT, temporary / ".metadata"])
            for of_shards in of_ranks:
                of_files |= of_shards
            checksums.write(temporary, of_files)
            if final.exists():
                remove(final)
            os.rename(temporary, final)
            sync(folder)
            for old in complete_checkpoints(Path(self.args.out))[: -self.args.keep]:
                remove(old)

        on_main(self.world, prepare)
        try:
            dcp.save(self.state(), checkpoint_id=temporary)
        except dcp.api.CheckpointException as error:  # a failure of any rank, raised on all
            raise RunError(f"{final}: the checkpoint can't be written: {causes(error)}") from error
        shards = f"__{self.world.rank}_*"  # of this rank
        of_rank = on_every(self.world, lambda: checksums.checksums(temporary.glob(shards)))
        of_ranks = gather(of_rank, self.world)
        on_main(self.world, complete)

    def resume(self) -> int:
        """Loads the newest checkpoint, which must exist (refusal_of_resume checks it).

        Returns its step. Removes the lines of later steps from metrics.jsonl. A collective. Raises
        RunError as `load`, and if metrics.jsonl was changed.
        """
        about = self.load(complete_checkpoints(Path(self.args.out))[-1], "--resume")
        path = Path(self.args.out, METRICS)
        on_main(self.world, partial(restore_metrics, about["metrics"], path))
        return about["step"]

    def load(self, path: Path, flag: str) -> dict:
        """Loads model, optimizer and objective, in place, from a checkpoint; returns its run.json.

        flag: that asks for it, for errors. A collective. Raises RunError if the checkpoint is
        damaged, or if the training rows or the initial models are not those of the checkpoint.
        """
        share = (self.world.rank, self.world.size)
        on_every(self.world, partial(check_whole, path, share=share))
        about, inputs = read_about(path), self.read_inputs()
        written, own = (
            {k: type(v) for k, v in state.items()}
            for state in (about["state"], self.objective.state)
        )
        if written != own:
            raise damaged(path, f"{ABOUT} has another 'state' than a run writes")
        if about["rows"] != inputs["rows"]:
            raise RunError(
                f"{flag}: the training pairs are not those of {path}; give the same data and the "
                f"same {', '.join(sorted(DATA - {'data'}))}, or start a new run with another --out"
            )
        for role, folder in self.folders.items():  # a reference and frozen weights are not in it
            if about["models"].get(role) != inputs["models"][role]:
                name = getattr(self.args, role.strip("-"))
                raise RunError(
                    f"{flag}: the files of {role} {name} ({folder}) are not those with which "
                    f"{path} was written; restore them, or start a new run with another --out"
                )
        state = self.state()
        # Parameters that get no gradient have no optimizer state in the files.
        planner, reader = Planner(allow_partial_load=True), Reader(path)
        modules = {name: part for name, part in state.items() if name != "optimizer"}
        try:  # read_metadata first, because dcp.load prints a traceback where that is damaged
            reader.read_metadata()
            dcp.load(modules, storage_reader=reader, planner=Planner())
            dcp.load({"optimizer": state["optimizer"]}, storage_reader=reader, planner=planner)
        except dcp.api.CheckpointException as error:
            raise damaged(path, causes(error)) from error
        except (OSError, EOFError, UnpicklingError) as error:
            raise damaged(path, in_a_line(error)) from error
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=get_model_state_dict(self.model) | state["model"],
            optim_state_dict=state["optimizer"],
        )
        for name, module in self.objective.modules.items():
            set_model_state_dict(module, state[name])
        self.objective.state = about["state"]
        return about

    def state(self) -> dict[str, object]:
        """Returns what a checkpoint stores: trained parameters, optimizer state, further modules.

        A module that was gathered is sharded again.
        """
        model, optimizer = get_state_dict(self.model, self.optimizer)
        parameters = self.model.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in parameters if not parameter.requires_grad}
        state = {"model": {k: v for k, v in model.items() if k not in frozen}}
        state["optimizer"] = optimizer
        for name, module in self.objective.modules.items():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without a backward pass leaves parameters gathered
            state[name] = get_model_state_dict(module)
        return state


def refusal_of_resume(args: Namespace) -> str | None:
    """Returns why --resume is refused, by the flags and the newest checkpoint's run.json, or None.

    Raises RunError as read_about does.
    """
    if args.overwrite:
        return "--resume continues a run and --overwrite replaces it; give one of them"
    checkpoints = complete_checkpoints(Path(args.out))
    if not checkpoints:
        return f"--resume: {args.out} has no checkpoint; --save_every and --stop_after write them"
    newest, about = checkpoints[-1], read_about(checkpoints[-1])
    if args.stop_after is not None and args.stop_after <= about["step"]:
        return (
            f"--stop_after {args.stop_after}: {newest} is at step {about['step']}; give a later "
            "step, or leave it out"
        )
    compared = {"eval_data"} if args.keep_best or args.patience else set()  # losses of one set
    if not (changed := changes(about["args"], vars(args), FREE - compared)):
        return None
    return (
        f"--resume continues the run of {newest}, but settings differ: {changed}; give the old "
        "ones, or start a new run with another --out"
    )


def changes(before: dict, now: dict, free: Set[str], dashes: str = "--") -> str:
    """Returns what differs between two sets of flags, but for those that are free; "": nothing.

    dashes: what a name gets before it.
    """
    return "; ".join(
        f"{dashes}{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - free)
        if before.get(name) != now.get(name)
    )


def read_about(path: Path) -> dict:
    """Returns the run.json of a checkpoint.

    Raises RunError if it is damaged, or was written by another version.
    """
    check_whole(path, [ABOUT])
    try:
        about = read_json(path / ABOUT)
    except RunError as error:
        raise damaged(path, str(error)) from error
    if about.get("format") != FORMAT:
        found = f"{about.get('format')!r:.40}"
        raise RunError(
            f"{path} has format version {found}, this version of nanoalign reads {FORMAT}; "
            "continue with the version that wrote it, or start a new run with another --out"
        )
    for name, kind in KINDS.items():
        if not isinstance(about.get(name), kind):
            raise damaged(path, f"{ABOUT} has no '{name}' as a run writes it")
    if list(map(type, about["metrics"])) != [int, int]:
        raise damaged(path, f"{ABOUT} has no length and checksum as 'metrics'")
    if checkpoint_of(path.parents[1], about["step"]) != path:
        raise damaged(path, f"{ABOUT} is of step {about['step']}")
    return about


def remove(path: Path) -> None:
    """Removes a checkpoint; renames it first, because removing a folder can be interrupted."""
    hidden = path.with_name(f".{path.name}.partial")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def check_whole(
    path: Path, names: list[str] | None = None, share: tuple[int, int] = (0, 1)
) -> None:
    """Raises RunError, which says how to go on, if a file of a checkpoint is missing or changed.

    names, share: as in checksums.verify.
    """
    try:
        checksums.verify(path, names, share)
    except RunError as error:
        raise damaged(path, str(error)) from error


def causes(error: dcp.api.CheckpointException) -> str:
    """Returns the errors of all ranks in one line, each once."""
    return "; ".join(sorted({in_a_line(cause[0]) for cause in error.failures.values()}))


def damaged(path: Path, problem: str) -> RunError:
    """Returns the error for a damaged checkpoint, which says how to go on without it."""
    return RunError(
        f"the checkpoint {path} can't be read: {problem}; remove it to --resume from an older one, "
        "or train again, with --overwrite"
    )
