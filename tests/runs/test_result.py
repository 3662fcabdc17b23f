"""python -m pytest tests/runs/test_result.py"""

import json
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import write_pairs
from matplotlib import pyplot
from processes import run_ranks
from trainings import rm_script, script

from nanoalign.distributed import setup
from nanoalign.runs import result
from nanoalign.runs.result import CARD_MARK, write_card


def test_next_evaluates_the_result_on_what_was_held_out(llama_folder, tmp_path):
    """The last line of both scripts; the picture and the card are written before it."""
    pairs, out = write_pairs(tmp_path / "pairs.jsonl", 24), tmp_path / "run"
    argv = ["--model", llama_folder, "--data", pairs, "--out", out, "--batch_size", 7,
            "--template", "raw", "--steps", 1, "--overwrite"]  # fmt: skip
    policy = f"policy --policy {out} --baseline {llama_folder} --reward REWARD_MODEL"
    for main, words in ((script, policy), (rm_script, f"rm --model {out}")):
        outcome = run_ranks(1, main, [str(word) for word in argv])
        assert outcome.codes == [0], outcome.stderr
        assert outcome.stdout.splitlines()[-1] == (
            f"next        python evaluate.py {words} --out {out}_eval --data held_out:{out}"
        )
        assert (out / "curves.png").exists() and CARD_MARK in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "held_out", "data"),
    [
        ({}, 3, " --data held_out:runs/rm"),
        ({}, 0, " --data HELD_OUT_DATA"),
        ({"eval_data": ["a b.jsonl", "c.jsonl"]}, 3, " --data 'a b.jsonl' c.jsonl"),
        ({"eval_data": ["tiny:test:tiny-a"]}, 3, ""),  # evaluated by default
        ({"out": "r m", "keys": ["prompt=q"]}, 3, " --data 'held_out:r m'"),  # has our own names
        ({"keys": ["prompt=q"], "eval_data": ["c.jsonl"]}, 3, " --data c.jsonl --keys prompt=q"),
    ],
)
def test_next_names_the_data(changes, held_out, data):
    default = {"out": "runs/rm", "data": ["a.jsonl"], "eval_data": None, "keys": []}
    args = Namespace(**default | changes)
    out = shlex.quote(f"{args.out}_eval")
    assert result.next_command(args, held_out, ["rm", "--model", "x y"]) == (
        f"python evaluate.py rm --model 'x y' --out {out}{data}"
    )


def test_a_run_without_its_metrics_has_a_result(tmp_path, capsys):
    """A finished run that is resumed without metrics.jsonl, as an error of it advises."""
    args = Namespace(out=str(tmp_path), data=["a.jsonl"], eval_data=None, keys=[], lr=1e-3)
    args.model, args.keep_best, args.patience = "tiny", False, None
    result.finish(args, setup(), "dpo", 3, ["policy", "--policy", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "held out    no records\n" in printed and (tmp_path / "curves.png").exists()


# --- the curves


def test_every_panel_is_drawn(tmp_path, monkeypatch):
    """Also of a run that has all metrics; steps are whole numbers."""
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    line = {metric: 0.5 for _, metrics in result.PANELS for metric in metrics}
    result.draw([{"step": step} | line for step in (1, 2)], "title", tmp_path / "curves.png")
    axes = [axis for axis in figures[0].axes if axis.get_visible()]
    assert [axis.get_title() for axis in axes] == [name for name, _ in result.PANELS]
    assert all(axis.lines for axis in axes)
    assert all(tick == int(tick) for axis in axes for tick in axis.get_xticks())


# --- the model card

RUN = {
    "model": "Owner/Name", "out": "runs/dpo", "data": ["x=hf://datasets/o/n/data:train", "a.jsonl"],
    "eval_data": None, "eval_share": 0.1, "loss": "ipo", "beta": 0.2, "lr": 1e-6, "seed": 0,
    "lora_rank": None, "ranks": 8, "argv": ["/x/train_dpo.py", "--data", "my file"],
    "nanoalign": "1", "commit": None, "torch": "2", "transformers": "5", "numpy": "2",
    "python": "3.11",
}  # fmt: skip
LINES = [{"step": 0, "eval/loss": 0.5}, {"step": 1, "loss": 0.4}, {"step": 9, "eval/loss": 0.25}]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "args.json").write_text(json.dumps(RUN))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


def test_the_card_says_what_the_run_was(folder):
    write_card(folder, LINES, 1234, is_reward_model=False)
    text = (folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert header == (
        "library_name: transformers\npipeline_tag: text-generation\nbase_model: Owner/Name\n"
        "datasets:\n- o/n\ntags:\n- nanoalign\n- ipo\n"
    )
    assert "torchrun --nproc_per_node 8 train_dpo.py --data 'my file'\n" in body
    assert "| on 1,234 held-out records | before | after step 9 |" in body
    assert "| loss | 0.5000 | 0.2500 |" in body
    assert "transformers 5," in body and 'name = "dpo"  # its folder; on the Hub OWNER/dpo' in body


def test_the_card_of_a_reward_model(folder):
    write_card(folder, [], 0, is_reward_model=True)
    text = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification\n" in text and "- reward-model\n" in text
    assert "AutoModelForSequenceClassification" in text and "held-out records" not in text


def test_a_card_that_someone_wrote_stays_and_ours_is_replaced(folder):
    for before, stays in (("mine", True), (CARD_MARK, False)):
        (folder / "README.md").write_text(before)
        write_card(folder, LINES, 9, is_reward_model=False)
        assert ((folder / "README.md").read_text() == before) == stays
