"""How packed rows are divided into micro-batches and dealt to ranks. Pure functions of lengths."""

import heapq
import math

import numpy as np


def operations(lengths: np.ndarray, costs: tuple[int, int, int]) -> np.ndarray:
    """Of each row, (N,). lengths: tokens of prompts and, behind them, of K responses, (1 + K, N).

    costs: of a token, of a scored token (one of a response), of a query with a key that it sees.
    """
    prompts, responses = lengths[0], lengths[1:]
    seen = (prompts**2 + (responses * (2 * prompts + responses)).sum(0)) // 2
    return costs[0] * lengths.sum(0) + costs[1] * responses.sum(0) + costs[2] * seen


def pack(tokens: np.ndarray, work: np.ndarray, ranks: int, limit: int) -> list[list[int]]:
    """Rounds of `ranks` groups of rows, with at most `limit` tokens each; a longer row is alone.

    tokens, work: (N,). Few rounds, in each of which groups have similar work, or none. From the
    most work to the least, each row goes to the group with the least that has room (Graham 1969).
    """
    order, over = np.argsort(-work, kind="stable").tolist(), np.minimum(tokens, limit).sum()
    tokens, work = tokens.tolist(), work.tolist()  # sums that do not overflow, items read faster
    rounds, share = 0, sum(work) / ranks
    while over:  # tokens that have no room in so many rounds
        rounds = min(rounds + math.ceil(over / (limit * ranks)), math.ceil(len(work) / ranks))
        # The first round is filled to its longest row, or evenly, or with the work of its tokens.
        level = min(max(work[order[0]], share / rounds), share * ranks * limit / sum(tokens))
        rest = level - (share - level) / max(1, rounds - 1)  # what others have less than the first
        groups = [[] for _ in range(ranks * rounds)]
        least = [(rest if n >= ranks else 0, n) for n in range(len(groups))]  # a heap
        over, room = 0, [limit] * len(groups)
        for i in order:
            while least and room[least[0][1]] < tokens[i] and groups[least[0][1]]:
                heapq.heappop(least)
            if least:
                done, n = least[0]
                groups[n].append(i)
                room[n] -= tokens[i]
                heapq.heapreplace(least, (done + work[i], n))
            else:
                over += min(tokens[i], limit)
    groups = sorted(filter(None, groups), key=lambda group: -sum([work[i] for i in group]))
    return groups + [[] for _ in range(-len(groups) % ranks)]
