"""The answers of two models to the same prompts, compared by their rewards.

Shapes: P pairs of answers, one of the policy and one of the baseline to the same prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanoalign.encode import Record, is_dialogue
from nanoalign.evaluation.ranking import Figures
from nanoalign.evaluation.statistics import (
    bootstrap_interval,
    length_controlled_win_rate,
    win_shares,
)
from nanoalign.formats.prompts import prompt_key
from nanoalign.tiny import world as tiny_world


@dataclass(frozen=True, slots=True)
class Compared:
    """Two answers to one prompt: a line of answers.jsonl.

    Tokens are counted with the EOS: as sampled, if both models sampled with one vocabulary, else by
    the tokenizer of the reward model.
    """

    id: str
    prompt: str | list[dict]
    policy_answer: str
    baseline_answer: str
    policy_score: float  # its reward
    baseline_score: float
    policy_tokens: int
    baseline_tokens: int
    policy_ended: bool | None  # False: cut; None: not known, because it was made elsewhere
    baseline_ended: bool | None


def comparison_metrics(compared: Sequence[Compared]) -> Figures:
    """The figures of a comparison.

    win_rate counts a tie as half a win; its 95 % interval is bootstrap_interval's over prompts.
    length_controlled_win_rate is the function of that name. The shares of answers that ended with
    EOS are None where that is not known. The figures with "true" are of the true rule, and are
    there if all prompts are those of the embedded world.
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
        figures |= true_metrics(compared, prompts)
    return figures


def true_metrics(compared: Sequence[Compared], prompts: list[str]) -> dict[str, float]:
    """The same by the true rule of the embedded world, in place of the reward model."""
    policy, baseline = (
        np.array([tiny_world.true_reward(x.prompt, getattr(x, f"{role}_answer")) for x in compared])
        for role in ("policy", "baseline")
    )  # (P,) each
    won = win_shares(policy - baseline)
    low, high = bootstrap_interval(won, prompts)
    return {
        "policy_true_mean": float(policy.mean()),
        "baseline_true_mean": float(baseline.mean()),
        "true_win_rate": float(won.mean()),
        "true_win_rate_low": low,
        "true_win_rate_high": high,
    }


def _share(ended: list[bool | None]) -> float | None:
    return None if None in ended else float(np.mean(ended))


def new_pairs(
    prompts: Sequence[Record], compared: Sequence[Compared], samples: int
) -> list[dict[str, str | list[dict]]]:
    """Preference records of the policy's own answers: of each prompt the best and the worst.

    compared: `samples` per prompt, in the order of the prompts. Cut answers are left out, because
    training would append an EOS to them. A prompt without two different answers of different
    reward has no record.
    """
    records = []
    for n, prompt in enumerate(prompts):
        answers = compared[n * samples : (n + 1) * samples]
        answers = [
            line for line in answers if line.policy_ended is not False and line.policy_answer
        ]
        # Equal texts once: in another row their reward differs by rounding, which is no preference.
        answers = list({line.policy_answer: line for line in reversed(answers)}.values())
        best = max(answers, key=lambda line: line.policy_score, default=None)
        worst = min(answers, key=lambda line: line.policy_score, default=None)
        if best is None or best.policy_score == worst.policy_score:
            continue
        chosen, rejected = best.policy_answer, worst.policy_answer
        if is_dialogue(prompt.prompt):
            record = {"chosen": prompt.prompt + chosen, "rejected": prompt.prompt + rejected}
        else:
            record = {"prompt": prompt.prompt, "chosen": chosen, "rejected": rejected}
        records.append(record)
    return records
