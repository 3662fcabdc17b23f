"""What a reward model says of preference data: a score a response, and the figures and cases they give.

Shapes: P pairs. A pair's `better` response is the chosen one of the data, its `worse` the rejected one.
"""

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nanoalign.distributed import World, sum_over_ranks
from nanoalign.errors import RunError
from nanoalign.loop import all_batches
from nanoalign.metrics import calibration, rank_correlation, wilson_interval, win_shares
from nanoalign.models import RewardModel, RowModel
from nanoalign.records import Example, Message, conditioned
from nanoalign.rows import EOS_RULE, Row, encode_all
from nanoalign.tiny import world as tiny_world


@dataclass(frozen=True, slots=True)
class Scored:
    """One response and its reward: a line of scores.jsonl."""

    pair_id: str
    subset: str
    prompt: str | tuple[Message, ...]
    response: str
    side: str  # "chosen": no response of the record is better; else "rejected"
    score: float
    tokens: int  # of the response as it was scored: with its EOS, or cut


Pairs = list[tuple[Scored, Scored]]  # (better, worse)

# --- scores ---------------------------------------------------------------------------------------


def scoring_rule(
    model: RewardModel,
    name: str,
    template: str | None,
    max_length: int | None,
    flags: str = "",
) -> tuple[str, int]:
    """(template, max_length) to score with: those of the model's training, which flags may only repeat.

    For a model that does not say how it was trained, the flags decide; their names begin with `flags`.
    """
    rule = model.scoring or {}
    template = None if template == "auto" else template
    for key, given in (("template", template), ("max_length", max_length), ("eos", EOS_RULE)):
        if given is not None and given != rule.get(key, given):
            raise RunError(
                f"model '{name}' was trained with {key} {rule[key]!r}, and is to score with {given!r}: "
                "its rewards would mean something else"
                + (f"; give --{flags}{key} {rule[key]}" if key != "eos" else "")
            )
    return template or rule.get("template", "auto"), max_length or rule.get("max_length", 1024)


@torch.no_grad()
def score_rows(
    model: RowModel, rows: list[Row], args: argparse.Namespace, world: World
) -> list[list[float]]:
    """Rewards or log-probabilities of every row's responses, each computed once, the same on every rank.

    Equal responses of a row get one score: at different places of it, rounding differs.
    """
    first = np.cumsum([0] + [len(row.responses) for row in rows])  # the first response of each row
    rewards = torch.zeros(int(first[-1]), dtype=torch.float64, device=world.device)
    with tqdm(total=len(rows), unit="row", disable=not world.is_main) as progress:
        for group, batch in all_batches(rows, args, world):
            scores = model(batch).double()  # (S,)
            if group:
                rewards[[j for i in group for j in range(first[i], first[i + 1])]] = scores
            progress.update(min(len(group) * world.size, len(rows) - progress.n))
    rewards = sum_over_ranks(rewards).cpu()  # one rank has written each place, the others have 0
    scores = []
    for row, start in zip(rows, first, strict=False):
        values = rewards[start : start + len(row.responses)].tolist()
        if not all(map(math.isfinite, values)):
            raise RunError(
                f"{row.pair_id}: the {model.SCORES} {values} are not finite; are the weights whole?"
            )
        first_of = {}
        for response, value in zip(row.responses, values, strict=True):
            first_of.setdefault(response.tobytes(), value)
        scores.append([first_of[response.tobytes()] for response in row.responses])
    return scores


class View(NamedTuple):
    """One way to read a reward model's outputs, and the labels that it is compared with."""

    name: str  # behind a subset's; "" where there is one view alone
    preference: str
    shares: dict[str, float]  # weights of the model's preferences


def views(
    model: RewardModel, preference: str | None, combine: list[tuple[str, float]] | None
) -> list[View]:
    """Each of the model's preferences against its own labels; or, with weights, their sum.

    preference: whose labels, where it is to be another than the model's own.
    """
    names = model.preferences
    if combine:
        shares = dict(combine)
        if len(shares) < len(combine):
            raise RunError("--combine names a preference twice; give each one weight")
        model.combine(shares)  # are they its own?
        labels = preference or (combine[0][0] if len(combine) == 1 else None)
        if labels is None:
            raise RunError(
                "--combine of several: say whose labels to compare with, as --preference better"
            )
        return [View("", labels, shares)]
    if len(names) == 1:
        return [View("", preference or names[0], {names[0]: 1.0})]
    chosen = [name for name in names if preference in (None, name)]
    if not chosen:
        raise RunError(
            f"the reward model has no preference '{preference}'; it has {', '.join(names)}"
        )
    return [View(name, name, {name: 1.0}) for name in chosen]


class Encoded(NamedTuple):
    """Examples as a reward model reads them."""

    rows: list[Row]
    counts: Counter
    weight: float


def encode_for(
    model: RewardModel,
    shares: dict[str, float],
    examples: list[Example],
    tokenizer,
    rule: tuple[str, int],
    ended: Sequence[Sequence[bool | None]] | None = None,
) -> list[Encoded]:
    """The examples as rows; where prompts name the preference, once for each that has a weight."""
    model.combine(shares)
    if not model.is_conditioned:
        return [Encoded(*encode_all(examples, tokenizer, *rule, ended), 1.0)]
    return [
        Encoded(
            *encode_all([conditioned(e, name) for e in examples], tokenizer, *rule, ended), weight
        )
        for name, weight in shares.items()
    ]


def score_encoded(
    model: RewardModel, encoded: list[Encoded], args: argparse.Namespace, world: World
) -> list[list[float]]:
    """The reward of every response, of each example a list. Every rank must call it."""
    parts = [score_rows(model, each.rows, args, world) for each in encoded]
    return [
        [
            sum(each.weight * x for each, x in zip(encoded, values, strict=True))
            for values in zip(*row, strict=True)
        ]
        for row in zip(*parts, strict=True)
    ]


def scored_lines(
    examples: list[Example], rows: list[Row], scores: list[list[float]], name: str
) -> list[Scored]:
    """A Scored for every response, in the order of the examples, whose rows and scores are given.

    name: of the view, behind those of subset and pair.
    """
    behind = f"/{name}" if name else ""
    scored = []
    for example, row, rewards in zip(examples, rows, scores, strict=True):
        worse = {pair.rejected for pair in example.pairs}
        scored += [
            Scored(
                pair_id=example.pair_id + behind,
                subset=example.subset + behind,
                prompt=example.prompt,
                response=response,
                side="rejected" if i in worse else "chosen",
                score=score,
                tokens=len(tokens),
            )
            for i, (response, score, tokens) in enumerate(
                zip(example.responses, rewards, row.responses, strict=True)
            )
        ]
    return scored


# --- figures --------------------------------------------------------------------------------------


def pairs_of(scored: list[Scored]) -> Pairs:
    """Every chosen response of a record with every rejected one: of a preference pair, the pair."""
    records = defaultdict(lambda: ([], []))
    for line in scored:
        records[line.pair_id][line.side == "rejected"].append(line)
    return [
        (better, worse)
        for chosen, rejected in records.values()
        for better in chosen
        for worse in rejected
    ]


def reward_metrics(scored: list[Scored]) -> dict[str, float | int | None]:
    """The figures of one subset, over the pairs of pairs_of and the responses as they are.

    (Training's figures of ranked records are over all their pairs, a record weighing as much as a
    pair.)

    accuracy counts a tie as half a hit; its interval is Wilson's, at 95 %. reward_mean and reward_std
    are over all responses, better_data_mean and worse_data_mean over those of one side. The counts
    are of pairs in which the worse response has the higher or the lower reward. calibration_error
    is that of metrics.calibration. longer_accuracy is the accuracy of always taking the answer with
    more tokens, length_correlation Spearman's between reward and tokens (None where one of them
    never varies).
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


def _accuracy(margins: np.ndarray) -> float:
    return float(win_shares(margins).mean())


def truth(scored: list[Scored], preference: str) -> dict[str, float]:
    """How well these labels can be predicted at all, where all prompts are the embedded world's.

    label_ceiling: the expected accuracy of a judge that knows the true rule, over labels that are
        drawn from it as those of the embedded data are; oracle_accuracy: its accuracy on these.
    true_accuracy: the share of pairs that the reward model orders as the true rule does, among those that
        differ by it, with Wilson's interval of 95 %.
    """
    prompts = {line.prompt if isinstance(line.prompt, str) else None for line in scored}
    if not prompts <= tiny_world.PROMPTS.keys():
        return {}
    judge = {"better": tiny_world.true_reward, "safer": tiny_world.true_safety}[preference]
    margins = np.array(
        [judge(b.prompt, b.response) - judge(w.prompt, w.response) for b, w in pairs_of(scored)]
    )
    orders = np.array([b.score - w.score for b, w in pairs_of(scored)]) * np.sign(margins)
    agreement = _accuracy(orders[margins != 0])
    low, high = wilson_interval(agreement, int((margins != 0).sum()))
    return {
        "label_ceiling": float((1 / (1 + np.exp(-np.abs(margins)))).mean()),
        "oracle_accuracy": _accuracy(margins),
        "true_accuracy": agreement,
        "true_accuracy_low": low,
        "true_accuracy_high": high,
    }


def table(rows: dict[str, dict[str, float | int | None]], title: str = "subset") -> str:
    """The figures as text, a row by name; their names stand over their columns, a word a line."""
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


# --- cases ----------------------------------------------------------------------------------------


def cases(scored: list[Scored], count: int) -> str:
    """The pairs worth reading, as Markdown: a subset's surest right, surest wrong and closest ones."""
    text = (
        "# Cases\n\nRight and wrong are by the labels, which may be wrong themselves; the winner's "
    )
    text += "probability is the reward model's, sigmoid of the difference of the two rewards.\n"
    for subset in dict.fromkeys(line.subset for line in scored):
        pairs = pairs_of([line for line in scored if line.subset == subset])
        # surest right first
        by_margin = sorted(pairs, key=lambda pair: pair[1].score - pair[0].score)
        right = [pair for pair in by_margin if pair[0].score > pair[1].score]
        wrong = [pair for pair in reversed(by_margin) if pair[0].score < pair[1].score]
        close = sorted(pairs, key=lambda pair: abs(pair[0].score - pair[1].score))
        for title, chosen in (
            ("surest right", right), ("surest wrong", wrong), ("closest", close)
        ):  # fmt: skip
            text += f"\n## {subset}: {title}\n"
            if not chosen:
                text += "\nNone.\n"
            for number, pair in enumerate(chosen[:count], start=1):
                text += _case(number, *pair)
    return text


def _case(number: int, better: Scored, worse: Scored) -> str:
    high, low = (better, worse) if better.score >= worse.score else (worse, better)
    verdict = "right" if better.score > worse.score else "wrong"
    verdict = "a tie" if better.score == worse.score else verdict
    prompt = better.prompt
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    probability = 1 / (1 + math.exp(low.score - high.score))
    text = (
        f"\n### {number}. {better.pair_id}: {verdict}, the winner's probability {probability:.3f}\n"
    )
    text += f"\nPrompt\n\n{_fenced(prompt)}"
    for name, line in (("Higher", high), ("Lower", low)):
        text += f"\n{name} reward **{line.score:+.3f}** ({line.side} in the data; tokens: {line.tokens})\n"
        text += f"\n{_fenced(line.response)}"
    return text


def _fenced(text: str) -> str:
    """As a block that Markdown leaves alone, whatever the text holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}\n"
