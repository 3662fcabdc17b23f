"""--data -> the rows of a run: in memory, or from a store on disk where the data are large."""

import argparse
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from nanoalign import records
from nanoalign.data import formats, store
from nanoalign.data.formats import unchanged
from nanoalign.data.held_out import training_mask
from nanoalign.data.readers import TEST_OF
from nanoalign.data.sources import check_sources, named, open_source
from nanoalign.data.split import Data, describe, drop_equal, hold_out, record_digests
from nanoalign.data.templates import encode_records, resolve_template
from nanoalign.distributed import World
from nanoalign.flags import number
from nanoalign.ranks.collectives import gather
from nanoalign.records import Record

PREFERENCES = ("better", "safer")
TEMPLATES = ("auto", "chat", "raw", "pku")


def add_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """several: whether --preference may name several labels."""

    add = parser.add_argument_group("formats of data").add_argument
    add("--preference", choices=PREFERENCES, nargs="+" if several else None,
        default=["better"] if several else "better",
        help="which label of PKU-SafeRLHF orders a pair" + ", or both" * several)  # fmt: skip
    add("--template", choices=TEMPLATES, default="auto", help="text of a prompt: docs/data.md")
    add_keys_argument(add)
    add("--audit", type=number(int, 1), metavar="N",
        help="print N training examples token by token, and a table of all, and do not train; "
        "default: train")  # fmt: skip
    parser.derived.append(eval_data_of)


def add_keys_argument(add) -> None:
    add("--keys", nargs="+", default=[], metavar="OURS=THEIRS",
        help="other names of keys: prompt=question chosen=good rejected=bad")  # fmt: skip


def eval_data_of(args: Namespace) -> dict:
    """The default of --eval_data: the embedded test data, where --data is embedded."""
    return {"eval_data": [TEST_OF[source] for source in args.data]} if is_embedded(args) else {}


def is_embedded(args: Namespace) -> bool:
    """Whether --data are embedded training data alone."""
    return TEST_OF.keys() >= set(args.data)


LARGE = 64 * 2**20  # bytes of files: about 45,000 dialogues, which take 40 s to encode


def load_rows(args: Namespace, tokenizer, folder: Path, world: World, unpaired: str = "") -> Data:
    """The rows of --data and of what is held out, and prints their counts.

    folder: of the tokenizer. unpaired: the loss that learns from single responses, or "".
    Small data are encoded by every rank and stay in memory. With --cache, or from 64 MiB of files,
    the ranks of a host encode them together into a store on disk.
    """
    preferences = [args.preference] if isinstance(args.preference, str) else args.preference
    change = unchanged
    if len(preferences) > 1 and args.condition:
        change = partial(formats.by_preference, preferences=preferences)
    known = formats.formats(preferences, unpaired, args.keys)
    files = check_sources(args.data) + check_sources(args.eval_data or [])
    # Rank 0 decides: hosts may have other copies of a file.
    if args.cache or gather(sum(path.stat().st_size for path in files) >= LARGE, world)[0]:
        settings = (tuple(preferences), unpaired, change is not unchanged, *args.keys)
        return store.load_rows(args, tokenizer, folder, known, change, settings, world)
    read = partial(records.read, formats=known, open_source=open_source)
    return in_memory(args, tokenizer, read, change)


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
