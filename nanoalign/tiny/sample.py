"""A policy's true gain: samples answers to test prompts, and lets the world itself judge them.

    python -m nanoalign.tiny.sample --model runs/dpo

Prints the mean true_reward of the policy and of the model it started from, on the same prompts,
with 95 % bootstrap intervals over prompts, and the share of answers that ended with EOS.
"""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoalign import tiny
from nanoalign.arguments import Parser, number
from nanoalign.data import Example
from nanoalign.distributed import run
from nanoalign.templates import render
from nanoalign.tiny.world import split_prompts, true_reward


@torch.no_grad()
def sample_answers(
    model, tokenizer, prompts: list[str], seed: int, max_new_tokens: int = 64, batch_size: int = 100
) -> tuple[list[str], list[bool]]:
    """One answer to each prompt, drawn at temperature 1, and whether it ended with EOS."""
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"  # so that all prompts of a batch end where their answers begin
    texts = [render(Example("", "text", prompt, ()), tokenizer, "pku")[0] for prompt in prompts]
    answers, ended = [], []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True)
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ended += (tokens == tokenizer.eos_token_id).any(1).tolist()
    return answers, ended


def interval(values: np.ndarray, resamples: int = 2000) -> str:
    """Mean and the 95 % interval of the mean over resampled prompts."""
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return f"{values.mean():+.3f}  [{low:+.3f}, {high:+.3f}]"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of the trained policy")
    parser.add_argument("--base", default=tiny.MODEL, help="folder of the model it started from")
    parser.add_argument("--n", type=number(int, 1, 601), default=200, help="test prompts")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the samples")
    args = parser.parse_args(argv)

    prompts = split_prompts()["test"][: args.n]
    answers, rewards = {}, {}
    for name, folder in (("base", args.base), ("model", args.model)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        answers[name], ended = sample_answers(model, tokenizer, prompts, args.seed)
        rewards[name] = np.array(list(map(true_reward, prompts, answers[name])))
        print(f"{name:6}{interval(rewards[name])}  ended {np.mean(ended):.1%}  {folder}")
    print(f"gain  {interval(rewards['model'] - rewards['base'])}")
    for i, prompt in enumerate(prompts[:3]):
        print(f"\n{prompt}")
        for name in answers:
            print(f"  {name:6}{rewards[name][i]:+.2f}  {answers[name][i]}")


if __name__ == "__main__":
    run(main)
