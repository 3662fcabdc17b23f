"""--data -> the rows of a run: in memory, or from a store on disk where the data are large."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nanoalign import pairs
from nanoalign.distributed import World
from nanoalign.encode import Record
from nanoalign.formats.records import formats
from nanoalign.formats.rows import Data, in_memory
from nanoalign.formats.sources import check_sources, open_source
from nanoalign.hosts.collectives import gather

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
        from nanoalign.rewards import condition

        change = partial(condition.by_preference, preferences=preferences)
    known = known_formats(preferences, unpaired, args.keys)
    files = check_sources(args.data) + check_sources(args.eval_data or [])
    # Rank 0 decides: hosts may have other copies of a file.
    if args.cache or gather(sum(path.stat().st_size for path in files) >= LARGE, world)[0]:
        from nanoalign.formats.selected import read_records
        from nanoalign.store.encode import Encoding
        from nanoalign.store.load import load

        settings = (tuple(preferences), unpaired, change is not unchanged, *args.keys)
        read = partial(read_records, known)
        how = (args.max_length, args.template, read, change, settings)
        return load(args, Encoding(tokenizer, folder, *how), world)
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
