"""--audit: examples token by token, as the loss reads them, and a table of all training data.

Positions, segments and scored tokens are those of the batch that packing makes of a row, so the
text shows what the model gets.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from nanoalign.batch import Batch, Row
from nanoalign.encode import BLANK_RESPONSE, CUT_PROMPT, CUT_RESPONSE
from nanoalign.packing.packed import collate
from nanoalign.packing.tree import coordinates

COLUMNS = (
    f"{'place':>6} {'id':>7} {'position':>9}  {'segment':<17} {'scored':<8} "
    f"{'predicted at':>12}  text"
)
COUNTED = (CUT_PROMPT, CUT_RESPONSE, BLANK_RESPONSE)  # shown also where there are none


def audit(rows: Sequence[Row], counts: Counter, tokenizer, examples: int, rewards: bool) -> str:
    """Returns the first `examples` rows token by token, and a table of all rows, as text.

    counts: how often encoding cut or dropped something, by reason.
    rewards: True for a reward model, which scores a response at its last token alone.
    """
    parts = [example(n, row, tokenizer, rewards) for n, row in enumerate(rows[:examples], start=1)]
    return "\n".join([*parts, table(rows, counts, tokenizer)])


# --- one row --------------------------------------------------------------------------------------


def example(number: int, row: Row, tokenizer, rewards: bool) -> str:
    """Returns, as text, a line for each token of a row and one for each response.

    number: of the example, from 1. rewards: as in `audit`.
    """
    batch = collate([row])
    names = response_names(row)
    scored = scored_tokens(batch, rewards)
    tokens = batch.inputs["input_ids"][0].tolist()
    _, segments, positions = coordinates(batch.inputs["tree"].rows)
    lines = [f"\nexample {number}: {row.name}", COLUMNS]
    tokens_in_place = zip(tokens, positions, segments, strict=True)
    for place, (token, position, segment) in enumerate(tokens_in_place):
        name = "prompt" if segment == 0 else names[segment - 1]
        mark, predicted_at = ("yes", scored[place]) if place in scored else ("-", "-")
        lines.append(
            f"{place:>6} {token:>7} {position:>9}  {name:<17} {mark:<8} {predicted_at:>12}  "
            f"{tokenizer.decode([token])!r}"
        )
    responses = zip(names, batch.ends_at.tolist(), batch.lengths.tolist(), strict=True)
    for k, (name, end, length) in enumerate(responses, start=1):
        places = [place for place in range(end - length + 1, end + 1) if place in scored]
        first, last = (
            f"{tokenizer.decode([tokens[place]])!r} at {place}" for place in (places[0], places[-1])
        )
        lines.append(f"response {k}, {name}: {len(places)} scored, first {first}, last {last}")
    return "\n".join(lines)


def response_names(row: Row) -> list[str]:
    """Returns the name of each response: chosen or rejected, by each preference.

    In a row with several pairs of one preference it is the rank: rank 1, ...
    """
    comparisons = compared(row)
    dimensions = {dimension for dimension, _, _ in comparisons}
    if len(comparisons) != len(dimensions):
        return [f"rank {k}" for k in range(1, len(row.responses) + 1)]
    return [
        "/".join("chosen" if k == chosen else "rejected" for _, chosen, _ in comparisons)
        for k in range(len(row.responses))
    ]


def compared(row: Row) -> list[tuple[int, int | None, int | None]]:
    """Returns (index of the preference, chosen, rejected) of each pair of a row.

    chosen, rejected: indices of responses. A single response, which is paired with itself, is the
        chosen one if it is desirable, else the rejected one; the other index is None.
    """
    dimensions = row.extra.get("dimensions", np.zeros(len(row.pairs), dtype=np.int64)).tolist()
    desirable = row.extra.get("desirable", np.ones(len(row.pairs), dtype=bool)).tolist()
    return [
        (dimension, *pair)
        if pair[0] != pair[1]
        else (dimension, pair[0] if wanted else None, None if wanted else pair[0])
        for pair, dimension, wanted in zip(row.pairs, dimensions, desirable, strict=True)
    ]


def scored_tokens(batch: Batch, rewards: bool) -> dict[int, int]:
    """Returns the place in the row of each scored token -> of the hidden state that scores it."""
    if rewards:
        return {end: end for end in batch.ends_at.tolist()}
    places = [
        place
        for end, length in zip(batch.ends_at.tolist(), batch.lengths.tolist(), strict=True)
        for place in range(end - length + 1, end + 1)
    ]
    assert torch.equal(batch.inputs["input_ids"][0, places], batch.targets)
    return dict(zip(places, batch.predicted_at.tolist(), strict=True))


# --- all rows -------------------------------------------------------------------------------------


def table(rows: Sequence[Row], counts: Counter, tokenizer) -> str:
    """Returns the figures of all rows as text, a line each. counts: as in `audit`."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    responses = [response for row in rows for response in row.responses]
    comparisons = [(row, pair) for row in rows for pair in compared(row)]
    pairs = [(row, pair) for row, pair in comparisons if None not in pair]
    longer = [  # 1 where the chosen response is longer, 0 where it is shorter, 0.5 for a tie
        np.sign(len(row.responses[chosen]) - len(row.responses[rejected])) / 2 + 0.5
        for row, (_, chosen, rejected) in pairs
    ]
    ended = np.mean([response[-1] == eos for response in responses])
    inside = sum(np.sum(r[:-1] == eos) + np.sum(r == bos) for r in responses)
    begun = [np.sum(row.prompt == bos) for row in rows]
    # (prompt, preference, chosen, rejected) of each pair
    contents = Counter(
        (
            row.prompt.tobytes(),
            dimension,
            *(k if k is None else row.responses[k].tobytes() for k in pair),
        )
        for row, (dimension, *pair) in comparisons
    )
    duplicates = sum(count - 1 for count in contents.values())
    swapped = [(*key[:2], key[3], key[2]) for key in contents]
    contradictions = sum(key in contents for key in swapped) // 2
    figures = {
        "records": f"{len(rows):,}",
        "pairs": f"{len(pairs):,}",
        "single examples": f"{len(comparisons) - len(pairs):,}",
        "duplicates": f"{duplicates:,} (prompt, responses and label again)",
        "contradictions": f"{contradictions:,} (the same, labelled the other way)",
        **{reason: f"{count:,}" for reason, count in (dict.fromkeys(COUNTED, 0) | counts).items()},
        "responses that end with EOS": f"{ended:.1%}",
        "BOS a prompt": "the tokenizer has none" if bos is None else quantiles(begun),
        "EOS or BOS inside responses": f"{inside:,}",
        "tokens of a prompt": quantiles([len(row.prompt) for row in rows]),
        "tokens of a response": quantiles([len(response) for response in responses]),
        "tokens of a row": quantiles([len(row) for row in rows]),
    }
    if longer:
        figures["chosen longer than rejected"] = f"{np.mean(longer):.1%} (ties count half)"
    lines = [f"{name:<38} {value}" for name, value in figures.items()]
    return "\n".join(["\nall of the training data", *lines])


def quantiles(values: Sequence[int]) -> str:
    """Returns the median, the 95 % quantile and the maximum, each one of the values, as text."""
    median, p95, most = np.quantile(values, (0.5, 0.95, 1.0), method="lower")
    return f"median {median:,}, 95 % up to {p95:,}, most {most:,}"
