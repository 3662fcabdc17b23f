"""python -m pytest tests/evaluation/test_given_answers.py

evaluate.py policy with answers from files, and which template its reward model has.
"""

import json
from pathlib import Path

import pytest
from evaluations import evaluated, policy_argv, write_policies, write_reward_model


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    return write_policies(tmp_path_factory.mktemp("policies"), llama_folder, tokenizer)


def test_answers_are_matched_in_their_order(world):
    """Prompt 9 is prompt 1 again, and gets the second answer to it."""
    both = ["--policy_answers", world / "answers.jsonl", "--baseline_answers"]
    lines, figures, _ = evaluated(policy_argv(world, "files", *both, world / "answers.jsonl"))
    assert [line["policy_answer"] for line in lines] == [f"a{i}" for i in range(9)]
    assert figures["policy_ended_share"] is None and "kl_per_answer" not in figures
    assert figures["length_controlled_win_rate"] == pytest.approx(0.5)
    # Tokens are those of the reward model's tokenizer, which has bytes: "a0" and EOS.
    assert {line["policy_tokens"] for line in lines} == {3}


def test_several_answers_to_a_prompt_are_the_samples(world):
    given = [json.loads(line) for line in (world / "answers.jsonl").read_text().splitlines()]
    twice = [line | {"response": line["response"] + x} for x in "xy" for line in given[:3]]
    (world / "twice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in twice))
    flags = ["--policy_answers", world / "twice.jsonl", "--samples", 2, "--allow_missing"]
    lines, _, printed = evaluated(policy_argv(world, "twice", *flags))
    assert [line["policy_answer"] for line in lines] == ["a0x", "a0y", "a1x", "a1y", "a2x", "a2y"]
    assert "left out" in printed and "6 of 9 prompts have fewer than 2 answers" in printed


def test_without_data_the_prompts_are_those_of_the_answers(world):
    given = world / "answers.jsonl"
    argv = ["policy", "--policy_answers", given, "--baseline_answers", given, "--reward",
            world / "rm", "--out", world / "no data", "--allow_missing"]  # fmt: skip
    lines, _, _ = evaluated(argv)
    assert [line["policy_answer"] for line in lines] == [f"a{i}" for i in range(8)]


def test_prompts_without_answers_are_left_out_with_allow_missing(world):
    """few.jsonl has answers to prompts 3 to 8 of 9; further.jsonl also to two other prompts."""
    flags = ["--policy_answers", world / "few.jsonl", "--baseline_answers",
             world / "further.jsonl", "--allow_missing"]  # fmt: skip
    lines, _, _ = evaluated(policy_argv(world, "missing", *flags))
    assert [line["policy_answer"] for line in lines] == [f"f{i}" for i in range(6)]
    assert [line["id"] for line in lines] == [f"prompts:{i}#0" for i in range(3, 9)]
    assert all(line["baseline_answer"] == "a" for line in lines)


def test_a_reward_model_of_another_template_needs_reward_template(world):
    """Prompts are rendered by pku for the policies, and by raw for the reward model."""
    flags = ["--template", "pku", "--reward_template", "raw"]
    lines, _, printed = evaluated(policy_argv(world, "templates", *flags))
    assert len(lines) == 9
    assert "9 prompts, template pku" in printed and "template raw, max_length 256" in printed


def test_a_reward_model_without_a_rule_has_the_template_of_the_policies(
    world, tokenizer, llama_folder
):
    write_reward_model(world / "no rule", llama_folder, tokenizer, rule=None)
    given, scores = ["--policy_answers", world / "answers.jsonl"], {}
    for template in ("raw", "pku"):
        flags = [*given, "--template", template, "--reward", world / "no rule"]
        lines, _, _ = evaluated(policy_argv(world, f"no rule {template}", *flags))
        scores[template] = [line["policy_score"] for line in lines]
    lines, _, _ = evaluated(policy_argv(world, "with a rule", *given))
    assert scores["raw"] == pytest.approx([line["policy_score"] for line in lines], abs=1e-5)
    assert scores["raw"] != pytest.approx(scores["pku"], abs=1e-3)
