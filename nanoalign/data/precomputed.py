"""--precompute_reference: the log-probabilities of a reference, computed once and kept on disk.

    CACHE/reference/KEY/logps.safetensors    (S,) float32: of all responses, row after row
    CACHE/reference/KEY/checksums.json

KEY is a hash of the weights of the reference, its precision and the rows.
"""

import gc
import hashlib
import math
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from nanoalign.batch import Batch, Row
from nanoalign.data import cache
from nanoalign.data.split import Data, fingerprint
from nanoalign.distributed import print0, progress_bar, sum_over_ranks
from nanoalign.errors import RunError
from nanoalign.files.checksums import digest_of_weights
from nanoalign.flags import Parser
from nanoalign.loop import Batcher
from nanoalign.model import Policy
from nanoalign.packing.self_check import LAYOUT_TOLERANCE
from nanoalign.ranks.collectives import gather, on_main


def add_arguments(parser: Parser) -> None:
    parser.add_argument_group("precomputed reference").add_argument(
        "--precompute_reference",
        action="store_true",
        help="run the reference once, before the policy is loaded, and keep its log-probabilities "
        "in --cache",
    )
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """Returns the error of flags that do not go with --precompute_reference; None if all do."""
    if not args.precompute_reference:
        return None
    for reason, refused in (
        (f"--loss {args.loss} has no reference", args.reference == "none"),
        ("--loss kto needs it again, for responses to other prompts", args.loss == "kto"),
        ("--ld_alpha needs its log-probabilities of single tokens", args.ld_alpha is not None),
        ("--sync_reference_every moves it", args.sync_reference_every is not None),
    ):
        if refused:
            return f"--precompute_reference runs the reference once, but {reason}"
    return None


FORMAT = 3  # version of the files; part of their key
LOGPS = "logps.safetensors"  # in a folder, with checksums.json
KEY = "reference_logps"  # in Row.extra and Batch.extra
CHECKED_ROWS = 8  # whose kept log-probabilities are compared with those of the reference


class Precomputed:
    """A reference that returns the log-probabilities in a batch: Batch -> (S,), in nats.

    tolerances: (of losses, of rewards), which self_check.check_start allows where policy and
        reference are one function. Values were computed in other batches than those of training,
        so they are rounded otherwise. A loss may multiply the difference by any factor (ipo_sum by
        1 / beta), so losses have no limit.
    """

    def __init__(self, tolerances: tuple[float, float]):
        self.tolerances = tolerances

    def __call__(self, batch: Batch) -> Tensor:
        return batch.extra[KEY]


class ReferencedRows(Sequence[Row]):
    """Rows, in memory or on disk, with the log-probabilities of a reference in their `extra`."""

    def __init__(self, rows: Sequence[Row], logps: np.ndarray, ends: np.ndarray):
        """logps: of all responses, (S,). ends: row n has logps[ends[n] : ends[n + 1]]; (N + 1,)."""
        self.rows, self.logps, self.ends = rows, logps, ends
        for name in ("lengths", "limits", "fingerprint"):  # what rows on disk know of themselves
            if hasattr(rows, name):
                setattr(self, name, getattr(rows, name))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]  # raises IndexError; counts from the end
        row, logps = self.rows[place], self.logps[self.ends[place] : self.ends[place + 1]]
        return replace(row, extra=row.extra | {KEY: logps})


def precompute(
    load: Callable[[], Policy], folder: Path, data: Data, batcher: Batcher, args: Namespace
) -> tuple[Data, Precomputed]:
    """Returns the data, whose rows have the log-probabilities of the reference, and their reader.

    load: loads the reference, which is in `folder`; it is freed at the end. Prints for each set of
    rows whether they were computed or read. A collective; raises RunError as `referenced` does.
    """
    weights = gather(on_main(batcher.world, partial(digest_of_weights, folder)), batcher.world)[0]
    reference, name = load(), f"--reference {args.reference or args.model}"
    folder_of_values = cache.cache_folder(args.cache) / "reference"
    sets = {"data": data.rows, "held out": data.held_out}
    for of, rows in sets.items():
        if not len(rows):  # nothing is held out
            continue
        key = "\n".join([str(FORMAT), str(weights), fingerprint(rows), str(reference.dtype)])
        path = folder_of_values / hashlib.sha256(key.encode()).hexdigest()[:32]
        sets[of] = referenced(rows, reference, path, batcher, f"{name}, {of}")
    first = data.rows[: args.batch_size]
    longest = max(len(response) for row in first for response in row.responses)
    rewards = (args.beta or 1.0) * LAYOUT_TOLERANCE[reference.dtype] * (longest + 5)
    del reference
    gc.collect()  # sharded modules have cycles of references
    data = data._replace(rows=sets["data"], held_out=sets["held out"])
    return data, Precomputed((math.inf, rewards))


def referenced(
    rows: Sequence[Row], reference: Policy, path: Path, batcher: Batcher, name: str
) -> ReferencedRows:
    """Returns the rows with the log-probabilities in the folder `path`; prints where they are from.

    If it does not exist, they are computed, and the folder is written. name: of the reference and
    the rows. A collective: raises RunError on all ranks if the folder is damaged, can't be written,
    or has other values than the reference computes now.
    """
    start = time.perf_counter()
    counts = getattr(rows, "responses", None)  # rows on disk know theirs without being read
    counts = [len(row.responses) for row in rows] if counts is None else counts
    ends, world = np.cumsum([0, *counts]), batcher.world
    logps = gather(on_main(world, partial(read, path)), world)[0]
    how = "read from"
    if logps is None:
        unfinished = on_main(world, partial(cache.begin, path))  # an error before all is computed
        try:
            logps = compute(reference, rows, ends, batcher)
            on_main(world, partial(write, logps, unfinished, path))
        finally:
            if unfinished:
                shutil.rmtree(unfinished, ignore_errors=True)
        how = f"computed in {time.perf_counter() - start:.1f} s, kept in"
    print0(f"{'reference':<11} {name}: {len(logps):,} responses, {how} {path}")
    result = ReferencedRows(rows, logps, ends)
    check_live(reference, result, batcher, path)
    return result


def read(path: Path) -> np.ndarray | None:
    """The log-probabilities in a folder, (S,); None if it does not exist.

    Raises RunError if its files are damaged.
    """
    if not path.exists():
        return None
    cache.check(path, "the precomputed log-probabilities")
    return load_file(path / LOGPS)["logps"]


def write(logps: np.ndarray, unfinished: Path, path: Path) -> None:
    """Writes log-probabilities and checksums into the folder `unfinished`; renames it to `path`.

    If another run has written `path` meanwhile, both stay as they are. Raises RunError if a file
    or the name can't be written.
    """
    with cache.writing(path.parent):
        (unfinished / LOGPS).write_bytes(save({"logps": logps}))
    cache.complete(unfinished, path)


@torch.no_grad()
def compute(
    reference: Policy, rows: Sequence[Row], ends: np.ndarray, batcher: Batcher
) -> np.ndarray:
    """Returns the log-probabilities of all responses, (S,) float32, on every rank. A collective.

    ends: as in ReferencedRows.
    """
    logps = torch.zeros(int(ends[-1]))  # each rank fills in those of its batches
    shown = batcher.world.is_main
    with progress_bar(len(rows), "row", shown, desc="reference") as progress:
        for batch in batcher.all(rows):
            places = [np.arange(ends[i], ends[i + 1]) for i in batch.rows]
            values = reference(batch).cpu()
            if places:  # else it is a filler
                logps[np.concatenate(places)] = values
            progress.update(min(len(places) * batcher.world.size, len(rows) - progress.n))
    return sum_over_ranks(logps).numpy()


@torch.no_grad()
def check_live(reference: Policy, rows: ReferencedRows, batcher: Batcher, path: Path) -> None:
    """Raises RunError if values of some rows differ from those that the reference computes now.

    Differences of rounding are allowed. path: the folder of the values, for the error.
    """
    last = len(rows) - 1
    picked = sorted({n * last // (CHECKED_ROWS - 1) for n in range(CHECKED_ROWS)})
    batch = batcher.collate([rows[n] for n in picked]).to(batcher.world.device)
    # As in self_check.check_layout: errors add up over the tokens of a response.
    off = ((reference(batch) - batch.extra[KEY]).abs() / (batch.lengths + 5)).max().item()
    tolerance = LAYOUT_TOLERANCE[reference.dtype]
    if not off <= tolerance:
        raise RunError(
            f"the precomputed log-probabilities in {path} differ from those that the reference "
            f"computes now by up to {off:.2g} nats per token (allowed: {tolerance:g}); "
            f"{cache.AGAIN}"
        )
