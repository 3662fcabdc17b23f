"""python -m pytest tests/runs/test_folder.py

The model card of a result; an --out that can't be written.
"""

import errno
import json
import os
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import write_pairs
from trainings import train as train_raw

from nanoalign.errors import RunError
from nanoalign.runs.folder import check_folder
from nanoalign.runs.result import CARD_MARK, write_card

RUN = {
    "model": "Owner/Name", "out": "runs/dpo", "data": ["x=hf://datasets/o/n/data:train", "a.jsonl"],
    "eval_data": None, "eval_share": 0.1, "loss": "ipo", "beta": 0.2, "lr": 1e-6, "seed": 0,
    "lora_rank": None, "ranks": 8, "argv": ["/x/train_dpo.py", "--data", "my file"],
    "nanoalign": "1", "commit": None, "torch": "2", "transformers": "5", "numpy": "2",
    "python": "3.11",
}  # fmt: skip
LINES = [{"step": 0, "eval/loss": 0.5}, {"step": 1, "loss": 0.4}, {"step": 9, "eval/loss": 0.25}]


@pytest.fixture
def result(tmp_path) -> Path:
    (tmp_path / "args.json").write_text(json.dumps(RUN))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


def test_the_card_says_what_the_run_was(result):
    write_card(result, LINES, 1234, is_reward_model=False)
    text = (result / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert header == (
        "library_name: transformers\npipeline_tag: text-generation\nbase_model: Owner/Name\n"
        "datasets:\n- o/n\ntags:\n- nanoalign\n- ipo\n- preference-alignment\n"
    )
    assert "torchrun --nproc_per_node 8 train_dpo.py --data 'my file'\n" in body
    assert "| on 1,234 held-out records | before | after step 9 |" in body
    assert "| loss | 0.5000 | 0.2500 |" in body and "| lr | 1e-06 |" in body
    assert "lora_rank" not in body and "transformers 5," in body


def test_the_card_of_a_reward_model(result):
    write_card(result, [], 0, is_reward_model=True)
    text = (result / "README.md").read_text()
    assert "pipeline_tag: text-classification\n" in text and "- reward-model\n" in text
    assert "AutoModelForSequenceClassification" in text and "held-out records" not in text


def test_a_card_that_someone_wrote_stays_and_ours_is_replaced(result):
    for before, stays in (("mine", True), (CARD_MARK, False)):
        (result / "README.md").write_text(before)
        write_card(result, LINES, 9, is_reward_model=False)
        assert ((result / "README.md").read_text() == before) == stays


def test_a_card_may_be_written_before_the_run(llama_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 24)
    train_raw(llama_folder, pairs, tmp_path / "out", steps=1)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_an_out_that_can_not_be_written_is_an_error_before_data_are_read(tmp_path, monkeypatch):
    def check(name: str) -> None:
        out = str(tmp_path / name)
        check_folder(Namespace(out=out, audit=None, resume=False, overwrite=False), [])

    def refused(path: object, *rest: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    check("a/b")  # which makes it
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        with pytest.raises(RunError, match=r"--out .*/c: no permission to write .*/c/\.lock; give"):
            check("c")
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(RunError, match=f"file/b/c: {tmp_path / 'file'} is a file; give a folder"):
        check("file/b/c")
    for name in ("loop", "gone"):
        with pytest.raises(RunError, match=f"/{name} is a symbolic link that leads nowhere; give"):
            check(name)
