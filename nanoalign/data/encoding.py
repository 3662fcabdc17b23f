"""How the records of a run are read and encoded, and records that are encoded in memory."""

import datetime
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import compress

import numpy as np

from nanoalign.batch import Row
from nanoalign.data.formats import by_preference, formats, single
from nanoalign.data.sources import read_records
from nanoalign.data.split import Encoded, drop_equal, record_digests
from nanoalign.data.templates import encode_records, resolve_template
from nanoalign.records import Record


@dataclass(frozen=True)
class DataSettings:
    """What the rows of a run depend on, beside the tokenizer."""

    data: Sequence[str]  # sources of the training records
    eval_data: Sequence[str] | None = None  # sources of the held-out ones; None: a share of `data`
    eval_share: float = 0.1  # of the prompts of `data`
    fold: str | None = None  # "K/N": the K-th of N parts of the prompts is held out, not a share
    seed: int = 0  # of the choice of what is held out
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
        """Returns the settings that the flags of a training script give: those of the same names.

        --preference, --loss and --template_date have other names here.
        """
        given, preference = vars(args), args.preference
        settings = {field.name: given[field.name] for field in fields(cls) if field.name in given}
        settings |= {"keys": tuple(args.keys), "template_args": tuple(args.template_args)}
        settings["date"] = datetime.date.fromisoformat(args.template_date)
        settings["single"] = single(given.get("loss", ""))
        several = (preference,) if isinstance(preference, str) else tuple(preference)
        return cls(**settings, preferences=several)


@dataclass(frozen=True)
class Encoding:
    """Records of sources -> rows, by a tokenizer and the settings of a run."""

    tokenizer: object
    settings: DataSettings

    @property
    def key(self) -> str:
        """The settings that decide how a record is read and encoded, and the tokenizer's class."""
        s = self.settings
        how = (s.max_length, s.template, s.preferences, s.condition, s.keys, s.single)
        how += (s.template_args,)
        if "strftime_now" in str(self.tokenizer.chat_template):
            how += (s.date,)
        return repr((*how, type(self.tokenizer)))

    def read(self, sources: Sequence[str]) -> Iterator[Record]:
        """Yields the records of some sources, in their order. Errors are those of read_records."""
        s = self.settings
        return read_records(formats(s.preferences, s.single), sources, s.keys)

    def encode(self, records: Sequence[Record]) -> tuple[list[Row], list[int], set[str]]:
        """Returns (the rows of the records, the number of pairs of each row, names of templates).

        A record has one row or, with --condition, a row for each preference. Pairs of equal
        responses are still in the rows. Raises RunError for a record that can't be encoded.
        """
        settings, tokenizer, changed = self.settings, self.tokenizer, records
        if settings.condition and len(settings.preferences) > 1:
            changed = [new for each in records for new in by_preference(each, settings.preferences)]
        how = settings.max_length, settings.template, settings.date
        rows = encode_records(changed, tokenizer, *how)
        prompts = (record.prompt for record in records)
        templates = {resolve_template(settings.template, each, tokenizer) for each in prompts}
        return rows, [len(record.pairs) for record in changed], templates


class EncodedInMemory(Encoded):
    """Records with their rows in memory."""

    def __init__(self, records: Sequence[Record], encoding: Encoding):
        rows, compared, self.templates = encoding.encode(records)
        self.left, self.notes = zip(*map(drop_equal, rows), strict=True)  # each a row or None
        self.compared = np.array(compared)
        self.digests = record_digests(records)
        self.kept = np.array([row is not None for row in self.left])

    def rows(self, chosen: np.ndarray) -> list[Row]:
        return list(compress(self.left, self.of_encoded(chosen) & self.kept))
