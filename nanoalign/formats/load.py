"""--data -> the rows of a run: in memory, or from a store on disk where the data are large."""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nanoalign import pairs
from nanoalign.distributed import World
from nanoalign.encode import Record
from nanoalign.formats.records import formats
from nanoalign.formats.sources import check_sources, open_source

LARGE = 64 * 2**20  # bytes of files: about 45,000 dialogues, which take 40 s to encode


def load_rows(
    args: Namespace, tokenizer, folder: Path, world: World, unpaired: bool = False
) -> pairs.Data:
    """The rows of --data and of what is held out, and prints their counts.

    folder: of the tokenizer. unpaired: whether single responses with a label are accepted.
    Small data are encoded by every rank and stay in memory. With --cache, or from 64 MiB of files,
    the ranks of a host encode them together into a store on disk.
    """
    known = formats(args.preference, unpaired) if isinstance(args.preference, str) else None
    change = None
    if known is None and len(args.preference) == 1:
        known = formats(args.preference[0])
    elif known is None:
        from nanoalign.rewards import condition, several

        known = several.formats(args.preference)
        if args.condition:
            change = partial(condition.by_preference, preferences=args.preference)
    read = partial(read_records, known=known, change=change)
    files = check_sources(args.data) + check_sources(args.eval_data or [])
    if args.cache or sum(path.stat().st_size for path in files) >= LARGE:
        from nanoalign.store.load import load

        return load(args, tokenizer, folder, world, read)
    return pairs.load(args, tokenizer, read)


def read_records(sources: list[str], known: dict, change=None) -> Iterator[Record]:
    """The records of some sources. change: makes several records of each (--condition)."""
    for record in pairs.read(sources, known, open_source):
        yield from [record] if change is None else change(record)
