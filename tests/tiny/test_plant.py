"""python -m pytest tests/tiny/test_plant.py

Labels that are wrong in a known way.
"""

import pytest

from nanoalign.tiny import plant, world


def test_planted_labels():
    """Without bias or flips the labels follow the rule; flipped ones its opposite; or length."""
    honest = world.records("test", "tiny-a")
    agreement = {
        name: world.oracle_accuracy(plant.planted(honest, bias, flip))
        for name, bias, flip in (("honest", 0, 0), ("turned", 0, 1), ("a fifth", 0, 0.2))
    }
    assert agreement["honest"] == pytest.approx(world.label_ceiling(honest), abs=0.04)
    assert agreement["turned"] == pytest.approx(1 - agreement["honest"])
    mixed = 0.8 * agreement["honest"] + 0.2 * agreement["turned"]
    assert agreement["a fifth"] == pytest.approx(mixed, abs=0.04)
    for record in plant.planted(honest, 1e6, 0):
        words = [len(record[f"response_{i}"].split()) for i in (0, 1)]
        assert words[0] == words[1] or record["better_response_id"] == int(words[1] > words[0])
