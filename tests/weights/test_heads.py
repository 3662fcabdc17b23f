"""python -m pytest tests/weights/test_heads.py"""

import json
import re
from pathlib import Path

import families
import pytest
import torch
from conftest import write_pairs
from processes import run_ranks
from trainings import metrics_of
from transformers import AutoConfig, AutoTokenizer

import train_rm
from nanoalign.batch import collate
from nanoalign.encode import encode
from nanoalign.errors import RunError
from nanoalign.model import TINY, RewardModel
from nanoalign.weights import tensor_files
from nanoalign.weights.heads import announce, class_of
from nanoalign.weights.slices import read_slices
from nanoalign.weights.write import write_model

ROOT = Path(__file__).parents[2]

# Of these transformers has no ...ForSequenceClassification.
NAMES = ("cohere2", "falcon_h1", "granite", "llama4_text", "mamba", "olmoe", "codegen", "rwkv")
ROWS = [("What is 2 plus 3?", ("It is 5.", "No.")), ("Say hello.", ("Hello there!", "Why?"))]


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def rewards_by_snippet(folder: Path, text: str) -> float:
    """What the lines of docs/models.md compute, which use transformers and safetensors alone."""
    page = (ROOT / "docs" / "models.md").read_text()
    (snippet,) = re.findall(r"```python\n(from glob.*?)```", page, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(snippet.replace("runs/rm", str(folder)).replace("TEXT", repr(text)), names)
    return names["reward"].item()


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_model_of_any_family(name, tiny_tokenizer, tmp_path, monkeypatch):
    """Its rewards are those of its own forward, of the saved one, and of other programs."""
    if name == "granite":
        monkeypatch.setattr(tensor_files, "MAX_FILE_BYTES", 200_000)  # several files
    tokenizer = tiny_tokenizer
    folder = families.write_model_of(name, tmp_path / "base", tied=False)
    assert class_of(type(AutoConfig.from_pretrained(folder))) is not None
    model = RewardModel.load(folder, read=read_slices, head_seed=0)
    batch = collate([encode(*row, tokenizer) for row in ROWS])
    alone = torch.cat(
        [model.textbook(collate([encode(p, (r,), tokenizer)])) for p, rs in ROWS for r in rs]
    )
    rewards = model(batch).detach()
    assert torch.allclose(rewards, alone, atol=1e-4) and rewards.std() > 1e-3
    write_model(model, tokenizer, tmp_path / "rm")
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["architectures"] == [
        class_of(type(model.model.config)).__name__
    ]
    assert (len(list((tmp_path / "rm").glob("*.safetensors"))) > 1) == (name == "granite")
    again = RewardModel.load(tmp_path / "rm", read=read_slices)
    assert torch.equal(again(batch), model(batch))
    tokens = [*encode(*ROWS[0], tokenizer).prompt, *encode(*ROWS[0], tokenizer).responses[0]]
    by_others = rewards_by_snippet(tmp_path / "rm", tokenizer.decode(tokens))
    assert by_others == pytest.approx(rewards[0].item(), abs=1e-4)


def test_training_says_so_before_it_reads_data_and_resumes(tmp_path, capsys):
    folder = families.write_model_of("granite", tmp_path / "base", tied=True)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    flags = f"--model {folder} --data {pairs} --steps 2 --batch_size 4 --template raw --out".split()
    train_rm.main([*flags, str(tmp_path / "rm")])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("head        ours: transformers has no GraniteForSequenceClass")
    lines = metrics_of(tmp_path / "rm")
    assert lines[-1]["train_eval/loss"] < lines[0]["train_eval/loss"]
    parts = [*flags, str(tmp_path / "parts")]
    assert run_ranks(2, train_rm.main, [*parts, "--stop_after", "1"]).codes == [0, 0]
    train_rm.main([*parts, "--resume"])
    again = metrics_of(tmp_path / "parts")
    assert [line["step"] for line in again] == [line["step"] for line in lines]
    assert again[-1]["train_eval/loss"] == pytest.approx(lines[-1]["train_eval/loss"], rel=1e-5)


def test_other_architectures_have_no_head_of_ours(llama_folder, tmp_path, capsys):
    announce(llama_folder)
    assert capsys.readouterr().out == ""
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(RunError, match="'clip' is no architecture of causal language models"):
        announce(tmp_path)
