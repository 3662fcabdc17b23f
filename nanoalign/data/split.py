"""What a run trains on and what it holds out, and the hashes of records and rows."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, compress
from typing import NamedTuple

import numpy as np

from nanoalign.batch import Row
from nanoalign.data.columns import IGNORED, joined
from nanoalign.data.dialogues import DIFFER_EARLIER
from nanoalign.distributed import print0
from nanoalign.errors import RunError
from nanoalign.records import Record

EQUAL_SCORES = "ranked records dropped: all scores equal"
EQUAL_RESPONSES = "pairs dropped: both responses equal"


class Data(NamedTuple):
    """What a run trains on, and what it is evaluated on."""

    rows: Sequence[Row]
    held_out: Sequence[Row]
    counts: Counter  # of `rows`: what was cut or dropped, by reason
    template: str  # the one that `auto` selected; `auto` where it selected several
    digests: tuple[np.ndarray, np.ndarray]  # record_digests: of what is trained on, of held_out


class Encoded:
    """R records, and E that were encoded in their place: E / R for each record, one behind another.

    A mask is an array of bool that selects some of the R records.
    """

    digests: np.ndarray  # (R, 3), record_digests
    kept: np.ndarray  # (E,) bool: whether a row is left, without pairs of equal responses
    compared: np.ndarray  # (E,) pairs, before those of equal responses were dropped
    notes: Iterable[Sequence[str]]  # E lists: what was cut or dropped
    templates: set[str]  # names of those that rendered the records

    def of_encoded(self, chosen: np.ndarray) -> np.ndarray:
        """Returns a mask of records, (R,), as one of what was encoded in their place, (E,)."""
        return np.repeat(chosen, len(self.kept) // len(self.digests))

    def has_row(self) -> np.ndarray:
        """Returns a mask (R,) of the records of which a row is left."""
        return self.kept.reshape(len(self.digests), -1).any(axis=1)

    def rows(self, chosen: np.ndarray) -> Sequence[Row]:
        """Returns the rows that are left of the chosen records."""
        raise NotImplementedError

    def counts(self, chosen: np.ndarray) -> tuple[int, int, Counter]:
        """Returns (how many were encoded for the chosen records, their pairs, their notes counted).

        chosen: a mask (R,). Pairs are counted before those of equal responses are dropped.
        """
        chosen = self.of_encoded(chosen)
        notes = chain.from_iterable(compress(self.notes, chosen))
        return int(chosen.sum()), int(self.compared[chosen].sum()), count_notes(notes)


def describe(name: str, source: str, records: int, pairs: int, counts: Counter) -> None:
    """Prints the line of one set of records: its name, source, records, pairs and notes.

    counts: of notes. Raises RunError if `name` is "data" and no pairs are left.
    """
    if any(reason.startswith(IGNORED) for reason in counts):
        counts = joined(counts)
    notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items() if count)
    ranked = f"{records:,} records with " if pairs != records else ""
    print0(f"{name:<11} {source}: {ranked}{pairs:,} pairs{notes}")
    if name == "data" and pairs <= counts[EQUAL_RESPONSES]:
        raise RunError(f"--data {source}: no pairs are left to train on; see the counts above")


def drop_equal(row: Row) -> tuple[Row | None, list[str]]:
    """Returns the row without pairs of equal responses, which teach nothing, and its notes.

    In place of a row without pairs it is None. A note for each pair that was dropped, or for equal
    scores, is added to those of the row.
    """
    # One response that is paired with itself is an unpaired record.
    differ = np.array(
        [w == r or not np.array_equal(row.responses[w], row.responses[r]) for w, r in row.pairs]
    )
    notes = [*row.notes, *[EQUAL_RESPONSES] * (len(differ) - int(differ.sum()))]
    if not row.pairs and DIFFER_EARLIER not in notes:
        notes.append(EQUAL_SCORES)
    if not differ.any():
        return None, notes
    if differ.all():
        return row, notes
    pairs = tuple(pair for pair, keep in zip(row.pairs, differ, strict=True) if keep)
    extra = {name: values[differ] for name, values in row.extra.items()}
    return replace(row, pairs=pairs, extra=extra), notes


def count_notes(notes: Iterable[str]) -> Counter:
    """Counts the notes. Those of drop_equal are the last two entries, also where they are 0."""
    counts = Counter(notes)
    for reason in (EQUAL_SCORES, EQUAL_RESPONSES):
        counts[reason] = counts.pop(reason, 0)
    return counts


def record_digests(records: Sequence[Record]) -> np.ndarray:
    """Returns the three `hashes` of each record, (R, 3) uint64."""
    return np.frombuffer(b"".join(map(hashes, records)), dtype="<u8").reshape(-1, 3)


def hashes(record: Record) -> bytes:
    """Returns three hashes of 8 bytes each, one behind the other.

    The first is of the prompt and its tools, the second of these and the responses in any order,
    the third of these, the order of the responses, the pairs and their values.
    """
    prompt = record.prompt if isinstance(record.prompt, str) else json.dumps(record.prompt)
    if record.tools:  # they are a part of the prompt
        prompt = json.dumps((prompt, record.tools), sort_keys=True)
    responses = [json.dumps(each, sort_keys=True) for each in record.answers or record.responses]
    everything = (prompt, responses, record.pairs, record.extra)
    texts = prompt, json.dumps((prompt, sorted(responses))), json.dumps(everything, sort_keys=True)
    return b"".join(hashlib.blake2b(t.encode(), digest_size=8).digest() for t in texts)


def hold_out(digests: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Returns a mask (R,) of the records that are held out: those of `share` of the prompts.

    digests: the hash of the prompt of each record, (R,). The first ones of `shuffled` are held out:
    at least one if share is above 0, and never all.
    """
    prompts = shuffled(digests, seed)
    count = min(max(round(share * len(prompts)), share > 0), len(prompts) - 1)
    return np.isin(digests, prompts[:count])


def hold_out_fold(digests: np.ndarray, fold: str, seed: int) -> np.ndarray:
    """Returns a mask (R,) of the records of one of N parts of the prompts: those of `shuffled`.

    digests: the hash of the prompt of each record, (R,). fold: "K/N", the K-th part, from 1. The
    parts have no prompt in common, have all prompts together, and differ by one prompt at most.
    Raises RunError if there are fewer than N prompts.
    """
    k, n = map(int, fold.split("/"))
    prompts = shuffled(digests, seed)
    if len(prompts) < n:
        raise RunError(f"--fold {fold}: the data have {len(prompts):,} prompts; give fewer parts")
    return np.isin(digests, prompts[len(prompts) * (k - 1) // n : len(prompts) * k // n])


def shuffled(digests: np.ndarray, seed: int) -> np.ndarray:
    """Returns each hash once, sorted by SplitMix64 (Steele et al. 2014) of the seed and the hash.

    So the order of the records does not matter.
    """
    prompts = np.unique(digests)
    with np.errstate(over="ignore"):
        mixed = prompts + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return prompts[np.argsort(mixed ^ (mixed >> np.uint64(31)))]


def fingerprint(rows: Sequence[Row]) -> str:
    """Returns a hash of the tokens, pairs and values of all rows in order, as 64 digits.

    Rows on disk know theirs without being read.
    """
    if hasattr(rows, "fingerprint"):
        return rows.fingerprint()
    return hashlib.sha256(b"".join(map(digest, rows))).hexdigest()


def digest(row: Row) -> bytes:
    """Returns a hash, 16 bytes, of the tokens, pairs and values of a row; its name is left out."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in (row.prompt, *row.responses):
        hashed.update(len(part).to_bytes(4, "little") + part.tobytes())
    hashed.update(repr(row.pairs).encode())
    for name, values in sorted(row.extra.items()):
        if name != "reference_logps":  # of the reference, not of the data
            hashed.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return hashed.digest()
