"""Rows in a folder, memory-mapped: what nanoalign/cache.py writes once and every rank of a host reads.

Each array is a plain .npy file, so the ranks of a host share the operating system's copy of it, and
memory holds what is in use. E examples, N rows (an example that is dropped has none), P parts (a
row's prompt and responses), B pairs, T tokens:

    tokens       (T,) int32    all parts, one behind the other
    part_starts  (P + 1,)      where each part begins among the tokens
    row_starts   (N + 1,)      where each row begins among the parts
    pairs        (B,)          chosen, rejected (-1: none), margin, dimension
    pair_starts  (N + 1,)      where each row's pairs begin
    ids          bytes         the rows' pair_ids in UTF-8
    id_starts    (N + 1,)      where each begins
    digests      (N, 16) uint8 rows.row_digest of each
    kept         (E,) bool     whether an example has a row
    prompts      (E,) uint64   a digest of its prompt
    counts       (E, 6) uint32 its pairs before any was dropped, and what REASONS count
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from nanoalign.errors import RunError, in_a_line
from nanoalign.records import Example, Pair, by_preference
from nanoalign.rows import REASONS, Row, drop_equal, encode_each, row_digest
from nanoalign.templates import resolve_template

PAIR = np.dtype([("chosen", "<i4"), ("rejected", "<i4"), ("margin", "<f8"), ("dimension", "<i4")])
# Array -> (type, shape of one element). Those of STARTS are lengths while they are in parts.
ARRAYS = {
    "tokens": ("<i4", ()), "part_starts": ("<i8", ()), "row_starts": ("<i8", ()),
    "pairs": (PAIR, ()), "pair_starts": ("<i8", ()), "ids": ("u1", ()), "id_starts": ("<i8", ()),
    "digests": ("u1", (16,)), "kept": ("?", ()), "prompts": ("<u8", ()),
    "counts": ("<u4", (1 + len(REASONS),)),
}  # fmt: skip
STARTS = ("part_starts", "row_starts", "pair_starts", "id_starts")
ABOUT = "about.json"


class Store:
    """A folder of encoded examples, and what of it is used: by examples."""

    def __init__(self, folder: Path):
        try:
            self.about = json.loads((folder / ABOUT).read_text())
            # A plain array over the same memory: slices of np.memmap take ten times as long.
            self.arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)
                for name in ARRAYS
            }
        except (OSError, ValueError) as error:
            raise RunError(
                f"{folder}: the encoded data can't be read: {in_a_line(error)}; remove that folder"
            ) from error
        self.everything = np.ones(len(self.arrays["kept"]), dtype=bool)

    def rows(self, examples: np.ndarray) -> "StoredRows":
        """The rows of the examples that a mask (E,) picks, in their order."""
        return StoredRows(self, np.flatnonzero(examples[self.arrays["kept"]]))

    def counts(self, examples: np.ndarray) -> tuple[int, int, Counter]:
        """(examples, their pairs before any was dropped, counts by reason) of those a mask (E,) picks."""
        pairs, *reasons = self.arrays["counts"][examples].sum(0, dtype=np.int64).tolist()
        return int(examples.sum()), pairs, Counter(dict(zip(REASONS, reasons, strict=True)))

    def hold_out(self, share: float, seed: int) -> np.ndarray:
        """A mask (E,) of `share` of the prompts, with all their pairs.

        Those are the first by a hash of (seed, prompt), whatever the order of the examples. A share
        above 0 holds out one prompt at least, and one prompt at least stays.
        """
        prompts = np.unique(self.arrays["prompts"])
        count = min(max(round(share * len(prompts)), share > 0), len(prompts) - 1)
        first = np.argsort(_mixed(prompts, seed))[:count]
        return np.isin(self.arrays["prompts"], prompts[first])

    def row(self, n: int) -> Row:
        arrays = self.arrays
        first, end = arrays["row_starts"][n : n + 2]
        starts = arrays["part_starts"][first : end + 1].tolist()
        prompt, *responses = (arrays["tokens"][start:end] for start, end in pairwise(starts))
        first, end = arrays["pair_starts"][n : n + 2]
        pairs = tuple(
            Pair(None if chosen < 0 else chosen, None if rejected < 0 else rejected, *rest)
            for chosen, rejected, *rest in arrays["pairs"][first:end].tolist()
        )
        first, end = arrays["id_starts"][n : n + 2]
        return Row(arrays["ids"][first:end].tobytes().decode(), prompt, tuple(responses), pairs)


class StoredRows(Sequence[Row]):
    """Rows of a store by their indices. Each is read when it is asked for; a slice copies none."""

    def __init__(self, store: Store, indices: np.ndarray):
        self.store, self.indices = store, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return StoredRows(self.store, self.indices[place])
        return self.store.row(int(self.indices[place]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, (N,)."""
        row_starts, part_starts = (self.store.arrays[name] for name in STARTS[1::-1])
        begin, end = row_starts[self.indices], row_starts[self.indices + 1]
        return part_starts[end] - part_starts[begin]

    @cached_property
    def response_starts(self) -> np.ndarray:
        """Where each row's responses begin among those of all rows, (N + 1,)."""
        row_starts = self.store.arrays["row_starts"]
        responses = row_starts[self.indices + 1] - row_starts[self.indices] - 1  # one is the prompt
        return np.concatenate([[0], np.cumsum(responses)])

    @property
    def limits(self) -> tuple[int, int]:
        """(token id, tokens of a prompt and one response) that no row of the store exceeds."""
        return self.store.about["largest"], self.store.about["longest"]

    def pair_lengths(self) -> np.ndarray:
        """Tokens of the chosen and of the rejected response of every pair, (B, 2); 0 where none is."""
        row_starts, part_starts, pair_starts, pairs = (
            self.store.arrays[name]
            for name in ("row_starts", "part_starts", "pair_starts", "pairs")
        )
        begin, end = pair_starts[self.indices], pair_starts[self.indices + 1]
        rows = np.repeat(np.arange(len(self)), end - begin)  # (B,) the row of each pair
        first = np.cumsum(end - begin) - (end - begin)  # (N,) of each row's pairs, among these
        own = pairs[begin[rows] + np.arange(len(rows)) - first[rows]]  # (B,)
        prompts = row_starts[self.indices][rows]  # (B,) a part; response k stands k + 1 behind it
        lengths = np.zeros((len(own), 2), dtype=np.int64)
        for side, name in enumerate(("chosen", "rejected")):
            there = own[name] >= 0
            part = prompts[there] + 1 + own[name][there]
            lengths[there, side] = part_starts[part + 1] - part_starts[part]
        return lengths

    def fingerprint(self) -> str:
        """A hash of all tokens and pairs in order: so a resumed run can tell whether it sees the same."""
        return hashlib.sha256(self.store.arrays["digests"][self.indices].tobytes()).hexdigest()


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014) of (seed, value): another order of the values for every seed."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


# --- writing --------------------------------------------------------------------------------------


def encode_part(
    examples: list[Example],
    tokenizer,
    template: str,
    max_length: int,
    conditions: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Consecutive examples as arrays of a part of a store, by name.

    conditions: preferences that the prompts are to name, each in an example of its own.
    """
    # The same under every condition.
    prompts = np.array([_prompt_digest(example) for example in examples], dtype=np.uint64)
    if conditions:
        examples = [part for each in examples for part in by_preference(each, conditions)]
        prompts = np.repeat(prompts, len(conditions))
    rows, counts = encode_each(examples, tokenizer, template, max_length)
    left = [drop_equal([row], count) for row, count in zip(rows, counts, strict=True)]
    kept = [row for some in left for row in some]
    parts = [part for row in kept for part in (row.prompt, *row.responses)]
    pairs = [
        (*(-1 if side is None else side for side in pair[:2]), *pair[2:])
        for row in kept
        for pair in row.pairs
    ]
    ids = [row.pair_id.encode() for row in kept]
    arrays = {
        "tokens": np.concatenate([np.empty(0, np.int32), *parts]),
        "part_starts": list(map(len, parts)),
        "row_starts": [1 + len(row.responses) for row in kept],
        "pairs": pairs,
        "pair_starts": [len(row.pairs) for row in kept],
        "ids": np.frombuffer(b"".join(ids), np.uint8),
        "id_starts": list(map(len, ids)),
        "digests": np.frombuffer(b"".join(map(row_digest, kept)), np.uint8),
        "kept": list(map(len, left)),
        "prompts": prompts,
        "counts": [
            (len(example.pairs), *(count[reason] for reason in REASONS))
            for example, count in zip(examples, counts, strict=True)
        ],
    }
    longest = [len(row.prompt) + max(map(len, row.responses)) for row in kept]
    names = {resolve_template(template, example, tokenizer) for example in examples}
    arrays = {
        name: np.asarray(arrays[name], dtype=kind).reshape(-1, *shape)
        for name, (kind, shape) in ARRAYS.items()
    }
    return arrays | {
        "sizes": np.array([len(arrays[name]) for name in ARRAYS]),
        "limits": np.array([arrays["tokens"].max(initial=0), max(longest, default=0)]),
        "templates": np.array(sorted(names)),
    }


def _prompt_digest(example: Example) -> int:
    """64 bits: a million prompts are all told apart but once in 37 million times."""
    return int.from_bytes(
        hashlib.blake2b(example.prompt_key().encode(), digest_size=8).digest(), "little"
    )


def join(parts: Sequence[Path], folder: Path) -> None:
    """Writes a new store of the parts (.npz of encode_part's arrays), one behind the other, into `folder`."""
    folder.mkdir()
    sizes = sum(_read(part, "sizes") for part in parts)
    limits, templates = np.zeros(2, np.int64), set()
    reached = dict.fromkeys(STARTS, 0)
    with ExitStack() as stack:
        files = {}
        for (name, (kind, shape)), size in zip(ARRAYS.items(), sizes.tolist(), strict=True):
            # Written, not mapped: a mapped file would count as this process's memory.
            file = files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(kind)),
                "fortran_order": False,
                "shape": (size + (name in STARTS), *shape),
            }
            np.lib.format.write_array_header_1_0(file, header)
            if name in STARTS:
                file.write(np.zeros(1, kind).tobytes())
        for part in parts:
            with np.load(part) as arrays:
                for name, file in files.items():
                    values = arrays[name]
                    if name in STARTS:
                        values = reached[name] + np.cumsum(values)
                        reached[name] = values[-1] if len(values) else reached[name]
                    file.write(values.tobytes())
                limits = np.maximum(limits, arrays["limits"])
                templates |= set(arrays["templates"].tolist())
    largest, longest = limits.tolist()
    about = {"largest": largest, "longest": longest, "templates": sorted(templates)}
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def _read(part: Path, name: str) -> np.ndarray:
    with np.load(part) as arrays:
        return arrays[name]
