"""python -m pytest tests/runs/test_result.py"""

import json
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import write_pairs
from matplotlib import pyplot
from trainings import train

import train_dpo
import train_rm
from nanoalign.runs import result
from nanoalign.runs.result import CARD_MARK, write_card


def next_line(script, monkeypatch, capsys, tmp_path, *data: str) -> str:
    """The last line of a script with --data `data`, in place of which it reads six pairs."""
    text = '{"prompt": "p%d", "chosen": "yes", "rejected": "no"}\n'
    (tmp_path / "a b.jsonl").write_text("".join(text % n for n in range(6)))
    load, finish = script.rows.load_rows, result.finish

    def load_six(args: Namespace, *rest: object, **options: object):
        six = Namespace(**vars(args) | {"data": ["a b.jsonl"], "eval_data": None})
        return load(six, *rest, **options)

    monkeypatch.setattr(script.rows, "load_rows", load_six)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(result, "draw", lambda *args: None)
    called = []
    monkeypatch.setattr(script.result, "finish", lambda *args: called.append(args))
    monkeypatch.setattr(script.loop, "train", lambda *args: True)
    monkeypatch.setattr(script, "write_model", lambda *args, **options: None)
    script.main(["--data", *data])
    args, world, title, _, command = called[0]
    (tmp_path / args.out / "metrics.jsonl").write_text("")
    capsys.readouterr()
    finish(args, world, title, 1, command)
    name, _, rest = capsys.readouterr().out.splitlines()[-1].partition(" ")
    assert name == "next"
    return rest.strip()


POLICY = "python evaluate.py policy --policy runs/dpo --baseline tiny --reward"


@pytest.mark.parametrize(
    ("script", "data", "line"),
    [
        (train_dpo, "a b.jsonl",
         f"{POLICY} REWARD_MODEL --out runs/dpo_eval --data held_out:runs/dpo"),
        (train_dpo, "tiny", f"{POLICY} runs/rm --out runs/dpo_eval"),
        (train_rm, "a b.jsonl", "python evaluate.py rm --model runs/rm --out runs/rm_eval --data "
         "held_out:runs/rm"),
    ],
)  # fmt: skip
def test_next_names_what_was_held_out(monkeypatch, capsys, tmp_path, script, data, line):
    """The reward model in runs/rm is named for the embedded world alone, whose judge it is."""
    assert next_line(script, monkeypatch, capsys, tmp_path, data) == line


@pytest.mark.parametrize(
    ("changes", "held_out", "data"),
    [
        ({}, 3, " --data held_out:runs/rm"),
        ({}, 0, " --data HELD_OUT_DATA"),
        ({"eval_data": ["a b.jsonl", "c.jsonl"]}, 3, " --data 'a b.jsonl' c.jsonl"),
        ({"eval_data": ["tiny:test:tiny-a"]}, 3, ""),  # evaluated by default
        ({"out": "r m"}, 3, " --data 'held_out:r m'"),
        ({"keys": ["prompt=q"]}, 3, " --data held_out:runs/rm"),  # which has our own names
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


def test_a_card_may_be_written_before_the_run(llama_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 24)
    train(llama_folder, pairs, tmp_path / "out", steps=1)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
