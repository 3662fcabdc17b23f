"""Several responses with scores: a pair of each two of unequal scores."""

from nanoalign.encode import Record
from nanoalign.formats.records import RANKED, from_messages

LARGEST = 1e30  # of a margin or a score. Losses are sums in float32, which ends at 3.4e38.


def ranked(record: dict) -> Record:
    """K responses with scores, best first, and all their pairs of unequal scores."""
    return with_pairs(*(record[key] for key in RANKED))


def with_pairs(prompt: str | list[dict], responses: object, scores: object) -> Record:
    """The responses, best first, and all their pairs of unequal scores, with their differences."""
    for name, values in (("responses", responses), ("scores", scores)):
        if not isinstance(values, list) or len(values) < 2:
            raise ValueError(f"{name} must be a list of at least two, found {values!r}")
    if len(responses) != len(scores):
        raise ValueError(f"{len(responses)} responses, but {len(scores)} scores")
    scores = [number(score, "score") for score in scores]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    best = [scores[i] for i in order]
    pairs = [(i, j) for i in range(len(best)) for j in range(i + 1, len(best)) if best[i] > best[j]]
    margins = [best[i] - best[j] for i, j in pairs]
    responses = tuple(responses[i] for i in order)
    found = Record(prompt, responses, tuple(pairs), {"margins": margins})
    return from_messages(found, "response")


def number(value: object, name: str) -> float:
    try:
        if not isinstance(value, bool) and abs(value) <= LARGEST:  # False for NaN
            return float(value)
    except TypeError:  # no number
        pass
    found = repr(str(value)[:40])
    raise ValueError(f"the {name} must be a finite number of at most {LARGEST:g}, found {found}")
