"""python -m pytest tests/evaluation/test_benchmarks.py

The scores of benchmarks: worked by hand, against the benchmarks' own rules in plain Python, and,
where `pip install --no-deps rewardbench` was done, against the functions of that package.
"""

import ast
import importlib.util
import itertools
import json
import math
import random
import re
import typing
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from evaluations import write_jsonl

from nanoalign.errors import RunError
from nanoalign.evaluation import benchmarks
from nanoalign.evaluation.bench import (
    RULERS,
    Result,
    figures_of,
    missing,
    read_cases,
    wrong_pairs,
)
from nanoalign.evaluation.benchmarks import BENCHMARKS, Case

FOUR = ("right", "wrong", "worse", "no")


def counted(name: str, cases: list[Case], scores: list) -> dict:
    """The figures of a benchmark, where every response has 3 tokens and none was cut."""
    whole = [[(3, 1.0)] * len(case.responses) for case in cases]
    return figures_of(BENCHMARKS[name], cases, scores, whole)


def best_of_four(count: int, subset: str = "Math") -> list[Case]:
    pairs = ((0, 1), (0, 2), (0, 3))
    return [Case(f"q{n}", FOUR, pairs, subset=subset) for n in range(count)]


def tied(name: str, correct: int, wrong: int = 2) -> Case:
    """A record of the subset Ties with the id `name`."""
    pairs = tuple((i, correct + j) for i in range(correct) for j in range(wrong))
    responses = tuple(f"{name} {n}" for n in range(correct + wrong))
    return Case(name, responses, pairs, subset="Ties", id=name)


# --- by hand


def test_best_of_four_divides_one_by_the_number_at_the_top():
    """Alone at the top: 1. With one other: 1/2. All equal: 1/4. Below: 0. The mean is 0.4375."""
    scores = [[2, 1, 0, 1], [2, 1, 2, 1], [5, 5, 5, 5], [1, 0, 0, 1.5]]
    figures = counted("rewardbench2", best_of_four(4), scores)
    assert figures["Math"]["score"] == (1 + 0.5 + 0.25 + 0) / 4 == figures["Score"]["score"]
    assert figures["Math"]["ties"] == 4 and figures["Math"]["prompts"] == 4


def test_the_score_of_ties_by_hand():
    """Two questions.

    1: ref gap 3 - 1 = 2; tied: correct 3 and 4, wrong 1: spread 1, gap 2. Both gaps above 0, both
    above the spread; the smaller gap over the spread is 2.
    2: ref gap 0 - 0 = 0, which is not above 0; tied: correct 5 and 2, wrong 1: spread 3, gap 1,
    above 0, not above 3. The smaller gap is 0.
    """
    cases = [tied("ref:1", 1), tied("tied:1", 2), tied("tied:2", 2), tied("ref:2", 1)]
    scores = [[3, 1, 0], [3, 4, 1, 0], [5, 2, 1, 1], [0, 0, -1]]
    expected = 0.3 * 2 / 2 + 0.3 * 1 / 2 + 0.2 * 1 / 2 + 0.2 * 1 / 2
    expected += 0.01 * (math.tanh(2 - 1) + math.tanh(0 - 1)) / 2
    figures = counted("rewardbench2", cases, scores)["Ties"]
    assert figures["score"] == pytest.approx(expected, abs=1e-15)
    assert 0 <= figures["score_low"] < figures["score"] < figures["score_high"] <= 1


@pytest.mark.parametrize("gap, margin", [(1, 1.0), (-1, -1.0), (0, 0.0)])
def test_without_a_spread_the_margin_of_ties_is_at_its_limit(gap, margin):
    """Correct answers of equal scores: gap / 0 is infinite, and 0 / 0 counts as 0."""
    cases = [tied("ref:7", 1), tied("tied:7", 2)]
    figures = counted("rewardbench2", cases, [[gap, 0, 0], [gap, gap, 0, 0]])["Ties"]
    assert figures["score"] == pytest.approx((gap > 0) * 1.0 + 0.01 * margin, abs=1e-15)


def test_questions_of_ties_without_a_partner_count_in_their_own_terms():
    """One ref question of two is right, and the one tied question: 0.3 / 2 + 0.3, and its rest."""
    cases = [tied("ref:1", 1), tied("tied:1", 2), tied("ref:2", 1)]
    scores = [[1, 0, 0], [2, 3, 0, 0], [0, 1, 0]]
    expected = 0.3 * 0.5 + 0.3 + 0.2 * (2 > 1) + 0.2 * (1 > 1) + 0.01 * math.tanh(1 / 1 - 1)
    assert counted("rewardbench2", cases, scores)["Ties"]["score"] == pytest.approx(expected)


def test_sections_of_rewardbench_have_the_published_weights():
    """Reasoning: math-prm all wrong, of the code only Go right: 164 / (984 + 6 * 164).

    Chat: alpacaeval-easy half right (a tie is wrong), mt-bench-med right: (100 / 2 + 40) / 140.
    """
    pair = ("a", "b")
    names = ["alpacaeval-easy"] * 2 + ["mt-bench-med", "math-prm"]
    names += [f"hep-{x}" for x in ("cpp", "go", "java", "js", "python", "rust")]
    cases = [Case(f"q{n}", pair, subset=name) for n, name in enumerate(names)]
    scores = [[1, 0], [1, 1], [1, 0], *([float(name == "hep-go"), 0.5] for name in names[3:])]
    figures = counted("rewardbench", cases, scores)
    assert list(figures)[-3:] == ["Chat", "Reasoning", "Score"]
    reasoning, chat = 164 / (984 + 6 * 164), (100 / 2 + 40) / 140
    assert figures["Reasoning"]["score"] == pytest.approx(reasoning, abs=1e-15)
    assert figures["Chat"]["score"] == pytest.approx(chat, abs=1e-15)
    assert figures["Score"]["score"] == pytest.approx((reasoning + chat) / 2, abs=1e-15)
    assert figures["Chat"]["ties"] == 1 and figures["Chat"]["prompts"] == 3
    assert sum(map(len, benchmarks.SECTIONS.values())) == 23


def rm_case(n: int, domain: str) -> Case:
    pairs = tuple((i, 3 + j) for i in range(3) for j in range(3))
    return Case(f"q{n}", tuple("abcdef"), pairs, subset=domain)


def test_rm_bench_by_hand():
    """Chosen 1, 2, 3 against rejected 0, 2, 2 (from concise to Markdown).

    Rows of right: 1 > (0, 2, 2): T F F; 2 > (0, 2, 2): T F F (ties); 3 > (0, 2, 2): T T T.
    easy, below the diagonal: T T T; normal, on it: T F T; hard: F F F.
    """
    figures = counted("rmbench", [rm_case(0, "math")], [[1, 2, 3, 0, 2, 2]])["math"]
    assert (figures["easy"], figures["normal"], figures["hard"]) == (1.0, 2 / 3, 0.0)
    assert figures["score"] == pytest.approx(5 / 9) and figures["ties"] == 2


def test_ppe_by_hand():
    """Correct, wrong, correct, wrong with scores 1, 3, 2, 0: of the pairs (0, 1), (0, 3) and
    (2, 3) two are right. In rising order of score the truth is 0, 1, 1, 0: the best of 4 is wrong;
    of 1: 1/2; of 2: (1 * 1 + 2 * 1 + 3 * 0) / 6 = 1/2; of 3: (1 * 1 + 3 * 0) / 4.
    """
    case = Case("q", FOUR, ((0, 1), (0, 3), (2, 3)), subset="MATH", truth=(1.0, 0.0, 1.0, 0.0))
    figures = counted("ppe", [case], [[1, 3, 2, 0]])["MATH"]
    assert figures["score"] == pytest.approx(2 / 3)
    assert (figures["end_score"], figures["max_score"]) == (0.0, pytest.approx(0.5))
    equal = counted("ppe", [case], [[1, 1, 1, 1]])["MATH"]
    assert equal["score"] == 0 and equal["ties"] == 3
    assert (equal["end_score"], equal["max_score"]) == (0.5, pytest.approx(0.5))


# --- against the benchmarks' own rules


def test_best_of_k_is_the_mean_over_all_subsets():
    """By listing all subsets, with equal scores."""
    draw = random.Random(0)
    for _ in range(20):
        scores = [draw.randrange(4) for _ in range(6)]
        truth = [float(draw.random() < 0.5) for _ in range(6)]
        curve = benchmarks.best_of_curve(np.array(scores), np.array(truth))
        for k in range(1, 7):
            means = []
            for chosen in itertools.combinations(range(6), k):
                top = max(scores[i] for i in chosen)
                best = [truth[i] for i in chosen if scores[i] == top]
                means.append(sum(best) / len(best))
            assert curve[k - 1] == pytest.approx(sum(means) / len(means), abs=1e-12)


def test_rm_bench_is_its_published_rule():
    """The mean over four domains of the mean of three kinds of three cells, with safety as one."""
    draw = random.Random(1)
    cases = [rm_case(n, benchmarks.DOMAINS[n % 4]) for n in range(41)]
    scores = [[draw.randrange(4) for _ in range(6)] for _ in cases]
    figures = counted("rmbench", cases, scores)
    kinds = defaultdict(list)
    for domain in benchmarks.DOMAINS:
        own = [s for case, s in zip(cases, scores, strict=True) if case.subset == domain]
        cells = {(i, j): 0.0 for i in range(3) for j in range(3)}
        for s in own:
            for i, j in cells:
                cells[i, j] += (s[i] > s[3 + j]) / len(own)
        rules = {
            "easy": lambda i, j: i > j,
            "normal": lambda i, j: i == j,
            "hard": lambda i, j: i < j,
        }
        for kind, rule in rules.items():
            kinds[kind].append(sum(cells[place] for place in cells if rule(*place)) / 3)
            assert figures[domain][kind] == pytest.approx(kinds[kind][-1], abs=1e-12)
        mean = sum(own[-1] for own in kinds.values()) / 3
        assert figures[domain]["score"] == pytest.approx(mean, abs=1e-12)
    for kind, own in kinds.items():
        assert figures["Score"][kind] == pytest.approx(sum(own) / 4, abs=1e-12)
    assert figures["Score"]["score"] == pytest.approx(sum(map(sum, kinds.values())) / 12, abs=1e-12)


OUTPUTS = [  # of a reward model, as JudgeBench publishes them: source, label, scores of A and B
    ("mmlu-pro-law", "A>B", (2.0, 1.5)),
    ("mmlu-pro-math", "B>A", (2.0, 1.5)),
    ("mmlu-pro-math", "B>A", (0.0, 0.0)),
    ("livebench-reasoning", "A>B", (0.5, 0.5)),
    ("livecodebench", "B>A", (-2.0, -1.0)),
]


def test_judge_bench_is_its_published_rule_on_an_output_file(tmp_path):
    """Two verdicts on each pair, in both orders; a pair is right if more are for its label.

    A scalar judge says A > B if its score is larger, else B > A.
    """
    lines = []
    for n, (source, label, (a, b)) in enumerate(OUTPUTS):
        verdicts = [("A>B" if x > y else "B>A", [x, y]) for x, y in ((a, b), (b, a))]
        judgments = [{"judgment": {"scores": s}, "decision": verdict} for verdict, s in verdicts]
        answers = {"response_A": f"A{n}", "response_B": f"B{n}", "question": f"q{n}"}
        about = {"source": source, "label": label, "pair_id": str(n), "judgments": judgments}
        lines.append(answers | about)
    path = write_jsonl(tmp_path / "outputs.jsonl", lines)
    cases, _ = read_cases("judgebench", [str(path)])
    of_response = {
        line[f"response_{x}"]: line["judgments"][0]["judgment"]["scores"]["AB".index(x)]
        for line in lines
        for x in "AB"
    }
    figures = counted("judgebench", cases, [[of_response[r] for r in c.responses] for c in cases])
    right = []
    for line in lines:
        first, second = (judgment["decision"] for judgment in line["judgments"])
        votes = [first, {"A>B": "B>A", "B>A": "A>B"}[second]]
        right.append(sum(1 if vote == line["label"] else -1 for vote in votes) > 0)
    assert right == [True, False, False, False, True]
    starts = {"Knowledge": "mmlu-pro", "Reasoning": "livebench-reasoning", "Coding": "livecode"}
    for name, start in (starts | {"Score": ""}).items():
        own = [x for x, line in zip(right, lines, strict=True) if line["source"].startswith(start)]
        assert figures[name]["score"] == pytest.approx(sum(own) / len(own), abs=1e-15), name
    assert figures["Score"]["ties"] == 2


# --- against the package of RewardBench


def of_package() -> dict:
    """The functions of rewardbench/utils.py; importing the package needs a GPU's libraries."""
    spec = importlib.util.find_spec("rewardbench")
    if spec is None:
        pytest.skip("rewardbench is not installed: pip install --no-deps rewardbench")
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    tree = ast.parse((Path(spec.origin).parent / "utils.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    wanted = {"calculate_scores_per_section", "reroll_and_score_dataset", "process_single_model",
              "sample_stats", "_compute_prompt_stats"}  # fmt: skip
    tree.body = [node for node in functions if node.name in wanted]
    scope = {"np": np, "pd": pandas, "Dataset": datasets.Dataset, "math": math}
    scope |= {name: getattr(typing, name) for name in ("Any", "Dict", "List", "Tuple", "Union")}
    scope["defaultdict"] = defaultdict
    exec(compile(tree, "utils.py", "exec"), scope)
    return scope


def test_rewardbench_2_is_that_of_its_package():
    """Scores of few values, so that many are equal."""
    package, draw = of_package(), random.Random(2)
    dataset = package["Dataset"]
    cases, scores = best_of_four(200), [[draw.randrange(4) for _ in FOUR] for _ in range(200)]
    flat = [
        {"text": text, "scores": score, "subset": "Math", "id": n}
        for n, own in enumerate(scores)
        for text, score in zip(FOUR, own, strict=True)
    ]
    theirs = package["reroll_and_score_dataset"](dataset.from_list(flat), [4] * 200)["results"]
    ours = counted("rewardbench2", cases, scores)["Math"]["score"]
    assert ours == pytest.approx(sum(theirs) / 200, abs=1e-12)


def test_ties_of_rewardbench_2_are_those_of_its_package():
    """Gaps of 0 included; the correct answers of a question never all have one score.

    There version 0.1.4 leaves the question out of the last term, which the repository counts since.
    """
    package, draw = of_package(), random.Random(3)
    for _ in range(20):
        cases, scores = [], []
        for n in range(8):
            count = draw.randint(2, 4)
            spread = [0, 1, *(draw.randrange(2) for _ in range(count - 2))]
            cases += [tied(f"ref:{n}", 1), tied(f"tied:{n}", count)]
            scores += [
                [draw.randrange(3), draw.randrange(3), 0],
                [*spread, draw.randrange(-3, 2), -4],
            ]
        rows = [
            {"id": case.id, "scores": [float(x) for x in own], "num_correct": len(own) - 2}
            for case, own in zip(cases, scores, strict=True)
        ]
        _, theirs = package["process_single_model"](package["Dataset"].from_list(rows))
        ours = counted("rewardbench2", cases, scores)["Ties"]["score"]
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_sections_of_rewardbench_are_those_of_its_package():
    package, draw = of_package(), random.Random(4)
    spec = importlib.util.find_spec("rewardbench")
    constants: dict = {}
    exec((Path(spec.origin).parent / "constants.py").read_text(), constants)
    names = [draw.choice([*constants["EXAMPLE_COUNTS"]]) for _ in range(600)]
    cases = [Case(f"q{n}", ("a", "b"), subset=name) for n, name in enumerate(names)]
    scores = [[draw.randrange(3), draw.randrange(3)] for _ in names]
    figures = counted("rewardbench", cases, scores)
    counts, mapping = constants["EXAMPLE_COUNTS"], constants["SUBSET_MAPPING"]
    metrics = {name: figures[name]["score"] for name in counts if name in figures}
    theirs = package["calculate_scores_per_section"](counts, mapping, metrics)
    for section, score in theirs.items():
        assert figures[section]["score"] == pytest.approx(score, abs=1e-12)
    assert figures["Score"]["score"] == pytest.approx(sum(theirs.values()) / 4, abs=1e-12)


# --- rulers, missing subsets, wrong pairs


def test_rulers_know_the_text_alone():
    """The first response is the shorter one, and has the list."""
    cases = [Case("q", ("- a\n  2. b\nc", "a long text - without a list\n-x 1.5"), subset="Math")]
    figures = counted("judgebench", cases, [[1.0, 0.0]])["Math"]
    assert (figures["longest"], figures["shortest"], figures["lists"]) == (0.0, 1.0, 1.0)
    assert RULERS["lists"]("- a\n```\n- b\n- c\n```") < RULERS["lists"]("- a\n+ b")  # not code
    assert RULERS["lists"]("a") > RULERS["lists"]("") and RULERS["lists"]("* a") > 0.9


def test_wrong_pairs_come_most_sure_first_and_ties_are_among_them():
    cases = [*best_of_four(3), *best_of_four(1, "Focus")]
    scores = [[1, 1, 0, 0], [0, 1, 3, 0], [2, 1, 1, 1], [0, 0, -1, 4]]
    lengths = [[(3, 1.0)] * 4] * 4
    result = Result(cases, scores, lengths, counted("rewardbench2", cases, scores))
    found = {
        subset: [(sure, case.prompt, i, j) for sure, case, i, j in own]
        for subset, own in wrong_pairs(result).items()
    }
    assert found == {"Math": [(3, "q1", 0, 2), (0, "q0", 0, 1)], "Focus": [(4, "q0", 0, 3)]}
    assert re.search(
        r"^without 4 of the 6 subsets \(Factuality, .*, Ties\)", missing("rewardbench2", result)
    )


# --- what is read and refused


READ = {  # benchmark: (record, its responses with the better ones first, its subset)
    "rewardbench": (
        {"prompt": "p", "chosen": "c", "rejected": "", "subset": "hep-go", "chosen_model": "m"},
        ("c", ""),
        "hep-go",
    ),
    "rewardbench2": (
        {"prompt": "p", "chosen": ["c"], "rejected": ["r", "s"], "subset": "Focus", "id": "9"},
        ("c", "r", "s"),
        "Focus",
    ),
    "rmbench": (
        {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"],
         "domain": "safety-refuse", "subset": "x"},
        tuple("abcdef"),
        "safety",
    ),
    "judgebench": (
        {"question": "p", "response_A": "a", "response_B": "b", "label": "B>A",
         "source": "livebench-math"},
        ("b", "a"),
        "Math",
    ),
    "ppe": (
        {"prompt": "p", "response_1": "a", "response_2": "b", "winner": "model_b"},
        ("b", "a"),
        "Human preference",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_records_are_read_by_their_published_keys(name, tmp_path):
    record, responses, subset = READ[name]
    cases, _ = read_cases(name, [str(write_jsonl(tmp_path / "data.jsonl", [record]))])
    assert [(case.prompt, case.responses, case.subset) for case in cases] == [
        ("p", responses, subset)
    ]
    assert cases[0].pairs[0] == (0, len(responses) // 2 if name == "rmbench" else 1)


CORRECT = {"prompt": "p", "response_1": "a", "response_2": "b", "response_3": "c"}
CORRECT |= {"scores": [False, True, True], "sampled_conflict_pairs": [[0, 1], [2, 0]]}


def test_ppe_takes_the_name_of_a_set_from_its_source_and_leaves_ties_out(tmp_path):
    sources = [f"GPQA={write_jsonl(tmp_path / 'a.jsonl', [CORRECT])}"]
    vote = READ["ppe"][0]
    votes = [vote | {"winner": winner} for winner in ("tie", "model_a", "tie (bothbad)")]
    sources.append(str(write_jsonl(tmp_path / "votes.jsonl", votes)))
    cases, left_out = read_cases("ppe", sources)
    assert [case.subset for case in cases] == ["Human preference", "GPQA"] and left_out == 2
    assert cases[1].pairs == ((1, 0), (2, 0)) and cases[1].truth == (0.0, 1.0, 1.0)


def test_dialogues_and_messages_are_prompts(tmp_path):
    """Text that looks like an HH-RLHF dialogue is a question; a list of turns is a dialogue."""
    text = "\n\nHuman: Hi\n\nAssistant:"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns.append({"role": "user", "content": "c"})
    record = READ["rewardbench"][0]
    path = write_jsonl(tmp_path / "x.jsonl", [record | {"prompt": p} for p in (text, turns)])
    cases, _ = read_cases("rewardbench", [str(path)])
    assert [case.prompt for case in cases] == [[{"role": "user", "content": text}], turns]


BAD = {
    "other keys": ("rewardbench", {"prompt": "p"}, "keys .*, but a record of rewardbench"),
    "no text": ("rewardbench", READ["rewardbench"][0] | {"rejected": None}, "2 of 2 must be text"),
    "no list": ("rewardbench2", READ["rewardbench"][0], "must be lists of responses"),
    "no id": ("rewardbench2", READ["rewardbench2"][0] | {"subset": "Ties"}, "the id is '9'"),
    "two styles": ("rmbench", READ["rmbench"][0] | {"chosen": ["a", "b"]}, "lists of three"),
    "no domain": ("rmbench", READ["rmbench"][0] | {"domain": "art"}, "the domain is 'art'"),
    "no label": ("judgebench", READ["judgebench"][0] | {"label": "tie"}, "the label is 'tie'"),
    "no winner": ("ppe", READ["ppe"][0] | {"winner": "me"}, "the winner is 'me'"),
    "ties alone": ("ppe", READ["ppe"][0] | {"winner": "tie"}, "no record of ppe that compares"),
    "few responses": ("ppe", CORRECT | {"scores": [0, 1, 1, 1]}, "response 4 of 4 must be text"),
    "equal pair": ("ppe", CORRECT | {"sampled_conflict_pairs": [[1, 2]]}, "a pair of equal scores"),
    "from the end": ("ppe", CORRECT | {"sampled_conflict_pairs": [[0, -1]]}, "negative number"),
    "not from 0 to 1": ("ppe", CORRECT | {"scores": [0, 2, 1]}, "they must be from 0 to 1"),
    "no subset": ("rewardbench", READ["rewardbench"][0] | {"subset": None}, "subset must be text"),
    "a list": ("rewardbench", READ["rewardbench"][0] | {"subset": ["a"]}, "subset must be text"),
    "no such pair": ("ppe", CORRECT | {"sampled_conflict_pairs": [[0, 9]]}, "no record of ppe: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_other_records_are_refused_with_their_line(name, tmp_path):
    benchmark, record, message = BAD[name]
    path = write_jsonl(tmp_path / "data.jsonl", [record])
    with pytest.raises(RunError, match=message) as raised:
        read_cases(benchmark, [str(path)])
    assert f"{path}:1: " in str(raised.value) or name == "ties alone"
    assert json.dumps(record)  # each is a record of a file
