"""The answers of two models to the same prompts, compared by their rewards.

Each answer of the policy is compared with each of the baseline to its prompt. The prompts may have
different numbers of answers, and every prompt counts as one: a mean, share or win rate is the mean
over prompts of the mean over the answers or pairs of a prompt.

Shapes: N prompts, P pairs of answers, one of the policy and one of the baseline to the same prompt.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

import numpy as np

from nanoalign.data.dialogues import is_dialogue
from nanoalign.evaluation import style
from nanoalign.evaluation.answers import ROLES
from nanoalign.evaluation.ranking import TrueRule
from nanoalign.evaluation.statistics import (
    Figures,
    best_of_weights,
    controlled_win_rate,
    ratio_interval,
    share_figures,
    win_shares,
)


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer and its reward."""

    answer: str
    score: float  # its reward
    # Of the whole answer, with its EOS: as sampled, if both models were sampled with one
    # vocabulary, else by the tokenizer of the reward model.
    tokens: int
    ended: bool | None  # False: sampling stopped at --max_new_tokens; None: not known, of a file
    read_share: float  # the share of its tokens that the reward model read
    tokenizer: str | None = None  # of the sampled tokens, see templates.tokenizer_name
    token_ids: list[int] | None = None  # as they were sampled; None: of a file
    log_ratio: float | None = None  # log(policy / baseline) of a policy's answer; None: not known

    @property
    def cut(self) -> bool:
        """Whether the reward model read only the beginning of the answer, by its max_length."""
        return self.read_share < 1


@dataclass(frozen=True, slots=True)
class Compared:
    """A prompt and all answers to it."""

    id: str
    prompt: str | list[dict]
    policy: tuple[Judged, ...]
    baseline: tuple[Judged, ...]
    tools: list[dict] | None = None  # of the prompt

    def answers(self, role: str) -> tuple[Judged, ...]:
        """The answers of the policy or of the baseline."""
        return self.policy if role == "policy" else self.baseline

    def margins(self) -> np.ndarray:
        """Rewards of the policy's answers minus those of the baseline's: (policy's, baseline's)."""
        return np.subtract.outer(*([x.score for x in self.answers(role)] for role in ROLES))

    def longer(self) -> np.ndarray:
        """Tokens of the policy's answers minus the baseline's: (policy's, baseline's)."""
        return np.subtract.outer(*([float(x.tokens) for x in self.answers(r)] for r in ROLES))

    def styles(self) -> np.ndarray:
        """style.differences of the answers: (policy's, baseline's, features)."""
        each = (np.array([style.style(x.answer, x.tokens) for x in self.answers(r)]) for r in ROLES)
        return style.differences(*each)


def answer_lines(compared: Sequence[Compared]) -> list[dict]:
    """The lines of answers.jsonl, one per answer: the fields of Judged, and whose answer it is."""
    return [
        {"id": case.id, "prompt": case.prompt}
        | ({"tools": case.tools} if case.tools else {})
        | {"side": role, **asdict(x), "cut": x.cut}
        for case in compared
        for role in ROLES
        for x in case.answers(role)
    ]


def comparison_metrics(
    compared: Sequence[Compared], max_length: int, truth: TrueRule | None = None
) -> Figures:
    """The figures of a comparison: those of `pair_metrics`, and of answers that were cut.

    max_length: of the reward model. truth: also judges the answers, if it knows all prompts.
    policy_cut_count is the number of the policy's answers that are cut, policy_cut_share the mean
    over prompts of their share; the same for the baseline. If any answer is cut, "without_cut" has
    `pair_metrics` of what the function `without_cut` returns, or 0 pairs and prompts if that is
    nothing. length_bins has the win rates of style.length_bins.
    """
    figures = pair_metrics(compared, truth) | {"reward_max_length": max_length}
    figures |= kl_figures(compared)
    ratios = [np.divide.outer(*([x.tokens for x in c.answers(r)] for r in ROLES)) for c in compared]
    figures["length_bins"] = style.length_bins(of_pairs(ratios)[0], *of_pairs(won_by(compared)))
    for role in ROLES:
        answers = [x for case in compared for x in case.answers(role)]
        figures[f"{role}_answers"] = len(answers)
        figures[f"{role}_cut_count"] = sum(x.cut for x in answers)
        figures[f"{role}_cut_share"] = mean_of(compared, role, lambda x: x.cut)
    if any(figures[f"{role}_cut_count"] for role in ROLES):
        whole = without_cut(compared)
        figures["without_cut"] = pair_metrics(whole, truth) if whole else {"pairs": 0, "prompts": 0}
    return figures


def with_log_ratios(
    compared: Sequence[Compared], ratios: Sequence[Sequence[float]]
) -> list[Compared]:
    """Returns the comparisons with the log_ratio of each answer. ratios: of answers.log_ratios."""
    found = []
    for case, own in zip(compared, ratios, strict=True):
        answers = zip(case.policy, own, strict=True)
        policy = tuple(replace(answer, log_ratio=ratio) for answer, ratio in answers)
        found.append(replace(case, policy=policy))
    return found


def kl_figures(compared: Sequence[Compared]) -> dict[str, float | None]:
    """Estimates KL(policy || baseline) in nats; empty if a log_ratio is not known.

    kl_per_answer is the mean of log_ratio over the policy's answers, kl_per_answer_low and
    kl_per_answer_high the ends of its 95 % interval over prompts, by statistics.ratio_interval, and
    kl_per_token the sum divided by the tokens of the answers.
    """
    ratios = [[x.log_ratio for x in case.policy] for case in compared]
    if None in chain(*ratios):
        return {}
    sums, counts = (np.array(list(map(of, ratios)), float) for of in (sum, len))
    kl, low, high = ratio_interval(sums, counts)
    tokens = sum(x.tokens for case in compared for x in case.policy)
    return {
        "kl_per_answer": kl,
        "kl_per_answer_low": low,
        "kl_per_answer_high": high,
        "kl_per_token": float(sums.sum() / tokens),
    }


def without_cut(compared: Sequence[Compared]) -> list[Compared]:
    """Returns the comparisons without cut answers, and without prompts that then lack one side."""
    whole = [
        replace(case, **{r: tuple(x for x in case.answers(r) if not x.cut) for r in ROLES})
        for case in compared
    ]
    return [case for case in whole if case.policy and case.baseline]


def pair_metrics(compared: Sequence[Compared], truth: TrueRule | None = None) -> Figures:
    """The figures that depend on pairs.

    wins, losses and ties count pairs. win_rate counts a tie as half a win and each prompt as one;
    its 95 % interval is that of statistics.prompt_interval. length_controlled_win_rate and
    style_controlled_win_rate are those of statistics.controlled_win_rate. longest_win_rate is the
    win rate if the longer answer always won, longest_agreement how often that answer has the higher
    reward, by style.agreement. policy_ended_share and baseline_ended_share are None if it is not
    known how an answer ended. The figures of `true_metrics` are there if truth knows all prompts.
    """
    won, _, weights = of_pairs(won_by(compared))
    longer = np.concatenate([case.longer().ravel() for case in compared])  # (P,)
    styles = np.concatenate([x.styles().reshape(-1, len(style.FEATURES)) for x in compared])
    longest = [win_shares(case.longer()) for case in compared]
    policy, baseline = (mean_of(compared, role, lambda x: x.score) for role in ROLES)
    policy_tokens, baseline_tokens = (mean_of(compared, role, lambda x: x.tokens) for role in ROLES)
    figures = {
        "pairs": len(won),
        "prompts": len(compared),
        "policy_mean": policy,
        "baseline_mean": baseline,
        "wins": int((won == 1).sum()),
        "losses": int((won == 0).sum()),
        "ties": int((won == 0.5).sum()),
        **rate_figures("win_rate", won_by(compared)),
        "length_controlled_win_rate": controlled_win_rate(won, [longer], weights),
        "style_controlled_win_rate": controlled_win_rate(won, styles.T, weights),
        **rate_figures("longest_win_rate", longest),
        "longest_agreement": float(
            np.mean([x.mean() for x in map(style.agreement, won_by(compared), longest)])
        ),
        "policy_tokens_mean": policy_tokens,
        "baseline_tokens_mean": baseline_tokens,
        "tokens_difference": policy_tokens - baseline_tokens,
        **{f"{role}_ended_share": ended_share(compared, role) for role in ROLES},
        "dpo_data_mean": policy,
        "no_dpo_data_mean": baseline,
        "no_dpo_better_than_dpo_count": int((won == 0).sum()),
        "no_dpo_worse_than_dpo_count": int((won == 1).sum()),
    }
    if truth is not None and truth.knows(case.prompt for case in compared):
        figures |= true_metrics(compared, truth)
    return figures


def true_metrics(compared: Sequence[Compared], truth: TrueRule) -> dict[str, float]:
    """Mean rewards and win rates by the ground truth in place of the reward model.

    truth: must know all prompts.
    """
    rule = truth.rewards["better"]

    def by_rule(case: Compared, role: str) -> tuple[Judged, ...]:
        return tuple(replace(x, score=rule(case.prompt, x.answer)) for x in case.answers(role))

    truly = [replace(case, **{role: by_rule(case, role) for role in ROLES}) for case in compared]
    means = {f"{role}_true_mean": mean_of(truly, role, lambda x: x.score) for role in ROLES}
    return means | rate_figures("true_win_rate", won_by(truly))


def won_by(compared: Sequence[Compared]) -> list[np.ndarray]:
    """The win_shares of each prompt, (policy's, baseline's)."""
    return [win_shares(case.margins()) for case in compared]


def of_pairs(shares: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Returns (the shares of all pairs, the number of their prompt, their weight): (P,) each.

    shares: of each prompt, of any shape. The weights of a prompt sum to 1.
    """
    flat = [x.ravel() for x in shares]
    prompts = [n for n, x in enumerate(flat) for _ in x]
    return (
        np.concatenate(flat),
        prompts,
        np.concatenate([np.full(len(x), 1 / len(x)) for x in flat]),
    )


def rate_figures(name: str, shares: Sequence[np.ndarray]) -> dict[str, float]:
    """statistics.share_figures of pairs of answers. shares: as in of_pairs."""
    rate = float(np.mean([x.mean() for x in shares]))  # over prompts
    return share_figures(name, *of_pairs(shares)) | {name: rate}


def mean_of(compared: Sequence[Compared], role: str, value: Callable[[Judged], float]) -> float:
    """The mean over prompts of the mean of a value over the answers of one role to a prompt."""
    return float(np.mean([np.mean([value(x) for x in case.answers(role)]) for case in compared]))


def ended_share(compared: Sequence[Compared], role: str) -> float | None:
    """Returns the mean over prompts of the share of a role's answers that ended with EOS.

    Returns None if that is unknown for any answer, as for answers from a file.
    """
    known = all(x.ended is not None for case in compared for x in case.answers(role))
    return mean_of(compared, role, lambda x: x.ended) if known else None


def best_of_n(
    compared: Sequence[Compared], truth: TrueRule | None = None
) -> list[dict[str, float]]:
    """The lines of best_of_n.jsonl: what the answer of the largest reward among n samples gains.

    A line for each n from 1 to the smallest number of the policy's answers to a prompt, with n and:
    kl: log n - (n - 1) / n, in nats an answer, a bound of the KL of best-of-n sampling from the
        policy (Beirami et al. 2024, arXiv 2401.01879) that is often taken as its value (Gao et al.
        2022, arXiv 2210.10760).
    reward: the mean over prompts of the expected reward of the best of n answers.
    true_reward: the same mean of the true rewards of these answers, if `truth` knows all prompts.
    """
    answers = [sorted(case.policy, key=lambda x: x.score) for case in compared]
    rewards = {"reward": [np.array([x.score for x in ranked]) for ranked in answers]}
    if truth is not None and truth.knows(case.prompt for case in compared):
        rewards["true_reward"] = [
            np.array([truth.rewards["better"](case.prompt, x.answer) for x in ranked])
            for case, ranked in zip(compared, answers, strict=True)
        ]
    return [
        {"n": n, "kl": math.log(n) - (n - 1) / n}
        | {
            name: float(np.mean([best_of_weights(n, len(x)) @ x for x in values]))
            for name, values in rewards.items()
        }
        for n in range(1, min(map(len, answers)) + 1)
    ]


def new_pairs(compared: Sequence[Compared]) -> list[dict[str, str | list[dict]]]:
    """Preference records of the policy's answers: the best and the worst answer to each prompt.

    Answers that sampling stopped are left out, because training would append an EOS to them, and so
    are empty answers, and cut ones, because their reward is not that of the whole text. A prompt
    without two different answers of different reward has no record.
    """
    records = []
    for case in compared:
        answers = [x for x in case.policy if x.ended is not False and x.answer and not x.cut]
        # Equal texts once: in another row their reward differs by rounding, which is no preference.
        answers = list({x.answer: x for x in reversed(answers)}.values())
        best = max(answers, key=lambda x: x.score, default=None)
        worst = min(answers, key=lambda x: x.score, default=None)
        if best is None or best.score == worst.score:
            continue
        if is_dialogue(case.prompt):
            record = {"chosen": case.prompt + best.answer, "rejected": case.prompt + worst.answer}
        else:
            record = {"prompt": case.prompt, "chosen": best.answer, "rejected": worst.answer}
        if case.tools:
            record["tools"] = case.tools
        # Answers of a file may be of several tokenizers, or have no tokens.
        if best.tokenizer == worst.tokenizer is not None:
            record |= {"chosen_tokens": best.token_ids, "rejected_tokens": worst.token_ids}
            record["tokenizer"] = best.tokenizer
        records.append(record)
    return records
