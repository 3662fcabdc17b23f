"""Levels 1 and 2: a function of a few lines each, with its formula."""

import math

import torch
from torch import Tensor

from nanoalign import losses
from nanoalign.family import losses as family
from nanoalign.lab.exercises.exercise import Exercise, beta, ids, lengths, normal, number
from nanoalign.logps import IGNORE, sequence_logps
from nanoalign.packing.tree import coordinates

# --- what is expected -----------------------------------------------------------------------------


def labels_of(prompt: list[int], response: list[int], width: int) -> list[int]:
    labels = [IGNORE] * len(prompt) + response
    return labels + [IGNORE] * (width - len(labels))


def accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    return ((torch.sign(chosen_rewards - rejected_rewards) + 1) / 2).mean()


def gradient_of_dpo(w: float, v: float, ref_w: float, ref_v: float, beta: float) -> tuple:
    logps = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (w, v)]
    fixed = [torch.tensor([x], dtype=torch.float64) for x in (ref_w, ref_v)]
    loss = losses.dpo_loss(*logps, *fixed, beta)[0]
    return tuple(each.item() for each in torch.autograd.grad(loss.sum(), logps))


def kl_of_kto(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    return (policy_logps - reference_logps).mean().clamp(min=0).detach()


def positions_of(prompt: int, responses: list[int]) -> list[int]:
    return coordinates([(prompt, *responses)])[2]


def kl_of_best(n: int) -> float:
    return math.log(n) - (n - 1) / n


def interval(differences: Tensor) -> tuple[float, float]:
    mean, error = differences.mean().item(), (differences.std() / len(differences) ** 0.5).item()
    return mean - 1.96 * error, mean + 1.96 * error


# --- inputs ---------------------------------------------------------------------------------------


def logits_and_labels(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 7, (3, 6), generator=generator)
    labels[:, : number(generator, 1, 4)] = IGNORE  # the prompt
    labels[0, 5:] = IGNORE  # padding
    labels[2, 0] = 3  # which nothing predicts
    return normal(generator, 3, 6, 7), labels


def prompt_and_response(generator: torch.Generator) -> tuple[list[int], list[int], int]:
    prompt, response = ids(generator, 1, 6), ids(generator, 1, 6)
    return prompt, response, len(prompt) + len(response) + number(generator, 0, 4)


def of_means(generator: torch.Generator) -> tuple:
    tokens = torch.randint(1, 50, (2, 4), generator=generator)
    logps = -normal(generator, 2, 4, scale=30).abs()
    return *logps, *tokens, beta(generator), beta(generator)


def four_logps(generator: torch.Generator) -> tuple:
    return *(-normal(generator, 4, scale=20).abs()).tolist(), beta(generator)


def steps_apart(generator: torch.Generator) -> Tensor:
    """Rewards that are often tied, and as near to each other as those of DPO."""
    return normal(generator, 5).round() / 100


def of_a_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    count = number(generator, 2, 9)
    return normal(generator, count), normal(generator, count)


def prompt_and_responses(generator: torch.Generator) -> tuple[int, list[int]]:
    prompt, *responses = lengths(generator)
    return prompt, responses


ZERO, FAR, ONES = torch.zeros(3), torch.tensor([1e4, -1e4, 0.0]), torch.ones(3, dtype=torch.long)
EXERCISES = [
    # level 1
    Exercise(
        "hinge",
        "torch.relu(x) is max(0, x), with a gradient of 0 where x is below 0",
        family.hinge,
        lambda g: (normal(g, 4), normal(g, 4), beta(g)),
        ((ZERO, ZERO, 0.1), (FAR, -FAR, 0.1)),
        trained=(0, 1),
    ),
    Exercise(
        "labels",
        "three lists, one behind the other: of the prompt, of the response, of the padding",
        labels_of,
        prompt_and_response,
    ),
    Exercise(
        "sequence_logps",
        "the logits at place t are of the token at t + 1; and a mean over T also counts padding",
        sequence_logps,
        logits_and_labels,
    ),
    Exercise(
        "accuracy",
        "torch.sign of the difference is 1, 0 or -1; map these to 1, 1/2 and 0",
        accuracy,
        lambda g: (steps_apart(g), steps_apart(g)),
        ((ZERO, ZERO), (FAR, -FAR)),
    ),
    Exercise(
        "reward_loss",
        "sigmoid(-20000) is 0 in float32, and log 0 is -inf; torch has log sigmoid as one function",
        losses.pairwise_reward_loss,
        lambda g: (normal(g, 4), normal(g, 4)),
        ((FAR, -FAR), (ZERO, ZERO)),
        trained=(0, 1),
    ),
    Exercise(
        "gradient",
        "d -log sigmoid(h) / dh = -sigmoid(-h), and dh / d log pi(y_w | x) = beta",
        gradient_of_dpo,
        four_logps,
        ((-5.0, -5.0, -5.0, -5.0, 0.1), (-100.0, -900.0, -100.0, -100.0, 0.1)),
    ),
    # level 2
    Exercise(
        "simpo",
        "a sum of log-probabilities divided by its tokens is their mean; gamma is in the sigmoid",
        family.simpo,
        of_means,
        ((-FAR.abs(), ZERO - 1, ONES, ONES, 2.0, 0.5),),
        trained=(0, 1),
    ),
    Exercise(
        "kl",
        "KTO compares rewards with this number as if it were a constant; no KL is below 0",
        kl_of_kto,
        of_a_batch,
        ((ZERO - 1, ZERO),),
        detached=True,
    ),
    Exercise(
        "positions",
        "each response begins at the position at which the prompt ends",
        positions_of,
        prompt_and_responses,
    ),
    Exercise(
        "kl_of_best",
        "the best of n has the density n F^(n - 1), F uniform: integrate n u^(n-1) log(n u^(n-1))",
        kl_of_best,
        lambda g: (number(g, 1, 1000),),
        ((1,),),
    ),
    Exercise(
        "dpo_loss",
        "a reward is beta * (log pi - log pi_ref); the loss is the one of exercise 5 on rewards",
        losses.dpo_loss,
        lambda g: (*normal(g, 4, 5, scale=20), beta(g)),
        ((ZERO, ZERO, ZERO, ZERO, 0.1), (FAR, -FAR, ZERO, ZERO, 1.0)),
        trained=(0, 1),
    ),
    Exercise(
        "interval",
        "the standard error of a mean is s / sqrt(n), and s divides by n - 1",
        interval,
        lambda g: (normal(g, number(g, 5, 40)),),
        close=1e-3,
    ),
]
