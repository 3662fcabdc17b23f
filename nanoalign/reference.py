"""A reference that is not there: its log-probabilities, computed once and kept on disk.

A frozen reference says the same of a row in every epoch and every run. --precompute_reference computes
that once, before the policy is loaded, and keeps it under a key of what it depends on: rows, weights,
precision. Training then holds one model in place of two, and runs one forward less. What is found on disk
is first compared with the living reference on a few rows.
"""

import argparse
import gc
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanoalign import loop
from nanoalign.cache import cache_folder
from nanoalign.checks import LAYOUT_TOLERANCE, START_TOLERANCE, check_layout
from nanoalign.distributed import World, max_over_ranks, on_main, print0, sum_over_ranks
from nanoalign.errors import RunError, in_a_line
from nanoalign.models import Policy
from nanoalign.rows import Batch, Row, collate
from nanoalign.store import StoredRows

CHECKED_ROWS = 8
VERSION = "1"  # of what is kept; part of the key


class Precomputed:
    """In place of a reference: what it said of a batch's responses, in nats, (S,)."""

    def __call__(self, batch: Batch) -> Tensor:
        return batch.reference_logps


class ReferencedRows(StoredRows):
    """Stored rows, each with what the reference says of its responses."""

    def __init__(self, rows: StoredRows, logps: np.ndarray):
        super().__init__(rows.store, rows.indices)
        self.logps, self.starts = logps, rows.response_starts

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        logps = self.logps[self.starts[place] : self.starts[place + 1]]
        return replace(super().__getitem__(place), reference_logps=logps)


def precompute(
    load: Callable[[], Policy],
    folder: Path,
    sets: dict[str, StoredRows],
    args: argparse.Namespace,
    world: World,
) -> dict[str, StoredRows]:
    """The sets of rows, each row with the reference's log-probabilities. Every rank must call it.

    load: loads the reference from `folder`; it is freed at the end.
    """
    weights = on_main(world, partial(_digest_of_weights, folder))  # rank 0 alone looks at the disk
    reference = load()
    for rows in sets.values():
        reference.check_fits(rows)
    check_layout(reference, sets["data"], args.share_prefix, world, f"--reference {args.reference}")
    referenced = {
        name: _referenced(name, rows, reference, weights, args, world) if rows else rows
        for name, rows in sets.items()
    }
    del reference
    gc.collect()  # sharded modules are cycles of references
    return referenced


def _referenced(
    name: str,
    rows: StoredRows,
    reference: Policy,
    weights: str | None,
    args: argparse.Namespace,
    world: World,
) -> ReferencedRows:
    begun = time.monotonic()
    parts = [VERSION, str(weights), rows.fingerprint(), str(reference.compute_dtype)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    path = cache_folder(args.cache) / "reference" / f"{key}.npy"
    starts = rows.response_starts
    logps = _kept(path, int(starts[-1]), world)
    if logps is None:
        on_main(world, partial(_open, path.parent))  # better to know now than when all is computed
        logps = _compute(reference, rows, starts, args, world)
        on_main(world, partial(_keep, logps, path))
        how = f"computed in {time.monotonic() - begun:.1f} s, kept in"
    else:
        how = "read from"
    referenced = ReferencedRows(rows, logps)
    _check_live(reference, referenced, args, world, path)
    print0(f"{'reference':<11} {args.reference}, {name}: {starts[-1]:,} responses, {how} {path}")
    return referenced


def _digest_of_weights(folder: Path) -> str:
    """A hash of what a model's function depends on."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _kept(path: Path, count: int, world: World) -> np.ndarray | None:
    """What rank 0 finds on disk, on every rank."""
    found = on_main(world, partial(_read, path, count))
    if not max_over_ranks(torch.tensor(float(found is not None))):
        return None
    logps = torch.zeros(count) if found is None else torch.from_numpy(found)
    return sum_over_ranks(logps).numpy()


def _read(path: Path, count: int) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        logps = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"{path} can't be read ({in_a_line(error)}); remove the file") from error
    if logps.shape != (count,):
        raise RunError(f"{path} holds {logps.shape} numbers, not {count}; remove the file")
    return logps


def _open(folder: Path) -> str:
    """A new file in the cache, under a name that no other run has."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".partial.npy", ".", folder)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise RunError(f"{folder} can't be written: {in_a_line(error)}; give --cache") from error
    return name


def _keep(logps: np.ndarray, path: Path) -> None:
    """Under its name when it is whole."""
    name = _open(path.parent)
    try:
        np.save(name, logps)
        os.replace(name, path)
    except OSError as error:
        raise RunError(f"{path} can't be written: {in_a_line(error)}; give --cache") from error
    finally:
        Path(name).unlink(missing_ok=True)


@torch.no_grad()
def _compute(
    reference: Policy,
    rows: StoredRows,
    starts: np.ndarray,
    args: argparse.Namespace,
    world: World,
) -> np.ndarray:
    """(responses,) float32: each rank its micro-batches, and 0 where another has computed."""
    logps = torch.zeros(int(starts[-1]))
    with tqdm(total=len(rows), unit="row", desc="reference", disable=not world.is_main) as progress:
        for group, batch in loop.all_batches(rows, args, world):
            said = reference(batch).cpu()
            if group:  # else the batch only keeps the other ranks company
                logps[np.concatenate([np.arange(starts[i], starts[i + 1]) for i in group])] = said
            progress.update(len(group) * world.size)
    return sum_over_ranks(logps).numpy()


@torch.no_grad()
def _check_live(
    reference: Policy, rows: ReferencedRows, args: argparse.Namespace, world: World, path: Path
) -> None:
    """Stops where a few rows have not what the reference says of them."""
    picked = [
        rows[i] for i in {n * (len(rows) - 1) // (CHECKED_ROWS - 1) for n in range(CHECKED_ROWS)}
    ]
    batch = collate(picked, args.share_prefix).to(world.device)
    live = reference(batch)
    off = (live - batch.reference_logps).abs() / reference.rounding(live, batch)
    tolerance = LAYOUT_TOLERANCE[reference.compute_dtype]
    if not off.max() <= tolerance:
        raise RunError(
            f"{path}: log-probabilities are up to {off.max():.2g} nats a token from what --reference "
            f"{args.reference} says now (at most {tolerance:g} allowed); remove the file"
        )


def start_tolerances(
    policy: Policy, rows: Sequence[Row], args: argparse.Namespace
) -> tuple[float, float]:
    """By how much losses, and rewards, may be off where policy and reference are the same function.

    Other rows stood beside these when the reference was asked, so that sums may be rounded otherwise. How
    much a loss makes of that is its own affair (ipo_sum 1 / beta, sppo_hard 1,000 times): rewards tell.
    """
    if not args.precompute_reference:
        return START_TOLERANCE, START_TOLERANCE
    longest = max(len(response) for row in rows for response in row.responses)
    return math.inf, (args.beta or 1.0) * LAYOUT_TOLERANCE[policy.compute_dtype] * (longest + 5)
