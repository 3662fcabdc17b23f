"""How a reward model ranks pairs of responses.

Shapes: P pairs. The better response of a pair is the chosen one, the worse the rejected one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanoalign.batch import Row
from nanoalign.checkpoints.intervals import wilson_interval
from nanoalign.encode import Record
from nanoalign.evaluation.statistics import calibration, rank_correlation, win_shares
from nanoalign.tiny import world as tiny_world

Figures = dict[str, float | int | None]


@dataclass(frozen=True, slots=True)
class Scored:
    """One response and its reward: a line of scores.jsonl."""

    pair_id: str
    subset: str
    prompt: str | list[dict]
    response: str
    side: str  # "chosen" if no response of the record is better, else "rejected"
    score: float
    tokens: int  # of the response as it was scored: with its EOS, or cut


Pairs = list[tuple[Scored, Scored]]  # (better, worse)


def scored_lines(
    records: Sequence[Record], rows: Sequence[Row], scores: Sequence[Sequence[float]], view: str
) -> list[Scored]:
    """A Scored for every response of the records.

    view: a name that is appended to those of subset and pair, if it is not empty.
    """
    suffix = f"/{view}" if view else ""
    scored = []
    for record, row, rewards in zip(records, rows, scores, strict=True):
        worse = {rejected for _, rejected in record.pairs}
        responses = zip(record.responses, rewards, row.responses, strict=True)
        scored += [
            Scored(
                pair_id=record.name + suffix,
                subset=record.subset + suffix,
                prompt=record.prompt,
                response=response,
                side="rejected" if i in worse else "chosen",
                score=score,
                tokens=len(tokens),
            )
            for i, (response, score, tokens) in enumerate(responses)
        ]
    return scored


def pairs_of(scored: Sequence[Scored]) -> Pairs:
    """Every chosen response of a record with every rejected one."""
    records = defaultdict(lambda: ([], []))
    for line in scored:
        records[line.pair_id][line.side == "rejected"].append(line)
    return [
        (better, worse)
        for chosen, rejected in records.values()
        for better in chosen
        for worse in rejected
    ]


def reward_metrics(scored: Sequence[Scored]) -> Figures:
    """The figures of some responses and their pairs: see pairs_of.

    Unlike those of training, they weigh each pair of a ranked record as much as any other pair.

    accuracy counts a tie as half a hit; accuracy_low and accuracy_high are its 95 % interval
    (Wilson). reward_mean and reward_std are those of all responses, better_data_mean and
    worse_data_mean the means of one side. worse_better_than_better_count is the number of pairs
    whose worse response has the higher reward, worse_worse_than_better_count those whose worse
    response has the lower one. calibration_error is that of statistics.calibration.
    longer_accuracy is the accuracy of always choosing the response with more tokens,
    length_correlation the rank correlation of reward and tokens, None if one of them is constant.
    """
    pairs = pairs_of(scored)
    better = np.array([b.score for b, _ in pairs])  # (P,)
    worse = np.array([w.score for _, w in pairs])
    longer = np.array([b.tokens - w.tokens for b, w in pairs])
    scores = np.array([line.score for line in scored])
    accuracy = _accuracy(better - worse)
    low, high = wilson_interval(accuracy, len(pairs))
    return {
        "pairs": len(pairs),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": int((better == worse).sum()),
        "reward_mean": float(scores.mean()),
        "reward_std": float(scores.std()),
        "better_data_mean": float(np.mean([x.score for x in scored if x.side == "chosen"])),
        "worse_data_mean": float(np.mean([x.score for x in scored if x.side == "rejected"])),
        "worse_better_than_better_count": int((worse > better).sum()),
        "worse_worse_than_better_count": int((worse < better).sum()),
        "margin_mean": float((better - worse).mean()),
        "calibration_error": calibration(better - worse).error,
        "longer_accuracy": _accuracy(longer),
        "length_correlation": rank_correlation(scores, np.array([x.tokens for x in scored])),
    }


def truth(scored: Sequence[Scored], preference: str) -> dict[str, float]:
    """How far the labels can be predicted at all, if all prompts are those of the embedded world.

    label_ceiling: the expected accuracy of the true rule, over labels that are drawn from it as
        those of the embedded data are; oracle_accuracy: its accuracy on these labels.
    true_accuracy: the share of pairs that the reward model orders as the true rule does, among
        those that differ by it, with its 95 % interval (Wilson).
    """
    prompts = {line.prompt if isinstance(line.prompt, str) else None for line in scored}
    if not prompts <= tiny_world.PROMPTS.keys():
        return {}
    rule = {"better": tiny_world.true_reward, "safer": tiny_world.true_safety}[preference]
    pairs = pairs_of(scored)
    margins = np.array(
        [rule(b.prompt, b.response) - rule(w.prompt, w.response) for b, w in pairs]
    )  # (P,)
    agrees = np.array([b.score - w.score for b, w in pairs]) * np.sign(margins)
    agreement = _accuracy(agrees[margins != 0])
    low, high = wilson_interval(agreement, int((margins != 0).sum()))
    return {
        "label_ceiling": float((1 / (1 + np.exp(-np.abs(margins)))).mean()),
        "oracle_accuracy": _accuracy(margins),
        "true_accuracy": agreement,
        "true_accuracy_low": low,
        "true_accuracy_high": high,
    }


def _accuracy(margins: np.ndarray) -> float:
    return float(win_shares(margins).mean())


def table(rows: dict[str, Figures], title: str = "subset") -> str:
    """The figures as text, a line per name; the words of a column's name are below each other."""
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    words = [name.split("_") for name in names]
    height = max(map(len, words))
    columns = [[title] + [""] * (height - 1) + list(rows)]
    for name, parts in zip(names, words, strict=True):
        cells = [_cell(figures.get(name)) for figures in rows.values()]
        columns.append(parts + [""] * (height - len(parts)) + cells)
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
    return "\n".join(lines)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
