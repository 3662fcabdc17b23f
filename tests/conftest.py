"""Shared by the tests: a byte-level tokenizer, a tiny random Llama, pairs of text, a world."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two workers share two cores
# What the tests expect is what a CPU computes in float32; benchmarks/gpu_check.py is for a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import random
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from nanoalign.distributed import World
from nanoalign.records import Record


def pytest_configure(config: pytest.Config) -> None:
    """Gives the tests a cache folder of their own, which ranks and scripts inherit."""
    folder = tempfile.TemporaryDirectory(prefix="nanoalign_cache_")
    config.add_cleanup(folder.cleanup)
    os.environ["NANOALIGN_CACHE"] = folder.name


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """One token per byte (256 of them), then <pad>, <bos>, <eos>. It adds neither BOS nor EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"} | options
    core.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in special.items() if v})


def sentencepiece_like(*more: str):
    """Words with a leading "▁", which the tokenizer also puts before the start of any text."""
    words = [
        "<unk>",
        "<bos>",
        "<eos>",
        "▁yes",
        "yes",
        "▁Q",
        ":",
        "▁no",
        "\n",
        "▁",
        "▁x",
        "x",
        *more,
    ]
    core = Tokenizer(models.Unigram([(w, -1.0 * (len(w) < 3)) for w in words], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens(["<bos>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def tiny_llama(seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    settings = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                "tie_word_embeddings": True, "bos_token_id": 257, "eos_token_id": 258,
                "pad_token_id": 256}  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings | options))
    # The usual deviation of 0.02 gives nearly uniform logits, which would hide errors.
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def records(count: int, seed: int = 0) -> list[Record]:
    """Pairs with prompts and responses of very different lengths."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(low, high))) + "."

    return [Record(text(2, 40), (text(1, 30), text(1, 30)), name=f"test:{i}") for i in range(count)]


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    lines = [
        json.dumps({"prompt": r.prompt, "chosen": r.responses[0], "rejected": r.responses[1]})
        for r in records(count, seed)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_both_labels(path: Path, count: int) -> Path:
    """Records in PKU-SafeRLHF's format, whose two labels agree in every second one."""
    lines = []
    for i, r in enumerate(records(count)):
        texts = {"prompt": r.prompt, "response_0": r.responses[0], "response_1": r.responses[1]}
        labels = {"better_response_id": i // 2 % 2, "safer_response_id": (i // 2 + i) % 2}
        lines.append(json.dumps(texts | labels))
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


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """25 pairs: with batches of 7 an epoch has 4 steps, the last of 4 pairs."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 25)


@pytest.fixture(scope="session")
def train(llama_folder, pairs):
    """trainings.train on the Llama and the 25 pairs."""
    import trainings

    return partial(trainings.train, llama_folder, pairs)


@pytest.fixture(scope="session")
def one_rank(train, tmp_path_factory) -> list[dict]:
    """The metrics of a run on one rank."""
    return train(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture
def world() -> World:
    """One process on the CPU, without a process group."""
    return World(0, 1, torch.device("cpu"), mesh=None)
