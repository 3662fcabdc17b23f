"""python -m pytest tests/rewards/test_prompt_kinds.py

The kinds of prompts that a reward model was trained on, and what its config has of them.
"""

import pytest
from conftest import records

import train_rm
from nanoalign.encode import encode_all
from nanoalign.evaluation.results import write_records
from nanoalign.model import RewardModel
from nanoalign.records import Record
from nanoalign.rewards.prompt_kinds import kinds_of
from nanoalign.rewards.rule import rule_of, set_rule

PROMPTS = {"text": "Why not? ", "dialogue": "\n\nHuman: Why not?\n\nAssistant:"}


@pytest.mark.parametrize("kinds", [["dialogue"], ["text"], ["dialogue", "text"]])
@pytest.mark.parametrize("max_length", [1024, 30])
def test_kinds_are_found_in_the_tokens_of_training_rows(tokenizer, kinds, max_length):
    """Also of prompts that were cut at their beginning."""
    texts = [3 * PROMPTS[kind] for kind in kinds]
    rows = encode_all([Record(text, ("a", "b")) for text in texts], tokenizer, max_length)
    assert kinds_of(rows, tokenizer, "raw") == kinds
    assert kinds_of(rows, tokenizer, "pku") == []


def test_a_config_has_the_kinds_of_all_its_trainings(llama_folder):
    model = RewardModel.load(llama_folder, head_seed=0)
    args = train_rm.parse_args([])
    set_rule(model, args, "raw", ["text"])
    assert rule_of(model)["prompts"] == ["text"]
    set_rule(model, args, "raw", ["dialogue"])
    assert rule_of(model)["prompts"] == ["dialogue", "text"]


def test_training_writes_the_kind_of_its_data(tmp_path, llama_folder):
    """Dialogues without a prompt of their own: the template raw, by auto."""
    head = PROMPTS["dialogue"]
    lines = [
        {"chosen": f"{head} {r.responses[0]}", "rejected": f"{head} {r.responses[1]}"}
        for r in records(6)
    ]
    data = tmp_path / "hh.jsonl"
    write_records(data, lines)
    argv = ["--model", llama_folder, "--data", data, "--out", tmp_path / "rm", "--steps", 1,
            "--batch_size", 4]  # fmt: skip
    train_rm.main(list(map(str, argv)))
    assert rule_of(RewardModel.load(tmp_path / "rm"))["prompts"] == ["dialogue"]
