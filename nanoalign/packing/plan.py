"""How packed rows are divided into micro-batches and dealt to ranks. Pure functions of lengths."""

import heapq
import math
from collections.abc import Sequence

Group = list[int]  # the rows of one micro-batch, by index


def pack(lengths: Sequence[int], ranks: int, limit: int) -> list[Group]:
    """Rounds of `ranks` groups of rows, with at most `limit` tokens each; a longer row is alone.

    lengths: tokens of each row. As few rounds as the limit allows, and in a round groups of similar
    size: a round lasts as long as its longest row, so its other groups are filled to that length,
    or to the mean of the remaining rounds if that is more. A group may be empty.
    """
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups = []
    while left:
        tokens = sum(lengths[i] for i in left)
        rounds = math.ceil(tokens / (limit * ranks))
        level = max(lengths[left[0]], math.ceil(tokens / (rounds * ranks)))
        # The last round takes all rows that are left, as far as the limit allows.
        new, left = _fill(left, lengths, ranks, min(level, limit) if rounds > 1 else limit)
        groups += new
    return groups


def _fill(
    order: list[int], lengths: Sequence[int], ranks: int, level: int
) -> tuple[list[Group], list[int]]:
    """(groups of one round, rows that did not fit): each row to the group with the fewest tokens.

    From the longest row to the shortest: at most 4/3 of the best division (Graham 1969).
    """
    groups: list[Group] = [[] for _ in range(ranks)]
    fewest = [(0, n) for n in range(ranks)]  # a heap of (tokens, group)
    over = []
    for i in order:
        tokens, n = fewest[0]
        if tokens and tokens + lengths[i] > level:
            over.append(i)
        else:
            groups[n].append(i)
            heapq.heapreplace(fewest, (tokens + lengths[i], n))
    return groups, over
