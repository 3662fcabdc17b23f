"""Which labels to doubt: pairs of N runs of train_rm.py, each scored by the run that held it out.

Shapes: P pairs.
"""

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoalign.data.columns import PKU
from nanoalign.data.formats import decode_renamed, formats, names_of
from nanoalign.data.held_out import held_out_by
from nanoalign.data.sources import source_at
from nanoalign.data.split import record_digests
from nanoalign.errors import RunError
from nanoalign.evaluation import plots
from nanoalign.evaluation.label_noise import (
    LEAST_RELIABLE,
    LabelNoise,
    estimate,
    expected_agreement,
    interval,
    probability_wrong,
)
from nanoalign.evaluation.ranking import TrueRule
from nanoalign.evaluation.render import share
from nanoalign.evaluation.results import METRICS, write_records
from nanoalign.evaluation.scoring import load_judges, prompt_keys
from nanoalign.evaluation.statistics import Figures, win_shares
from nanoalign.files.run_folder import ARGS
from nanoalign.files.text import in_a_line, read_json
from nanoalign.loop import Batcher
from nanoalign.records import Record, decode, parse

# Flags in which the runs must agree: they select the records, their labels and the parts.
SHARED = ("data", "keys", "preference")
# The estimate of simulated pairs is off by 4 points with 100 of them, by 3 with 300, by 1.5 with
# 1,000 (root mean square, a fifth of the labels flipped, errors as the estimate assumes).
FEW = 300


class Folds(NamedTuple):
    """Runs of train_rm.py --fold K/N of two or more seeds, for each seed one of each K."""

    runs: list[Path]
    seeds: list[int]  # of each run
    held_out: list[np.ndarray]  # of each run, (M,) hashes of records
    sources: list[list[str]]  # [name, absolute place]
    names: dict[str, str]  # of formats.names_of
    preference: str
    parts: int  # N


class Line(NamedTuple):
    """A record as its source has it, and as it was read."""

    where: str  # place for errors
    keys: tuple[str, ...]  # by which its format was found
    raw: dict
    record: Record


class Pair(NamedTuple):
    """A pair of two different responses."""

    line: int  # index of its record
    chosen: int  # index of a response
    rejected: int


class Doubts(NamedTuple):
    """What is known of the labels of the pairs."""

    margins: np.ndarray  # (P,) means over the seeds
    wrong: np.ndarray  # (P,) the probability that the label is wrong
    order: np.ndarray  # (P,) indices of pairs, the most doubtful first
    truly: np.ndarray | None  # (P,) whether it is, where the truth is known; 1/2 for a tie
    noise: LabelNoise
    figures: Figures


# --- reading --------------------------------------------------------------------------------------


def read_folds(runs: Sequence[str]) -> Folds:
    """Reads what the runs have held out.

    Raises RunError for a folder of no run, for runs of different data or labels, for runs of one
    seed, and unless the runs of each seed are all N folds, each once.
    """
    paths = list(map(Path, runs))
    known = [held_out_by(path, str(path)) for path in paths]
    settings = [
        read_json(path / ARGS) | {"data": arrays["sources"].tolist()}
        for path, arrays in zip(paths, known, strict=True)
    ]
    for path, own in zip(paths, settings, strict=True):
        if not own.get("fold") or not isinstance(own.get("preference"), list):
            raise RunError(f"{path} is no run of train_rm.py --fold K/N; train one for each K")
        for key in SHARED:
            if own.get(key) != (first := settings[0].get(key)):
                raise RunError(
                    f"{path} was trained with --{key} {own.get(key)}, {paths[0]} with {first}; "
                    "give runs that differ in --fold and --seed alone"
                )
    parts, seeds = int(settings[0]["fold"].partition("/")[2]), [own["seed"] for own in settings]
    for seed in sorted(set(seeds)):
        given = sorted(own["fold"] for own in settings if own["seed"] == seed)
        expected = sorted(f"{k}/{parts}" for k in range(1, parts + 1))
        if given != expected:
            raise RunError(
                f"the runs of --seed {seed} are the folds {' '.join(given)}; give one of each of "
                f"{' '.join(expected)}"
            )
    if len(set(seeds)) == 1:
        raise RunError(
            "runs of one --seed can't tell a wrong label from an error of the models; train all "
            "folds again with another --seed, and give all runs"
        )
    preference = settings[0]["preference"]
    if len(preference) > 1:
        raise RunError(f"the runs learn the labels {' '.join(preference)}; give runs of one label")
    held_out, names = [arrays["held_out"] for arrays in known], names_of(settings[0]["keys"])
    return Folds(paths, seeds, held_out, settings[0]["data"], names, preference[0], parts)


def read_lines(folds: Folds) -> list[Line]:
    """Returns all records of the sources, in their order."""
    known = formats(folds.preference)
    lines = []
    for source, place in folds.sources:
        for where, name, _, raw in source_at(place, source).records():
            raw = decode(raw, where)
            keys, record = parse(decode_renamed(raw, where, folds.names), where, known)
            lines.append(Line(where, keys, raw, replace(record, name=name)))
    return lines


def pairs_of(lines: Sequence[Line]) -> list[Pair]:
    return [
        Pair(n, *pair)
        for n, line in enumerate(lines)
        for pair in line.record.pairs
        if line.record.responses[pair[0]] != line.record.responses[pair[1]]
    ]


def held_out_margins(
    folds: Folds, lines: Sequence[Line], pairs: Sequence[Pair], precision: str, batcher: Batcher
) -> np.ndarray:
    """Returns the margins of the pairs by the runs that held them out, (S, P) of S seeds.

    A margin is the reward of chosen minus that of rejected, divided by the root mean square of the
    margins of the run, because runs may differ in scale. A collective. precision: of --precision.
    Raises RunError if the records are not those that the runs have held out.
    """
    digests, seeds = record_digests([line.record for line in lines])[:, 2], sorted({*folds.seeds})
    margins = np.full((len(seeds), len(pairs)), np.nan)
    for run, seed, held_out in zip(folds.runs, folds.seeds, folds.held_out, strict=True):
        chosen = np.isin(digests, held_out)
        if chosen.sum() != len(held_out):
            raise RunError(
                f"{run} held out {len(held_out):,} records, and {chosen.sum():,} of them are in "
                f"{' '.join(place for _, place in folds.sources)}; restore these data"
            )
        flags = dict.fromkeys(("head", "combine", "output", "template", "max_length"))
        args = Namespace(model=str(run), precision=precision, **flags)
        (judge,) = load_judges(args, folds.preference, batcher)
        own = np.flatnonzero(chosen).tolist()
        encoded = judge.encode([lines[n].record for n in own])
        judge.check(encoded)
        scores = dict(zip(own, judge.score(encoded), strict=True))
        places = [n for n, pair in enumerate(pairs) if pair.line in scores]
        found = [
            scores[line][better] - scores[line][worse]
            for line, better, worse in (pairs[n] for n in places)
        ]
        if not places:
            raise RunError(
                f"{run} held out no record with two different responses; train all folds again, "
                "with fewer of them or on more data"
            )
        if not any(found):
            raise RunError(f"{run} gives both responses of each pair one reward; train it longer")
        margins[seeds.index(seed), places] = found / np.sqrt(np.mean(np.square(found)))
    if np.isnan(margins).any():
        where = lines[pairs[int(np.isnan(margins).any(0).argmax())].line].where
        raise RunError(f"{where}: no run has held this record out; restore the data of the runs")
    return margins


def truly_wrong(
    lines: Sequence[Line], pairs: Sequence[Pair], preference: str, truth: TrueRule
) -> np.ndarray | None:
    """Returns 1 where the ground truth contradicts the label, 1/2 where it has a tie, else 0: (P,).

    None if the rule does not know all prompts.
    """
    if not truth.knows(line.record.prompt for line in lines):
        return None
    rule = truth.rewards[preference]
    margins = []
    for line, better, worse in pairs:
        record = lines[line].record
        chosen, rejected = record.responses[better], record.responses[worse]
        margins.append(rule(record.prompt, chosen) - rule(record.prompt, rejected))
    return (1 - np.sign(margins)) / 2


# --- figures and files ----------------------------------------------------------------------------


def doubt(
    lines: Sequence[Line],
    pairs: Sequence[Pair],
    margins: np.ndarray,
    folds: Folds,
    truth: TrueRule,
) -> Doubts:
    """Estimates which labels are wrong, and how many. margins: (S, P) of held_out_margins.

    accuracy is the share of labels with which the mean margin agrees, wrong_share the estimated
    share of wrong labels, wrong_share_low and wrong_share_high the ends of its 95 % interval,
    wrong_share_most the share if the models made no errors, flipped_share the part that does not
    depend on the margin, and reliability that of LabelNoise. Where the truth is known,
    true_wrong_share is the share of labels that contradict it, and true_wrong_share_of_first_tenth
    that among the most doubtful tenth.
    """
    noise, mean = estimate(margins, folds.parts), margins.mean(0)
    wrong = probability_wrong(mean, noise)
    order = np.lexsort((mean, -wrong))
    records = [lines[pair.line].record for pair in pairs]
    low, high = interval(margins, prompt_keys(records), folds.parts)
    figures = {
        "pairs": len(pairs),
        "accuracy": float(win_shares(mean).mean()),
        "wrong_share": noise.share,
        "wrong_share_low": low,
        "wrong_share_high": high,
        "wrong_share_most": noise.most,
        "flipped_share": noise.flipped,
        "reliability": noise.reliability,
    }
    truly = truly_wrong(lines, pairs, folds.preference, truth)
    if truly is not None:
        figures["true_wrong_share"] = float(truly.mean())
        first = order[: max(1, len(order) // 10)]
        figures["true_wrong_share_of_first_tenth"] = float(truly[first].mean())
    return Doubts(mean, wrong, order, truly, noise, figures)


def write(folder: Path, lines: Sequence[Line], pairs: Sequence[Pair], found: Doubts) -> None:
    """Writes suspects.jsonl, metrics.json and suspects.png."""
    write_records(folder / "suspects.jsonl", suspect_lines(lines, pairs, found))
    (folder / METRICS).write_text(json.dumps(found.figures, indent=2) + "\n")
    sizes = np.quantile(np.abs(found.margins), np.linspace(0, 1, 200))
    curve, order = (sizes, expected_agreement(sizes, found.noise)), found.order
    truly = None if found.truly is None else found.truly[order]
    path = folder / "suspects.png"
    plots.suspects_picture(path, found.margins, curve, found.wrong[order], truly, found.figures)


def suspect_lines(
    lines: Sequence[Line], pairs: Sequence[Pair], found: Doubts
) -> Iterator[dict[str, object]]:
    """Yields the lines of suspects.jsonl, the most doubtful pair first."""
    for n in found.order.tolist():
        record = lines[pairs[n].line].record
        line = {
            "id": record.name,
            "prompt": record.prompt,
            "chosen": record.responses[pairs[n].chosen],
            "rejected": record.responses[pairs[n].rejected],
            "margin": float(found.margins[n]),
            "probability": float(found.wrong[n]),
        }
        yield line if found.truly is None else line | {"truly_wrong": float(found.truly[n])}


def summary(figures: Figures) -> str:
    """The figures as sentences."""
    text = (
        f"{share(figures, 'wrong_share')} of {figures['pairs']:,} labels are wrong, by the "
        f"estimate; {figures['wrong_share_most']:.1%} if the models made no errors."
    )
    if figures["pairs"] < FEW:
        text += f" Fewer than {FEW} pairs are too few for an estimate."
    if figures["reliability"] < LEAST_RELIABLE:
        text += " The seeds hardly agree, so the estimate says little: train longer."
    if "true_wrong_share" in figures:
        text += (
            f"\nBy the ground truth {figures['true_wrong_share']:.1%} are wrong, and "
            f"{figures['true_wrong_share_of_first_tenth']:.1%} of the most doubtful tenth."
        )
    return text


# --- cleaned data ---------------------------------------------------------------------------------


def check_cleaning(lines: Sequence[Line], flip: bool, folds: Folds) -> None:
    """Raises RunError unless the records are in one format, of one pair each, and can be written.

    flip: whether labels are to be reversed, which must be possible, too.
    """
    first = lines[0]
    for line in lines:
        if line.keys != first.keys:
            raise RunError(
                f"{line.where} has the keys {' + '.join(line.keys)}, {first.where} has "
                f"{' + '.join(first.keys)}; --cleaned writes records of one format"
            )
        if len(line.record.pairs) > 1:
            raise RunError(
                f"{line.where}: {len(line.record.pairs)} pairs; --drop and --flip are for records "
                "of one pair"
            )
        if flip:
            flipped(line, folds)
        try:
            json.dumps(line.raw)
        except TypeError as error:  # dates and bytes of parquet and arrow
            raise RunError(
                f"{line.where} can't be written as JSON by --cleaned: {in_a_line(error)}; leave "
                "that column out of the data"
            ) from error


def cleaned(
    lines: Sequence[Line],
    pairs: Sequence[Pair],
    found: Doubts,
    drop: float | None,
    flip: float | None,
    folds: Folds,
) -> list[dict]:
    """Returns the records in their order, without the most doubtful ones, or with these reversed.

    drop, flip: the share of the pairs; one of them is None.
    """
    count = round((drop or flip) * len(pairs))
    doubted = {pairs[n].line for n in found.order[:count].tolist()}
    kept = (n for n in range(len(lines)) if flip or n not in doubted)
    return [flipped(lines[n], folds) if n in doubted else lines[n].raw for n in kept]


def flipped(line: Line, folds: Folds) -> dict:
    """Returns the record as its source has it, but with its label reversed.

    A label of PKU-SafeRLHF becomes the other index. Of other records the values are exchanged of
    each two keys that differ by the words chosen and rejected, or the names of these in --keys.
    Raises RunError if the result would not be read as the same pair in the other order.
    """
    raw, label = line.raw, f"{folds.preference}_response_id"
    if raw.keys() >= {*PKU, label}:
        new = raw | {label: 1 - raw[label]}
    else:
        sides = [folds.names.get(side, side) for side in ("chosen", "rejected")]
        others = {key: key.replace(*sides) for key in raw if sides[0] in key}
        both = [(key, other) for key, other in others.items() if other in raw]
        new = raw | {a: raw[b] for a, b in both} | {b: raw[a] for a, b in both}
    renamed = decode_renamed(new, line.where, folds.names)
    _, record = parse(renamed, line.where, formats(folds.preference))
    if [*record.responses] != [*line.record.responses][::-1]:
        raise RunError(
            f"{line.where}: --flip can't reverse the label of a record with the keys "
            f"{' + '.join(line.keys)}; give --drop"
        )
    return new
