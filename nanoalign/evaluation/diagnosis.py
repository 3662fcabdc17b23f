"""What the figures of a comparison mean: the result in a sentence, and what to try."""

from nanoalign.evaluation.answers import ROLES
from nanoalign.evaluation.render import cell, share
from nanoalign.evaluation.seen import note_on_prompts
from nanoalign.evaluation.statistics import Figures

RESULTS = {
    1: "The policy is better than the baseline",
    -1: "The policy is worse than the baseline",
    0: "The difference between policy and baseline is within chance",
}


def conclusion(figures: Figures) -> str:
    """The result in one sentence: the policy is better, worse, or within chance.

    It is better or worse if the 95 % interval of its win rate excludes 1/2. If the figures include
    those of the ground truth of the embedded world, and by them the result is another, the sentence
    says instead that the two do not agree.
    """
    wins = f"by the reward model it wins {share(figures, 'win_rate')} of {_comparisons(figures)}"
    by_model = _better(figures, "")
    result = RESULTS[by_model]
    if "true_win_rate" in figures:
        wins += f", by the ground truth of the embedded world {share(figures, 'true_win_rate')}"
        if _better(figures, "true_") != by_model:
            result = "The reward model and the ground truth do not agree"
    return f"{result}: {wins}."


def caution(figures: Figures) -> str | None:
    """How many answers the reward model read only in part, and the result without them.

    None if there are none.
    """
    cut = [
        f"{figures[f'{role}_cut_count']:,} of the {role}'s {figures[f'{role}_answers']:,} answers"
        for role in ROLES
        if figures[f"{role}_cut_count"]
    ]
    if not cut:
        return None
    text = (
        f"The reward model read only the beginning of {' and '.join(cut)}: its max_length of "
        f"{figures['reward_max_length']:,} tokens cut them."
    )
    whole = figures["without_cut"]
    if not whole["pairs"]:
        return f"{text} The result rests on these: no comparison is of two answers read whole."
    result = RESULTS[_better(whole, "")]
    return (
        f"{text} The result rests on these beginnings. Where it read both answers whole, it has "
        f"the policy win {share(whole, 'win_rate')} of {_comparisons(whole)}: "
        f"{result[0].lower()}{result[1:]}."
    )


def ruler_warning(figures: Figures) -> str | None:
    """Sentences: always preferring the longer, or the shorter, answer gives the same result.

    None if it does not, or the reward model finds no difference.
    """
    result, by_longest = _better(figures, ""), _better(figures, "longest_")
    if not result or not by_longest:
        return None
    rule, agreement = "longer", figures["longest_agreement"]
    if by_longest != result:
        rule, agreement = "shorter", 1 - agreement
    rates = {name: figures[f"{name}_controlled_win_rate"] for name in ("length", "style")}
    known = [f"{rate:.1%} at equal {name}" for name, rate in rates.items() if rate is not None]
    controlled = f"wins {' and '.join(known)}" if known else "hardly gives answers of equal length"
    return (
        f"Length alone gives the same result: always preferring the {rule} answer agrees with the "
        f"reward model on {agreement:.1%} of the comparisons. The policy {controlled}."
    )


def retention_note(figures: Figures) -> str | None:
    """A sentence: how the policy changed the log-likelihood of texts; None if it is not known."""
    kinds = {"chosen_logps": "chosen responses of the data", "text_logps": "texts of --retention"}
    parts = []
    for name, text in kinds.items():
        if f"{name}_change" in figures:
            change, low, high, before, after = (
                figures[f"{name}_{key}"]
                for key in ("change", "change_low", "change_high", "baseline", "policy")
            )
            interval = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
            parts.append(
                f"{change:+.3f}{interval} a token of the {text}, from {before:.3f} to {after:.3f}"
            )
    return f"Log-likelihood, policy against baseline: {'; '.join(parts)}." if parts else None


def verdicts_note(figures: Figures) -> str | None:
    """A sentence: what the judge of --verdicts says; None without verdicts."""
    if "verdicts_pairs" not in figures:
        return None
    text = (
        f"By the verdicts the policy wins {share(figures, 'verdicts_win_rate')} of "
        f"{figures['verdicts_pairs']:,} comparisons, by the reward model "
        f"{share(figures, 'verdicts_reward_win_rate')} of the same"
    )
    if "verdicts_agreement" not in figures:
        return f"{text}; all verdicts are ties."
    agreement = share(figures, "verdicts_agreement")
    return f"{text}. It agrees with {agreement} of the verdicts that are no ties."


def _comparisons(figures: Figures) -> str:
    pairs, prompts = figures["pairs"], figures["prompts"]
    of_prompts = f" (each of {prompts:,} prompts counts as one)" if 1 < prompts < pairs else ""
    return f"{pairs:,} comparison{'s' * (pairs != 1)}{of_prompts}"


def _better(figures: Figures, judge: str) -> int:
    """1 if the interval of the win rate is above 1/2, -1 if it is below, else 0.

    judge: "" (the reward model), "true_" or "longest_".
    """
    low, high = figures[f"{judge}win_rate_low"], figures[f"{judge}win_rate_high"]
    return int(low > 0.5) - int(high < 0.5)


def figure_rows(figures: Figures) -> list[list[str]]:
    """The figures as text: rows of [name, value].

    If answers were cut, rows of [name, value, value without cut answers], after a row of headings.
    """
    values = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    columns, heads = [values], []
    if "without_cut" in figures:
        columns.append(figures["without_cut"])
        heads = [["", "all", "without cut answers"]]
    return heads + [
        [name, *(cell(x[name], 4, "not known") if name in x else "" for x in columns)]
        for name in values
    ]


# What report.html has in groups. Other figures are a group of their own; those of SAME are left
# out, because they are others by another name.
GROUPS = {
    "Result": ("win_rate", "true_win_rate", "length_controlled_win_rate", "style_controlled_")
    + ("wins", "losses", "ties", "longest_"),
    "Rewards": ("policy_mean", "baseline_mean", "policy_true_mean", "baseline_true_mean"),
    "Length and end of answers": ("policy_tokens_mean", "baseline_tokens_mean", "tokens_difference")
    + ("policy_ended_", "baseline_ended_", "policy_cut_", "baseline_cut_", "reward_max_length"),
    "Change of the policy": ("kl_per_", "chosen_logps_", "text_logps_"),
    "Verdicts of another judge": ("verdicts_",),
}
SAME = ("dpo_data_mean", "no_dpo_")


def figure_groups(figures: Figures) -> dict[str, list[list[str]]]:
    """The rows of `figure_rows` by the title of their group."""
    rows = [row for row in figure_rows(figures) if not row[0].startswith(SAME)]
    heads = [row for row in rows if not row[0]]
    groups = {title: [] for title in (*GROUPS, "Data and models")}
    for row in rows[len(heads) :]:
        titles = (title for title, names in GROUPS.items() if row[0].startswith(names))
        groups[next(titles, "Data and models")].append(row)
    return {title: heads + rows for title, rows in groups.items() if rows}


CUT = (
    "The reward of an answer that was cut is read in the middle of its text, where no reward was "
    "learned, and long answers are cut first: so neither figure is that of all answers read whole. "
    "For that, train a reward model with a larger --max_length, or compare shorter answers. "
    "metrics.json has all figures also without the answers that were cut."
)
# Below this share of stopped answers, and between these KLs, nothing is advised.
STOPPED, NEAR, FAR = 0.01, 0.5, 20.0


def note_on_ends(figures: Figures) -> str | None:
    """Sentences: how many answers sampling stopped, and what helps; None if hardly any."""
    ended = {role: figures[f"{role}_ended_share"] for role in ROLES}
    if ended["policy"] is None or 1 - ended["policy"] < STOPPED:
        return None
    text = f"Sampling stopped {1 - ended['policy']:.1%} of the policy's answers at --max_new_tokens"
    if ended["baseline"] is None:
        return f"{text}. A larger --max_new_tokens shows whether they end."
    text += f", and {1 - ended['baseline']:.1%} of the baseline's. "
    if ended["policy"] >= ended["baseline"] - STOPPED:
        return f"{text}Give a larger --max_new_tokens."
    return (
        f"{text}The policy stops less often by itself than before training: a larger --beta keeps "
        "it nearer to the baseline."
    )


def note_on_kl(figures: Figures) -> str | None:
    """Sentences: how far the policy is from the baseline, and what to try; None if not known."""
    if "kl_per_answer" not in figures:
        return None
    kl, low, high = (figures[f"kl_per_answer{end}"] for end in ("", "_low", "_high"))
    ends = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    text = f"KL(policy || baseline) is {kl:.2f}{ends} nats an answer"
    text += f", {figures['kl_per_token']:.3f} a token."
    if kl < NEAR and _better(figures, "") == 0:
        return f"{text} The policy has hardly changed: raise --lr or --epochs, or lower --beta."
    if kl > FAR:
        return f"{text} The policy has changed a lot: compare with a larger --beta, or fewer steps."
    return text


def bin_rows(figures: Figures) -> list[list[str]]:
    """The win rates by length as text: rows of [lengths, pairs, win rate and its interval]."""
    bins = figures["length_bins"].items()
    return [[name, f"{own['pairs']:,}", share(own, "win_rate")] for name, own in bins]


def diagnosis(figures: Figures) -> list[str]:
    """What the figures say about the next training or evaluation, a sentence or two per cause."""
    notes = [CUT if "without_cut" in figures else None, note_on_ends(figures), note_on_kl(figures)]
    return [note for note in notes if note] + notes_of(figures)


def notes_of(figures: Figures) -> list[str]:
    """The sentences that a terminal shows below the result, too, but for the warnings."""
    notes = (verdicts_note(figures), retention_note(figures), note_on_prompts(figures))
    return [note for note in notes if note]


def warnings_of(figures: Figures) -> list[str]:
    """What makes the result doubtful: answers that were cut, and a ruler that says the same."""
    return [note for note in (caution(figures), ruler_warning(figures)) if note]
