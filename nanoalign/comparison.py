"""Two models' answers to the same prompts, judged by rewards: who wins, by how much, how surely.

Shapes: P pairs of answers, one of the policy and one of the baseline to the same prompt.
"""

from dataclasses import dataclass

import numpy as np

from nanoalign.metrics import win_shares
from nanoalign.records import Example, Message, prompt_key
from nanoalign.tiny import world as tiny_world

RESAMPLES = 4000  # of a bootstrap


@dataclass(frozen=True, slots=True)
class Compared:
    """Both answers to one prompt: a line of answers.jsonl."""

    id: str
    prompt: str | tuple[Message, ...]
    policy_answer: str
    baseline_answer: str
    policy_score: float  # the reward model's
    baseline_score: float
    policy_tokens: (
        int  # EOS included; as both were sampled, or else by the reward model's tokenizer
    )
    baseline_tokens: int
    policy_ended: bool | None  # by itself, not cut; None: made elsewhere, not known
    baseline_ended: bool | None


def bootstrap_interval(
    values: np.ndarray, groups: list[str], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % interval of the mean of `values` (P,), by resampling the groups with all that is in them.

    Efron 1979's percentile bootstrap. Answers to one prompt are not independent, so prompts are the
    groups: resampling answers would make the interval too narrow.
    """
    number = {name: n for n, name in enumerate(dict.fromkeys(groups))}
    group = np.array([number[name] for name in groups])
    sums, counts = np.bincount(group, weights=values), np.bincount(group)
    draw = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        picked = draw.integers(len(sums), size=len(sums))
        means.append(sums[picked].sum() / counts[picked].sum())
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def length_controlled_win_rate(won: np.ndarray, longer: np.ndarray) -> float | None:
    """The win rate that is left where both answers are equally long: won (P,), longer (P,) -> share.

    A logistic regression of the wins on the difference of lengths, and of it the prediction at a
    difference of 0: the idea of Dubois et al. 2024 (arXiv 2404.04475), of whose terms (a tanh of the
    length, the models, the prompts) only a linear one for length is here. A penalty of 1/2 the squared
    slope a standard deviation, over all pairs, keeps it finite where lengths separate wins from losses.

    None where the differences hardly reach 0 (it lies outside their central 95 %): what would
    happen at equal lengths was not seen.
    """
    if won.min() == won.max():
        return float(won[0])
    low, high = np.quantile(longer, (0.025, 0.975))
    if not low <= 0 <= high:
        return None
    centre, deviation = longer.mean(), longer.std() or 1.0
    x = np.stack([np.ones(len(won)), (longer - centre) / deviation], 1)
    penalty = np.array([0.0, 1.0])  # of the slope alone: the win rate itself is not drawn to 1/2
    coefficients = np.zeros(2)
    for _ in range(50):  # Newton's method
        p = 1 / (1 + np.exp(-x @ coefficients))
        gradient = x.T @ (won - p) - penalty * coefficients
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        coefficients += step
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-(coefficients[0] - coefficients[1] * centre / deviation))))


def comparison_metrics(compared: list[Compared]) -> dict[str, float | int | None]:
    """The figures of a comparison.

    win_rate counts a tie as half a win; its interval of 95 % is bootstrap_interval's over prompts.
    length_controlled_win_rate is the function of that name. The shares of answers that ended by
    themselves are None where that is not known.
    """
    policy = np.array([line.policy_score for line in compared])  # (P,)
    baseline = np.array([line.baseline_score for line in compared])
    longer = np.array([line.policy_tokens - line.baseline_tokens for line in compared], dtype=float)
    won = win_shares(policy - baseline)  # (P,)
    prompts = [prompt_key(line.prompt) for line in compared]
    low, high = bootstrap_interval(won, prompts)
    figures = {
        "pairs": len(compared),
        "prompts": len(set(prompts)),
        "policy_mean": float(policy.mean()),
        "baseline_mean": float(baseline.mean()),
        "wins": int((won == 1).sum()),
        "losses": int((won == 0).sum()),
        "ties": int((won == 0.5).sum()),
        "win_rate": float(won.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
        "length_controlled_win_rate": length_controlled_win_rate(won, longer),
        "policy_tokens_mean": float(np.mean([line.policy_tokens for line in compared])),
        "baseline_tokens_mean": float(np.mean([line.baseline_tokens for line in compared])),
        "policy_ended_share": _share([line.policy_ended for line in compared]),
        "baseline_ended_share": _share([line.baseline_ended for line in compared]),
        "dpo_data_mean": float(policy.mean()),
        "no_dpo_data_mean": float(baseline.mean()),
        "no_dpo_better_than_dpo_count": int((won == 0).sum()),
        "no_dpo_worse_than_dpo_count": int((won == 1).sum()),
    }
    if set(prompts) <= tiny_world.PROMPTS.keys():
        true = np.array(
            [
                [tiny_world.true_reward(x.prompt, answer) for answer in (x.policy_answer, x.baseline_answer)]
                for x in compared
            ]
        )  # fmt: skip
        truly = win_shares(true[:, 0] - true[:, 1])
        low, high = bootstrap_interval(truly, prompts)
        figures |= {
            "policy_true_mean": float(true[:, 0].mean()),
            "baseline_true_mean": float(true[:, 1].mean()),
            "true_win_rate": float(truly.mean()),
            "true_win_rate_low": low,
            "true_win_rate_high": high,
        }
    return figures


def new_pairs(prompts: list[Example], compared: list[Compared], samples: int) -> list[dict]:
    """Preference records of the policy's own answers: the best to each prompt against the worst.

    Cut answers are left out: training would put an EOS where they did not end. Where fewer than two
    different ones are left, or have the same score, nothing is preferred, and there is no record.
    """
    records = []
    for n, prompt in enumerate(prompts):
        answers = compared[n * samples : (n + 1) * samples]
        answers = [
            line for line in answers if line.policy_ended is not False and line.policy_answer
        ]
        # Once each: in another row a text's score differs by rounding, which is no preference.
        answers = list({line.policy_answer: line for line in reversed(answers)}.values())
        best = max(answers, key=lambda line: line.policy_score, default=None)
        worst = min(answers, key=lambda line: line.policy_score, default=None)
        if best is None or best.policy_score == worst.policy_score:
            continue
        chosen, rejected = best.policy_answer, worst.policy_answer
        if prompt.kind == "dialogue":
            record = {"chosen": prompt.prompt + chosen, "rejected": prompt.prompt + rejected}
        else:
            record = {"prompt": prompt.prompt, "chosen": chosen, "rejected": rejected}
        records.append(record)
    return records


def _share(ended: list[bool | None]) -> float | None:
    return None if None in ended else float(np.mean(ended))
