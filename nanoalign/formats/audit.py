"""What a loss will see of the data: tokens one by one, and the data set as a whole. Text, for people.

All is read from the batches that training makes, nothing is worked out a second time.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from nanoalign.rows import Batch, Row, collate

CUT = "prompts cut at their beginning"
HEAD = f"{'place':>6} {'id':>7} {'position':>9}  {'segment':<17} {'scored':<8} {'predicted at':>12}  text"


def audit(rows: Sequence[Row], counts: Counter, tokenizer, examples: int, rewards: bool) -> str:
    """The first `examples` rows token by token, and a table of them all.

    counts: what encoding counted, by reason.
    rewards: whether responses are scored at their last token alone, as a reward model reads them.
    """
    parts = [_example(n, row, tokenizer, rewards) for n, row in enumerate(rows[:examples], start=1)]
    return "\n".join([*parts, _table(rows, counts, tokenizer)])


def _example(number: int, row: Row, tokenizer, rewards: bool) -> str:
    batch = collate([row])
    names = _names(row)
    scored = _scored(batch, rewards)
    lines = [f"\nexample {number}: {row.pair_id}", HEAD]
    for place, (token, position, segment) in enumerate(
        zip(
            batch.tokens[0].tolist(),
            batch.positions[0].tolist(),
            batch.segments[0].tolist(),
            strict=True,
        )
    ):
        by = scored.get(place)
        lines.append(
            f"{place:>6} {token:>7} {position:>9}  {'prompt' if segment == 0 else names[segment - 1]:<17} "
            f"{'-' if by is None else 'yes':<8} {'-' if by is None else by:>12}  "
            f"{tokenizer.decode([token])!r}"
        )
    for k, (name, end, length) in enumerate(
        zip(names, batch.ends.tolist(), batch.lengths.tolist(), strict=True), start=1
    ):
        places = [place for place in range(end - length + 1, end + 1) if place in scored]
        first, last = (
            f"{tokenizer.decode([batch.tokens[0, place]])!r} at {place}"
            for place in (places[0], places[-1])
        )
        lines.append(f"response {k}, {name}: {len(places)} scored, first {first}, last {last}")
    return "\n".join(lines)


def _names(row: Row) -> list[str]:
    """What each response is to the loss: chosen, rejected, its rank, or what each preference says."""
    dimensions = {pair.dimension for pair in row.pairs}
    if len(row.pairs) != len(dimensions):
        return [f"rank {k}" for k in range(1, len(row.responses) + 1)]
    return [
        "/".join("chosen" if k == pair.chosen else "rejected" for pair in row.pairs)
        for k in range(len(row.responses))
    ]


def _scored(batch: Batch, rewards: bool) -> dict[int, int]:
    """Place of a scored token -> place of the hidden state that scores it."""
    if rewards:
        return {end: end for end in batch.ends.tolist()}
    places = [
        place
        for end, length in zip(batch.ends.tolist(), batch.lengths.tolist(), strict=True)
        for place in range(end - length + 1, end + 1)
    ]
    assert batch.tokens[0, places].equal(batch.targets), "targets are the responses' tokens"
    return dict(zip(places, batch.reads.tolist(), strict=True))


def _table(rows: Sequence[Row], counts: Counter, tokenizer) -> str:
    responses = [response for row in rows for response in row.responses]
    ended = np.mean([response[-1] == tokenizer.eos_token_id for response in responses])
    begun = [np.sum(row.prompt == tokenizer.bos_token_id) for row in rows]
    inside = [
        np.sum(response[:-1] == tokenizer.eos_token_id) + np.sum(response == tokenizer.bos_token_id)
        for response in responses
    ]
    longer = [
        np.sign(len(row.responses[pair.chosen]) - len(row.responses[pair.rejected])) / 2 + 0.5
        for row in rows
        for pair in row.pairs
        if None not in pair
    ]
    same = Counter(key for row in rows for key in _keys(row))
    opposite = sum(_opposite(key) in same for key in same) // 2
    lines = {
        "records": f"{len(rows):,}",
        "pairs": f"{sum(None not in pair for row in rows for pair in row.pairs):,}",
        "single examples": f"{sum(None in pair for row in rows for pair in row.pairs):,}",
        "duplicates": f"{sum(count - 1 for count in same.values()):,} (prompt, responses and label again)",
        "contradictions": f"{opposite:,} (the same, labelled the other way)",
        **{reason: f"{count:,}" for reason, count in ({CUT: 0} | counts).items()},
        "responses that end with EOS": f"{ended:.1%}",
        "BOS a prompt": _spread(begun)
        if tokenizer.bos_token_id is not None
        else "the tokenizer has none",
        "EOS or BOS inside responses": f"{sum(inside):,}",
        "tokens of a prompt": _spread([len(row.prompt) for row in rows]),
        "tokens of a response": _spread([len(response) for response in responses]),
        "tokens of a row": _spread([len(row) for row in rows]),
    }
    if longer:
        lines["chosen longer than rejected"] = f"{np.mean(longer):.1%} (ties count half)"
    return "\nall of the training data\n" + "\n".join(
        f"{name:<38} {value}" for name, value in lines.items()
    )


def _keys(row: Row) -> list[tuple]:
    """Of each pair, or single example, what makes it the same as another."""
    own = [response.tobytes() for response in row.responses]
    return [
        (row.prompt.tobytes(), pair.dimension, *(None if k is None else own[k] for k in pair[:2]))
        for pair in row.pairs
    ]


def _opposite(key: tuple) -> tuple:
    prompt, dimension, chosen, rejected = key
    return prompt, dimension, rejected, chosen


def _spread(values: list[int]) -> str:
    median, p95, most = np.quantile(values, (0.5, 0.95, 1.0), method="lower")
    return f"median {median:,}, 95 % up to {p95:,}, most {most:,}"
