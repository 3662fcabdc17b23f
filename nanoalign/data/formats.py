"""Formats of records, found by their keys: docs/data.md has an example of each.

A format is a function from a record to a Record, and an entry of `formats`. It raises ValueError
for a record that it can't read; nanoalign/pairs.py adds file and line. Messages, tools and system
prompts are those of nanoalign/formats/messages.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from nanoalign.data.columns import (
    DEMONSTRATION,
    DIALOGUES,
    LABELS,
    PKU,
    RANKED,
    TEXTS,
    UNPAIRED,
    ignored,
    number,
)
from nanoalign.data.dialogues import ASSISTANT, is_dialogue, split_dialogues
from nanoalign.data.foreign import FOREIGN, read_as, refuse_unknown
from nanoalign.data.messages import from_messages, pair_of_messages, read_messages
from nanoalign.errors import RunError
from nanoalign.records import FORMATS, Format, Record, decode


def formats(
    preference: str = "better", unpaired: str = "", keys: Sequence[str] = ()
) -> dict[tuple[str, ...], Format]:
    """The formats by their keys; the first whose keys a record has is taken.

    preference: the label of PKU-SafeRLHF that orders the responses.
    unpaired: the loss that learns from single responses (kto, sft); "": they are refused.
    keys: of --keys, OURS=THEIRS: what the records call a key of these formats.
    """
    known = {
        RANKED: ranked,
        PKU: lambda record: with_margin(record, pku(record, preference)),
        UNPAIRED: partial(completion, unpaired),
        ("prompt", "chosen", "rejected"): pair_with_prompt,
        DEMONSTRATION: partial(completion, unpaired),
        DIALOGUES: pair,
    }
    known |= {names: read for names, read in FORMATS.items() if names not in known}
    if unpaired:
        known = with_labels(known)
    own = {names: partial(complete, names, read) for names, read in known.items()}
    last = {DIALOGUES: own[DIALOGUES], (): partial(refuse_unknown, own)}
    own = own | {names: partial(read_as, convert, own) for names, convert in FOREIGN.items()}
    known = {names: read for names, read in own.items() if names not in last} | last
    if keys:
        known = renamed(known, keys)
    return known


def complete(keys: tuple[str, ...], read: Format, record: dict) -> Record:
    """The Record with what any format may have: messages, tools, a system prompt, more columns."""
    texts = [record[key] for key in TEXTS if key in record]
    plain = all(isinstance(text, str) and text.lstrip()[:1] != "[" for text in texts)
    if plain and not {"system", "tools"} & record.keys():
        found = read(record)
    else:
        found = read_messages(read, record)
    if names := record.keys() - {*keys, *LABELS}:
        found = replace(found, notes=(*found.notes, *ignored(names, keys)))
    return found


def pku(record: dict, preference: str = "better") -> Record:
    """PKU-SafeRLHF: two responses; the label of `preference`, better or safer, orders them."""
    key = f"{preference}_response_id"
    best = record.get(key)
    if isinstance(best, bool) or best not in (0, 1):
        raise ValueError(f"{key} is {best!r}; --preference {preference} needs 0 or 1")
    responses = (record["response_0"], record["response_1"])[:: -1 if best else 1]
    return from_messages(Record(record["prompt"], responses), "response")


def with_margin(record: dict, pair: Record) -> Record:
    """The Record with the margin of the data: by how much its chosen response is better, else 1."""
    margin = 1.0
    if record.get("margin") is not None:
        margin = number(record["margin"], "margin")
    if margin < 0:
        raise ValueError(f"the margin is {margin:g}; it must not be negative")
    return replace(pair, extra=pair.extra | {"margins": [margin]})


def pair_with_prompt(record: dict) -> Record:
    """A prompt and two responses; each is text, or a list of messages."""
    prompt, chosen, rejected = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return with_margin(record, pair_of_messages(record))
    return with_margin(record, from_messages(Record(prompt, (chosen, rejected)), "response"))


def pair(record: dict) -> Record:
    """Two texts that begin with the same prompt, or two lists of messages that do."""
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return pair_with_prompt(record)
    return with_margin(record, split_dialogues(chosen, rejected))


def ranked(record: dict) -> Record:
    """K responses with scores, best first, and all their pairs of unequal scores."""
    return with_pairs(*(record[key] for key in RANKED))


def with_pairs(prompt: str | list[dict], responses: object, scores: object) -> Record:
    """The responses, best first, and all their pairs of unequal scores, with their differences."""
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
    found = Record(prompt, responses, tuple(pairs), {"margins": margins})
    return from_messages(found, "response")


def with_labels(known: dict[tuple[str, ...], Format]) -> dict[tuple[str, ...], Format]:
    """The formats, whose Records all get the same key in `extra`.

    Pairs and single responses may be in one batch, which joins what `extra` has.
    """
    return {keys: partial(with_label, read) for keys, read in known.items()}


def completion(loss: str, record: dict) -> Record:
    """One response, and whether it is desirable. It is paired with itself.

    loss: kto, sft, or "" where pairs are needed. Without a label a response is a demonstration.
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
    found = Record(prompt, (response,), ((0, 0),), {"desirable": [label is None or bool(label)]})
    return from_messages(found, "completion")


def with_label(read: Format, record: dict) -> Record:
    """The Record with `desirable` alone in `extra`, which has no meaning for pairs."""
    found = read(record)
    return replace(
        found, extra={"desirable": found.extra.get("desirable", [True] * len(found.pairs))}
    )


def single(loss: str) -> str:
    """The loss, if it learns from single responses; else ""."""
    return loss if loss in ("kto", "sft") else ""


def known_formats(preferences: Sequence[str], unpaired: str, keys: Sequence[str]) -> dict:
    """The formats of a run by their keys. unpaired: see load_rows. keys: of --keys."""
    if len(preferences) == 1:
        return formats(preferences[0], unpaired, keys)

    return formats_of_several(preferences)


def unchanged(record: Record) -> list[Record]:
    return [record]


# --- records --------------------------------------------------------------------------------------


def formats_of_several(
    preferences: Sequence[str],
) -> dict[tuple[str, ...], Callable[[dict], Record]]:
    """The formats, by their keys, of records that have a label for each of these preferences."""
    refuse = partial(has_one_label, preferences=preferences)
    return {PKU: partial(complete, PKU, partial(labelled, preferences=preferences)), (): refuse}


def labelled(record: dict, preferences: Sequence[str]) -> Record:
    """PKU-SafeRLHF: a pair for each preference, with its number in extra["dimensions"].

    The response that is best by the first preference is the first one.
    """
    best = [record.get(f"{name}_response_id") for name in preferences]
    for name, each in zip(preferences, best, strict=True):
        if isinstance(each, bool) or each not in (0, 1):
            raise ValueError(
                f"{name}_response_id is {each!r}; --preference {' '.join(preferences)} needs 0 or 1"
            )
    responses = (record["response_0"], record["response_1"])[:: -1 if best[0] else 1]
    pairs = tuple((int(each != best[0]), int(each == best[0])) for each in best)
    found = Record(record["prompt"], responses, pairs, {"dimensions": list(range(len(best)))})
    return from_messages(found, "response")


def has_one_label(record: dict, preferences: Sequence[str]) -> Record:
    raise ValueError(
        f"a record with the keys {' + '.join(sorted(map(str, record)))} has one label; "
        f"--preference {' '.join(preferences)} needs {' + '.join(PKU)}, with a label for each"
    )


def conditioned(record: Record, preference: str) -> Record:
    """The record with the name of a preference behind the last question of its prompt.

    There it stays where a prompt that is too long loses its beginning.
    """
    mark, prompt = f" [{preference}]", record.prompt
    if isinstance(prompt, list):
        prompt = [*prompt[:-1], prompt[-1] | {"content": prompt[-1]["content"] + mark}]
    elif is_dialogue(prompt):
        prompt = prompt.removesuffix(ASSISTANT) + mark + ASSISTANT
    else:
        prompt = prompt + mark
    return replace(record, prompt=prompt)


def by_preference(record: Record, preferences: Sequence[str]) -> list[Record]:
    """A record for each preference, whose prompt names it, with the pairs of its own labels."""
    records = []
    for d, name in enumerate(preferences):
        own = [n for n, dimension in enumerate(record.extra["dimensions"]) if dimension == d]
        extra = {key: [values[n] for n in own] for key, values in record.extra.items()}
        del extra["dimensions"]
        pairs = tuple(record.pairs[n] for n in own)
        marked = conditioned(record, name)
        records.append(replace(marked, pairs=pairs, extra=extra, name=f"{record.name}/{name}"))
    return records


OURS = ("prompt", "chosen", "rejected", "responses", "scores", "completion", "label", "margin",
        "system", "tools")  # fmt: skip


def names_of(keys: Sequence[str]) -> dict[str, str]:
    """What the records call each of OURS. Raises RunError for a pair that is not OURS=THEIRS."""
    names = {}
    for pair in keys:
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or ours not in OURS or ours in names:
            expected = ", ".join(OURS)
            raise RunError(f"--keys {pair}: expected OURS=THEIRS, with each once of {expected}")
        names[ours] = theirs
    return names


def renamed(
    known: dict[tuple[str, ...], Format], keys: Sequence[str]
) -> dict[tuple[str, ...], Format]:
    """The formats by the names that records have for their keys.

    A record that lacks one of these names is an error, also where it has ours: it would be read as
    something else than was asked for. The embedded data alone keep our names.
    """
    names = names_of(keys)
    found: dict[tuple[str, ...], Format] = {}
    for own, read in known.items():
        theirs = tuple(names.get(key, key) for key in own)
        found.setdefault(theirs, partial(read_renamed, names, read))
    found[PKU] = partial(read_renamed, names, known[PKU])
    found[()] = found.pop(())  # the last one, which takes all
    return found


def read_renamed(names: dict[str, str], read: Format, record: dict) -> Record:
    return read(with_our_names(record, names))


def decoded(raw: str | dict, where: str, names: dict[str, str]) -> object:
    """A record that was read at `where`, as an object with our names. Raises RunError."""
    record = decode(raw, where)
    if not names or not isinstance(record, dict):
        return record
    try:
        return with_our_names(record, names)
    except ValueError as error:
        raise RunError(f"{where}: {error}") from error


def with_our_names(record: dict, names: dict[str, str]) -> dict:
    """The record with our names for its keys. Raises ValueError if it lacks one of theirs."""
    theirs = {*names.values()}
    if not theirs & record.keys() and record.keys() >= {*PKU}:
        return record  # of the embedded data
    if missing := sorted(theirs - record.keys()):
        raise ValueError(
            f"--keys names {', '.join(missing)}, and the record has no such key; it has "
            f"{', '.join(sorted(record))}"
        )
    back = {theirs: ours for ours, theirs in names.items()}
    others = {key: value for key, value in record.items() if key not in names or key in back}
    return {back.get(key, key): value for key, value in others.items()}
