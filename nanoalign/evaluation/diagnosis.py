"""What the figures of a comparison mean: the result in a sentence, and what to try."""

from nanoalign.evaluation.answers import ROLES
from nanoalign.evaluation.render import cell
from nanoalign.evaluation.seen import note_on_prompts
from nanoalign.evaluation.statistics import Figures

RESULTS = {
    1: "The policy is better than the baseline",
    -1: "The policy is worse than the baseline",
    0: "The difference between policy and baseline is within chance",
}
FEW = 0.02  # of the answers: where more were cut, the result is not that of whole answers


def conclusion(figures: Figures) -> str:
    """The result in one sentence. A difference counts if its 95 % intervals exclude 1/2.

    Where the figures include those of the true rule of the embedded world, and these differ from
    those of the reward model, the sentence is about the difference.
    """
    wins = f"by the reward model it wins {_share(figures, '')} of {_comparisons(figures)}"
    by_model = _better(figures, "")
    result = RESULTS[by_model]
    if "true_win_rate" in figures:
        wins += f", by the true rule of the embedded world {_share(figures, 'true_')}"
        by_rule = _better(figures, "true_")
        if by_model == 0 != by_rule:
            result = "The true rule shows a difference, the reward model does not"
        elif by_rule == 0 != by_model:
            result = "The reward model shows a difference, the true rule does not"
        elif by_model != by_rule:
            result = "The reward model contradicts the true rule"
    return f"{result}: {wins}."


def caution(figures: Figures) -> str | None:
    """What the result rests on where the reward model read only the beginning of answers."""
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
    if max(figures[f"{role}_cut_share"] for role in ROLES) <= FEW:
        return text
    whole = figures["without_cut"]
    if not whole["pairs"]:
        return f"{text} The result rests on these: no comparison is of two answers read whole."
    result = RESULTS[_better(whole, "")]
    return (
        f"{text} The result rests on these beginnings. Where it read both answers whole, it has "
        f"the policy win {_share(whole, '')} of {_comparisons(whole)}: "
        f"{result[0].lower()}{result[1:]}."
    )


def _comparisons(figures: Figures) -> str:
    pairs, prompts = figures["pairs"], figures["prompts"]
    if pairs == prompts:
        return f"{pairs:,} comparison{'s' * (pairs != 1)}"
    if prompts == 1:
        return f"{pairs:,} comparisons, all of one prompt"
    return f"{pairs:,} comparisons (each of {prompts:,} prompts counts as one)"


def _share(figures: Figures, judge: str) -> str:
    low, high = figures[f"{judge}win_rate_low"], figures[f"{judge}win_rate_high"]
    return f"{figures[f'{judge}win_rate']:.1%} [{low:.1%}, {high:.1%}]"


def _better(figures: Figures, judge: str) -> int:
    """1 if the interval of the win rate is above 1/2, -1 if it is below, else 0.

    judge: "" (the reward model) or "true_".
    """
    low, high = figures[f"{judge}win_rate_low"], figures[f"{judge}win_rate_high"]
    return int(low > 0.5) - int(high < 0.5)


def figure_rows(figures: Figures) -> list[list[str]]:
    """The figures as text: [name, value], where answers were cut [name, value, value without them].

    In the latter case the first row names the columns.
    """
    values = {name: value for name, value in figures.items() if name != "without_cut"}
    columns, heads = [values], []
    if "without_cut" in figures:
        columns.append(figures["without_cut"])
        heads = [["", "all", "without cut answers"]]
    return heads + [
        [name, *(cell(x[name], 4, "not known") if name in x else "" for x in columns)]
        for name in values
    ]


def diagnosis(figures: Figures) -> list[str]:
    """Why the policy may not be better, and what to try: a note per group of figures."""
    notes = [
        note_on_cut_answers(figures),
        note_on_missing_prompts(figures),
        note_on_length(figures),
        note_on_stopped_answers(figures),
        note_on_kl(figures),
        note_on_prompts(figures),
    ]
    return [note for note in notes if note]


def note_on_length(figures: Figures) -> str:
    text = f"The policy's answers are {_longer(figures)} than the baseline's"
    if figures.get("without_cut", {}).get("pairs"):
        text += f" ({_longer(figures['without_cut'])} where the reward model read both whole)"
    controlled = figures["length_controlled_win_rate"]
    if controlled is None:
        text += ", so much that their lengths hardly overlap, and length can't be controlled. "
    else:
        text += (
            "; with length controlled (a logistic regression of the wins on the difference of "
            f"lengths, at a difference of 0) it wins {controlled:.1%}. "
        )
    return (
        f"{text}Where the two win rates are far apart the reward model may reward length: look at "
        "length_correlation in evaluate.py rm."
    )


def _longer(figures: Figures) -> str:
    difference = figures["tokens_difference"]
    return f"{abs(difference):.1f} tokens {'longer' if difference > 0 else 'shorter'}"


def note_on_cut_answers(figures: Figures) -> str | None:
    if "without_cut" not in figures:
        return None
    return (
        "The reward of an answer that was cut is read in the middle of its text, where no reward "
        "was learned, and long answers are cut first: so neither figure is that of all answers "
        "read whole. For that, train a reward model with a larger --max_length, or compare shorter "
        "answers. metrics.json has all figures also without the answers that were cut."
    )


def note_on_stopped_answers(figures: Figures) -> str | None:
    stopped = {
        role: 1 - figures[f"{role}_ended_share"]
        for role in ROLES
        if figures[f"{role}_ended_share"] is not None
    }
    if not stopped:
        return None
    shares = " and ".join(f"{share:.1%} of the {role}'s" for role, share in stopped.items())
    return (
        f"Sampling stopped at --max_new_tokens in {shares} answers. A policy that does not stop by "
        "itself needs chosen answers that end with EOS, a larger --beta, or here a larger "
        "--max_new_tokens."
    )


def note_on_missing_prompts(figures: Figures) -> str | None:
    if not figures.get("prompts_left_out"):
        return None
    return (
        f"{figures['prompts_left_out']:,} prompts were left out, because not all files have them; "
        f"the figures are of the other {figures['prompts']:,}."
    )


def note_on_kl(figures: Figures) -> str | None:
    if "kl_per_answer" not in figures:
        return None
    return (
        f"KL(policy || baseline) is {figures['kl_per_answer']:.2f} nats an answer, "
        f"{figures['kl_per_token']:.3f} a token. Near 0 the policy has hardly changed: raise --lr "
        "or --epochs, or lower --beta. At tens of nats an answer it has changed too much: do the "
        "opposite."
    )
