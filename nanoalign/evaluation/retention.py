"""Retention: what a policy has forgotten, by the log-likelihood of texts that it did not sample.

    change = (sum of log pi(y | x) - log pi_0(y | x)) / (tokens of all y)

of the policy pi and the baseline pi_0: over the chosen responses of the data, and over any text. A
training of preferences that hurts the rest has a change far below 0 on text that has nothing to do
with them. In DPO that of chosen responses often falls, too (docs/design.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from nanoalign.batch import Row
from nanoalign.data.formats import formats
from nanoalign.data.prompts import prompt_key
from nanoalign.data.sources import check_sources, open_source
from nanoalign.data.templates import encode_records
from nanoalign.distributed import print0
from nanoalign.encode import tokenize
from nanoalign.errors import RunError
from nanoalign.evaluation.answers import Sampler
from nanoalign.evaluation.scoring import score_rows
from nanoalign.evaluation.statistics import Figures, ratio_interval
from nanoalign.files.text import named
from nanoalign.loop import Batcher
from nanoalign.packing.self_check import check_fits
from nanoalign.records import Record, check_text, decode, parse

# By the beginning of the names of figures: rows, and of each the prompt or text that it is of.
Texts = dict[str, tuple[list[Row], list[str]]]


def read_chosen(sources: Sequence[str], renaming: Sequence[str] = ()) -> list[Record]:
    """Returns those records of the sources that have pairs, with their chosen responses alone.

    Raises RunError, with file and line, for a record of pairs that no format reads. renaming:
    of --keys, OURS=THEIRS.
    """
    check_sources(sources)
    known, records = formats(unpaired="prompts"), []
    for source in sources:
        for where, name, _, raw in open_source(source, renaming):
            decoded = decode(raw, where)
            keys = decoded.keys() if isinstance(decoded, dict) else set()
            if any(names and keys >= {*names} for names in known):
                record = chosen_alone(parse(decoded, where, known)[1])
                records += [replace(record, name=name)] if record.responses else []
    return records


def chosen_alone(record: Record) -> Record:
    """The record with the responses that are in a pair and are not worse than another one."""
    better, worse = ({pair[side] for pair in record.pairs if pair[0] != pair[1]} for side in (0, 1))
    kept = sorted(better - worse)
    return replace(
        record,
        responses=[record.responses[i] for i in kept],
        answers=[record.answers[i] for i in kept] if record.answers else (),
        sampled=record.sampled and (record.sampled[0], [record.sampled[1][i] for i in kept]),
        pairs=(),
        extra={},
    )


def read_texts(source: str) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the records of a source, which have the key "text".

    Raises RunError, with file and line, for another record.
    """
    check_sources([source])
    for where, name, _, raw in open_source(source):
        record = decode(raw, where)
        if not isinstance(record, dict) or "text" not in record:
            raise RunError(f"{where}: --retention needs records with the key 'text'")
        try:
            check_text("text", record["text"])
        except ValueError as error:
            raise RunError(f"{where}: {error}") from error
        yield name, record["text"]


def rows_of_texts(source: str, tokenizer, max_length: int) -> list[Row]:
    """Returns the texts of a source as rows; the first token of a text is its prompt.

    Texts are cut to max_length tokens. Raises RunError if none has two tokens.
    """
    names, texts = zip(*read_texts(source), strict=True)
    tokens = [np.array(ids[:max_length], np.int32) for ids in tokenize(texts, tokenizer, True)]
    named_tokens = zip(names, tokens, strict=True)
    rows = [Row(name, ids[:1], (ids[1:],), ()) for name, ids in named_tokens if len(ids) > 1]
    if not rows:
        raise RunError(f"--retention {source}: no text has two tokens")
    return rows


def held_out_texts(
    policy: Sampler, data: Sequence[str], keys: Sequence[str], texts: str | None, max_length: int
) -> Texts:
    """Returns the chosen responses of the data, and the texts of --retention if it is given.

    data: sources, whose records without pairs are left out. keys: of --keys. Raises RunError for
    data that can't be read, and for rows that the policy can't read.
    """
    found: Texts = {}
    if chosen := read_chosen(data, keys):
        rows = encode_records(chosen, policy.tokenizer, max_length, policy.template)
        prompts = [prompt_key(record.prompt, record.tools) for record in chosen]
        found["chosen_logps"] = (rows, prompts)
    if texts:
        rows = rows_of_texts(texts, policy.tokenizer, max_length)
        print0(f"{'retention':<11} {named([texts])}: {len(rows):,} texts")
        found["text_logps"] = (rows, [row.name for row in rows])
    for rows, _ in found.values():
        check_fits(policy.policy, rows, f"'{policy.name}'")
    return found


def retention(texts: Texts, samplers: Sequence[Sampler], batcher: Batcher) -> Figures:
    """The change of the log-likelihood of texts, in nats per token. A collective.

    samplers: policy and baseline, of one vocabulary. For each NAME in texts, NAME_change is the
    policy's minus the baseline's, with its 95 % interval over the groups by
    statistics.ratio_interval, NAME_policy and NAME_baseline are theirs, NAME_tokens counts tokens.
    """
    figures = {}
    for name, (rows, groups) in texts.items():
        sums = []  # by model: (rows,)
        for sampler in samplers:
            batcher.prepare(sampler.policy)  # another model may have prepared it since
            scores = score_rows(sampler.policy, rows, batcher, f"'{sampler.name}'")
            sums.append(np.array([sum(of_row) for of_row in scores]))
        tokens = np.array([sum(map(len, row.responses)) for row in rows])
        place = np.unique(groups, return_inverse=True)[1]
        change = np.bincount(place, sums[0] - sums[1])
        ratio, low, high = ratio_interval(change, np.bincount(place, tokens))
        policy, baseline = (float(own.sum() / tokens.sum()) for own in sums)
        own = {"change": ratio, "change_low": low, "change_high": high}
        own |= {"policy": policy, "baseline": baseline, "tokens": int(tokens.sum())}
        figures |= {f"{name}_{key}": value for key, value in own.items()}
    return figures
