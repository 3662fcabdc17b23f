"""--data -> the rows of a run: in memory, or from a store on disk where the data are large."""

import hashlib
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoalign import pairs
from nanoalign.batch import Row
from nanoalign.distributed import World, print0
from nanoalign.encode import Record
from nanoalign.errors import RunError
from nanoalign.formats import named
from nanoalign.formats.records import formats
from nanoalign.formats.sources import check_sources, open_source
from nanoalign.formats.templates import encode_records, resolve_template
from nanoalign.hosts.collectives import gather

LARGE = 64 * 2**20  # bytes of files: about 45,000 dialogues, which take 40 s to encode
EQUAL_SCORES = "ranked records dropped: all scores equal"
EQUAL_RESPONSES = "pairs dropped: both responses equal"
IGNORED = "records with ignored columns: "  # and their names


class Data(NamedTuple):
    """What a run trains on, and what it is evaluated on."""

    rows: Sequence[Row]
    held_out: Sequence[Row]
    counts: Counter  # of `rows`: what was cut or dropped, by reason
    template: str  # the one that `auto` selected; `auto` where it selected several
    digests: tuple[np.ndarray, np.ndarray]  # record_digests of what is trained on, and held out


def load_rows(args: Namespace, tokenizer, folder: Path, world: World, unpaired: str = "") -> Data:
    """The rows of --data and of what is held out, and prints their counts.

    folder: of the tokenizer. unpaired: the loss that learns from single responses, or "".
    Small data are encoded by every rank and stay in memory. With --cache, or from 64 MiB of files,
    the ranks of a host encode them together into a store on disk.
    """
    preferences = [args.preference] if isinstance(args.preference, str) else args.preference
    change = unchanged
    if len(preferences) > 1 and args.condition:
        from nanoalign.rewards import condition

        change = partial(condition.by_preference, preferences=preferences)
    known = known_formats(preferences, unpaired, args.keys)
    files = check_sources(args.data) + check_sources(args.eval_data or [])
    # Rank 0 decides: hosts may have other copies of a file.
    if args.cache or gather(sum(path.stat().st_size for path in files) >= LARGE, world)[0]:
        from nanoalign.store.load import load_rows as load

        settings = (tuple(preferences), unpaired, change is not unchanged, *args.keys)
        return load(args, tokenizer, folder, known, change, settings, world)
    read = partial(pairs.read, formats=known, open_source=open_source)
    return in_memory(args, tokenizer, read, change)


def known_formats(preferences: Sequence[str], unpaired: str, keys: Sequence[str]) -> dict:
    """The formats of a run by their keys. unpaired: see load_rows. keys: of --keys."""
    if len(preferences) == 1:
        return formats(preferences[0], unpaired, keys)
    from nanoalign.rewards import several

    return several.formats(preferences)


def unchanged(record: Record) -> list[Record]:
    return [record]


def in_memory(
    args: Namespace, tokenizer, read: Callable[[list[str]], Iterator[Record]],
    change: Callable[[Record], list[Record]] = unchanged,
) -> Data:  # fmt: skip
    """The rows of --data and of --eval_data or --eval_share; prints what was cut and dropped.

    change: maps a record to the records that are encoded in its place, on either side of the split.
    """
    records = list(read(args.data))
    digests = record_digests(records)
    if args.eval_data:
        from nanoalign.formats.overlap import training_mask

        held_out, source = list(read(args.eval_data)), named(args.eval_data)
        held_digests = record_digests(held_out)
        chosen = training_mask(digests, held_digests, args.eval_data)
    else:
        chosen = ~hold_out(digests[:, 0], args.eval_share, args.seed)
        held_digests, source = digests[~chosen], f"{args.eval_share:g} of the prompts"
        held_out = [record for record, each in zip(records, chosen, strict=True) if not each]
    records = [record for record, each in zip(records, chosen, strict=True) if each]
    digests = digests[chosen]
    parts = []
    for name, part, of in (("data", records, named(args.data)), ("held out", held_out, source)):
        part = [changed for record in part for changed in change(record)]
        rows, counts = drop_equal(encode_records(part, tokenizer, args.max_length, args.template))
        describe(name, of, len(part), sum(len(record.pairs) for record in part), counts)
        parts.append((rows, counts))
    prompts = [record.prompt for record in (*records, *held_out)]
    templates = {resolve_template(args.template, prompt, tokenizer) for prompt in prompts}
    template = templates.pop() if len(templates) == 1 else args.template
    names = {row.name for row in parts[0][0]}  # of a record that was dropped there is no row
    trained = [any(each.name in names for each in change(record)) for record in records]
    digests = digests[np.array(trained)], held_digests
    return Data(parts[0][0], parts[1][0], parts[0][1], template, digests)


def describe(name: str, source: str, records: int, pairs: int, counts: Counter) -> None:
    """Prints the counts of one set of records; an empty set of training records is an error."""
    if any(reason.startswith(IGNORED) for reason in counts):
        from nanoalign.formats.ignored import joined

        counts = joined(counts)
    notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items() if count)
    ranked = f"{records:,} records with " if pairs != records else ""
    print0(f"{name:<11} {source}: {ranked}{pairs:,} pairs{notes}")
    if name == "data" and pairs <= counts[EQUAL_RESPONSES]:
        raise RunError(f"--data {source}: no pairs are left to train on; see the counts above")


def drop_equal(rows: Sequence[Row]) -> tuple[list[Row], Counter]:
    """(rows without pairs of equal responses, which teach nothing; counts by reason)."""
    kept, counts = [], Counter(note for row in rows for note in row.notes)
    for row in rows:
        # One response that is paired with itself is an unpaired record.
        differ = np.array(
            [w == r or not np.array_equal(row.responses[w], row.responses[r]) for w, r in row.pairs]
        )
        counts[EQUAL_SCORES] += not row.pairs
        counts[EQUAL_RESPONSES] += len(differ) - int(differ.sum())
        if len(differ) and differ.all():
            kept.append(row)
        elif differ.any():
            pairs = tuple(pair for pair, keep in zip(row.pairs, differ, strict=True) if keep)
            extra = {name: values[differ] for name, values in row.extra.items()}
            kept.append(replace(row, pairs=pairs, extra=extra))
    return kept, counts


def record_digests(records: Sequence[Record]) -> np.ndarray:
    """(N, 3) uint64: the three `hashes` of each record."""
    return np.frombuffer(b"".join(map(hashes, records)), dtype="<u8").reshape(-1, 3)


def hashes(record: Record) -> bytes:
    """Three hashes of 8 bytes: of the prompt; with its responses in any order; of all, with labels.

    They are the same for two records exactly when these are.
    """
    prompt = record.prompt if isinstance(record.prompt, str) else json.dumps(record.prompt)
    if record.tools:  # they are a part of the prompt
        prompt = json.dumps((prompt, record.tools), sort_keys=True)
    responses = [json.dumps(each, sort_keys=True) for each in record.answers or record.responses]
    everything = (prompt, responses, record.pairs, record.extra)
    texts = prompt, json.dumps((prompt, sorted(responses))), json.dumps(everything, sort_keys=True)
    return b"".join(hashlib.blake2b(t.encode(), digest_size=8).digest() for t in texts)


def hold_out(digests: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A mask (N,) of `share` of the prompts, with all their records, in whatever order these are.

    These prompts are the first by SplitMix64 (Steele et al. 2014) of the seed and the digest. A
    share above 0 holds out at least one prompt, and at least one prompt stays.
    """
    prompts = np.unique(digests)
    count = min(max(round(share * len(prompts)), share > 0), len(prompts) - 1)
    with np.errstate(over="ignore"):
        mixed = prompts + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    order = np.argsort(mixed ^ (mixed >> np.uint64(31)))
    return np.isin(digests, prompts[order[:count]])
