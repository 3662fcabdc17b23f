"""What a judge may prefer in an answer beside what it says: length, headers, lists, bold text.

The features are those of Arena-Hard's style control (lmarena/arena-hard-auto, show_result.py), and
what counts as a header, list or bold text is as in Chatbot Arena (lm-sys/FastChat).

Shapes: A answers of the policy and B of the baseline to one prompt, F features.
"""

import re
from collections.abc import Sequence

import numpy as np

from nanoalign.evaluation.statistics import Figures, share_figures

CODE = re.compile(r"```[^`]*```")  # what is in a block of code is no style
MARKDOWN = {
    "headers": [re.compile(r"^#{1,6}\s", re.MULTILINE)],
    "lists": [re.compile(r"^\s*\d+\.\s", re.MULTILINE), re.compile(r"^\s*[-*+]\s", re.MULTILINE)],
    "bold": [re.compile(r"\*\*[^*\n]+\*\*"), re.compile(r"__[^_\n]+__")],
}
FEATURES = ("length", *MARKDOWN)
# Tokens of the policy's answer over those of the baseline's: the upper ends of the bins.
LENGTHS = {"less than 1/2": 0.5, "1/2 to 4/5": 0.8, "4/5 to 5/4": 1.25, "5/4 to 2": 2.0}
LONGEST = "2 or more"


def style(answer: str, tokens: int) -> list[int]:
    """Returns the tokens of an answer, and how many headers, list items and bold texts it has."""
    return [tokens, *(count_of(name, answer) for name in MARKDOWN)]


def count_of(name: str, answer: str) -> int:
    """How many headers, list items or bold texts an answer has outside blocks of code."""
    return sum(len(kind.findall(CODE.sub("", answer))) for kind in MARKDOWN[name])


def differences(policy: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """The features of pairs of answers, (A, B, F): above 0 where the policy's answer has more.

    policy, baseline: what `style` returns of their answers, (A, F) and (B, F).
    The length is (a - b) / (a + b) of their tokens. The others are (d - e) / (d + e + 1) of the
    densities d and e, which are a count divided by one more than the tokens.
    """
    a, b = policy[:, None].astype(float), baseline[None].astype(float)  # (A, 1, F), (1, B, F)
    length = (a[..., :1] - b[..., :1]) / (a[..., :1] + b[..., :1])
    d, e = a[..., 1:] / (a[..., :1] + 1), b[..., 1:] / (b[..., :1] + 1)
    return np.concatenate([length, (d - e) / (d + e + 1)], -1)


def agreement(won: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """1 where two judges prefer the same answer, 0 where they do not, 1/2 for a tie of either.

    won, longer: what each says of the policy's answer: 1, 0, or 1/2 for a tie; of any shape.
    """
    return 0.5 + 2 * (won - 0.5) * (longer - 0.5)


def length_bins(
    ratios: np.ndarray, won: np.ndarray, prompts: Sequence[int], weights: np.ndarray
) -> dict[str, Figures]:
    """The win rate by bins of the length of the policy's answer over that of the baseline's.

    ratios: of their tokens, (P,). won, prompts, weights: (P,), as in statistics.prompt_interval.
    Bins without pairs are left out.
    """
    place = np.searchsorted([*LENGTHS.values()], ratios, side="right")
    bins = {}
    for n, name in enumerate([*LENGTHS, LONGEST]):
        here = place == n
        if here.any():
            groups = np.array(prompts)[here].tolist()
            rate = share_figures("win_rate", won[here], groups, weights[here])
            bins[name] = {"pairs": int(here.sum()), **rate}
    return bins
