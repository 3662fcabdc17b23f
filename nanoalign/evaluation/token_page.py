"""The files of evaluate.py tokens, and its report.html, whose template is tokens.html."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nanoalign.data.prompts import prompt_text
from nanoalign.evaluation.render import render
from nanoalign.evaluation.results import METRICS, write_records
from nanoalign.evaluation.statistics import Figures
from nanoalign.evaluation.token_values import KINDS, SIDES, Pair, Response

TEMPLATE = Path(__file__).with_name("tokens.html")
LEVELS = (0.1, 0.25, 0.5, 1.0, 2.0)  # the least value of each shade of a colour, see `look`
WINDOW = 8  # tokens after which text without a whole character is shown as it is
ABOUT = {  # by kind of tokens; "": all
    "": "",
    "shared": "the other response has the same token at the same place",
    "own": "the other response has another token there",
    "beyond": "the other response is not as long",
    "eos": "the end of the response",
}


# --- what the figures say -------------------------------------------------------------------------


def moved(figures: Figures, name: str) -> int:
    """1 if the interval of a figure is above 0, -1 if it is below, else 0.

    A figure of one prompt has no interval; its own sign is returned.
    """
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    if low is None:
        low = high = figures[name]
    return int(low > 0) - int(high < 0)


def amount(figures: Figures, name: str, sign: int = 1) -> str:
    """A figure with its interval as text, multiplied by a sign."""
    value, *ends = (figures[f"{name}{end}"] for end in ("", "_low", "_high"))
    if None in ends:
        return f"{sign * value:.2f}"
    # Adding 0 makes 0 of a rounded -0.
    low, high = (round(end, 2) + 0.0 for end in sorted(sign * end for end in ends))
    return f"{round(sign * value, 2) + 0.0:.2f} [{low:.2f}, {high:.2f}]"


def change(figures: Figures, name: str, up: str, down: str) -> str:
    """In words, how a figure changed, in nats."""
    sign = moved(figures, name)
    if not sign:
        return f"did not change beyond chance ({amount(figures, name)} nats)"
    return f"{up if sign > 0 else down} by {amount(figures, name, sign)} nats"


def conclusion(figures: Figures) -> str:
    """The sentence about all tokens."""
    over = f"{figures['pairs']:,} pair{'s' * (figures['pairs'] != 1)}"
    if "chosen_policy" not in figures:
        sign = -1 if figures["margin_added"] < 0 else 1
        return (
            f"Over {over}, the reward of a chosen response is on average "
            f"{amount(figures, 'margin_added', sign)} {'above' if sign > 0 else 'below'} that of a "
            "rejected one."
        )
    chosen, rejected = (change(figures, f"{side}_added", "rose", "fell") for side in SIDES)
    margin = change(figures, "margin_added", "grew", "shrank")
    return (
        f"From the reference to the policy, the log-probability of a chosen response {chosen}, "
        f"that of a rejected one {rejected}, and the margin between them {margin}: means over "
        f"{over}, {'of one prompt' if figures['prompts'] == 1 else 'with 95 % intervals'}."
    )


def notes_of(figures: Figures) -> list[str]:
    """The sentences about the figures that apply."""
    return of_policy(figures) if "chosen_policy" in figures else of_reward_model(figures)


def of_policy(figures: Figures) -> list[str]:
    chosen, margin = moved(figures, "chosen_added"), moved(figures, "margin_added")
    notes = []
    if chosen < 0 < margin:
        notes.append(
            "That chosen responses became less probable is no fault by itself: the loss of DPO "
            "reads the margin alone, and it grew because rejected responses lost more. What both "
            "lost went to other responses."
        )
    if margin <= 0:
        notes.append(
            "The margin did not grow beyond chance, so nothing shows that the policy has learned "
            "to prefer the chosen responses of these pairs: look at rewards/accuracies in "
            "metrics.jsonl, at the labels, and at --lr and --epochs."
        )
    kind = main_kind(figures, "chosen") if chosen else None
    if kind:
        what = f"Most of the {'rise' if chosen > 0 else 'fall'} of chosen responses, "
        notes.append(
            f"{what}{amount(figures, f'chosen_{kind}_added', chosen)} nats, is on "
            f"{OF_KIND[kind].format(**figures)}{HELP[kind] if chosen < 0 else ''}"
        )
    if end := moved(figures, "chosen_eos_added"):
        size = amount(figures, "chosen_eos_added", end)
        more, answers = ("more", "shorter") if end > 0 else ("less", "longer")
        notes.append(
            f"The EOS behind a chosen response became {more} probable, by {size} nats: sampled "
            f"answers may get {answers}."
        )
    return notes + note_on_length(figures, "the policy learns")


def of_reward_model(figures: Figures) -> list[str]:
    notes = []
    if moved(figures, "margin_added") > 0 and (kind := main_kind(figures, "margin")):
        notes.append(
            f"Most of this margin, {amount(figures, f'margin_{kind}_added')}, arises at "
            f"{OF_KIND[kind].format(**figures)}"
        )
    notes += note_on_length(figures, "the reward model has learned")
    return notes + [
        "Training reads the reward at the last token alone. Those within a response are of a text "
        "that stops there, on which nothing was trained: take them as a hint."
    ]


def note_on_length(figures: Figures, who: str) -> list[str]:
    """A sentence if tokens beyond the end of the other response decide a part of the margin."""
    margin, name = moved(figures, "margin_added"), "margin_beyond_added"
    if margin <= 0 or moved(figures, name) <= 0:
        return []
    return [
        f"{amount(figures, name)} of the margin is on tokens beyond the end of the shorter "
        f"response, so length may be a part of what {who}: docs/losses.md and "
        "docs/reward_models.md say what keeps it out."
    ]


def main_kind(figures: Figures, side: str) -> str | None:
    """The kind of tokens on which at least half of what a side adds is; None without one."""
    total = figures[f"{side}_added"]
    shares = {kind: figures[f"{side}_{kind}_added"] / total for kind in KINDS}
    kind = max(shares, key=shares.get)
    return kind if shares[kind] >= 0.5 else None


OF_KIND = {
    "shared": "tokens that both responses have at the same place ({chosen_shared_tokens:.1f} of a "
    "chosen response).",
    "own": "tokens where the other response has another one ({chosen_own_tokens:.1f} of a chosen "
    "response).",
    "beyond": "tokens beyond the end of the other response ({chosen_beyond_tokens:.1f} of a chosen "
    "response).",
    "eos": "the EOS.",
}
HELP = {
    "shared": " Where both begin with the same tokens, the loss pushes these up and down at once, "
    "and they move with the rest. Pairs that differ earlier have fewer of them; --nll_weight and "
    "--loss dpop hold chosen responses up.",
    "own": " In its own pair the loss pushes a chosen response up, so the fall comes from rejected "
    "responses with similar text, in this or other pairs (Razin et al. 2024, arXiv 2410.05779). "
    "--nll_weight and --loss dpop hold chosen responses up, and a larger --beta keeps the policy "
    "nearer to the reference.",
    "beyond": " A longer response has more tokens that can lose.",
    "eos": "",
}


# --- files ----------------------------------------------------------------------------------------


def write_results(
    folder: Path, title: str, pairs: Sequence[Pair], figures: Figures, tokenizer, count: int
) -> None:
    """Writes report.html, tokens.jsonl and metrics.json. count: pairs in report.html."""
    (folder / METRICS).write_text(json.dumps(figures, indent=2) + "\n")
    write_records(folder / "tokens.jsonl", lines(pairs))
    text = page(title, pairs, figures, tokenizer, count)
    (folder / "report.html").write_text(text, encoding="utf-8")


def lines(pairs: Sequence[Pair]) -> Iterator[dict]:
    """The lines of tokens.jsonl, one for each response of a pair."""
    for pair in pairs:
        for side, response in zip(SIDES, pair.responses, strict=True):
            values = {name: own.tolist() for name, own in response.values.items()}
            yield {
                "id": pair.record.name,
                "side": side,
                "token_ids": response.ids.tolist(),
                "kinds": [KINDS[kind] for kind in response.kinds],
                **values,
                "added": response.added.tolist(),
            }


def page(title: str, pairs: Sequence[Pair], figures: Figures, tokenizer, count: int) -> str:
    """The text of report.html. count: how many pairs it shows.

    They are spread evenly over all, in rising order of what the tokens of the chosen response add;
    of a reward model in rising order of the margin.
    """
    is_policy = "chosen_policy" in figures
    order = sorted(pairs, key=lambda pair: pair.chosen_added if is_policy else pair.margin)
    count = min(count, len(order))
    shown = [order[round(n * (len(order) - 1) / max(1, count - 1))] for n in range(count)]
    responses = [response for pair in pairs for response in pair.responses]
    if is_policy:
        centre, spread = 0.0, np.concatenate([response.added for response in responses])
    else:
        spread = np.array([response.values["reward"][-1] for response in responses])
        centre = float(spread.mean())
    unit = float(np.sqrt(np.mean((spread - centre) ** 2))) or 1.0
    return render(
        TEMPLATE,
        title=title,
        is_policy=is_policy,
        conclusion=conclusion(figures),
        notes=notes_of(figures),
        table=table(figures),
        levels=[f"{level * unit:.2g}" for level in LEVELS],
        centre=f"{centre:+.3f}",
        total=f"{len(pairs):,}",
        pairs=[case(pair, tokenizer, centre, unit) for pair in shown],
    )


def table(figures: Figures) -> list[list[str]]:
    """The table of figures as text: a row of headings, one of all tokens, and one of each kind."""
    sides = [head for side in SIDES for head in (f"in {side}", "they add")]
    rows = [["tokens", *sides, "margin", "meaning"]]
    for kind in ("", *KINDS):
        name, row = f"{kind}_added" if kind else "added", [kind or "all"]
        for side in SIDES:
            tokens = sum(figures[f"{side}_{each}_tokens"] for each in ([kind] if kind else KINDS))
            row += [f"{tokens:.1f}", amount(figures, f"{side}_{name}")]
        rows.append([*row, amount(figures, f"margin_{name}"), ABOUT[kind]])
    return rows


def case(pair: Pair, tokenizer, centre: float, unit: float) -> dict[str, object]:
    """What the page has about one pair. centre, unit: of colours, see `look`."""
    return {
        "name": pair.record.name,
        "margin": f"{pair.margin:+.3f}",
        "prompt": prompt_text(pair.record.prompt, "\n"),
        "responses": [
            {"side": side, **response_on_page(response, tokenizer, centre, unit)}
            for side, response in zip(SIDES, pair.responses, strict=True)
        ],
    }


def response_on_page(
    response: Response, tokenizer, centre: float, unit: float
) -> dict[str, object]:
    """What the page has about one response, and about each of its tokens."""
    added, values = response.added, response.values
    shades = values.get("reward", added)
    tokens = [
        {
            "text": text.replace("\n", "↵\n"),
            "look": look((shades[n] - centre) / unit),
            "kind": KINDS[response.kinds[n]],
            "numbers": [f"{own[n]:+.3f}" for own in values.values()],
            "added": f"{added[n]:+.3f}",
        }
        for n, text in enumerate(pieces(response.ids, tokenizer))
    ]
    if "reward" in values:
        head = f"reward {shades[-1]:+.3f}"
    else:
        sums = ", ".join(f"{name} {own.sum():+.3f}" for name, own in values.items())
        head = f"log-ratio {added.sum():+.3f}; {sums}"
    order = np.argsort(added)
    return {
        "head": head,
        "columns": list(values),
        "tokens": tokens,
        "least": [tokens[n] for n in order[:3] if added[n] < -LEVELS[0] * unit],
        "most": [tokens[n] for n in order[::-1][:3] if added[n] > LEVELS[0] * unit],
    }


def look(value: float) -> str:
    """The class of a token in the style sheet: up1 to up5, down1 to down5, or none.

    value: distance from the centre of the colours, in their unit: the root of the mean square of
        all tokens' distances, of a reward model of those at the ends of responses.
    """
    level = int(np.searchsorted(LEVELS, abs(value), side="right"))
    return f"{'up' if value > 0 else 'down'}{level}" if level else ""


def pieces(ids: np.ndarray, tokenizer) -> list[str]:
    """The text of each token, which together are that of all; "" before a character is complete.

    Tokens are decoded behind those of the last whole character, because a token's text depends on
    the ones before it. A run of bytes that begins or ends within a character would be no text.
    """
    tokens, texts = ids.tolist(), []
    start, whole, given = 0, 0, 0  # a window of tokens, its whole characters, their length as text
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[start:end], clean_up_tokenization_spaces=False)
        is_whole = not text.endswith("\ufffd") or end - whole == WINDOW or end == len(tokens)
        text = text if is_whole else text.rstrip("\ufffd")
        texts.append(text[given:])
        given = max(given, len(text))
        if is_whole:
            start, whole = whole, end
            text = tokenizer.decode(tokens[start:end], clean_up_tokenization_spaces=False)
            given = len(text)
    return texts
