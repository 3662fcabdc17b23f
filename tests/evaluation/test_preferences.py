"""python -m pytest tests/evaluation/test_preferences.py

Evaluation by reward models of several preferences: an output for each, or one that a prompt names.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import RULE, evaluated, script, write_jsonl
from processes import run_ranks
from transformers import AutoModelForSequenceClassification

from nanoalign.batch import collate
from nanoalign.data.formats import conditioned, formats
from nanoalign.data.sources import open_source
from nanoalign.encode import encode_all
from nanoalign.model import RewardModel
from nanoalign.records import read
from nanoalign.rewards.several import SeveralRewards
from nanoalign.weights.write import write_model

BOTH = ["better", "safer"]
ANSWERS = [("yes", "certainly not"), ("a long answer", "no")]  # to even and odd questions


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """8 pairs whose two labels agree in every other one."""
    lines = []
    for i in range(8):
        first, second = ANSWERS[i % 2]
        record = {"prompt": f"question {i}?", "response_0": first, "response_1": second}
        lines.append(record | {"better_response_id": i % 2, "safer_response_id": i // 2 % 2})
    return write_jsonl(tmp_path_factory.mktemp("data") / "set.jsonl", lines)


@pytest.fixture(scope="module")
def records(data):
    return list(read([str(data)], formats("better"), open_source))


@pytest.fixture(scope="module")
def models(tmp_path_factory, llama_folder, tokenizer) -> Path:
    """Random reward models: `two` outputs, `marked` prompts, and `one` output by "safer"."""
    folder = tmp_path_factory.mktemp("models")
    two = SeveralRewards.load(llama_folder, head_seed=0, outputs=2)
    two.model.config.nanoalign = RULE | {"preferences": BOTH, "condition": False}
    two.model.config.id2label = dict(enumerate(BOTH))
    write_model(two, tokenizer, folder / "two")
    for name, preferences, condition in (("marked", BOTH, True), ("one", ["safer"], False)):
        model = RewardModel.load(llama_folder, head_seed=0)
        model.model.config.nanoalign = RULE | {"preferences": preferences, "condition": condition}
        write_model(model, tokenizer, folder / name)
    return folder


@pytest.fixture
def evaluate_rm(data, models, tmp_path):
    """evaluate.py rm on the data -> (score by subset, prompt and response; metrics.json)."""

    def run(model: str, *flags: object) -> tuple[dict[tuple, float], dict]:
        out = tmp_path / "_".join([model, *map(str, flags)])
        argv = ["rm", "--model", models / model, "--data", f"set={data}", *flags, "--out", out]
        lines, figures, _ = evaluated(argv)
        return {(x["subset"], x["prompt"], x["response"]): x["score"] for x in lines}, figures

    return run


def test_each_output_is_compared_with_its_own_labels(evaluate_rm, models, records, tokenizer):
    """The scores are the logits of transformers, output by output."""
    scores, figures = evaluate_rm("two")
    assert list(figures["subsets"]) == ["set/better", "set/safer"]
    model = AutoModelForSequenceClassification.from_pretrained(models / "two")
    for record, row in zip(records, encode_all(records, tokenizer), strict=True):
        for response, tokens in zip(record.responses, row.responses, strict=True):
            ids = torch.tensor(np.concatenate([row.prompt, tokens])[None].astype(np.int64))
            with torch.no_grad():
                logits = model(ids).logits[0].tolist()
            for name, logit in zip(BOTH, logits, strict=True):
                found = scores[f"set/{name}", record.prompt, response]
                assert found == pytest.approx(logit, abs=1e-5)
    # By hand: the labels of `safer` are 0, 0, 1, 1, ...; those of `better` 0, 1, 0, 1, ...
    for name, label_of in (("better", lambda i: i % 2), ("safer", lambda i: i // 2 % 2)):
        won = []
        for i in range(8):
            own = [scores[f"set/{name}", f"question {i}?", text] for text in ANSWERS[i % 2]]
            won.append(own[label_of(i)] > own[1 - label_of(i)])
        assert figures["subsets"][f"set/{name}"]["accuracy"] == np.mean(won)


def test_combined_rewards_are_the_weighted_sum(evaluate_rm):
    apart, _ = evaluate_rm("two")
    weights = ["--combine", "better=1", "safer=-2.5", "--preference", "better"]
    scores, figures = evaluate_rm("two", *weights)
    assert figures["subsets"].keys() == {"set"} and len(scores) == 16
    for (_, prompt, response), score in scores.items():
        better, safer = (apart[f"set/{name}", prompt, response] for name in BOTH)
        assert score == pytest.approx(better - 2.5 * safer, abs=1e-5)


def test_a_single_preference_of_several_is_evaluated(evaluate_rm):
    _, figures = evaluate_rm("two", "--preference", "safer")
    assert figures["subsets"].keys() == {"set/safer"}


def test_the_weight_of_a_single_output_counts(evaluate_rm):
    """-2 times the rewards, against the labels of the one preference."""
    plain, figures = evaluate_rm("one")
    scaled, others = evaluate_rm("one", "--combine", "safer=-2")
    assert scaled == pytest.approx({key: -2 * score for key, score in plain.items()}, abs=1e-6)
    assert others["all"]["accuracy"] == pytest.approx(1 - figures["all"]["accuracy"])


def test_a_conditioned_model_scores_prompts_that_name_the_preference(
    evaluate_rm, models, records, tokenizer
):
    scores, figures = evaluate_rm("marked")
    assert list(figures["subsets"]) == ["set/better", "set/safer"]
    model = RewardModel.load(models / "marked", trainable=False)
    for name in BOTH:
        marked = [conditioned(record, name) for record in records]
        for record, row in zip(records, encode_all(marked, tokenizer), strict=True):
            with torch.no_grad():
                expected = model(collate([row])).tolist()
            found = [scores[f"set/{name}", record.prompt, text] for text in record.responses]
            assert found == pytest.approx(expected, abs=1e-5)
    weights = ["--combine", "better=1", "safer=2", "--preference", "better"]
    both, _ = evaluate_rm("marked", *weights)
    for (_, prompt, response), score in both.items():
        better, safer = (scores[f"set/{name}", prompt, response] for name in BOTH)
        assert score == pytest.approx(better + 2 * safer, abs=1e-5)


def test_a_judge_of_two_outputs_combines_them(evaluate_rm, models, records, tmp_path):
    """Answers to the prompts, judged by the weighted sum that `rm` gives the same responses."""
    weights = ["--combine", "better=1", "safer=0.5"]
    scores, _ = evaluate_rm("two", *weights, "--preference", "better")
    argv = ["policy", "--reward", models / "two", *weights]
    for k, role in enumerate(("policy", "baseline")):
        given = [{"prompt": r.prompt, "answer": r.responses[k]} for r in records]
        argv += [f"--{role}_answers", write_jsonl(tmp_path / f"{role}.jsonl", given)]
    lines, _, _ = evaluated([*argv, "--template", "raw", "--out", tmp_path / "judged"])
    assert len(lines) == 2 * len(records)
    for line in lines:
        expected = scores["set", line["prompt"], line["answer"]]
        assert line["score"] == pytest.approx(expected, abs=1e-5)


def test_wrong_preferences_are_refused(data, models, llama_folder, tmp_path, subtests):
    rm = ["rm", "--model", models / "two", "--data", f"set={data}", "--out", tmp_path / "x"]
    policy = ["policy", "--policy", llama_folder, "--data", data, "--reward", models / "two"]
    policy += ["--template", "raw", "--out", tmp_path / "x"]
    cases = {
        "no such name": ([*rm, "--combine", "nice=1"], "no preference 'nice'; it has better, "),
        "a name twice": ([*rm, "--combine", "better=1", "better=2"], "has a preference twice"),
        "no labels": ([*rm, "--combine", "better=1", "safer=2"], "of several preferences needs --"),
        "not finite": ([*rm, "--combine", "better=nan"], "expected NAME=NUMBER, got 'better=nan'"),
        "no weights": (policy, "has the preferences better, safer; give the weight of each"),
        "no such weight": ([*policy, "--combine", "nice=1"], "no preference 'nice'; it has better"),
    }
    for name, (argv, message) in cases.items():
        with subtests.test(name):
            outcome = run_ranks(1, script, list(map(str, argv)))
            assert outcome.codes == [1]
            assert re.search(f"error: .*{re.escape(message)}", outcome.stderr), outcome.stderr
    assert not (tmp_path / "x").exists()
