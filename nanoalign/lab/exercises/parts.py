"""Level 4: parts of an engine, from tensors of a batch to a policy whose true reward is graded."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanoalign import batch
from nanoalign.batch import Row
from nanoalign.lab.exercises.exercise import Exercise, Wrong, beta, ids, lengths, normal, number
from nanoalign.logps import IGNORE, Head, chunked_token_logps
from nanoalign.losses import dpo_loss
from nanoalign.packing.tree import coordinates

ROOT = Path(__file__).parents[3]
Pairs = list[tuple[list[int], list[int], list[int]]]  # of prompt, chosen, rejected

# --- collate, mask --------------------------------------------------------------------------------


def collate(pairs: Pairs, pad: int) -> tuple[Tensor, Tensor]:
    arrays = [[np.array(part, dtype=np.int32) for part in pair] for pair in pairs]
    made = batch.collate([Row("", prompt, tuple(pair)) for prompt, *pair in arrays])
    tokens = made.inputs["input_ids"]
    labels = torch.full_like(tokens.flatten(), IGNORE)
    labels[made.predicted_at + 1] = made.targets
    behind = torch.arange(tokens.numel()).view_as(tokens) > made.ends_at[:, None]
    return tokens.masked_fill(behind, pad), labels.view_as(tokens)


def mask(rows: list[list[int]]) -> Tensor:
    row, segment, _ = map(torch.tensor, coordinates(rows))
    same = (segment == 0) | (segment == segment[:, None])
    return (same & (row == row[:, None])).tril()


# --- chunked_logps --------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor of floating numbers that an operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.is_floating_point():
                self.size = max(self.size, each.numel())
        return result


def chunked_logps(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return chunked_token_logps(hidden, Head(weight), targets, chunk)


def within_memory(function: Callable, hidden: Tensor, weight: Tensor, *others: object) -> object:
    with Largest() as largest:
        result = function(hidden, weight, *others)
    if largest.size >= (whole := len(hidden) * len(weight)):
        raise Wrong(f"makes a tensor of {largest.size:,} numbers; all logits would be {whole:,}")
    return result


# --- training_step --------------------------------------------------------------------------------


class Toy(nn.Module):
    """log pi of responses by two numbers of each: (n, 2) -> (n,); of so many at most."""

    def __init__(self, weight: Tensor, most: int):
        super().__init__()
        self.weight, self.most = nn.Parameter(weight.clone()), most

    def forward(self, responses: Tensor) -> Tensor:
        if len(responses) > self.most:
            raise Wrong(f"computes {len(responses)} responses at a time; {self.most} are allowed")
        return nn.functional.logsigmoid(responses @ self.weight)


def training_step(
    policy: nn.Module, reference: nn.Module, chosen: Tensor, rejected: Tensor,
    optimizer: torch.optim.Optimizer, beta: float, size: int, max_norm: float,
) -> float:  # fmt: skip
    optimizer.zero_grad()
    total = 0.0
    for w, r in zip(chosen.split(size), rejected.split(size), strict=True):
        with torch.no_grad():
            fixed = reference(w), reference(r)
        loss = dpo_loss(policy(w), policy(r), *fixed, beta)[0].sum() / len(chosen)
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    optimizer.step()
    return total


def two_steps(
    function: Callable, weight: Tensor, chosen: Tensor, rejected: Tensor, *numbers: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(the losses of two steps, the weight of the policy after them, that of the reference)."""
    lr, beta, size, max_norm = numbers
    policy, reference = (Toy(weight, 2 * size) for _ in range(2))
    optimizer = torch.optim.SGD(policy.parameters(), lr)
    found = []
    for _ in range(2):
        loss = function(policy, reference, chosen, rejected, optimizer, beta, size, max_norm)
        found.append(torch.as_tensor(loss, dtype=torch.float32).detach().reshape(()))
    if reference.weight.grad is not None:
        raise Wrong("gives the reference a gradient: compute it in torch.no_grad()")
    return torch.stack(found), policy.weight.detach(), reference.weight.detach()


# --- advantages, flags ----------------------------------------------------------------------------


def advantages(rewards: Tensor) -> Tensor:
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


TARGET = 3.0  # of the mean true reward


def true_reward(function: Callable[[], list[str]]) -> float:
    """TARGET if a policy that is trained with these flags is better than it."""
    flags = function()
    if not (isinstance(flags, list | tuple) and all(isinstance(word, str) for word in flags)):
        raise Wrong("must return the flags of train_dpo.py, a list of texts")
    with TemporaryDirectory() as folder:
        out = f"{folder}/policy"
        # the last of two equal flags counts: the 3,000 pairs and the base are the same for all
        fixed = ["--model", "tiny", "--data", "tiny", "--eval_data", "tiny:test", "--out", out]
        run([str(ROOT / "train_dpo.py"), *flags, *fixed])
        printed = run(["-m", "nanoalign.lab", "grade", out])
    reward = float(re.search(r"true reward +([-+.\d]+)", printed)[1])
    if reward <= TARGET:
        raise Wrong(f"gives a policy with a true reward of {reward:.3f}; it must be above {TARGET}")
    return TARGET


def run(words: list[str]) -> str:
    """What `python WORDS` prints. Raises Wrong with the last line of its errors if it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise Wrong(f"fails: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


# --- inputs ---------------------------------------------------------------------------------------


def pairs(generator: torch.Generator) -> tuple[Pairs, int]:
    count = number(generator, 1, 4)
    parts = [tuple(ids(generator, 1, 5) for _ in range(3)) for _ in range(count)]
    return parts, number(generator, 0, 3)


def hidden_and_weight(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    vocabulary = number(generator, 60, 90)
    targets = torch.randint(0, vocabulary, (30,), generator=generator)
    hidden, weight = (normal(generator, n, 4, scale=1) for n in (30, vocabulary))
    return hidden, weight, targets, number(generator, 7, 20)


def of_a_step(generator: torch.Generator) -> tuple:
    count = number(generator, 2, 9)
    features = normal(generator, 3, count, 2, scale=1)
    size, norm = number(generator, 1, 5), number(generator, 1, 9) / 8
    return features[0, 0], *features[1:], 0.5, beta(generator), size, norm


EXERCISES = [
    Exercise(
        "collate",
        "first the width of the longest line; then a list for each line, as in exercise 2",
        collate,
        pairs,
    ),
    Exercise(
        "mask",
        "write the row and the segment of each token as two vectors, and compare them by [:, None]",
        mask,
        lambda g: ([lengths(g) for _ in range(number(g, 1, 4))],),
    ),
    Exercise(
        "chunked_logps",
        "log p = z of the target - logsumexp of all z; logaddexp joins two logsumexp",
        chunked_logps,
        hidden_and_weight,
        trained=(0, 1),
        use=within_memory,
        close=1e-4,
    ),
    Exercise(
        "training_step",
        "divide the loss of each micro-batch by the pairs of the whole step, and add the gradients",
        partial(two_steps, training_step),
        of_a_step,
        use=two_steps,
    ),
    Exercise(
        "advantages",
        "the sum of the others is the sum of all without one's own",
        advantages,
        lambda g: (normal(g, number(g, 1, 4), number(g, 2, 6)),),
    ),
    Exercise(
        "flags",
        "docs/lab.md shows what beta does; look at the learning rate and the number of steps, too",
        lambda: TARGET,
        lambda g: (),
        use=true_reward,
        cases=1,
        seconds=3600,
    ),
]
