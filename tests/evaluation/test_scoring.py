"""python -m pytest tests/evaluation/test_scoring.py

Scores of rows on any number of ranks and in both layouts; the views of a reward model.
"""

from pathlib import Path

import pytest
import torch
from conftest import records
from evaluations import write_reward_model
from ranks import run_ranks

from nanoalign.batch import Row, collate
from nanoalign.distributed import setup
from nanoalign.encode import Record, encode_all
from nanoalign.errors import RunError
from nanoalign.evaluation.scoring import score_rows
from nanoalign.loop import Batches
from nanoalign.model import RewardModel
from nanoalign.packing.batches import Packed


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[Row]:
    return encode_all(records(7), tokenizer, template="raw")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama_folder, tokenizer) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("rm") / "model", llama_folder, tokenizer)


def scores_of(folder: Path, rows: list[Row], layout: type[Batches]) -> list[list[float]]:
    world = setup()
    model = RewardModel.load(folder, world, trainable=False)
    batches = layout(world, 300)
    batches.prepare(model)
    return score_rows(model, rows, batches, "it")


@pytest.mark.parametrize(("ranks", "layout"), [(1, Batches), (2, Packed), (3, Packed)])
def test_ranks_and_layout_change_no_score(folder, rows, ranks, layout):
    """7 rows do not divide by 2 or 3; every rank has every score, and those of plain lines."""
    outcome = run_ranks(ranks, scores_of, folder, rows, layout)
    assert outcome.codes == [0] * ranks, outcome.stderr
    with torch.no_grad():
        expected = RewardModel.load(folder)(collate(rows)).tolist()
    for scores in outcome.results:
        assert [len(row) for row in scores] == [2] * 7
        assert sum(scores, []) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("layout", [Batches, Packed])
def test_equal_responses_have_one_score(folder, tokenizer, layout):
    """Also at different places of one row, where rounding differs."""
    long = [record.responses[0] * 3 for record in records(20)]
    twins = [Record("prompt", (text, text), name=str(i)) for i, text in enumerate(long)]
    scores = scores_of(folder, encode_all(twins, tokenizer, template="raw"), layout)
    assert all(first == second for first, second in scores) and len(set(map(tuple, scores))) == 20


def test_a_score_that_is_not_finite_is_refused_with_its_row(rows):
    def score(batch) -> torch.Tensor:
        return torch.where(batch.ends == batch.ends.max(), torch.nan, 1.0)

    with pytest.raises(RunError, match=r"test:6: --model m gives \[.*nan.*weights complete"):
        score_rows(score, rows[-1:], Batches(setup(), 1000), "--model m")
