"""A policy's true gain: samples answers to test prompts, and lets the world itself judge them.

    python -m nanoalign.tiny.sample --model runs/dpo

Prints the mean true_reward of the policy and of the model it started from, on the same prompts,
with 95 % bootstrap intervals over prompts, and the share of answers that ended with EOS.
"""

import numpy as np

from nanoalign import tiny
from nanoalign.arguments import Parser, number
from nanoalign.distributed import World, print0, run, setup
from nanoalign.generate import Sampling, generate
from nanoalign.models import Policy
from nanoalign.prepare import load_tokenizer
from nanoalign.records import Example
from nanoalign.rows import encode_all
from nanoalign.tiny.world import split_prompts, true_reward


def sample_answers(
    policy: Policy, tokenizer, prompts: list[str], seed: int, world: World
) -> tuple[list[str], list[bool]]:
    """One answer to each prompt, drawn at temperature 1, and whether it ended with EOS."""
    examples = [Example(prompt, "text", prompt, (), pairs=()) for prompt in prompts]
    rows = encode_all(examples, tokenizer, "pku")[0]
    sampling = Sampling(max_new_tokens=64, seed=seed, batch_size=100)
    drawn = [
        answer for (answer,) in generate(policy, rows, {tokenizer.eos_token_id}, sampling, world)
    ]
    texts = tokenizer.batch_decode([answer.tokens for answer in drawn], skip_special_tokens=True)
    return texts, [answer.ended for answer in drawn]


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
    world = setup()
    args = parser.parse_args(argv)

    prompts = split_prompts()["test"][: args.n]
    answers, rewards = {}, {}
    for name, folder in (("base", args.base), ("model", args.model)):
        policy = Policy.load(folder, trainable=False).to(world.device)
        tokenizer = load_tokenizer(folder)
        answers[name], ended = sample_answers(policy, tokenizer, prompts, args.seed, world)
        rewards[name] = np.array(list(map(true_reward, prompts, answers[name])))
        print0(f"{name:6}{interval(rewards[name])}  ended {np.mean(ended):.1%}  {folder}")
    print0(f"gain  {interval(rewards['model'] - rewards['base'])}")
    for i, prompt in enumerate(prompts[:3]):
        print0(f"\n{prompt}")
        for name in answers:
            print0(f"  {name:6}{rewards[name][i]:+.2f}  {answers[name][i]}")


if __name__ == "__main__":
    run(main)
