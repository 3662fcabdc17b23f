"""python -m pytest tests/evaluation/test_bench.py

evaluate.py bench: its scores are those of other programs, its files, its page, what it refuses.
"""

import html
import json
import re
from pathlib import Path

import pytest
import torch
from evaluations import RULE, evaluated, script, write_jsonl, write_reward_model
from processes import run_ranks
from transformers import AutoModelForSequenceClassification, pipeline

from nanoalign.data.sources import parse_source
from nanoalign.errors import RunError
from nanoalign.evaluation.bench import Result, figures_of, read_cases
from nanoalign.evaluation.bench_page import lines, page
from nanoalign.evaluation.benchmarks import BENCHMARKS, CORRECTNESS, Case
from nanoalign.evaluation.render import source_of

NASTY = "<script>alert('x')</script> & \"quotes\""
STYLES = ["4.", "It is 4, as 2 and 2 are.", "- It is **4**."]
WRONG = ["5.", "It is 5, as 2 and 2 are.", "- It is **5**."]


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    """A folder with a reward model, and a file of each benchmark in its published keys."""
    folder = tmp_path_factory.mktemp("world")
    write_reward_model(folder / "rm", llama_folder, tokenizer)
    names = ("alpacaeval-easy", "mt-bench-hard", "hep-go", "math-prm", "alpacaeval-easy")
    pair = {"chosen": "yes, it is", "rejected": "", "chosen_model": "m", "rejected_model": "n"}
    lines = [
        pair | {"prompt": f"Is {n} even?", "subset": name, "id": n} for n, name in enumerate(names)
    ]
    write_jsonl(folder / "rewardbench.jsonl", lines)
    lines = [
        {"id": "4", "prompt": "q", "chosen": ["a"], "rejected": ["bb", "a", "c"], "subset": "Math"}
    ]
    ties = {"rejected": ["a dog", "x" * 300], "subset": "Ties"}
    for n in (1, 2):
        both = {"ref": ["red"], "tied": ["red", "blue"]}
        lines += [
            ties | {"id": f"{kind}:{n}", "prompt": f"{kind} {n}", "chosen": own}
            for kind, own in both.items()
        ]
    write_jsonl(folder / "rewardbench2.jsonl", lines)
    record = {"prompt": "What is 2 plus 2?", "chosen": STYLES, "rejected": WRONG}
    lines = [record | {"id": n, "domain": name} for n, name in enumerate(("chat", "safety-refuse"))]
    write_jsonl(folder / "rmbench.jsonl", lines)
    record = {"question": "q", "response_A": "one", "response_B": "two", "source": "mmlu-pro-law"}
    lines = [record | {"pair_id": str(n), "label": label} for n, label in enumerate(("A>B", "B>A"))]
    write_jsonl(folder / "judgebench.jsonl", lines)
    votes = ("model_a", "tie", "model_b")
    record = {"prompt": "Hi", "response_1": "Hello!", "response_2": "What?"}
    write_jsonl(folder / "ppe.jsonl", [record | {"winner": vote} for vote in votes])
    record = {f"response_{n}": f"It is {n}." for n in range(1, 5)}
    record |= {"scores": [True, False, False, True], "sampled_conflict_pairs": [[0, 1], [2, 3]]}
    write_jsonl(folder / "GPQA.jsonl", [record | {"prompt": f"q{n}"} for n in range(3)])
    return folder


def argv(folder: Path, name: str, *flags: object) -> list[object]:
    data = [folder / f"{name}.jsonl", *([folder / "GPQA.jsonl"] if name == "ppe" else [])]
    base = ["bench", name, "--model", folder / "rm", "--data", *data]
    return [*base, "--micro_batch_tokens", 200, "--out", folder / f"{name}_eval", *flags]


@pytest.fixture(scope="module", params=BENCHMARKS)
def run(request, world) -> tuple[str, list[dict], dict, str]:
    return request.param, *evaluated(argv(world, request.param), ranks=2)


def test_every_response_has_the_reward_that_transformers_computes(run, world, tokenizer):
    """As in RULE: the text of prompt and response, cut to 256 tokens, else with one EOS."""
    model = AutoModelForSequenceClassification.from_pretrained(world / "rm").eval()
    _, scores, _, _ = run
    for line in scores:
        ids = tokenizer(line["prompt"] + line["response"])["input_ids"] + [tokenizer.eos_token_id]
        assert line["cut"] == (len(ids) > RULE["max_length"])
        with torch.no_grad():
            expected = model(torch.tensor([ids[: RULE["max_length"]]])).logits.item()
        assert line["score"] == pytest.approx(expected, abs=1e-4)


def test_figures_are_those_of_the_scores(run):
    """A subset with one kind of pair: its score is counted again from scores.jsonl."""
    name, scores, metrics, printed = run
    figures = metrics[name]
    for subset in {line["subset"] for line in scores}:
        own = [line for line in scores if line["subset"] == subset]
        assert subset.startswith(f"{name}/")
        line = figures[subset.removeprefix(f"{name}/")]
        assert line["prompts"] == len({x["pair_id"] for x in own})
        assert line["cut_share"] == sum(x["cut"] for x in own) / len(own)
        assert line["score_low"] <= max(line["score"], 0) and line["score"] <= 1.01
        assert {"longest", "shortest", "lists"} <= line.keys()
    if name in ("rewardbench", "judgebench"):
        right = [a["score"] > b["score"] for a, b in zip(scores[::2], scores[1::2], strict=True)]
        shares = {line["pair_id"]: x for line, x in zip(scores[::2], right, strict=True)}
        for subset in {line["subset"] for line in scores}:
            ids = {line["pair_id"] for line in scores if line["subset"] == subset}
            expected = sum(shares[i] for i in ids) / len(ids)
            assert figures[subset.removeprefix(f"{name}/")]["score"] == expected
    assert f"\n{name} " in printed and all(f"\n{line} " in printed for line in figures)


def test_bench_rm_and_the_pipeline_give_one_number(world, tokenizer):
    """The pipeline of transformers gets the text with the EOS that the rule appends."""
    data = write_jsonl(
        world / "both.jsonl",
        [
            {"prompt": f"Is {n} odd?", "chosen": "yes", "rejected": "no, no", "subset": "hep-go"}
            for n in range(4)
        ],
    )
    flags = ["--model", world / "rm", "--data", data, "--out"]
    by_bench, figures, _ = evaluated(["bench", "rewardbench", *flags, world / "b"])
    by_rm, metrics, _ = evaluated(["rm", *flags, world / "r"])
    texts = [line["prompt"] + line["response"] + tokenizer.eos_token for line in by_bench]
    pipe = pipeline("text-classification", str(world / "rm"), function_to_apply="none")
    by_pipeline = [each["score"] for each in pipe(texts, batch_size=3, padding=True)]
    assert [line["score"] for line in by_bench] == pytest.approx(by_pipeline, abs=1e-5)
    for ours, theirs in zip(by_bench, by_rm, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)
        same = ("pair_id", "prompt", "response", "side", "tokens", "cut")
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert (
        figures["rewardbench"]["hep-go"]["score"] == metrics["subsets"]["both/hep-go"]["accuracy"]
    )


def test_sides_of_ppe_are_those_of_correctness(world):
    """Also of the responses that no compared pair has."""
    case = Case("p", tuple("abc"), ((0, 1),), subset="GPQA", name="g:1", truth=(1.0, 0.0, 0.0))
    result = Result([case], [[1.0, 2.0, 3.0]], [[(2, 1.0)] * 3], {})
    assert [line["side"] for line in lines("ppe", result)] == ["chosen", "rejected", "rejected"]


# --- the page


@pytest.fixture
def result() -> Result:
    """Wrong by 2, tied, right, and wrong by 3 in a pair whose worse response was cut."""
    cases = [
        Case(NASTY, (NASTY, "b"), subset="Math", name="m:1"),
        Case("q2", ("a", "b"), subset="Math", name="m:2"),
        Case("q3", ("a", "b"), subset="Math", name="m:3"),
        Case("q4", ("a", "b"), subset="Coding", name=NASTY),
    ]
    scores = [[0.0, 2.0], [1.0, 1.0], [1.0, 0.0], [0.0, 3.0]]
    lengths = [[(5, 1.0), (9, 1.0)]] * 3 + [[(5, 1.0), (2000, 0.5)]]
    figures = figures_of(BENCHMARKS["judgebench"], cases, scores, lengths)
    return Result(cases, scores, lengths, figures)


def test_the_page_shows_what_is_wrong_subset_by_subset_most_sure_first(result):
    text = page("model", {"judgebench": result}, 5)
    heads = re.findall(r"<header>(.*?)</header>", text)
    assert heads[:2] == ["m:1: wrong by 2.000", "m:2: tied"] and len(heads) == 3
    summaries = re.findall(r"<summary>(.*?)</summary>", text)
    assert summaries == [
        "Math: 2 of 3 prompts with a wrong pair",
        "Coding: 1 of 1 prompts with a wrong pair",
    ]
    assert text.count("cut: the model read only 50% of it") == 1
    assert "of the 4 subsets (Knowledge, Reasoning)" in text
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert cells[:5] == ["Math", "3", "0.333", "0.061", "0.792"]
    few = page("model", {"judgebench": result}, 1)
    assert (
        "Math: 2 of 3 prompts with a wrong pair, the 1 surest" in few and few.count("<article") == 2
    )


def test_text_of_models_and_data_is_escaped_in_the_page(result):
    """Title and heading; a prompt, a response and a name."""
    text = page(NASTY, {"judgebench": result}, 5)
    assert "<script" not in text and text.count("&lt;script&gt;alert(&#39;x&#39;)") == 5
    assert not re.search(r"(src|href)=|@import|url\(|https?://", text)
    policy = html.unescape(re.search(r'Policy" content="([^"]*)"', text)[1])
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert policy.startswith("default-src 'none'; ") and str(source_of(style)) in policy


# --- what is refused

BAD = {
    "two benchmarks": (["rmbench", "ppe", "--data", "x.jsonl"], "--data is of one benchmark, but"),
    "no such benchmark": (["mmlu"], "invalid choice: 'mmlu'"),
    "another's file": (["rmbench", "--data", "judgebench.jsonl"], r"bench\.jsonl:1: keys "),
    "no such file": (["rmbench", "--data", "none.jsonl"], "'none.jsonl' does not exist"),
    "several rewards": (["ppe", "--data", "ppe.jsonl", "--model", "two"], "has the preferences"),
}  # fmt: skip


def test_bad_input_is_one_clear_error(world, llama_folder, tokenizer, subtests, monkeypatch):
    monkeypatch.chdir(world)
    folder = write_reward_model(world / "two", llama_folder, tokenizer, None)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, ignore_mismatched_sizes=True
    )
    model.config.nanoalign = RULE | {"preferences": ["better", "safer"]}
    model.save_pretrained(folder)
    for name, (flags, message) in BAD.items():
        with subtests.test(name):
            command = ["bench", *flags, *([] if "--model" in flags else ["--model", "rm"])]
            outcome = run_ranks(1, script, command)
            assert outcome.codes == [1], outcome.stderr
            errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and re.search(message, errors[0]), outcome.stderr


CORRECT = {"prompt": "p", "response_1": "a", "response_2": "b", "response_3": "c"}
CORRECT |= {"scores": [False, True, True], "sampled_conflict_pairs": [[0, 1], [2, 0]]}
VOTE = {"prompt": "p", "response_1": "a", "response_2": "b", "winner": "model_b"}
TIED = {"prompt": "p", "chosen": ["c"], "rejected": ["r"], "subset": "Ties", "id": "tied:1"}
TOGETHER = {
    "other number": ("ppe", "GPQA", CORRECT, CORRECT | {"response_4": "d", "scores": [0, 1, 1, 1]},
                     "GPQA:2: 4 responses, but other records of GPQA have 3"),
    "one id": ("rewardbench2", "a", TIED, TIED, "a:2: the id tied:1 is that of a:1, too"),
    "a mean": ("ppe", "Correctness", CORRECT, CORRECT, "subset 'Correctness' has the name of a"),
    "votes": ("ppe", "Human preference", VOTE, CORRECT, ":2: .* names the votes of"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_records_that_do_not_go_together_are_refused_before_they_are_scored(name, tmp_path):
    benchmark, source, *both, message = TOGETHER[name]
    path = write_jsonl(tmp_path / "data.jsonl", both)
    with pytest.raises(RunError, match=message):
        read_cases(benchmark, [f"{source}={path}"])


def test_published_sources_are_of_the_grammar_and_have_the_names_of_the_sets():
    names = {name: [parse_source(x).name for x in own.sources] for name, own in BENCHMARKS.items()}
    assert names["ppe"][1:] == list(CORRECTNESS) and len(names) == 5


def test_metrics_have_the_lines_of_the_table_in_order(world):
    text = (world / "rewardbench_eval" / "metrics.json").read_text()
    figures = json.loads(text)["rewardbench"]
    order = ["alpacaeval-easy", "mt-bench-hard", "math-prm", "hep-go"]
    assert list(figures) == [*order, "Chat", "Chat Hard", "Reasoning", "Score"]
