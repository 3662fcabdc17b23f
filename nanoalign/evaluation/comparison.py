"""The answers of two models to the same prompts, compared by their rewards.

Each answer of the policy is compared with each of the baseline to its prompt. The prompts may have
different numbers of answers, and every prompt counts as one: a mean, share or win rate is the mean
over prompts of the mean over the answers or pairs of a prompt.

Shapes: N prompts, P pairs of answers, one of the policy and one of the baseline to the same prompt.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanoalign.data.dialogues import is_dialogue
from nanoalign.evaluation.answers import ROLES
from nanoalign.evaluation.ranking import TrueRule
from nanoalign.evaluation.statistics import (
    Figures,
    best_of_weights,
    length_controlled_win_rate,
    prompt_interval,
    win_shares,
)


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer and its reward.

    Tokens are those of the whole answer, with its EOS: as sampled, if both models sampled with one
    vocabulary, else by the tokenizer of the reward model.
    """

    answer: str
    score: float  # its reward
    tokens: int
    ended: bool | None  # False: sampling stopped at --max_new_tokens; None: it was made elsewhere
    read_share: float  # of its tokens: what the reward model read of it

    @property
    def cut(self) -> bool:
        """Whether its max_length let the reward model read only the beginning of the answer."""
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

    def win_rate(self) -> float:
        """The policy's share of wins; a tie is half a win."""
        return float(win_shares(self.margins()).mean())


def answer_lines(compared: Sequence[Compared]) -> list[dict]:
    """The lines of answers.jsonl: one an answer."""
    return [
        {
            "id": case.id,
            "prompt": case.prompt,
            "side": role,
            "answer": x.answer,
            "score": x.score,
            "tokens": x.tokens,
            "ended": x.ended,
            "cut": x.cut,
            "read_share": x.read_share,
        }
        for case in compared
        for role in ROLES
        for x in case.answers(role)
    ]


def comparison_metrics(
    compared: Sequence[Compared], max_length: int, truth: TrueRule | None = None
) -> Figures:
    """The figures of a comparison. max_length: of the reward model.

    truth: a rule that judges the answers beside the reward model, if it knows all prompts.

    policy_cut_count is the number of the policy's answers of which the reward model read only the
    beginning, policy_cut_share their share. If there are such answers of either model,
    "without_cut" has the figures of the pairs without one: see `without_cut`.
    """
    figures = pair_metrics(compared, truth) | {"reward_max_length": max_length}
    for role in ROLES:
        answers = [x for case in compared for x in case.answers(role)]
        figures[f"{role}_answers"] = len(answers)
        figures[f"{role}_cut_count"] = sum(x.cut for x in answers)
        figures[f"{role}_cut_share"] = mean_of(compared, role, lambda x: x.cut)
    if any(figures[f"{role}_cut_count"] for role in ROLES):
        whole = without_cut(compared)
        figures["without_cut"] = pair_metrics(whole, truth) if whole else {"pairs": 0, "prompts": 0}
    return figures


def without_cut(compared: Sequence[Compared]) -> list[Compared]:
    """Without the answers that were cut, and without the prompts that then lack one side."""
    whole = [
        replace(case, **{r: tuple(x for x in case.answers(r) if not x.cut) for r in ROLES})
        for case in compared
    ]
    return [case for case in whole if case.policy and case.baseline]


def pair_metrics(compared: Sequence[Compared], truth: TrueRule | None = None) -> Figures:
    """The figures that depend on pairs.

    wins, losses and ties count pairs; win_rate counts a tie as half a win, and each prompt as one;
    its 95 % interval is that of statistics.prompt_interval. length_controlled_win_rate is the
    function of that name. The shares of answers that ended with EOS are None where that is not
    known. The figures with "true" are those of `true_metrics`.
    """
    won, weights = won_pairs(compared)
    longer = np.concatenate([case.longer().ravel() for case in compared])  # (P,)
    pairs = [len(case.policy) * len(case.baseline) for case in compared]  # (N,)
    policy, baseline = (mean_of(compared, role, lambda x: x.score) for role in ROLES)
    policy_tokens, baseline_tokens = (mean_of(compared, role, lambda x: x.tokens) for role in ROLES)
    figures = {
        "pairs": sum(pairs),
        "prompts": len(compared),
        "policy_mean": policy,
        "baseline_mean": baseline,
        "wins": int((won == 1).sum()),
        "losses": int((won == 0).sum()),
        "ties": int((won == 0.5).sum()),
        **win_rate_figures("", compared),
        "length_controlled_win_rate": length_controlled_win_rate(won, longer, weights),
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
    """Means and win rates by a true rule, in place of the reward model. It knows all prompts."""
    rule = truth.rewards["better"]
    truly = [
        replace(
            case,
            **{
                role: tuple(
                    replace(x, score=rule(case.prompt, x.answer)) for x in case.answers(role)
                )
                for role in ROLES
            },
        )
        for case in compared
    ]
    means = {f"{role}_true_mean": mean_of(truly, role, lambda x: x.score) for role in ROLES}
    return means | win_rate_figures("true_", truly)


def won_pairs(compared: Sequence[Compared]) -> tuple[np.ndarray, np.ndarray]:
    """(win_shares of all pairs (P,), their weights (P,), together 1 a prompt)."""
    won = [win_shares(case.margins()).ravel() for case in compared]
    return np.concatenate(won), np.concatenate([np.full(len(x), 1 / len(x)) for x in won])


def win_rate_figures(judge: str, compared: Sequence[Compared]) -> dict[str, float]:
    """The mean of the win rates of the prompts, with its interval. judge: "" or "true_"."""
    won, weights = won_pairs(compared)
    prompts = [n for n, case in enumerate(compared) for _ in range(case.margins().size)]
    low, high = prompt_interval(won, prompts, weights)
    rate = float(np.mean([case.win_rate() for case in compared]))
    means = {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}
    return {f"{judge}{name}": value for name, value in means.items()}


def mean_of(compared: Sequence[Compared], role: str, value: Callable[[Judged], float]) -> float:
    """The mean over prompts of the mean over one model's answers to a prompt."""
    return float(np.mean([np.mean([value(x) for x in case.answers(role)]) for case in compared]))


def ended_share(compared: Sequence[Compared], role: str) -> float | None:
    """Computes the mean over prompts of the share of a model's answers that ended with EOS.

    Returns None if this is unknown for any answer, as for answers from a file.
    """
    known = all(x.ended is not None for case in compared for x in case.answers(role))
    return mean_of(compared, role, lambda x: x.ended) if known else None


def best_of_n(
    compared: Sequence[Compared], truth: TrueRule | None = None
) -> list[dict[str, float]]:
    """What taking the answer of the largest reward among n samples of the policy gains, by n.

    A line for each n, up to the smallest number of the policy's answers to a prompt. n; kl, in nats
    an answer: log n - (n - 1) / n, a bound of the KL of best-of-n sampling from the policy (Beirami
    et al. 2024, arXiv 2401.01879) that is often taken as its value (Gao et al. 2022, 2210.10760);
    reward: the mean over prompts of the expected reward of the best of n; true_reward: the mean of
    the true rewards of the same answers, if `truth` knows all prompts.
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
    are answers that the reward model read only in part, because their reward is not that of the
    text. A prompt without two different answers of different reward has no record.
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
        records.append(record)
    return records
