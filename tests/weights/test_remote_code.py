"""python -m pytest tests/weights/test_remote_code.py"""

import json
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from nanoalign.errors import RunError
from nanoalign.model import Policy, RewardModel
from nanoalign.rewards.rule import check_pad_token
from nanoalign.weights.folders import load_tokenizer, read_config
from nanoalign.weights.heads import announce
from nanoalign.weights.slices import read_slices
from nanoalign.weights.write import change_json, write_model

AUTO_MAP = {
    "AutoConfig": "own.Config",
    "AutoModelForCausalLM": "own.Model",
    "AutoModelForSequenceClassification": "own.Model",
}
OWN = """
open({ran!r}, "w").close()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Tokenizer
"""


@pytest.fixture
def hostile(tmp_path, llama_folder, monkeypatch):
    """(makes a model folder with code of its own, the file that the code would write).

    transformers asks whether to run such code; the answer here is yes.
    """
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    folder, ran = tmp_path / "model", tmp_path / "ran"

    def make(**changes: str) -> Path:
        shutil.copytree(llama_folder, folder)
        (folder / "own.py").write_text(OWN.format(ran=str(ran)))
        change_json(folder / "config.json", {"auto_map": AUTO_MAP} | changes)
        own = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
        change_json(folder / "tokenizer_config.json", own)
        return folder

    return make, ran


def test_code_that_is_not_run_is_named_and_left_out_of_the_result(hostile, tmp_path, capsys):
    make, _ = hostile
    folder = make()
    read_config(folder)
    code = "names Python code of its own (auto_map), which is not run"
    assert capsys.readouterr().out == f"model       {folder} {code}\n"
    (tmp_path / "out").mkdir()
    write_model(Policy.load(folder), load_tokenizer(folder), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("read", [None, read_slices])
def test_a_known_architecture_loads_without_the_code_of_its_folder(hostile, read):
    make, ran = hostile
    options, folder = {} if read is None else {"read": read}, make()
    load_tokenizer(folder)
    Policy.load(folder, **options)
    RewardModel.load(folder, head_seed=0, **options)
    announce(folder)
    check_pad_token(folder)
    assert not ran.exists()


def test_pickled_weights_are_not_read(tmp_path, llama_folder):
    shutil.copytree(llama_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        Policy.load(tmp_path / "model")
    with pytest.raises(RunError, match="neither model.safetensors"):
        Policy.load(tmp_path / "model", read=read_slices)


def test_an_unknown_architecture_is_refused_in_one_line(hostile):
    make, ran = hostile
    folder = make(model_type="own")
    with pytest.raises(RunError, match="needs Python code of its own, which is never run"):
        read_config(folder)
    with pytest.raises(ValueError, match="custom code"):
        Policy.load(folder)
    assert not ran.exists()


@pytest.mark.parametrize("wanted", ["somebody/attention", "flash_attention_2", {"": "own/er"}])
def test_a_folder_does_not_choose_code_of_the_hub(hostile, wanted):
    """transformers would fetch such an implementation, and run it, where `kernels` is installed."""
    folder = hostile[0](attn_implementation=wanted, experts_implementation="sonicmoe")
    for load in (partial(Policy.load, folder), partial(RewardModel.load, folder, head_seed=0)):
        config = load(read=read_slices).model.config
        assert config._attn_implementation == "sdpa"
        assert config._experts_implementation != "sonicmoe"


def test_weights_that_are_converted_are_not_pickled_ones(tmp_path):
    """A mixture of experts, whose tensors transformers converts."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads))
    model.save_pretrained(tmp_path)
    name = "transformers.modeling_utils.PreTrainedModel.from_pretrained"
    with patch(name) as called, suppress(ValueError):  # of what a patch returns
        Policy.load(tmp_path, read=read_slices)
    assert called.call_args.kwargs["use_safetensors"] is True
    assert called.call_args.kwargs["trust_remote_code"] is False
    assert called.call_args.kwargs["attn_implementation"] == "eager"  # is never fetched
