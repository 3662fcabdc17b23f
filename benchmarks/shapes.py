"""A model folder with random weights in the shape of a known model, to measure without a download.

    python benchmarks/shapes.py qwen2.5-0.5b runs/shape

Its tokenizer is that of the embedded model, or of --tokenizer FOLDER.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanoalign import model
from nanoalign.weights.folders import load_tokenizer

SHAPES = {
    "llama-12m": LlamaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b-4": Qwen2Config(  # the same with 4 of 24 layers: the vocabulary is most of it
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=4,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "qwen2.5-3b": Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip


def write(shape: str, folder: Path, tokenizer_folder: Path = model.TINY) -> int:
    """Writes the model and a tokenizer; the number of its parameters."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_folder)
    config = SHAPES[shape]
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--tokenizer", type=Path, default=model.TINY, help="a model's folder")
    args = parser.parse_args()
    parameters = write(args.shape, args.folder, args.tokenizer)
    print(f"{args.folder}: {parameters:,} parameters, bfloat16")


if __name__ == "__main__":
    main()
