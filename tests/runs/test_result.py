"""python -m pytest tests/runs/test_result.py"""

import shlex
from argparse import Namespace

import pytest

import train_dpo
import train_rm
from nanoalign.runs import result


def next_line(script, monkeypatch, capsys, tmp_path, *data: str) -> str:
    """The last line of a script with --data `data`, in place of which it reads six pairs."""
    text = '{"prompt": "p%d", "chosen": "yes", "rejected": "no"}\n'
    (tmp_path / "a b.jsonl").write_text("".join(text % n for n in range(6)))
    load = script.load_rows

    def load_six(args: Namespace, *rest: object, **options: object):
        six = Namespace(**vars(args) | {"data": ["a b.jsonl"], "eval_data": None})
        return load(six, *rest, **options)

    monkeypatch.setattr(script, "load_rows", load_six)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(result, "draw", lambda *args: None)
    called = []
    monkeypatch.setattr(script, "finish", lambda *args: called.append(args))
    monkeypatch.setattr(script.loop, "train", lambda *args: True)
    monkeypatch.setattr(script, "write_model", lambda *args, **options: None)
    script.main(["--data", *data])
    args, world, title, _, command = called[0]
    (tmp_path / args.out / "metrics.jsonl").write_text("")
    capsys.readouterr()
    result.finish(args, world, title, 1, command)
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
