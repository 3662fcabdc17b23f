"""python -m pytest tests/lab/test_plant.py"""

import json

import pytest

from nanoalign.errors import RunError
from nanoalign.lab import plant
from nanoalign.tiny import world


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


def test_the_file_has_the_pairs_of_one_source_and_the_flags_are_checked(tmp_path, monkeypatch):
    honest = world.records("test", "tiny-c")
    monkeypatch.setattr(plant.world, "records", lambda *asked: {("train", "tiny-c"): honest}[asked])
    plant.main(["--flip", "1", "--source", "tiny-c", "--out", str(tmp_path / "new" / "p.jsonl")])
    lines = (tmp_path / "new" / "p.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record, own in zip(records, honest, strict=True):
        assert record | {"better_response_id": 0} == own | {"better_response_id": 0}
    assert world.oracle_accuracy(records) < 0.2
    with pytest.raises(RunError, match="--flip 1.5 is a probability"):
        plant.main(["--flip", "1.5", "--out", str(tmp_path / "other.jsonl")])
