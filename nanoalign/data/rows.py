"""--data -> the rows of a run: in memory, or from a store on disk where the data are large."""

import argparse
import datetime
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np

from nanoalign.data.cache import cache_folder
from nanoalign.data.encoding import DataSettings, EncodedInMemory, Encoding
from nanoalign.data.held_out import training_mask
from nanoalign.data.sources import HELD_OUT, check_sources, test_of
from nanoalign.data.split import Data, Encoded, describe, hold_out, hold_out_fold
from nanoalign.data.store import open_store
from nanoalign.distributed import World
from nanoalign.files.run_folder import ARGS
from nanoalign.files.text import named, read_json
from nanoalign.flags import number
from nanoalign.ranks.collectives import gather

PREFERENCES = ("better", "safer")
TEMPLATES = ("auto", "chat", "raw", "pku")
TEMPLATE_HELP = (
    "how a prompt becomes text: chat, by the tokenizer's chat template; raw, as it is; pku, as "
    "PKU-SafeRLHF writes it; auto picks one of them (docs/data.md)"
)
LARGE = 64 * 2**20  # bytes of files: about 45,000 dialogues, which take 40 s to encode


def add_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds the flags of formats, and the default of --eval_data, to the parser.

    several: whether --preference may name several labels.
    """
    add = parser.add_argument_group("formats of data").add_argument
    add(
        "--preference",
        choices=PREFERENCES,
        nargs="+" if several else None,
        default=["better"] if several else "better",
        help="label of PKU-SafeRLHF that says which response is chosen"
        + ("; with both, the model learns both" if several else ""),
    )
    add("--template", choices=TEMPLATES, default="auto", help=TEMPLATE_HELP)
    add_template_args_argument(add)
    text = (
        "the date that a chat template may write (Llama 3.2 and gpt-oss do); default: today, or "
        "with --resume the date of the run's start"
    )
    add("--template_date", type=iso_date, metavar="YYYY-MM-DD", help=text)
    add_keys_argument(add)
    text = (
        "hold out the K-th of N parts of the prompts of --data; evaluate.py suspects reads all N "
        "runs; default: --eval_share is held out"
    )
    add("--fold", type=fold_text, metavar="K/N", help=text)
    add(
        "--audit",
        type=number(int, 1),
        metavar="N",
        help="show N training examples token by token and a table of all data, then stop without "
        "training; default: off",
    )
    parser.derived += [eval_data_of, template_date_of]
    parser.refusals.append(refusal)


def add_keys_argument(add) -> None:
    """Adds --keys. add: the add_argument of a group of flags."""
    add(
        "--keys",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="the records' names of our keys, if they differ, such as prompt=question chosen=good "
        "rejected=bad",
    )


def add_template_args_argument(add) -> None:
    """add: the add_argument of a group."""
    text = (
        "arguments of the chat template, such as enable_thinking=false; a value is JSON or text. "
        "A result of training has them as defaults"
    )
    add("--template_args", nargs="+", default=[], metavar="NAME=VALUE", help=text)


def iso_date(text: str) -> str:
    """An argparse type: a date as YYYY-MM-DD."""
    return datetime.date.fromisoformat(text).isoformat()


def template_date_of(args: Namespace) -> dict:
    """The default of --template_date: today; with --resume that of the run, if it was kept."""
    today = datetime.date.today().isoformat()
    try:
        kept = read_json(Path(args.out) / ARGS) if args.resume else {}
        return {"template_date": iso_date(kept.get("template_date", today))}
    except (OSError, ValueError, TypeError):  # reported where the run is continued
        return {"template_date": today}


def eval_data_of(args: Namespace) -> dict:
    """Returns embedded test data as "eval_data" if --data is embedded training data; else {}."""
    if args.fold or not is_embedded(args):
        return {}
    return {"eval_data": list(map(test_of, args.data))}


def fold_text(text: str) -> str:
    """An argparse type: K/N with 1 <= K <= N and N >= 2."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) > 1):
        raise argparse.ArgumentTypeError(f"expected K/N, such as 1/5, got '{text}'")
    return f"{int(part)}/{int(parts)}"


def refusal(args: Namespace) -> str | None:
    """What is wrong with the flags of what is held out; None if nothing is."""
    if args.fold and args.eval_data:
        return "--fold and --eval_data both say what is held out; give one of them"
    return None


def is_embedded(args: Namespace) -> bool:
    """Whether all --data are embedded training data."""
    return all(map(test_of, args.data))


def load_rows(settings: DataSettings, tokenizer, folder: Path, world: World) -> Data:
    """Returns the rows that a run trains on and those it holds out; prints their counts.

    folder: of the tokenizer. Small data are encoded by every rank and stay in memory. With a cache,
    or from 64 MiB of files on, the ranks of a host encode them together into a store on disk. A
    collective: raises RunError on all ranks for data that can't be read or encoded, or have no
    pairs.
    """
    files = check_sources(settings.data) + check_sources(settings.eval_data or [])
    # Rank 0 decides: hosts may have other copies of a file, and another date at midnight.
    large = sum(path.stat().st_size for path in files) >= LARGE
    large, date = gather((large, settings.date), world)[0]
    settings = replace(settings, date=date)
    encoding = Encoding(tokenizer, settings)

    def encoded(sources: list[str]) -> Encoded:
        if settings.cache or large:
            return open_store(encoding, folder, sources, cache_folder(settings.cache), world)
        return EncodedInMemory(list(encoding.read(sources)), encoding)

    training = encoded(settings.data)
    if settings.eval_data:
        others, source = encoded(settings.eval_data), named(settings.eval_data)
        held_out = np.ones(len(others.digests), dtype=bool)
        unseen = any(HELD_OUT in spec for spec in settings.eval_data)
        chosen = training_mask(training.digests, others.digests, unseen)
    else:
        others, prompts = training, training.digests[:, 0]
        if settings.fold:
            source = f"part {settings.fold} of the prompts"
            held_out = hold_out_fold(prompts, settings.fold, settings.seed)
        else:
            source = f"{settings.eval_share:g} of the prompts"
            held_out = hold_out(prompts, settings.eval_share, settings.seed)
        chosen = ~held_out
    records, pairs, counts = training.counts(chosen)
    describe("data", named(settings.data), records, pairs, counts)
    describe("held out", source, *others.counts(held_out))
    templates = training.templates | others.templates
    template = templates.pop() if len(templates) == 1 else settings.template
    digests = training.digests[chosen & training.has_row()], others.digests[held_out]
    return Data(training.rows(chosen), others.rows(held_out), counts, template, digests)
