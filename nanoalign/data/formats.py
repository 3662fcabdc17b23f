"""Formats of records, which are found by their keys: docs/data.md has an example of each.

A format is a function from a record, a dict, to a Record, and an entry of the table of `formats`.
It raises ValueError for a record that it can't read; records.parse adds file and line.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn

from nanoalign.data.columns import (
    CONTEXT,
    DEMONSTRATION,
    DIALOGUES,
    IMAGE_AS_TEXT,
    IMAGES,
    LABELS,
    PAIR,
    PKU,
    RANKED,
    SAMPLED,
    SUBSET,
    TEXTS,
    UNPAIRED,
    ignored,
    number,
)
from nanoalign.data.dialogues import ASSISTANT, is_dialogue, split_dialogues
from nanoalign.data.foreign import FOREIGN, read_foreign, refuse_unknown
from nanoalign.data.messages import from_messages, pair_of_messages, read_messages
from nanoalign.errors import RunError
from nanoalign.records import FORMATS, Format, Formats, Record, decode, pair


def formats(preference: str | Sequence[str] = "better", unpaired: str = "") -> Formats:
    """Returns the formats by their keys; the first one whose keys a record has reads it.

    preference: the label of PKU-SafeRLHF that orders the responses. Several ones are the labels
        that every record must have, and records of other formats are refused.
    unpaired: the loss that learns from single responses (kto, sft); "": they are refused.
    """
    preferences = [preference] if isinstance(preference, str) else list(preference)
    if len(preferences) > 1:
        read = partial(read_ours, PKU, partial(pku, preferences))
        return {PKU: read, (): partial(refuse_single_label, preferences)}
    ours: Formats = {
        RANKED: ranked,
        PKU: partial(pku, preferences),
        UNPAIRED: partial(completion, unpaired),
        PAIR: pair_with_prompt,
        DEMONSTRATION: partial(completion, unpaired),
        DIALOGUES: pair_without_prompt,
    }
    ours |= {names: read for names, read in FORMATS.items() if names not in ours}
    if unpaired:
        ours = {names: partial(with_label, read) for names, read in ours.items()}
    ours = {names: partial(read_ours, names, read) for names, read in ours.items()}
    table = ours | {names: partial(read_foreign, read, ours) for names, read in FOREIGN.items()}
    refuse = partial(refuse_unknown, [PAIR, *table])
    table[DIALOGUES] = table.pop(DIALOGUES)  # the last one: other formats have these keys, too
    return table | {(): refuse}


def read_ours(keys: tuple[str, ...], read: Format, record: dict) -> Record:
    """Reads a record of one of our formats by its function `read`.

    Adds what any format may have beside its keys: messages in place of texts, tools, a system
    prompt, the name of a subset, and a note of the columns that nothing reads.
    """
    texts = [record[key] for key in TEXTS if key in record]
    is_text = all(isinstance(text, str) and text.lstrip()[:1] != "[" for text in texts)
    is_plain = is_text and not CONTEXT & record.keys()
    parsed = read(record) if is_plain else read_messages(read, record)
    if any(record.get(key) for key in IMAGES):
        raise ValueError("a record with images, which are not read; remove it, or its images")
    if any(isinstance(text, str) and "<image>" in text for text in texts):
        parsed = replace(parsed, notes=(*parsed.notes, IMAGE_AS_TEXT))
    if "tokenizer" in record:
        parsed = replace(parsed, sampled=sampled_of(record, keys))
    known = {*keys, *LABELS, *(SAMPLED if parsed.sampled else ())}
    if isinstance(subset := record.get(SUBSET), str):
        parsed, known = replace(parsed, subset=subset), known | {SUBSET}
    if columns := record.keys() - known:
        parsed = replace(parsed, notes=(*parsed.notes, *ignored(columns, keys)))
    return parsed


def sampled_of(record: dict, keys: tuple[str, ...]) -> tuple[str, list[list[int]]] | None:
    """Returns the sampled tokens of a record's responses, which evaluate.py has written, or None.

    Raises ValueError for what is no list of whole numbers.
    """
    names = [name for name in SAMPLED if name.removesuffix("_tokens") in keys]
    if not names or not all(name in record for name in names):
        return None
    return str(record["tokenizer"]), [token_ids(record, name) for name in names]


def token_ids(record: dict, name: str) -> list[int]:
    """Returns the list of token ids under a key. Raises ValueError for anything else."""
    tokens = record[name]
    if not isinstance(tokens, list) or any(type(n) is not int or n < 0 for n in tokens):
        raise ValueError(f"{name} must be a list of token ids, found {str(tokens)[:60]}")
    return tokens


# --- pairs ----------------------------------------------------------------------------------------


def pair_with_prompt(record: dict) -> Record:
    """Reads a prompt, a chosen and a rejected response; each is text, or a list of messages."""
    if isinstance(record["chosen"], list) and isinstance(record["rejected"], list):
        return with_margin(record, pair_of_messages(record))
    return with_margin(record, from_messages(pair(record), "chosen", "rejected"))


def pair_without_prompt(record: dict) -> Record:
    """Reads two texts, or two lists of messages, that begin with the same prompt."""
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return with_margin(record, pair_of_messages(record))
    return with_margin(record, split_dialogues(chosen, rejected))


def pku(preferences: Sequence[str], record: dict) -> Record:
    """Reads a PKU-SafeRLHF record: two responses and, for each preference, the index of the better.

    The better response by the first preference comes first. One preference: one pair, whose margin
    is record["margin"] or 1. Several: one pair per preference; extra["dimensions"] holds the index
    of each pair's preference. Raises ValueError if an index is not 0 or 1.
    """
    better = []
    for name in preferences:
        label = record.get(f"{name}_response_id")
        if isinstance(label, bool) or label not in (0, 1):
            given = " ".join(preferences)
            raise ValueError(f"{name}_response_id is {label!r}; --preference {given} needs 0 or 1")
        better.append(label)
    names = ("response_0", "response_1")[:: -1 if better[0] else 1]
    responses = tuple(record[name] for name in names)
    pairs = tuple((0, 1) if label == better[0] else (1, 0) for label in better)
    parsed = from_messages(Record(record["prompt"], responses, pairs), *names)
    if len(preferences) == 1:
        return with_margin(record, parsed)
    return replace(parsed, extra={"dimensions": list(range(len(pairs)))})


def with_margin(record: dict, parsed: Record) -> Record:
    """Returns the pair with the margin of its record: how much better chosen is; 1 if not given.

    Raises ValueError for a margin that is negative or no number.
    """
    margin = 1.0
    if record.get("margin") is not None:
        margin = number(record["margin"], "margin")
    if margin < 0:
        raise ValueError(f"the margin is {margin:g}; it must not be negative")
    return replace(parsed, extra={"margins": [margin]})


# --- rankings and single responses ----------------------------------------------------------------


def ranked(record: dict) -> Record:
    """Reads K responses with scores: sorts them, best first, and pairs all of unequal scores.

    The margin of a pair is the difference of its scores. Raises ValueError unless responses and
    scores are lists of the same length, of at least two.
    """
    prompt, responses, scores = (record[key] for key in RANKED)
    for name, values in (("responses", responses), ("scores", scores)):
        if not isinstance(values, list) or len(values) < 2:
            raise ValueError(f"{name} must be a list of at least two, found {values!r}")
    if len(responses) != len(scores):
        raise ValueError(f"{len(responses)} responses, but {len(scores)} scores")
    scores = [number(score, "score") for score in scores]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    best = [scores[i] for i in order]
    pairs = [(i, j) for i in range(len(best)) for j in range(i + 1, len(best)) if best[i] > best[j]]
    margins = [best[i] - best[j] for i, j in pairs]
    responses = tuple(responses[i] for i in order)
    return from_messages(Record(prompt, responses, tuple(pairs), {"margins": margins}), "response")


def completion(loss: str, record: dict) -> Record:
    """Reads one response and pairs it with itself; extra["desirable"] is its label.

    loss: kto, sft, or "" where pairs are needed. A response without a label is a demonstration.
    Raises ValueError if the loss needs pairs, or can't use this label.
    """
    prompt, response, label = record["prompt"], record["completion"], record.get("label")
    if not loss:
        raise ValueError(
            "a single completion, where pairs are needed; train_dpo.py --loss kto learns from "
            "completions with a label, and --loss sft from demonstrations"
        )
    if label is None and loss == "kto":
        raise ValueError("--loss kto needs a label, true or false, beside each completion")
    if label not in (None, True, False):  # also 1 and 0
        raise ValueError(f"the label must be true or false, found {label!r}")
    if label is not None and not label and loss == "sft":
        raise ValueError("--loss sft learns from good responses; remove those of the label false")
    parsed = Record(prompt, (response,), ((0, 0),), {"desirable": [label is None or bool(label)]})
    return from_messages(parsed, "completion")


def with_label(read: Format, record: dict) -> Record:
    """Reads a record and puts `desirable` alone into `extra`; it is True for each pair.

    A batch may have pairs and single responses, and needs the same keys in `extra` of all rows.
    """
    parsed = read(record)
    desirable = parsed.extra.get("desirable", [True] * len(parsed.pairs))
    return replace(parsed, extra={"desirable": desirable})


def single(loss: str) -> str:
    """Returns the loss if it learns from single responses, else ""."""
    return loss if loss in ("kto", "sft") else ""


# --- several preferences --------------------------------------------------------------------------


def refuse_single_label(preferences: Sequence[str], record: dict) -> NoReturn:
    """Raises ValueError for a record of another format than PKU-SafeRLHF's."""
    raise ValueError(
        f"a record with the keys {' + '.join(sorted(map(str, record)))} has one label; "
        f"--preference {' '.join(preferences)} needs {' + '.join(PKU)}, with a label for each"
    )


def by_preference(record: Record, preferences: Sequence[str]) -> list[Record]:
    """Returns the records that --condition encodes in place of one: one for each preference.

    The prompt of each names its preference, and its pairs are those of that preference.
    """
    marked = []
    for d, name in enumerate(preferences):
        numbers = [n for n, dimension in enumerate(record.extra["dimensions"]) if dimension == d]
        extra = {key: [values[n] for n in numbers] for key, values in record.extra.items()}
        del extra["dimensions"]
        pairs = tuple(record.pairs[n] for n in numbers)
        new = conditioned(record, name)
        marked.append(replace(new, pairs=pairs, extra=extra, name=f"{record.name}/{name}"))
    return marked


def conditioned(record: Record, preference: str) -> Record:
    """Returns the record with " [PREFERENCE]" behind the last question of its prompt.

    There the name stays when a prompt that is too long loses its beginning.
    """
    mark, prompt = f" [{preference}]", record.prompt
    if isinstance(prompt, list):
        prompt = [*prompt[:-1], prompt[-1] | {"content": prompt[-1]["content"] + mark}]
    elif is_dialogue(prompt):
        prompt = prompt.removesuffix(ASSISTANT) + mark + ASSISTANT
    else:
        prompt = prompt + mark
    return replace(record, prompt=prompt)


# --- --keys OURS=THEIRS ---------------------------------------------------------------------------

OURS = (
    *("prompt", "chosen", "rejected", "responses", "scores", "completion", "label", "margin"),
    *("system", "tools"),
)


def names_of(keys: Sequence[str]) -> dict[str, str]:
    """Returns {our key: the records' name of it} for the texts of --keys.

    Raises RunError for a text that is not OURS=THEIRS, and for a key of ours that is unknown or is
    given twice.
    """
    names: dict[str, str] = {}
    for given in keys:
        ours, _, theirs = given.partition("=")
        if not theirs or ours not in OURS or ours in names:
            expected = ", ".join(OURS)
            raise RunError(f"--keys {given}: expected OURS=THEIRS, with each once of {expected}")
        names[ours] = theirs
    return names


def decode_renamed(raw: str | dict, where: str, names: dict[str, str]) -> object:
    """Returns records.decode of a record, with our names for its keys. where: for errors.

    names: as names_of returns it. A record of the embedded data has our names. Raises RunError if
    another one lacks one of its names, also where it has ours: it would be read as something else
    than was asked for.
    """
    record = decode(raw, where)
    if not names or not isinstance(record, dict):
        return record
    ours_of = {theirs: ours for ours, theirs in names.items()}
    if not ours_of.keys() & record.keys() and record.keys() >= {*PKU}:
        return record  # of the embedded data
    if missing := sorted(ours_of.keys() - record.keys()):
        raise RunError(
            f"{where}: --keys names {', '.join(missing)}, and the record has no such key; it has "
            f"{', '.join(sorted(record))}"
        )
    # A key of ours that is there under their name, too, is another column.
    others = {key: each for key, each in record.items() if key not in names or key in ours_of}
    return {ours_of.get(key, key): value for key, value in others.items()}
