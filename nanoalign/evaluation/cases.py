"""cases.md: the pairs worth reading, as Markdown."""

import math
from collections.abc import Sequence

from nanoalign.data.prompts import shown
from nanoalign.evaluation.ranking import Scored, pairs_of
from nanoalign.files.text import visible

HEAD = (
    "# Cases\n\nRight and wrong are by the labels, which may be wrong themselves; the winner's "
    "probability is the reward model's, sigmoid of the difference of the two rewards.\n"
)


def cases(scored: Sequence[Scored], count: int) -> str:
    """`count` pairs of each subset: the surest right, the surest wrong, and the closest ones."""
    text = HEAD
    for subset in dict.fromkeys(line.subset for line in scored):
        pairs = pairs_of([line for line in scored if line.subset == subset])
        falling = sorted(pairs, key=lambda pair: pair[1].score - pair[0].score)  # by margin
        right = [pair for pair in falling if pair[0].score > pair[1].score]
        wrong = [pair for pair in reversed(falling) if pair[0].score < pair[1].score]
        close = sorted(pairs, key=lambda pair: abs(pair[0].score - pair[1].score))
        kinds = {"surest right": right, "surest wrong": wrong, "closest": close}
        for title, chosen in kinds.items():
            text += f"\n## {visible(subset)}: {title}\n"
            if not chosen:
                text += "\nNone.\n"
            for place, pair in enumerate(chosen[:count], start=1):
                text += _case(place, *pair)
    return text


def _case(place: int, better: Scored, worse: Scored) -> str:
    high, low = (better, worse) if better.score >= worse.score else (worse, better)
    result = "right" if better.score > worse.score else "wrong"
    result = "a tie" if better.score == worse.score else result
    prompt = shown(better.prompt, "\n\n")
    probability = 1 / (1 + math.exp(low.score - high.score))
    name = visible(better.pair_id)
    title = f"{place}. {name}: {result}, the winner's probability {probability:.3f}"
    text = f"\n### {title}\n\nPrompt\n\n{_fenced(prompt)}"
    for name, line in (("Higher", high), ("Lower", low)):
        cut = ", cut: the model read only its beginning" * line.cut
        side = f"({line.side} in the data; tokens: {line.tokens}{cut})"
        text += f"\n{name} reward **{line.score:+.3f}** {side}\n\n{_fenced(line.response)}"
    return text


def _fenced(text: str) -> str:
    """A code block, with a fence that is longer than any run of backticks in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{visible(text)}\n{fence}\n"
