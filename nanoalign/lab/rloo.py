"""REINFORCE with leave-one-out baselines (RLOO): what DPO replaces, in one flat file.

    python -m nanoalign.lab.rloo --reward rule --out runs/rloo

    maximise  E[y ~ pi(. | x)]  r(x, y) - beta * log(pi(y | x) / pi_ref(y | x))

A step samples K answers to each of some prompts from the policy as it is. The return of an answer,
the bracket above, minus the mean return of the K - 1 other answers to its prompt is its advantage,
and the loss is the mean of -advantage * log pi(y | x) (Williams 1992; Kool et al. 2019; Ahmadian et
al. 2024, arXiv 2402.14740, equation 8). DPO has the optimum of the same objective, without sampling
(Rafailov et al. 2023, arXiv 2305.18290, section 4). The reward is the ground truth of the embedded
world, or a reward model.

Shapes: P prompts of a step, K answers to each.
"""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nanoalign.batch import Row, collate
from nanoalign.data.templates import encode_records
from nanoalign.distributed import run, setup
from nanoalign.errors import RunError
from nanoalign.evaluation.generation import Sampling, generate
from nanoalign.flags import Parser, number, positive
from nanoalign.loop import get_lr, step_indices
from nanoalign.model import TINY, Policy, RewardModel
from nanoalign.ranks import report
from nanoalign.records import Record
from nanoalign.tiny.world import split_prompts, true_reward
from nanoalign.weights.folders import load_tokenizer
from nanoalign.weights.write import write_model

MAX_NEW_TOKENS = 64  # the longest answers of the three sources have 57 tokens


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    add, count = parser.add_argument, number(int, 1)
    add("--reward", default="rule", help="'rule', the true one, or the folder of a reward model")
    add("--beta", type=positive, default=0.1, help="factor of the KL from the base; default: 0.1")
    add("--steps", type=count, default=40, help="of training; default: 40")
    add("--prompts", type=count, default=64, help="of a step; default: 64")
    add("--samples", type=number(int, 2), default=4, help="answers to each prompt; default: 4")
    add("--lr", type=positive, default=5e-4, help="peak of the learning rate; default: 5e-4")
    add("--seed", type=int, default=0, help="of prompts and answers")
    add("--out", type=Path, required=True, help="the folder for the policy and log.jsonl")
    return parser.parse_args(argv)


def sample(policy: Policy, rows: list[Row], eos: int, args: Namespace, step: int) -> list[Row]:
    """The rows with K sampled answers each; an answer that sampling cut has no EOS."""
    seed = args.seed * 1_000_003 + step
    options = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": args.prompts * args.samples}
    sampling = Sampling(samples=args.samples, seed=seed, **options)
    drawn = generate(policy, rows, {eos}, sampling, setup())
    return [
        replace(row, responses=tuple(np.array(a.drawn, np.int32) for a in answers), pairs=())
        for row, answers in zip(rows, drawn, strict=True)
    ]


def true_rewards(rows: list[Row], tokenizer) -> Tensor:
    """The true rewards of the responses of all rows, whose names are their prompts: (P * K,)."""
    texts = [(row.name, tokenizer.decode(y, True)) for row in rows for y in row.responses]
    return torch.tensor([true_reward(prompt, text) for prompt, text in texts])


def advantages(returns: Tensor, samples: int) -> Tensor:
    """Each return minus the mean of the K - 1 others of its prompt: (P * K,) -> (P * K,)."""
    grouped = returns.view(-1, samples)
    others = (grouped.sum(1, keepdim=True) - grouped) / (samples - 1)
    return (grouped - others).flatten()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.out.exists():
        raise RunError(f"--out {args.out} exists; give another, or remove it")
    tokenizer, policy = load_tokenizer(TINY), Policy.load("tiny")
    reference = Policy.load("tiny", trainable=False)
    judge = None if args.reward == "rule" else RewardModel.load(args.reward, trainable=False)
    prompts = [Record(prompt, (), (), name=prompt) for prompt in split_prompts()["train"]]
    rows = encode_records(prompts, tokenizer, 1024, "pku")
    optimizer, log = torch.optim.AdamW(policy.parameters(), weight_decay=0.0), []

    for step in range(args.steps):
        picked = [rows[i] for i in step_indices(step, len(rows), args.prompts, args.seed)]
        picked = sample(policy, picked, tokenizer.eos_token_id, args, step)
        batch = collate(picked)
        logps = policy(batch)  # (P * K,)
        with torch.no_grad():
            rewards = judge(batch) if judge else true_rewards(picked, tokenizer)
            log_ratios = logps - reference(batch)
        returns = rewards - args.beta * log_ratios.detach()
        (-advantages(returns, args.samples) * logps).mean().backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, args.steps, args.lr, 0.1, "cosine")
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "reward": rewards.mean().item(), "kl": log_ratios.mean().item()})
        print("step {step:3}  reward {reward:6.3f}  kl {kl:5.2f}".format(**log[-1]), flush=True)

    write_model(policy, tokenizer, args.out)
    (args.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


if __name__ == "__main__":
    run(main, report.report)
