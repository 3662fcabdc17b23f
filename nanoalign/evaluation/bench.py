"""evaluate.py bench: the scores of a reward model on a benchmark, as its leaderboard counts them.

Beside the model's score stands what rulers get that know nothing of quality: RULERS.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nanoalign.data.sources import check_sources, open_source
from nanoalign.distributed import print0
from nanoalign.errors import RunError
from nanoalign.evaluation.benchmarks import BENCHMARKS, Benchmark, Case, Counted, Scores
from nanoalign.evaluation.judge import rewards_of
from nanoalign.evaluation.scoring import Judge, check_one, load_judges
from nanoalign.evaluation.statistics import Figures, share_figures
from nanoalign.evaluation.style import count_of
from nanoalign.loop import Batcher
from nanoalign.records import decode

SHOWN = 4  # names in a line
RULERS = {  # a score of a response from its text alone
    "longest": len,
    "shortest": lambda text: -len(text),
    # The longer of equally many, because most pairs have no lists.
    "lists": lambda text: count_of("lists", text) + len(text) / 1e9,
}


class Result(NamedTuple):
    """The cases of a benchmark, with their scores, lengths and figures."""

    cases: Sequence[Case]
    scores: list[list[float]]  # [case][response]
    lengths: list[list[tuple[int, float]]]  # as Judge.lengths returns them
    figures: dict[str, Figures]  # by the line of the table


# --- data -----------------------------------------------------------------------------------------


def read_cases(name: str, sources: Sequence[str]) -> tuple[list[Case], int]:
    """Returns (the cases of a benchmark's records, how many records have no pair to compare).

    The cases are in the order of the subsets in the table. Raises RunError, with file and line, for
    a record that the benchmark does not have, or that does not go with the others; for sources
    without cases; and as check_sources.
    """
    check_sources(sources)
    benchmark, cases = BENCHMARKS[name], []
    for source in sources:
        for where, record_name, of_source, raw in open_source(source):
            case = case_at(benchmark, name, where, of_source, decode(raw, where))
            cases.append(replace(case, name=record_name))
    compared = [case for case in cases if case.pairs]
    if not compared:
        raise RunError(f"{' '.join(sources)}: no record of {name} that compares responses")
    order = {subset: n for n, subset in enumerate(benchmark.subsets)}
    compared.sort(key=lambda case: order.get(case.subset, len(order)))
    sizes = Counter(case.subset for case in compared)
    if taken := sizes.keys() & benchmark.means(sizes).keys():
        raise RunError(f"{' '.join(sources)}: the subset {min(taken)!r} has the name of a mean")
    responses, ids = {}, {}
    for case in compared:
        count = len(case.responses)
        if case.truth and responses.setdefault(case.subset, count) != count:
            raise RunError(
                f"{case.name}: {count} responses, but other records of {case.subset} have "
                f"{responses[case.subset]}"
            )
        if case.id and ids.setdefault(case.id, case.name) != case.name:
            raise RunError(f"{case.name}: the id {case.id} is that of {ids[case.id]}, too")
    return compared, len(cases) - len(compared)


def case_at(benchmark: Benchmark, name: str, where: str, source: str, record: object) -> Case:
    """Returns the Case of a decoded record. Raises RunError, which begins with `where`."""
    known = record.keys() if isinstance(record, dict) else ()
    for keys, read in benchmark.formats.items():
        if {*keys} <= {*known}:
            try:
                return read(record, source)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise RunError(f"{where}: no record of {name}: {error}") from error
    expected = "; or ".join(" + ".join(keys) for keys in benchmark.formats)
    raise RunError(f"{where}: keys {sorted(known)}, but a record of {name} has {expected}")


# --- scores ---------------------------------------------------------------------------------------


def load_judge(args: Namespace, batcher: Batcher) -> Judge:
    """Loads the one reward of --model. Raises RunError as load_judges and check_one."""
    judges = load_judges(args, args.combine and "better", batcher)
    check_one([judge.view for judge in judges])
    return judges[0]


def evaluate(name: str, cases: Sequence[Case], judge: Judge) -> Result:
    """Scores the cases of a benchmark, and prints what was cut. A collective.

    Each response is a record of its own, so that the responses to a prompt, which may be 32 long
    ones, are shared among rows of about `batcher.tokens` tokens.
    """
    alone = [
        replace(case, responses=(response,), pairs=())
        for case in cases
        for response in case.responses
    ]
    encoded = judge.encode(alone)
    judge.check(encoded)
    notes = "".join(f"; {count:,} {reason}" for reason, count in encoded[0].counts(alone).items())
    print0(f"{'scored':<11} {name}: {len(alone):,} responses to {len(cases):,} prompts{notes}")
    flat = np.sum([rewards_of(judge, part) for part in encoded], axis=0).tolist()
    lengths = [own for (own,) in judge.lengths(alone, encoded)]
    ends = np.cumsum([0] + [len(case.responses) for case in cases]).tolist()
    scores, read = (
        [values[a:b] for a, b in zip(ends, ends[1:], strict=False)] for values in (flat, lengths)
    )
    return Result(cases, scores, read, figures_of(BENCHMARKS[name], cases, scores, read))


# --- figures --------------------------------------------------------------------------------------


def figures_of(
    benchmark: Benchmark,
    cases: Sequence[Case],
    scores: Scores,
    lengths: Sequence[Sequence[tuple[int, float]]],
) -> dict[str, Figures]:
    """The figures of each line of the table: of each subset, and of each mean of subsets.

    prompts: the number of records. score: as the benchmark counts it; score_low and score_high are
    the ends of its 95 % interval, by statistics.prompt_interval. ties: the number of pairs of equal
    scores. cut_share: the share of responses of which max_length cut a part off. Those of RULERS:
    the score that the ruler gets. Then come the further figures of the benchmark.
    """
    subsets = list(dict.fromkeys(case.subset for case in cases))
    places = {name: [n for n, c in enumerate(cases) if c.subset == name] for name in subsets}
    rulers = {
        name: [[float(rule(text)) for text in case.responses] for case in cases]
        for name, rule in RULERS.items()
    }
    counted: dict[str, Counted] = {}
    ruled: dict[str, Figures] = {}
    for name, own in places.items():
        count, of_subset = benchmark.count(name), [cases[n] for n in own]
        counted[name] = count(of_subset, [scores[n] for n in own])
        ruled[name] = {
            ruler: float(count(of_subset, [given[n] for n in own]).values.mean())
            for ruler, given in rulers.items()
        }
    lines = {name: {name: 1.0} for name in subsets}
    lines |= benchmark.means({name: len(own) for name, own in places.items()})
    figures = {}
    for line, weights in lines.items():
        own = [n for name in weights for n in places[name]]
        read = [share for n in own for _, share in lengths[n]]
        figures[line] = {
            "prompts": len(own),
            **score_figures(counted, weights),
            "ties": sum(scores[n][i] == scores[n][j] for n in own for i, j in cases[n].pairs),
            "cut_share": sum(share < 1 for share in read) / len(read),
            **weighted(ruled, weights),
            **weighted({name: counted[name].more for name in weights}, weights),
        }
    return figures


def score_figures(counted: dict[str, Counted], weights: dict[str, float]) -> Figures:
    """The score, which is the weighted mean of those of some subsets, and its interval.

    weights: of each of these subsets, of any sum.
    """
    total = sum(weights.values())
    means = {name: float(counted[name].values.mean()) for name in weights}
    values = np.concatenate([counted[name].values for name in weights])
    each = [np.full(n, weights[x] / n) for x in weights if (n := len(counted[x].values))]
    prompts = [prompt for name in weights for prompt in counted[name].prompts]
    score = sum(weight * means[name] for name, weight in weights.items()) / total
    figures = share_figures("score", values.clip(0, 1), prompts, np.concatenate(each))
    return figures | {"score": score}


def weighted(figures: dict[str, Figures], weights: dict[str, float]) -> Figures:
    """The weighted mean of each figure that all subsets of `weights` have."""
    first, *others = (figures[name] for name in weights)
    names = [name for name in first if all(name in other for other in others)]
    total = sum(weights.values())
    return {
        name: sum(weight * figures[subset][name] for subset, weight in weights.items()) / total
        for name in names
    }


def missing(name: str, result: Result) -> str | None:
    """A sentence on the subsets of a benchmark that the data do not have; None if there are all."""
    lacking = [subset for subset in BENCHMARKS[name].subsets if subset not in result.figures]
    if not lacking:
        return None
    count = f"{len(lacking)} of the {len(BENCHMARKS[name].subsets)} subsets"
    shown = ", ".join(lacking[:SHOWN]) + ", ..." * (len(lacking) > SHOWN)
    return f"without {count} ({shown}): the means are those of the others"


def wrong_pairs(result: Result) -> dict[str, list[tuple[float, Case, int, int]]]:
    """By subset, the cases with a pair ranked wrongly: (difference, case, better, worse).

    The pair is that of the case with the largest difference of the score of the worse response from
    that of the better one, which is 0 for a tie. The largest differences come first.
    """
    wrong = {case.subset: [] for case in result.cases}
    for case, scores in zip(result.cases, result.scores, strict=True):
        sure, better, worse = max((scores[j] - scores[i], i, j) for i, j in case.pairs)
        if sure >= 0:
            wrong[case.subset].append((sure, case, better, worse))
    return {subset: sorted(own, key=lambda x: -x[0]) for subset, own in wrong.items()}
