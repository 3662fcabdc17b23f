"""--data -> the rows of a run, from stores on disk that are made if they are not there."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from nanoalign.distributed import World
from nanoalign.encode import Record
from nanoalign.formats import named
from nanoalign.formats.rows import Data, describe, hold_out
from nanoalign.formats.selected import read_records
from nanoalign.pairs import Format
from nanoalign.store.encode import Encoding, encoded
from nanoalign.store.folder import cache_folder


def load_rows(
    args: Namespace, tokenizer, folder: Path, known: dict[tuple[str, ...], Format],
    change: Callable[[Record], list[Record]], settings: tuple, world: World,
) -> Data:  # fmt: skip
    """As formats.rows.load_rows. known, change: formats, and what changes a record, by settings."""
    read = partial(read_records, known)
    how = (args.max_length, args.template, read, change, settings)
    return load(args, Encoding(tokenizer, folder, *how), world)


def load(args: Namespace, encoding: Encoding, world: World) -> Data:
    """What formats.rows.in_memory returns and prints, with rows on disk. A collective."""
    cache = cache_folder(args.cache)
    training = encoded(encoding, args.data, cache, world)
    if args.eval_data:
        from nanoalign.formats.overlap import training_mask

        other, source = encoded(encoding, args.eval_data, cache, world), named(args.eval_data)
        held = np.ones(len(other.records), dtype=bool)
        chosen = training_mask(training.records, other.records, args.eval_data)
    else:
        other, source = training, f"{args.eval_share:g} of the prompts"
        held = hold_out(training.records[:, 0], args.eval_share, args.seed)
        chosen = ~held
    digests = training.records[chosen & training.with_rows()], other.records[held]
    chosen, held = training.encoded(chosen), other.encoded(held)
    records, pairs, counts = training.counts(chosen)
    describe("data", named(args.data), records, pairs, counts)
    describe("held out", source, *other.counts(held))
    templates = training.templates | other.templates
    template = templates.pop() if len(templates) == 1 else args.template
    return Data(training.rows(chosen), other.rows(held), counts, template, digests)
