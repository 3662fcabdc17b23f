"""python -m pytest tests/lab/test_make_tiny.py

The commands around the embedded world: make_tiny trains its model, plant writes labels that are
wrong in a known way.
"""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoalign.errors import RunError
from nanoalign.lab import make_tiny, plant
from nanoalign.model import TINY
from nanoalign.tiny import world


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def test_model_predicts_held_out_answers(model, tokenizer):
    """Measured: 0.416 nats a token on test prompts; a uniform guess has ln 1536 = 7.3."""
    policy = make_tiny.load_policy(model)
    rows = make_tiny.make_rows("test", 1, 0, tokenizer)[:100]
    assert make_tiny.mean_loss(policy, rows) < 0.43
    # The same as by transformers: the cross-entropy of the labels of one answer at a time.
    total = tokens = 0
    for row in rows[:3]:
        for response in row.responses:
            ids = torch.tensor([[*row.prompt.tolist(), *response.tolist()]])
            labels = ids.clone()
            labels[0, : len(row.prompt)] = -100
            with torch.no_grad():
                total += model(ids, labels=labels).loss.item() * len(response)
            tokens += len(response)
    assert make_tiny.mean_loss(policy, rows[:3]) == pytest.approx(total / tokens, rel=1e-5)


def test_make_model_writes_a_model_and_its_tokenizer(tmp_path, monkeypatch, capsys):
    """Two steps on twenty prompts, in bfloat16; the loss of random weights is near ln 300."""
    corpus = world.sft_corpus("train", 1)[:20]
    monkeypatch.setattr(world, "sft_corpus", lambda *args: corpus)
    make_tiny.make_model(tmp_path, steps=2, vocabulary=300)
    loss = float(re.search(r"([\d.]+) nats a token, held out", capsys.readouterr().out)[1])
    assert abs(loss - math.log(300)) < 1
    written = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert written.dtype == torch.bfloat16 and written.config.vocab_size == 300
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 300


# --- labels that are wrong in a known way


def test_new_labels_have_the_known_errors():
    """Labels follow the rule; all flipped, its opposite; by a large bias, the length."""
    honest = world.records("test", "tiny-a")
    agreement = {
        name: world.oracle_accuracy(plant.relabelled(honest, bias, flip))
        for name, bias, flip in (("honest", 0, 0), ("flipped", 0, 1), ("a fifth", 0, 0.2))
    }
    assert agreement["honest"] == pytest.approx(world.label_ceiling(honest), abs=0.04)
    assert agreement["flipped"] == pytest.approx(1 - agreement["honest"])
    mixed = 0.8 * agreement["honest"] + 0.2 * agreement["flipped"]
    assert agreement["a fifth"] == pytest.approx(mixed, abs=0.04)
    for record in plant.relabelled(honest, 1e6, 0):
        words = [len(record[f"response_{i}"].split()) for i in (0, 1)]
        assert words[0] == words[1] or record["better_response_id"] == int(words[1] > words[0])


def test_a_planted_bias_of_another_world_is_added_to_its_own_rule(tmp_path, monkeypatch):
    some = world.records("test", "tiny-a", 3)
    monkeypatch.setattr(
        plant.world, "records", lambda *asked: {("train", "tiny-a", 3): some}[asked]
    )
    plant.main(["--world", "3", "--length_bias", "100", "--out", str(tmp_path / "p.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert all(record["prompt"].endswith(" (3)") for record in records)
    for record in records:
        words = [len(record[f"response_{i}"].split()) for i in (0, 1)]
        assert words[0] == words[1] or record["better_response_id"] == int(words[1] > words[0])


def test_the_file_has_the_pairs_of_one_source_and_the_flags_are_checked(tmp_path, monkeypatch):
    honest = world.records("test", "tiny-c")
    monkeypatch.setattr(
        plant.world, "records", lambda *asked: {("train", "tiny-c", None): honest}[asked]
    )
    plant.main(["--flip", "1", "--source", "tiny-c", "--out", str(tmp_path / "new" / "p.jsonl")])
    lines = (tmp_path / "new" / "p.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record, own in zip(records, honest, strict=True):
        assert record | {"better_response_id": 0} == own | {"better_response_id": 0}
    assert world.oracle_accuracy(records) < 0.2
    with pytest.raises(RunError, match="--flip 1.5 is a probability"):
        plant.main(["--flip", "1.5", "--out", str(tmp_path / "other.jsonl")])
