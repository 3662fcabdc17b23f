"""python -m pytest tests/checkpoints/test_rounded.py"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train_dpo
from nanoalign.checkpoints import rounded
from nanoalign.checkpoints.rounded import round_result
from nanoalign.errors import RunError


def test_the_share_of_changes_that_survives(tmp_path):
    """Of four weights three changed; near 1 bfloat16 has steps of 1/128, and one change is below.

    A head that the start did not have counts for nothing.
    """
    for name, values in {"start": [1.0, 1, 1, 1], "out": [1.0, 1.001, 1.02, 1.5]}.items():
        (tmp_path / name).mkdir()
        tensors = {"w": torch.tensor(values)}
        tensors |= {"score.weight": torch.ones(3)} if name == "out" else {}
        save_file(tensors, tmp_path / name / "model.safetensors")
    (tmp_path / "out/config.json").write_text('{"dtype": "float32"}')
    line = round_result(tmp_path / "out", tmp_path / "start")
    assert "66.7% of the 3 weights" in line
    found = load_file(tmp_path / "out/model.safetensors")
    assert found["w"].tolist() == [1.0, 1.0, 1.0234375, 1.5] and found["w"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_a_run_writes_the_rounded_weights_of_the_other(tmp_path, capsys):
    flags = ["--data", "tiny:test", "--steps", "2", "--batch_size", "4", "--eval_share", "0"]
    for dtype in ("fp32", "bf16"):
        train_dpo.main([*flags, "--save_dtype", dtype, "--out", str(tmp_path / dtype)])
    assert "rounded     bfloat16: " in capsys.readouterr().out
    exact, found = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("fp32", "bf16"))
    assert exact.keys() == found.keys()
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in exact)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16


def test_a_full_disk_leaves_the_float32_weights(tmp_path, monkeypatch, llama_folder):
    out = shutil.copytree(llama_folder, tmp_path / "out")

    def full(*args, **options):
        raise rounded.SafetensorError("No space left on device")

    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(rounded, "save_file", full)
    with pytest.raises(RunError, match="could not be rounded to bfloat16: No space left"):
        round_result(out, llama_folder)
    assert (out / "model.safetensors").read_bytes() == before
