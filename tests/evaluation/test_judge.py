"""python -m pytest tests/evaluation/test_judge.py

The answers of a comparison as the reward model reads them: whole, or cut by its max_length.
"""

from pathlib import Path

import pytest
from evaluations import (
    RULE,
    evaluated,
    write_jsonl,
    write_policies,
    write_reward_model,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    """A reward model that reads 20 tokens, and answers to 4 prompts of 4 letters.

    With their EOS the policy's answers have 4, 4, 4 and 31 tokens, the baseline's 31, 31, 4 and 16:
    16 beside the prompt are read whole.
    """
    folder = write_policies(tmp_path_factory.mktemp("policies"), llama_folder, tokenizer)
    write_reward_model(folder / "short", llama_folder, tokenizer, RULE | {"max_length": 20})
    for name, lengths in (("short answers", (3, 3, 3, 30)), ("long answers", (30, 30, 3, 15))):
        lines = [
            {"prompt": f"ask{n}", "answer": f"{name}{n} " * 9 and f"{n}{name}x" * 9}
            for n in range(4)
        ]
        lines = [
            line | {"answer": line["answer"][:length]}
            for line, length in zip(lines, lengths, strict=True)
        ]
        write_jsonl(folder / f"{name}.jsonl", lines)
    return folder


@pytest.fixture(scope="module")
def results(world) -> tuple[list[dict], dict, str]:
    argv = ["policy", "--policy_answers", world / "short answers.jsonl", "--baseline_answers",
            world / "long answers.jsonl", "--reward", world / "short", "--out",
            world / "cut"]  # fmt: skip
    return evaluated(argv)


def test_answers_that_max_length_cut_are_marked_and_have_their_true_length(results):
    """Two of the baseline's answers and one of the policy's; one of exactly 16 tokens is whole."""
    lines, figures, _ = results
    found = [(line.get("side"), line.get("cut"), line.get("tokens")) for line in lines]
    assert found == [
        ("policy", False, 4), ("baseline", True, 31), ("policy", False, 4), ("baseline", True, 31),
        ("policy", False, 4), ("baseline", False, 4), ("policy", True, 31), ("baseline", False, 16),
    ]  # fmt: skip
    assert figures["policy_tokens_mean"] == (4 + 4 + 4 + 31) / 4
    assert figures["baseline_tokens_mean"] == (31 + 31 + 4 + 16) / 4
    assert (figures["policy_cut_share"], figures["baseline_cut_share"]) == (0.25, 0.5)
