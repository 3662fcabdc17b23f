"""python -m pytest tests/lab/test_pipeline.py docs/lab.md has what the whole of it gains."""

import json

import numpy as np
import pytest
from fakes import parsed

from nanoalign.errors import RunError
from nanoalign.lab import execute, pipeline
from nanoalign.model import TINY


@pytest.mark.parametrize("steps", [None, 8])
def test_the_commands_are_those_of_the_scripts_and_each_stage_begins_with_the_last(tmp_path, steps):
    before = None
    for _, commands, folder in pipeline.stages(tmp_path, steps):
        stage = list(map(parsed, commands))
        training = [args for args in stage if hasattr(args, "loss")]
        for args in training:
            assert args.out == str(folder) and args.steps == steps and args.lr == 5e-4
            assert args.model == ("tiny" if before == TINY else str(before))
        before = folder
    (_, sampling, own) = stage
    assert sampling.pairs_out == own.data[0] and sampling.samples == 4
    assert sampling.data == (["tiny"] if steps is None else ["tiny*0.1"])  # not what is graded


def test_what_each_stage_gains_is_printed_and_written(tmp_path, monkeypatch, capsys):
    ran, grades = [], iter(np.full((4, 5), [[0.0], [1.0], [3.0], [2.5]]))
    monkeypatch.setattr(pipeline, "run", lambda words, log: ran.append(words[0]))
    monkeypatch.setattr(pipeline, "graded", lambda folder, count, seed: next(grades))
    pipeline.pipeline(tmp_path / "out", None, 5, 0)
    assert ran == ["train_dpo.py", "train_dpo.py", "train_rm.py", "evaluate.py", "train_dpo.py"]
    found = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert [each["true_reward"] for each in found] == [0.0, 1.0, 3.0, 2.5]
    printed = capsys.readouterr().out
    for gain in ("+1.000", "+2.000", "-0.500"):
        assert f"gained {gain}" in printed
    with pytest.raises(RunError, match="out exists; give another, or remove it"):
        pipeline.pipeline(tmp_path / "out", None, 5, 0)


def test_a_command_that_fails_ends_it(tmp_path):
    with pytest.raises(RunError, match="train_dpo.py has failed; the end of .* has its error"):
        pipeline.run(["train_dpo.py", "--beta", "-1"], tmp_path / "log.txt")
    assert "error: argument --beta" in (tmp_path / "log.txt").read_text()


def test_the_base_is_graded_by_the_true_rule():
    """Another world has other prompts, and grades by its own rule."""
    grades = pipeline.graded(TINY, 20, 0)
    assert grades.shape == (20,) and -4 < grades.mean() < 3 and grades.std() > 0.5
    assert pipeline.graded(TINY, 20, 0, other=7).mean() != grades.mean()
    with pytest.raises(RunError, match="model folder 'runs/none' does not exist"):
        execute.main(["grade", "runs/none"])
