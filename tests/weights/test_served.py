"""python -m pytest tests/weights/test_served.py

What vLLM 0.33 reads of a result: docs/results.md.
"""

import json
from pathlib import Path

import pytest
from conftest import tiny_llama
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from nanoalign.model import Policy, RewardModel
from nanoalign.weights.write import write_model

SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 257,
         "eos_token_id": 258, "pad_token_id": 256}  # fmt: skip


def names_in(folder: Path) -> set[str]:
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {*file.keys()}
    return names


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, Gemma2Config, MistralConfig, None])
def test_a_reward_model_has_the_names_that_vllm_maps(kind, tied, tokenizer, tmp_path):
    """Those of its language model without lm_head, and score.weight, of one label.

    vLLM removes ForSequenceClassification from the architecture, and takes the class with the
    ending ForCausalLM; its adapter adds a layer `score` without bias, and fills both by name.
    """
    model = tiny_llama(tie_word_embeddings=tied)
    if kind is not None:
        model = AutoModelForCausalLM.from_config(kind(**SIZES, tie_word_embeddings=tied))
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_model(RewardModel.load(base, head_seed=0), tokenizer, tmp_path / "rm")
    assert names_in(tmp_path / "rm") == names_in(base) - {"lm_head.weight"} | {"score.weight"}
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    causal = type(model).__name__
    family = causal.removesuffix("ForCausalLM")
    assert config["architectures"] == [f"{family}ForSequenceClassification"]
    assert len(config["id2label"]) == 1 and config["pad_token_id"] == 256
    # Without these keys vLLM does not convert a language model's output layer into the head.
    assert not {"classifier_from_token", "method", "head_dtype", "problem_type"} & config.keys()
    write_model(Policy.load(base), tokenizer, tmp_path / "policy")
    assert names_in(tmp_path / "policy") == names_in(base)
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert config["architectures"] == [causal]
