"""Published benchmarks of reward models: how a record of each is read, and how scores are counted.

A response counts as better only if its score is larger: a tie is an error, as in the benchmarks'
own programs, unless a function below says otherwise.
Shapes: N records, K responses to a prompt, P pairs.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nanoalign.data.dialogues import is_dialogue
from nanoalign.data.messages import messages
from nanoalign.data.prompts import prompt_key
from nanoalign.evaluation.statistics import best_of_weights
from nanoalign.records import Record, check_text

Scores = Sequence[Sequence[float]]  # [record][response]


@dataclass(frozen=True, slots=True)
class Case(Record):
    """A record of a benchmark: the pairs are those that it compares, (better, worse)."""

    id: str = ""  # of a question of Ties
    truth: tuple[float, ...] = ()  # of PPE: whether each response is correct


class Counted(NamedTuple):
    """What the scores of one subset count for; its score is the mean of `values`."""

    values: np.ndarray  # one for each of `prompts`, about 0 to 1
    prompts: list[Hashable]  # values of one prompt depend on each other
    more: Mapping[str, float] = {}  # further figures of the subset


@dataclass(frozen=True)
class Benchmark:
    sources: tuple[str, ...]  # where it is published
    # By the keys that a record must have. The function also gets the name of the source, and
    # raises ValueError for a record that it can't read.
    formats: dict[tuple[str, ...], Callable[[dict, str], Case]]
    count: Callable[[str], Callable[[Sequence[Case], Scores], Counted]]  # by the name of a subset
    subsets: tuple[str, ...] = ()  # all, in the order of its table
    # From the number of prompts of each subset that is there: the lines below those of the subsets,
    # each with the weights of the subsets whose mean it is.
    means: Callable[[Mapping[str, int]], dict[str, dict[str, float]]] = field(default=lambda _: {})


# --- how scores are counted -----------------------------------------------------------------------


def prompts_of(cases: Sequence[Case]) -> list[str]:
    return [prompt_key(case.prompt) for case in cases]


def best_alone(cases: Sequence[Case], scores: Scores) -> Counted:
    """1 where the first response has the largest score; with n equal ones at the top 1 / n.

    RewardBench 2 (Malik et al. 2025, arXiv 2506.01937).
    """
    tops = [[score == max(own) for score in own] for own in scores]
    return Counted(np.array([top[0] / sum(top) for top in tops]), prompts_of(cases))


def chosen_above(cases: Sequence[Case], scores: Scores) -> Counted:
    """1 where the first of two responses has the larger score, else 0.

    RewardBench (Lambert et al. 2024, arXiv 2403.13787); also JudgeBench (Tan et al. 2024, arXiv
    2410.12784), whose judges see a pair in both orders and are right if more verdicts are for the
    label than against it: at equal scores a scalar judge gives one of each.
    """
    return Counted(np.array([float(x > y) for x, y in scores]), prompts_of(cases))


def style_matrix(cases: Sequence[Case], scores: Scores) -> Counted:
    """The mean over the 3 x 3 pairs of a correct response in one style and a wrong one in another.

    The styles are concise, detailed, and detailed with Markdown. In the pairs of `hard` the wrong
    response has the richer style, in those of `easy` the correct one, in `normal` both have the
    same. RM-Bench (Liu et al. 2024, arXiv 2410.16184).
    """
    given = np.array(scores)  # (N, 6)
    right = given[:, :3, None] > given[:, None, 3:]  # (N, style of the correct, style of the wrong)
    mean = right.mean(0)
    kinds = {"easy": np.tri(3, k=-1) > 0, "normal": np.eye(3) > 0, "hard": np.tri(3, k=-1).T > 0}
    more = {name: float(mean[places].mean()) for name, places in kinds.items()}
    return Counted(right.mean((1, 2)), prompts_of(cases), more)


def correct_above(cases: Sequence[Case], scores: Scores) -> Counted:
    """1 for each pair of a correct and a wrong response in which the correct one scores higher.

    end_score: the share of correct answers among those with the largest score of all K. max_score:
    the largest such share for the best of k, over k from 1 to K; the best of k is expected over all
    subsets of k responses. PPE (Frick et al. 2024, arXiv 2410.14872).
    """
    right, prompts, curves = [], [], []
    for case, own, prompt in zip(cases, scores, prompts_of(cases), strict=True):
        right += [float(own[better] > own[worse]) for better, worse in case.pairs]
        prompts += [prompt] * len(case.pairs)
        curves.append(best_of_curve(np.array(own), np.array(case.truth)))
    curve = np.mean(curves, 0)  # (K,)
    return Counted(
        np.array(right), prompts, {"end_score": float(curve[-1]), "max_score": float(curve.max())}
    )


def best_of_curve(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The expected truth of the response of the largest score among k of K, for each k: (K,).

    scores, truth: (K,). Where scores are equal, each of their responses is as likely.
    """
    _, group = np.unique(scores, return_inverse=True)
    expected = (np.bincount(group, truth) / np.bincount(group))[np.sort(group)]  # in rising order
    count = len(scores)
    return np.array([best_of_weights(k, count) @ expected for k in range(1, count + 1)])


def ties(cases: Sequence[Case], scores: Scores) -> Counted:
    """The score of the subset Ties of RewardBench 2: process_single_model of its repository.

    A question of number n is asked twice: "ref:n" has one correct response, "tied:n" several that
    are equally good. spread: the largest minus the smallest score of the correct ones; gap: the
    smallest score of the correct ones minus the largest of the wrong ones. The score is
    0.3 [gap > 0 in tied] + 0.3 [gap > 0 in ref] + 0.2 [gap in tied > spread]
    + 0.2 [smaller gap of both > spread] + 0.01 tanh(smaller gap of both / spread - 1),
    each term averaged over all questions that have what it needs; the last one is 0 for 0 / 0.
    """
    gaps: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spreads = {}
    for case, own in zip(cases, scores, strict=True):
        kind, number = case.id.split(":")
        correct = [own[i] for i in {better for better, _ in case.pairs}]
        gaps[kind][number] = min(correct) - max(own[i] for i in {worse for _, worse in case.pairs})
        spreads[kind, number] = max(correct) - min(correct)
    numbers = list(gaps["ref"] | gaps["tied"])
    total = np.zeros(len(numbers))

    def add(weight: float, terms: Mapping[str, float]) -> None:
        """Adds weight * the mean of the terms, divided so that the mean of `total` is the score."""
        for number, term in terms.items():
            total[numbers.index(number)] += weight * term * len(numbers) / len(terms)

    for own in gaps.values():
        add(0.3, {number: gap > 0 for number, gap in own.items()})
    both = [number for number in gaps["tied"] if number in gaps["ref"]]
    spread = {number: spreads["tied", number] for number in both}
    least = {number: min(own[number] for own in gaps.values()) for number in both}
    add(0.2, {number: gaps["tied"][number] > spread[number] for number in both})
    add(0.2, {number: least[number] > spread[number] for number in both})
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = {number: np.divide(least[number], spread[number]) for number in both}
    add(0.01, {number: np.nan_to_num(np.tanh(ratio[number] - 1)) for number in both})
    return Counted(total, numbers)


# --- how records are read -------------------------------------------------------------------------


def case_of(
    record: dict, subset: str, responses: Sequence[str], pairs: Sequence[tuple[int, int]], **more
) -> Case:
    """Returns the Case of a record's prompt, text or messages, and of these responses.

    A benchmark gives a model each response, also an empty one. Raises ValueError for what is no
    text.
    """
    prompt = record["question"] if "question" in record else record["prompt"]
    if isinstance(prompt, list) or is_dialogue(prompt):  # a text that looks like one is a question
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        prompt = messages(turns, "prompt")
    else:
        check_text("prompt", prompt)
    check_text("subset", subset)
    for n, response in enumerate(responses, start=1):
        if response != "":
            check_text(f"response {n} of {len(responses)}", response)
    return Case(prompt, tuple(responses), tuple(pairs), subset=subset, **more)


def is_list_of_text(*values: object) -> bool:
    return all(isinstance(x, list) and x and all(isinstance(y, str) for y in x) for x in values)


def reward_bench(record: dict, source: str) -> Case:
    return case_of(record, record["subset"], [record["chosen"], record["rejected"]], [(0, 1)])


def reward_bench_2(record: dict, source: str) -> Case:
    """Any number of correct responses and of wrong ones, in the published subsets 1 to 3."""
    chosen, rejected = record["chosen"], record["rejected"]
    if not is_list_of_text(chosen, rejected):
        raise ValueError("chosen and rejected must be lists of responses, of at least one each")
    subset, given = record["subset"], ""
    if str(subset).lower() == "ties":
        given = str(record.get("id", ""))
        if not re.fullmatch(r"(ref|tied):\d+", given):
            raise ValueError(f"the id is {given!r}; of {subset} it is ref:NUMBER or tied:NUMBER")
    return case_of(record, subset, [*chosen, *rejected], all_pairs(chosen, rejected), id=given)


def all_pairs(chosen: Sequence[str], rejected: Sequence[str]) -> list[tuple[int, int]]:
    """The pairs of each chosen response and each rejected one, which stand behind the chosen."""
    count = len(chosen)
    return [(i, count + j) for i in range(count) for j in range(len(rejected))]


def rm_bench(record: dict, source: str) -> Case:
    """Three styles of a correct and of a wrong response. source: begins with the domain if the
    record has none."""
    chosen, rejected = record["chosen"], record["rejected"]
    if not is_list_of_text(chosen, rejected) or (len(chosen), len(rejected)) != (3, 3):
        raise ValueError("chosen and rejected must be lists of three responses: of three styles")
    name = str(record.get("domain") or source)
    domain = next((each for each in DOMAINS if name.startswith(each)), None)
    if domain is None:
        raise ValueError(f"the domain is {name!r}; it must begin with one of {', '.join(DOMAINS)}")
    return case_of(record, domain, [*chosen, *rejected], all_pairs(chosen, rejected))


def judge_bench(record: dict, source: str) -> Case:
    better = {"A>B": "AB", "B>A": "BA"}.get(record["label"])
    if better is None:
        raise ValueError(f"the label is {record['label']!r}; it must be 'A>B' or 'B>A'")
    kinds = [name for start, name in KINDS.items() if record["source"].startswith(start)]
    responses = [record[f"response_{letter}"] for letter in better]
    return case_of(record, kinds[0] if kinds else record["source"], responses, [(0, 1)])


def ppe_human(record: dict, source: str) -> Case:
    """The vote of a person for one of two responses; a tie has no pair."""
    winner = record["winner"]
    if winner not in ("model_a", "model_b") and not str(winner).startswith("tie"):
        raise ValueError(f"the winner is {winner!r}; it must be model_a, model_b, or a tie")
    responses = [record["response_1"], record["response_2"]]
    pairs = [] if winner not in ("model_a", "model_b") else [(0, 1)]
    return case_of(record, HUMAN, responses[:: -1 if winner == "model_b" else 1], pairs)


def ppe_correctness(record: dict, source: str) -> Case:
    """K responses, which are correct or not, and the pairs (i, j) of them that are compared."""
    if source == HUMAN:
        raise ValueError(f"'{HUMAN}' names the votes of people; name the source otherwise")
    truth, compared = record["scores"], record["sampled_conflict_pairs"]
    if not all(0 <= score <= 1 for score in truth):
        raise ValueError(f"the scores are {truth}; they must be from 0 to 1")
    responses = [record.get(f"response_{n}") for n in range(1, len(truth) + 1)]
    pairs = [(i, j) if truth[i] > truth[j] else (j, i) for i, j in compared]
    if any(i < 0 or j < 0 or truth[i] == truth[j] for i, j in pairs):
        raise ValueError("sampled_conflict_pairs has a pair of equal scores, or a negative number")
    return case_of(record, source, responses, pairs, truth=tuple(map(float, truth)))


# --- the benchmarks -------------------------------------------------------------------------------

# The number of prompts by which a subset counts in its section: as published, but for math-prm,
# whose 447 count as much as all code.
SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        **{f"hep-{name}": 164 for name in ("cpp", "go", "java", "js", "python", "rust")},
    },
}
DOMAINS = ("chat", "math", "code", "safety")  # of RM-Bench
KINDS = {  # of JudgeBench, by what a source begins with
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
HUMAN = "Human preference"  # of PPE
CORRECTNESS = ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval")


def sections(sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """The sections of RewardBench, and its score: their mean."""
    known = {
        name: {subset: weight for subset, weight in own.items() if subset in sizes}
        for name, own in SECTIONS.items()
    }
    known = {name: own for name, own in known.items() if own}
    mean = {
        subset: weight / sum(own.values())
        for own in known.values()
        for subset, weight in own.items()
    }
    return known | ({"Score": mean} if mean else {})


def mean_of_subsets(sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    return {"Score": dict.fromkeys(sizes, 1.0)}


def mean_of_prompts(sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    return {"Score": dict(sizes)}


def mean_correctness(sizes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """The mean over the sets of correctness, of which votes are no part."""
    weights = {name: 1.0 for name in sizes if name != HUMAN}
    return {"Correctness": weights} if weights else {}


HUB = "hf://datasets/"
BENCHMARKS = {
    "rewardbench": Benchmark(
        (f"{HUB}allenai/reward-bench:filtered",),
        {("prompt", "chosen", "rejected", "subset"): reward_bench},
        lambda subset: chosen_above,
        tuple(subset for own in SECTIONS.values() for subset in own),
        sections,
    ),
    "rewardbench2": Benchmark(
        (f"{HUB}allenai/reward-bench-2:test",),
        {("prompt", "chosen", "rejected", "subset"): reward_bench_2},
        lambda subset: ties if subset.lower() == "ties" else best_alone,
        ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"),
        mean_of_subsets,
    ),
    "rmbench": Benchmark(
        (f"{HUB}THU-KEG/RM-Bench:train",),
        {("prompt", "chosen", "rejected"): rm_bench},
        lambda subset: style_matrix,
        DOMAINS,
        mean_of_subsets,
    ),
    "judgebench": Benchmark(
        (f"{HUB}ScalerLab/JudgeBench:gpt",),
        {("question", "response_A", "response_B", "label", "source"): judge_bench},
        lambda subset: chosen_above,
        tuple(KINDS.values()),
        mean_of_prompts,
    ),
    "ppe": Benchmark(
        (
            f"{HUB}lmarena-ai/PPE-Human-Preference-V1:test",
            *(f"{name}={HUB}lmarena-ai/PPE-{name}-Best-of-K:train" for name in CORRECTNESS),
        ),
        {
            ("prompt", "response_1", "scores", "sampled_conflict_pairs"): ppe_correctness,
            ("prompt", "response_1", "response_2", "winner"): ppe_human,
        },
        lambda subset: chosen_above if subset == HUMAN else correct_above,
        (HUMAN, *CORRECTNESS),
        mean_correctness,
    ),
}
