"""How a reward model ranks pairs of responses.

Shapes: P pairs. The better response of a pair is the chosen one, the worse the rejected one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from nanoalign.data.prompts import prompt_key
from nanoalign.evaluation.render import figures_table, share
from nanoalign.evaluation.statistics import (
    Figures,
    calibration,
    rank_correlation,
    share_figures,
    win_shares,
)
from nanoalign.records import Record


@dataclass(frozen=True)
class TrueRule:
    """The rule that the labels of some prompts were drawn from, where it is known.

    By it the labels themselves can be judged, and what a reward model or a policy has learned.
    """

    is_prompt: Callable[[str], bool]  # whether it knows a prompt
    rewards: dict[str, Callable[[str, str], float]]  # of (prompt, response), by preference

    def knows(self, prompts: Iterable[str | list[dict]]) -> bool:
        return all(isinstance(prompt, str) and self.is_prompt(prompt) for prompt in prompts)

    def rule(self, preference: str) -> Callable[[str | list[dict], str], float | None]:
        """The true reward of (prompt, response), None for a prompt that is not known."""
        reward = self.rewards.get(preference)
        return lambda prompt, text: reward(prompt, text) if self.knows([prompt]) else None


@dataclass(frozen=True, slots=True)
class Scored:
    """One response and its reward: a line of scores.jsonl."""

    pair_id: str
    subset: str
    prompt: str | list[dict]
    response: str
    side: str  # "chosen" if no response of the record is better, else "rejected"
    score: float
    tokens: int  # of the whole response, with its EOS
    cut: bool  # whether max_length cut it: its score is that of its beginning, without EOS
    true_reward: float | None = None  # by the rule that the labels were drawn from, if it is known
    tools: list | None = None  # of the prompt


def score_line(scored: Scored) -> dict:
    """A line of scores.jsonl. It has a true reward and tools where they are known."""
    optional = ("true_reward", "tools")
    return {k: v for k, v in asdict(scored).items() if k not in optional or v is not None}


def with_view(name: str, view: str) -> str:
    """The name of a pair or of a subset, as a view scores it; "" is a view without a name."""
    return f"{name}/{view}" if view else name


Pairs = list[tuple[Scored, Scored]]  # (better, worse)


def scored_lines(
    records: Sequence[Record],
    lengths: Sequence[Sequence[tuple[int, float]]],
    scores: Sequence[Sequence[float]],
    view: str,
    rule: Callable[[str | list[dict], str], float | None] = lambda *_: None,
) -> list[Scored]:
    """Returns a Scored for every response of the records, in their order.

    lengths: what scoring.Judge.lengths returns. scores: the rewards, [record][response].
    view: the name of a preference, which is appended to pair_id and subset; "": nothing is.
    rule: the true reward of (prompt, response), None where it is not known.
    """
    scored = []
    for record, record_lengths, rewards in zip(records, lengths, scores, strict=True):
        worse = {rejected for _, rejected in record.pairs}
        responses = zip(record.responses, rewards, record_lengths, strict=True)
        scored += [
            Scored(
                pair_id=with_view(record.name, view),
                subset=with_view(record.subset, view),
                prompt=record.prompt,
                response=response,
                side="rejected" if i in worse else "chosen",
                score=score,
                tokens=tokens,
                cut=read_share < 1,
                true_reward=rule(record.prompt, response),
                tools=record.tools or None,
            )
            for i, (response, score, (tokens, read_share)) in enumerate(responses)
        ]
    return scored


def pairs_of(scored: Sequence[Scored]) -> Pairs:
    """Returns the pairs of every chosen response of a record with every rejected one."""
    records = defaultdict(lambda: ([], []))
    for line in scored:
        records[line.pair_id][line.side == "rejected"].append(line)
    return [
        (better, worse)
        for chosen, rejected in records.values()
        for better in chosen
        for worse in rejected
    ]


def is_label_error(better: Scored, worse: Scored) -> bool:
    """Whether the ground truth is known and prefers the response that the label calls worse."""
    return better.true_reward is not None and better.true_reward < worse.true_reward


def reward_metrics(scored: Sequence[Scored]) -> Figures:
    """The figures of scored responses and of their pairs, which `pairs_of` makes.

    Each pair of a ranked record counts as much as any other pair; in training, each record does.

    accuracy counts a tie as half a hit; accuracy_low and accuracy_high are the ends of its 95 %
    interval, by statistics.prompt_interval. reward_mean and reward_std are those of all responses,
    better_data_mean and worse_data_mean the means of one side. worse_better_than_better_count is
    the number of pairs whose worse response has the higher reward, worse_worse_than_better_count
    the number of those whose worse response has the lower one. calibration_error is the error of
    statistics.calibration. longer_accuracy is the accuracy of always choosing the response with
    more tokens, length_correlation the rank correlation of reward and tokens, None if one of them
    is constant.
    cut_count is the number of responses that were cut, cut_share their share. If there are any,
    "without_cut" has the figures of the pairs without a cut response, or {"pairs": 0}.
    """
    pairs = pairs_of(scored)
    cut = [line.cut for line in scored]
    figures = _figures(scored, pairs)
    figures |= {"cut_count": sum(cut), "cut_share": sum(cut) / len(cut)}
    if any(cut):
        whole = [pair for pair in pairs if not any(line.cut for line in pair)]
        compared = {id(line) for pair in whole for line in pair}
        lines = [line for line in scored if id(line) in compared]
        figures["without_cut"] = _figures(lines, whole) if whole else {"pairs": 0}
    return figures


def _figures(scored: Sequence[Scored], pairs: Pairs) -> Figures:
    """The figures of some pairs, and of the responses that are in them."""
    better = np.array([b.score for b, _ in pairs])  # (P,)
    worse = np.array([w.score for _, w in pairs])
    longer = np.array([b.tokens - w.tokens for b, w in pairs])
    scores = np.array([line.score for line in scored])
    return {
        "pairs": len(pairs),
        **share_figures("accuracy", win_shares(better - worse), _prompts(pairs)),
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


def true_figures(
    scored: Sequence[Scored], preference: str, truth: TrueRule | None
) -> dict[str, float]:
    """How well the ground truth orders pairs, and a reward model by the ground truth.

    Returns no figures without a rule, or if it does not know all prompts; and no true_accuracy if
    no true rewards differ.
    label_ceiling: the expected accuracy of the ground truth on labels that are drawn from it.
    oracle_accuracy: the accuracy of the ground truth on the labels of these pairs.
    true_accuracy: the share of pairs that the reward model orders as the ground truth does, among
        those whose true rewards differ; true_accuracy_low and true_accuracy_high are the ends of
        its 95 % interval, by statistics.prompt_interval.
    """
    if truth is None or not truth.knows(line.prompt for line in scored):
        return {}
    rule = truth.rewards[preference]
    pairs = pairs_of(scored)
    margins = np.array(
        [rule(b.prompt, b.response) - rule(w.prompt, w.response) for b, w in pairs]
    )  # (P,)
    agrees = np.array([b.score - w.score for b, w in pairs]) * np.sign(margins)
    differ = margins != 0
    figures = {
        "label_ceiling": float((1 / (1 + np.exp(-np.abs(margins)))).mean()),
        "oracle_accuracy": _accuracy(margins),
    }
    if not differ.any():
        return figures
    prompts = [prompt for prompt, differs in zip(_prompts(pairs), differ, strict=True) if differs]
    return figures | share_figures("true_accuracy", win_shares(agrees[differ]), prompts)


def _accuracy(margins: np.ndarray) -> float:
    return float(win_shares(margins).mean())


def _prompts(pairs: Pairs) -> list[str]:
    return [prompt_key(better.prompt, better.tools) for better, _ in pairs]


def summary(figures: Figures) -> str:
    shown = [f"{key} = {figures[key]:.4f}" for key in ("accuracy", "reward_mean", "reward_std")]
    return f"Evaluation: {', '.join(shown)}"


def about_cut(figures: Figures) -> str | None:
    """How many responses max_length cut, and the accuracy without them; None if it cut none."""
    if not (count := figures["cut_count"]):
        return None
    text = f"max_length cut {count:,} of the responses ({figures['cut_share']:.1%})"
    whole = figures["without_cut"]
    if not whole["pairs"]:
        return f"{text}, and one of each pair: no accuracy of whole responses is known"
    return (
        f"{text}; in the {whole['pairs']:,} of {figures['pairs']:,} pairs without one the accuracy "
        f"is {share(whole, 'accuracy')}"
    )


# What the table of evaluate.py rm has, in 100 columns without `trained_on`; metrics.json has all.
PRINTED = (
    "pairs",
    "trained_on",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "margin_mean",
    "calibration_error",
    "longer_accuracy",
    "label_ceiling",
    "true_accuracy",
)


def table(rows: dict[str, Figures]) -> str:
    """A table as text of the figures of PRINTED that some row has; trained_on only if above 0.

    rows: figures by the name of the subset.
    """
    shown = [key for key in PRINTED if any(key in figures for figures in rows.values())]
    if not any(figures.get("trained_on") for figures in rows.values()):
        shown = [key for key in shown if key != "trained_on"]
    printed = {name: {key: figures.get(key) for key in shown} for name, figures in rows.items()}
    return figures_table(printed, "subset")
