"""How the records of a run are read and encoded, and records that are encoded in memory."""

import datetime
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, compress

import numpy as np

from nanoalign.batch import Row
from nanoalign.data.formats import by_preference, formats, single, unchanged
from nanoalign.data.sources import read_records
from nanoalign.data.split import Encoded, count_notes, drop_equal, record_digests
from nanoalign.data.templates import encode_records, resolve_template
from nanoalign.records import Format, Record


@dataclass(frozen=True)
class DataSettings:
    """What the rows of a run depend on, beside the tokenizer."""

    data: Sequence[str]  # sources of the training records
    eval_data: Sequence[str] | None = None  # sources of the held-out ones; None: a share of `data`
    eval_share: float = 0.1  # of the prompts of `data`
    seed: int = 0  # of the choice of that share
    max_length: int = 1024  # tokens of a prompt and one response
    template: str = "auto"
    template_args: tuple[str, ...] = ()  # which the tokenizer's chat template has, too
    date: datetime.date | None = None  # for the chat template; None: today
    preferences: tuple[str, ...] = ("better",)  # labels of PKU-SafeRLHF
    condition: bool = False  # whether prompts name the preference, where there are several
    keys: tuple[str, ...] = ()  # of --keys
    single: str = ""  # the loss that learns from single responses, kto or sft; "": none
    cache: str | None = None  # the folder of the store; None: see cache.cache_folder

    @classmethod
    def of(cls, args: Namespace) -> "DataSettings":
        """The settings that the flags of a training script give."""
        given = vars(args)
        preference = args.preference
        return cls(
            args.data,
            args.eval_data,
            args.eval_share,
            args.seed,
            args.max_length,
            args.template,
            tuple(args.template_args),
            datetime.date.fromisoformat(args.template_date),
            preferences=(preference,) if isinstance(preference, str) else tuple(preference),
            condition=given.get("condition", False),
            keys=tuple(args.keys),
            single=single(given.get("loss", "")),
            cache=args.cache,
        )


@dataclass(frozen=True)
class Encoding:
    """Records of sources -> rows, by a tokenizer and the settings of a run."""

    tokenizer: object
    settings: DataSettings

    @cached_property
    def formats(self) -> dict[tuple[str, ...], Format]:
        settings = self.settings
        return formats(settings.preferences, settings.single, settings.keys)

    @property
    def change(self) -> Callable[[Record], list[Record]]:
        """Maps a record to those that are encoded in its place, on its side of the split."""
        if self.settings.condition and len(self.settings.preferences) > 1:
            return partial(by_preference, preferences=self.settings.preferences)
        return unchanged

    @property
    def key(self) -> str:
        """All that decides how a record is read and encoded, but for code and tokenizer's files."""
        s = self.settings
        how = (s.max_length, s.template, s.preferences, s.condition, s.keys, s.single)
        how += (s.template_args,)
        if "strftime_now" in str(self.tokenizer.chat_template):
            how += (s.date,)
        return repr((*how, type(self.tokenizer)))

    def read(
        self, sources: Sequence[str], wanted: Callable[[int], bool] = lambda number: True
    ) -> Iterator[Record]:
        """The records of some sources, as sources.read_records."""
        return read_records(self.formats, sources, wanted)

    def encode(self, records: Sequence[Record]) -> tuple[list[Row], list[int], set[str]]:
        """(the rows of the records, with all their pairs; pairs of each row; names of templates).

        Every record has equally many rows.
        """
        changed = list(chain.from_iterable(map(self.change, records)))
        settings, tokenizer = self.settings, self.tokenizer
        how = settings.max_length, settings.template, settings.date
        rows = encode_records(changed, tokenizer, *how)
        prompts = (record.prompt for record in records)
        templates = {resolve_template(settings.template, each, tokenizer) for each in prompts}
        return rows, [len(record.pairs) for record in changed], templates


class EncodedInMemory(Encoded):
    """Records with their rows in memory."""

    def __init__(self, records: Sequence[Record], encoding: Encoding):
        rows, self.pairs, self.templates = encoding.encode(records)
        dropped = [drop_equal(row) for row in rows]
        self.left = [row for row, _ in dropped]  # each a row or None
        self.notes = [notes for _, notes in dropped]
        self.digests = record_digests(records)
        self.kept = np.array([row is not None for row in self.left])

    def rows(self, chosen: np.ndarray) -> list[Row]:
        return list(compress(self.left, self.of_encoded(chosen) & self.kept))

    def counts(self, chosen: np.ndarray) -> tuple[int, int, Counter]:
        chosen = self.of_encoded(chosen)
        notes = chain.from_iterable(compress(self.notes, chosen))
        return int(chosen.sum()), sum(compress(self.pairs, chosen)), count_notes(notes)
