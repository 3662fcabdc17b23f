"""Measures the true gain of a policy: samples answers to test prompts, and scores them by the rule.

    python -m nanoalign.lab.sample --model runs/dpo

Prints the mean true reward of the policy and of the model that it was trained from, on the same
prompts, with 95 % bootstrap intervals over prompts, and the share of answers that end with EOS.
"""

import numpy as np

from nanoalign.data.templates import encode_records
from nanoalign.distributed import World, print0, run, setup
from nanoalign.evaluation.generation import Sampling, generate
from nanoalign.flags import Parser, number
from nanoalign.model import Policy
from nanoalign.ranks import report
from nanoalign.records import Record
from nanoalign.tiny.world import split_prompts, true_reward
from nanoalign.weights.folders import load_tokenizer, local_folder
from nanoalign.weights.slices import read_slices

MAX_NEW_TOKENS = 64  # the longest answers of the three sources have 57 tokens


def sample_answers(
    policy: Policy, tokenizer, prompts: list[str], seed: int, world: World
) -> tuple[list[str], list[bool]]:
    """(an answer to each prompt, sampled at temperature 1; whether each ended with EOS)."""
    records = [Record(prompt, (), (), name=prompt) for prompt in prompts]
    rows = encode_records(records, tokenizer, 1024, "pku")
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, seed=seed, batch_size=100)
    answers = [
        answer for (answer,) in generate(policy, rows, {tokenizer.eos_token_id}, sampling, world)
    ]
    texts = tokenizer.batch_decode([answer.tokens for answer in answers], skip_special_tokens=True)
    return texts, [answer.ended for answer in answers]


def mean_and_interval(values: np.ndarray, resamples: int = 2000) -> str:
    """The mean of `values`, (prompts,), and its 95 % interval by resampling prompts, as text."""
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return f"{values.mean():+.3f}  [{low:+.3f}, {high:+.3f}]"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the trained policy: a folder, OWNER/NAME, or 'tiny'")
    add("--base", default="tiny", help="the model from which --model was trained; same forms")
    add("--n", type=number(int, 1, 601), default=200, help="number of test prompts")
    add("--seed", type=number(int, 0), default=0, help="random seed for sampling")
    args = parser.parse_args(argv)
    world = setup()

    prompts = split_prompts()["test"][: args.n]
    answers, rewards = {}, {}
    for name, model in (("base", args.base), ("model", args.model)):
        folder = local_folder(model)
        policy = Policy.load(folder, trainable=False, read=read_slices).to(world.device)
        tokenizer = load_tokenizer(folder)
        answers[name], ended = sample_answers(policy, tokenizer, prompts, args.seed, world)
        rewards[name] = np.array(list(map(true_reward, prompts, answers[name])))
        print0(f"{name:6}{mean_and_interval(rewards[name])}  ended {np.mean(ended):.1%}  {folder}")
    print0(f"gain  {mean_and_interval(rewards['model'] - rewards['base'])}")
    for i, prompt in enumerate(prompts[:3]):
        print0(f"\n{prompt}")
        for name in answers:
            print0(f"  {name:6}{rewards[name][i]:+.2f}  {answers[name][i]}")


if __name__ == "__main__":
    run(main, report.report)
