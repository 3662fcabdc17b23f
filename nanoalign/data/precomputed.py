"""What is kept on disk for further runs: encoded data, and the log-probabilities of a reference.

load.py         --data -> rows of a store, which is made if it is not there
encode.py       makes a store: all ranks of a host encode parts of the data
disk.py         the files of a store, and rows that are read from them
reference.py    --precompute_reference
folder.py       where all of it is kept
"""

import gc
import hashlib
import math
import shutil
import tempfile
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from nanoalign.batch import Batch, Row
from nanoalign.data.split import Data, fingerprint
from nanoalign.data.store import cache_folder, make_private, writing
from nanoalign.distributed import World, print0, progress_bar, sum_over_ranks
from nanoalign.errors import RunError, in_a_line
from nanoalign.files import checksums
from nanoalign.files.checksums import digest_of_weights
from nanoalign.flags import Parser
from nanoalign.loop import Batcher
from nanoalign.model import Policy
from nanoalign.packing.self_check import LAYOUT_TOLERANCE
from nanoalign.ranks.collectives import gather, on_main


def add_arguments(parser: Parser) -> None:
    parser.add_argument_group("precomputed reference").add_argument(
        "--precompute_reference", action="store_true",
        help="run the reference once, before the policy is loaded, and keep its log-probabilities "
        "in --cache")  # fmt: skip
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """What does not go with --precompute_reference, if anything does not."""
    if not args.precompute_reference:
        return None
    for reason, refused in (
        (f"--loss {args.loss} has no reference", args.reference == "none"),
        ("--loss kto needs it for responses to other prompts", args.loss == "kto"),
        ("--ld_alpha needs it for single tokens", args.ld_alpha is not None),
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
    """A reference whose log-probabilities are in the batches: Batch -> (S,), in nats.

    tolerances: of checks.check_start, for a policy that is the same function. The other rows of a
        batch differ from those when the values were computed, which changes the rounding of sums.
        A loss may multiply that by any factor (ipo_sum by 1 / beta), so only rewards are checked.
    """

    def __init__(self, tolerances: tuple[float, float]):
        self.tolerances = tolerances

    def __call__(self, batch: Batch) -> Tensor:
        return batch.extra[KEY]


class ReferencedRows(Sequence[Row]):
    """Rows, in memory or on disk, with the log-probabilities of a reference in their `extra`."""

    def __init__(self, rows: Sequence[Row], logps: np.ndarray, ends: np.ndarray):
        """logps: of all responses, (S,). ends: where those of each row end among them, (N + 1,)."""
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
    """The data with the log-probabilities of the reference, and what reads them. A collective.

    load: loads the reference from `folder`; it is freed at the end.
    """
    weights = gather(on_main(batcher.world, partial(digest_of_weights, folder)), batcher.world)[0]
    reference, name = load(), f"--reference {args.reference or args.model}"
    cache, sets = cache_folder(args.cache) / "reference", {"held out": data.held_out}
    for of, rows in {"data": data.rows, "held out": data.held_out}.items():
        if not len(rows):  # nothing is held out
            continue
        start = time.perf_counter()
        key = "\n".join([str(FORMAT), str(weights), fingerprint(rows), str(reference.dtype)])
        path = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
        sets[of], found = referenced(rows, reference, path, batcher, name)
        seconds = time.perf_counter() - start
        how = "read from" if found else f"computed in {seconds:.1f} s, kept in"
        print0(f"{'reference':<11} {name}, {of}: {len(sets[of].logps):,} responses, {how} {path}")
    first = data.rows[: args.batch_size]
    longest = max(len(response) for row in first for response in row.responses)
    rewards = (args.beta or 1.0) * LAYOUT_TOLERANCE[reference.dtype] * (longest + 5)
    del reference
    gc.collect()  # sharded modules have cycles of references
    data = data._replace(rows=sets["data"], held_out=sets["held out"])
    return data, Precomputed((math.inf, rewards))


def referenced(
    rows: Sequence[Row], reference: Policy, path: Path, batcher: Batcher, name: str
) -> tuple[ReferencedRows, bool]:
    """(the rows with the log-probabilities of a file, whether the file was there). A collective."""
    known = getattr(rows, "responses", None)  # of rows on disk
    sizes = [len(row.responses) for row in rows] if known is None else known
    ends = np.cumsum([0, *sizes])
    logps = read(path, int(ends[-1]), batcher.world)
    found = logps is not None
    if not found:
        on_main(batcher.world, partial(check_writable, path.parent))  # before all is computed
        logps = compute(reference, rows, ends, batcher)
        on_main(batcher.world, partial(write, logps, path))
    result = ReferencedRows(rows, logps, ends)
    check_live(reference, result, batcher, path, name)
    return result, found


@torch.no_grad()
def compute(
    reference: Policy, rows: Sequence[Row], ends: np.ndarray, batcher: Batcher
) -> np.ndarray:
    """The log-probabilities of all responses, (S,) float32. A collective."""
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
def check_live(
    reference: Policy, rows: ReferencedRows, batcher: Batcher, path: Path, name: str
) -> None:
    """Raises RunError where the values of some rows are not those that the reference computes."""
    last = len(rows) - 1
    picked = sorted({n * last // (CHECKED_ROWS - 1) for n in range(CHECKED_ROWS)})
    batch = batcher.collate([rows[n] for n in picked]).to(batcher.world.device)
    # As in checks.check_layout: errors add up over the tokens of a response.
    off = ((reference(batch) - batch.extra[KEY]).abs() / (batch.lengths + 5)).max().item()
    tolerance = LAYOUT_TOLERANCE[reference.dtype]
    if not off <= tolerance:
        raise RunError(
            f"{path}: its log-probabilities differ by up to {off:.2g} nats a token from those that "
            f"{name} computes now (at most {tolerance:g} allowed); remove that folder"
        )


# --- the file -------------------------------------------------------------------------------------


def read(path: Path, count: int, world: World) -> np.ndarray | None:
    """The values of the file that rank 0 finds, on every rank; None: no file. A collective."""
    found = on_main(world, partial(read_file, path, count))
    if not gather(found is not None, world)[0]:
        return None
    return sum_over_ranks(torch.zeros(count) if found is None else found).numpy()


def read_file(path: Path, count: int) -> Tensor | None:
    if not path.exists():
        return None
    try:
        checksums.verify(path)
        with safe_open(path / LOGPS, framework="pt") as file:
            logps = file.get_tensor(
                "logps"
            ).clone()  # a sum over ranks fills it, which a mapped file must not be
    except (RunError, SafetensorError) as error:
        raise RunError(f"{path} can't be read: {in_a_line(error)}; remove that folder") from error
    if logps.shape != (count,):
        raise RunError(f"{path} has {logps.numel()} values, not {count}; remove that folder")
    return logps


def check_writable(folder: Path) -> None:
    """Raises RunError for a folder in which no file can be made."""
    with writing(folder):
        make_private(folder)
        tempfile.TemporaryFile(dir=folder).close()


def write(logps: np.ndarray, path: Path) -> None:
    """Writes a folder that gets its name when it is whole."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with writing(path.parent):
        try:
            unfinished.mkdir()
            (unfinished / LOGPS).write_bytes(save({"logps": logps}))
            checksums.write(unfinished, checksums.checksums([unfinished / LOGPS]))
            unfinished.rename(path)
        except OSError:
            if not path.exists():  # else another run has computed the same meanwhile
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
