"""Checkpoints of a run: each rank writes its shards, and any number of ranks can read them."""

import hashlib
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
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

from nanoalign.batch import Row
from nanoalign.distributed import World, on_main
from nanoalign.errors import RunError
from nanoalign.loop import Objective
from nanoalign.runs import METRICS

FORMAT = 1  # version of a checkpoint; another one is refused
# Flags that decide over the training rows, which are compared by their fingerprint.
DATA = {"data", "preference", "template", "max_length", "eval_share", "unpaired"}
# Flags that may change: they do not alter the steps of a run, or only how many there are.
FREE = DATA | {"epochs", "steps", "micro_batch_tokens", "share_prefix", "eval_data", "eval_every",
               "activation_checkpointing", "save_every", "keep", "stop_after", "resume",
               "overwrite", "out", "audit", "cache", "precompute_reference", "shard_size",
               "gradient_sync", "timeout"}  # fmt: skip


class Checkpoints:
    """Writes the checkpoints of a run when they are due, and reads the newest one."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, objective: Objective,
        rows: Sequence[Row], args: Namespace, world: World,
    ):  # fmt: skip
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.args, self.world, self.out = args, world, Path(args.out)
        self.rows = rows

    def __call__(self, step: int, last: bool) -> bool:
        """Writes a checkpoint if it is due; True if the run is to end: the `save` of loop.train."""
        args, stop = self.args, step == self.args.stop_after
        if stop or (args.save_every and (last or step % args.save_every == 0)):
            self.save(step)
        return stop

    def save(self, step: int) -> None:
        """Writes checkpoints/step_NNNNNN, which gets its name when it is whole. A collective."""
        final = self.out / "checkpoints" / f"step_{step:06d}"
        partial_ = final.with_name(f".{final.name}.partial")
        if self.world.is_main:
            shutil.rmtree(partial_, ignore_errors=True)  # of a run that was killed
            partial_.mkdir(parents=True)
        dist.barrier()  # the folder is there
        try:
            dcp.save(self.state(), checkpoint_id=partial_)
        except dcp.api.CheckpointException as error:  # a failure of any rank, raised on all
            raise RunError(f"{final}: the checkpoint can't be written: {causes(error)}") from error
        if self.world.is_main:
            about = {"format": FORMAT, "step": step, "state": self.objective.state,
                     "rows": fingerprint(self.rows), "args": vars(self.args)}  # fmt: skip
            (partial_ / "run.json").write_text(json.dumps(about, indent=2))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial_, final)
            for old in complete(self.out)[: -self.args.keep]:
                shutil.rmtree(old)

    def resume(self) -> int:
        """Fills model, optimizer and objective from the newest checkpoint; returns its step.

        A collective. Raises RunError where settings or data differ from those of the checkpoint.
        """
        path = newest(self.out)
        about = json.loads((path / "run.json").read_text())
        if about.get("format") != FORMAT:
            raise RunError(
                f"{path} has the format {about.get('format', 0)} of another version of nanoalign, "
                f"not {FORMAT}; continue with that version, or start anew with another --out"
            )
        now, before = vars(self.args), about["args"]
        changed = [
            f"--{name} was {before.get(name)!r}, now {now.get(name)!r}"
            for name in sorted((before.keys() | now.keys()) - FREE)
            if before.get(name) != now.get(name)
        ]
        if about["rows"] != fingerprint(self.rows):
            changed.append(f"the training pairs are others ({', '.join(sorted(DATA))} decide)")
        if changed:
            raise RunError(
                f"--resume continues the run of {path}, but its settings differ: "
                f"{'; '.join(changed)}. Give the old ones, or start anew with another --out"
            )
        state = self.state()
        # Parameters that get no gradient have no optimizer state in the files.
        partly = dcp.DefaultLoadPlanner(allow_partial_load=True)
        try:
            rest = {name: part for name, part in state.items() if name != "optimizer"}
            dcp.load(rest, checkpoint_id=path)
            dcp.load({"optimizer": state["optimizer"]}, checkpoint_id=path, planner=partly)
        except dcp.api.CheckpointException as error:
            raise RunError(f"{path}: the checkpoint can't be read: {causes(error)}") from error
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=get_model_state_dict(self.model) | state["model"],
            optim_state_dict=state["optimizer"],
        )
        for name, module in self.objective.modules.items():
            set_model_state_dict(module, state[name])
        self.objective.state = about["state"]
        on_main(self.world, partial(forget_metrics, self.out / METRICS, about["step"]))
        return about["step"]

    def state(self) -> dict[str, object]:
        """What is saved: trained parameters, optimizer state, and further modules."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        parameters = self.model.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in parameters if not parameter.requires_grad}
        state = {"model": {k: v for k, v in model.items() if k not in frozen}}
        state["optimizer"] = optimizer
        for name, module in self.objective.modules.items():
            module.reshard()  # a forward without a backward pass leaves parameters gathered
            state[name] = get_model_state_dict(module)
        return state


def newest(out: Path) -> Path:
    """The newest complete checkpoint of a run."""
    found = complete(out)
    if not found:
        raise RunError(
            f"--resume: {out} has no checkpoint; --save_every or --stop_after write checkpoints"
        )
    return found[-1]


def complete(out: Path) -> list[Path]:
    """Checkpoints, oldest first. They get this name only when they are whole."""
    return sorted((out / "checkpoints").glob("step_" + "[0-9]" * 6))


def causes(error: dcp.api.CheckpointException) -> str:
    return "; ".join(sorted({str(cause[0]) for cause in error.failures.values()}))


def forget_metrics(path: Path, step: int) -> None:
    """Drops the metrics behind a step, and a line that was torn when the run was killed."""
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    temporary = path.with_name(".metrics.partial")
    temporary.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    os.replace(temporary, path)


def fingerprint(rows: Sequence[Row]) -> str:
    """A hash of the tokens, pairs and margins of all rows in order. Rows on disk know theirs."""
    if hasattr(rows, "fingerprint"):
        return rows.fingerprint()
    return hashlib.sha256(b"".join(map(digest, rows))).hexdigest()


def digest(row: Row) -> bytes:
    """16 bytes that differ where two rows differ in tokens, pairs or values of pairs."""
    found = hashlib.blake2b(digest_size=16)
    for part in (row.prompt, *row.responses):
        found.update(len(part).to_bytes(4, "little") + part.tobytes())
    found.update(repr(row.pairs).encode())
    for name, values in sorted(row.extra.items()):
        if name != "reference_logps":  # of the reference, not of the data
            found.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return found.digest()
