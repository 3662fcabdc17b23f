"""python -m pytest tests/evaluation/test_given_answers.py

evaluate.py policy with answers from files, and which template its reward model has.
"""

import json
import re
from pathlib import Path

import pytest
from evaluations import (
    answers_of,
    by_prompt,
    check_figures,
    evaluated,
    files_argv,
    policy_argv,
    write_jsonl,
    write_policies,
    write_reward_model,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    return write_policies(tmp_path_factory.mktemp("policies"), llama_folder, tokenizer)


def test_uneven_answers_of_two_files_need_no_flag(world):
    """p has 2 and 3 answers, q 1 and 2; r and s are in one file only."""
    counts = {"a": {"p": 2, "r": 4, "q": 1}, "b": {"q": 2, "p": 3, "s": 1}}
    for name, own in counts.items():
        lines = [
            {"prompt": f"Prompt {prompt}?", "answer": f"{name}{prompt}{k}" * (1 + k)}
            for k in range(4)
            for prompt, count in own.items()
            if k < count
        ]
        write_jsonl(world / f"{name}.jsonl", lines)
    argv = files_argv(world, "uneven", world / "a.jsonl", world / "b.jsonl")
    lines, figures, printed = evaluated(argv)
    found = {side: list(map(len, by_prompt(lines, side))) for side in ("policy", "baseline")}
    assert found == {"policy": [2, 1], "baseline": [3, 2]}
    check_figures(lines, figures)
    assert figures["policy_ended_share"] is None and "kl_per_answer" not in figures
    # Tokens are those of the reward model's tokenizer, which has bytes: "ap0" and EOS.
    assert lines[0]["answer"] == "ap0" and lines[0]["tokens"] == 4
    assert re.search(r"left out    2 prompts that are not in all of .*a\.jsonl.*b\.jsonl", printed)


def test_a_file_of_uneven_answers_is_compared_with_all_samples(world):
    """1, 2 and 3 answers of the file, against 2 samples each; the other 5 prompts are left out."""
    prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").open()]
    given = [{"prompt": prompts[n], "output": f"{n}{k}"} for k in range(3) for n in range(k, 3)]
    write_jsonl(world / "uneven.jsonl", given)
    flags = ["--policy_answers", world / "uneven.jsonl", "--samples", 2]
    lines, figures, printed = evaluated(policy_argv(world, "one file", *flags))
    assert by_prompt(lines, "policy", "answer") == [["00"], ["10", "11"], ["20", "21", "22"]]
    assert [len(own) for own in by_prompt(lines, "baseline")] == [2, 2, 2]
    check_figures(lines, figures)
    assert "6 answers to 3 prompts" in printed and "left out    5 prompts" in printed
    assert figures["prompts_left_out"] == 5


def test_the_policys_answers_of_a_file_make_pairs(world):
    """Of a prompt with two answers; the others have one."""
    flags = ["--policy_answers", world / "answers.jsonl", "--pairs_out", world / "of a file.jsonl"]
    lines, _, printed = evaluated(policy_argv(world, "pairs of a file", *flags))
    (pair,) = map(json.loads, (world / "of a file.jsonl").open())
    scores = dict(zip(("a0", "a8"), by_prompt(lines, "policy")[0], strict=True))
    assert scores[pair["chosen"]] > scores[pair["rejected"]] and "1 of 8 prompts" in printed


def test_a_reward_model_of_another_template_needs_reward_template(world):
    """Prompts are rendered by pku for the policies, and by raw for the reward model."""
    flags = ["--template", "pku", "--reward_template", "raw"]
    lines, _, printed = evaluated(policy_argv(world, "templates", *flags))
    assert len(lines) == 16
    assert "8 prompts, template pku" in printed and "template raw, max_length 256" in printed


def test_a_reward_model_without_a_rule_has_the_template_of_the_policies(
    world, tokenizer, llama_folder
):
    write_reward_model(world / "no rule", llama_folder, tokenizer, rule=None)
    given, scores = ["--policy_answers", world / "answers.jsonl"], {}
    for template in ("raw", "pku"):
        flags = [*given, "--template", template, "--reward", world / "no rule"]
        lines, _, _ = evaluated(policy_argv(world, f"no rule {template}", *flags))
        scores[template] = answers_of(lines, "policy", "score")
    lines, _, _ = evaluated(policy_argv(world, "with a rule", *given))
    assert scores["raw"] == pytest.approx(answers_of(lines, "policy", "score"), abs=1e-5)
    assert scores["raw"] != pytest.approx(scores["pku"], abs=1e-3)
