"""python -m pytest tests/runs/test_best.py"""

import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import write_pairs
from trainings import metrics_of, train
from transformers import AutoModelForCausalLM

import train_dpo
from nanoalign.errors import RunError
from nanoalign.loop import Objective
from nanoalign.ranks.watch import Watch
from nanoalign.runs.best import Best, up_to_best
from nanoalign.runs.guards import Guard, Signals

LOSSES = [5.0, 3.0, 4.0, 2.0, 2.0, 6.0]


def follow(losses: list, patience: int | None = None, stop_after: int | None = None) -> tuple:
    """(value at the end, last step, whether the run is complete) of a model of one number.

    It is n after step n, where the held-out loss is losses[n - 1]; None: it is not evaluated.
    """
    model = torch.nn.ParameterList([torch.zeros(1)])
    best = Best(model, Objective(lambda batch: ()), patience)
    guard = Guard.__new__(Guard)  # without a disk
    guard.args = Namespace(save_every=None, stop_after=stop_after)
    guard.best, guard.signals, guard.stopped = best, Signals(), False
    guard.write_checkpoint, guard.watch = lambda step: None, Watch(SimpleNamespace(size=1))
    for step, loss in enumerate(losses, start=1):
        model[0].data.fill_(step)
        metrics = {"loss": 0.0} | ({} if loss is None else {"eval/loss": loss})
        if guard.save(step, step == len(losses), metrics):
            break
    return model[0].item(), step, not guard.stopped


def test_the_best_weights_are_the_result():
    assert follow(LOSSES) == (4, 6, True)  # of two equal losses the first
    assert follow([1.0, 2.0]) == (1, 2, True)
    assert follow([2.0, 1.0]) == (2, 2, True)


def test_patience_counts_evaluations_in_a_row():
    assert follow(LOSSES, patience=1) == (2, 3, True)
    assert follow(LOSSES, patience=2) == (4, 6, True)
    assert follow([5.0, None, 6.0, None, None, 7.0, 1.0], patience=2) == (1, 6, True)


def test_a_run_that_is_stopped_or_has_nothing_held_out_keeps_the_last_weights():
    """They are those of the checkpoint; the best ones are beside them."""
    assert follow(LOSSES, stop_after=3) == (3, 3, False)
    assert follow([None, None]) == (2, 2, True)


def test_the_printed_result_ends_at_the_best(capsys):
    lines = [{"step": n, "eval/loss": loss} for n, loss in enumerate([1.0, *LOSSES])]
    assert up_to_best(lines)[-1] == {"step": 4, "eval/loss": 2.0}  # step 0 is not trained
    assert capsys.readouterr().out == "best        the weights after step 4, of 6 that were done\n"


FLAGS = ["--keep_best", "--eval_every", 1, "--eval_share", 0.3, "--lr", 3e-2]


@pytest.fixture(scope="module")
def run(llama_folder, tmp_path_factory):
    """A run whose held-out loss rises again: (its folder, the file of its pairs)."""
    folder = tmp_path_factory.mktemp("best")
    pairs = write_pairs(folder / "pairs.jsonl", 25)
    train(llama_folder, pairs, folder / "run", *FLAGS)
    return folder / "run", pairs


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def held_out_losses(out) -> list[float]:
    return [line["eval/loss"] for line in metrics_of(out) if "eval/loss" in line]


def test_the_saved_model_has_the_lowest_held_out_loss(run, llama_folder, tmp_path):
    """As a run that starts from it finds, with the same reference and the same held-out pairs."""
    out, pairs = run
    losses = held_out_losses(out)[1:]
    assert min(losses) < losses[-1] - 1e-3 and min(losses) < math.log(2)
    flags = ["--reference", llama_folder, "--eval_share", 0.3]
    train(out, pairs, tmp_path / "again", *flags, steps=1)
    assert held_out_losses(tmp_path / "again")[0] == pytest.approx(min(losses), rel=1e-6)


def test_a_run_that_continues_knows_the_best(run, llama_folder, tmp_path):
    """Stopped behind it on two ranks, continued on one."""
    out, pairs = run
    best = min(range(1, 11), key=lambda step: held_out_losses(out)[step])
    assert best < 9
    train(llama_folder, pairs, tmp_path / "run", *FLAGS, "--stop_after", best + 1, ranks=2)
    train(llama_folder, pairs, tmp_path / "run", *FLAGS, "--resume", "--save_every", 20)
    assert held_out_losses(tmp_path / "run") == pytest.approx(held_out_losses(out), rel=1e-5)
    first, second = map(weights, (out, tmp_path / "run"))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-4), name
    # Nothing is left to do: the best weights are written again.
    train(llama_folder, pairs, tmp_path / "run", *FLAGS, "--resume")
    third = weights(tmp_path / "run")
    assert all(torch.equal(second[name], third[name]) for name in second)


def test_nothing_held_out_is_refused():
    with pytest.raises(RunError, match="--keep_best and --patience need held-out pairs"):
        train_dpo.parse_args(["--patience", "3", "--data", "x.jsonl", "--eval_share", "0"])


@pytest.mark.parametrize("loss", ["kto", "bco_pair"])
def test_losses_with_a_state_of_their_own_keep_the_best_weights(loss, llama_folder, tmp_path):
    """The result is that of a run that ends at the best step; their state is that of the run."""
    pairs, flags = write_pairs(tmp_path / "pairs.jsonl", 25), [*FLAGS, "--loss", loss, "--lr", 0.1]
    flags += ["--schedule", "constant", "--warmup", 0]  # so that a shorter run has the same steps
    lines = train(llama_folder, pairs, tmp_path / "run", *flags, steps=6)
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line and line["step"]]
    best = 1 + losses.index(min(losses))
    assert best < 6, losses
    without = [flag for flag in flags if flag != "--keep_best"]
    train(llama_folder, pairs, tmp_path / "short", *without, steps=best)
    first, second = map(weights, (tmp_path / "run", tmp_path / "short"))
    assert all(torch.equal(first[name], second[name]) for name in first)
