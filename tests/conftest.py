"""What the tests share: a byte-level tokenizer, a tiny random Llama with it, and pairs of text."""

import json
import os
import random
import tempfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from nanoalign.records import Example


def pytest_configure(config: pytest.Config) -> None:
    """A cache of their own for the tests. Ranks and scripts that they start inherit it."""
    folder = tempfile.TemporaryDirectory(prefix="nanoalign_cache_")
    config.add_cleanup(folder.cleanup)
    os.environ["NANOALIGN_CACHE"] = folder.name


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """One token a byte (256 of them), then <pad>, <bos> and <eos>; adds neither BOS nor EOS by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"} | options
    core.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in special.items() if v})


def tiny_llama(seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    settings = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
                "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings | options))
    # The usual deviation of 0.02 gives nearly uniform logits, in which errors would hide.
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def examples(count: int, seed: int = 0) -> list[Example]:
    """Pairs with prompts and responses of very different lengths."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(low, high))) + "."

    return [
        Example(f"test:{i}", "text", text(2, 40), (text(1, 30), text(1, 30))) for i in range(count)
    ]


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    lines = [
        json.dumps({"prompt": e.prompt, "chosen": e.responses[0], "rejected": e.responses[1]})
        for e in examples(count, seed)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizer) -> Path:
    """A tiny random Llama and its tokenizer, saved in Hugging Face format."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
