"""Level 3: six bugs of well-known frameworks, each in a few lines of our own."""

import re

import torch
from torch import Tensor

from nanoalign.lab.exercises.exercise import Exercise, beta, ids, normal, number
from nanoalign.logps import IGNORE
from nanoalign.losses import dpo_loss

BOS, EOS = 1, 2
WORDS = ("Hi", "What is 3 plus 4?", "It is 7.", "Sorry, no.", "Why?")


class Tokenizer:
    """A tokenizer that, like many, puts BOS before each text: a token for a letter."""

    bos_token, bos_token_id, eos_token_id = "<bos>", BOS, EOS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        tokens = [BOS if part == "<bos>" else ord(part) for part in re.findall("<bos>|.", text)]
        return [BOS] * add_special_tokens + tokens

    def __repr__(self) -> str:
        return "tokenizer"


# --- what is expected -----------------------------------------------------------------------------


def scored(prompt: list[int], response: list[int], tail: list[int]) -> list[int]:
    return [IGNORE] * len(prompt) + response + tail


def joined(tokenizer: Tokenizer, prompt: str, response: str) -> list[int]:
    return [BOS, *map(ord, prompt.removeprefix("<bos>") + response), EOS]


def labels_of_batch(tokens: Tensor, prompts: Tensor, lengths: Tensor, pad: int) -> Tensor:
    places = torch.arange(tokens.shape[1])
    return tokens.where((places >= prompts[:, None]) & (places < lengths[:, None]), IGNORE)


def step_loss(losses: Tensor, sizes: list[int]) -> Tensor:
    return losses.mean()


def last_rewards(values: Tensor, tokens: Tensor, mask: Tensor, pad: int) -> Tensor:
    return values[torch.arange(len(values)), mask.sum(1) - 1]


def packed_loss(policy: Tensor, reference: Tensor, sequences: int, beta: float) -> Tensor:
    return dpo_loss(policy[::2], policy[1::2], reference[::2], reference[1::2], beta)[0].mean()


# --- inputs ---------------------------------------------------------------------------------------


def two_texts(generator: torch.Generator) -> tuple[Tokenizer, str, str]:
    prompt, response = (WORDS[number(generator, 0, len(WORDS))] for _ in range(2))
    return Tokenizer(), "<bos>" * number(generator, 0, 2) + prompt, response


def padded(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens (4, T), of which EOS is also the padding; tokens of prompts; of whole lines)."""
    prompts = [ids(generator, 1, 5) for _ in range(4)]
    prompts[number(generator, 0, 4)][0] = EOS  # of the turn before
    lines = [prompt + ids(generator, 1, 5) + [EOS] for prompt in prompts]
    width = max(map(len, lines))
    tokens = torch.tensor([line + [EOS] * (width - len(line)) for line in lines])
    return tokens, torch.tensor([*map(len, prompts)]), torch.tensor([*map(len, lines)])


def values_of_batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    tokens, _, lengths = padded(generator)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return normal(generator, *tokens.shape), tokens, mask, EOS


def of_micro_batches(generator: torch.Generator) -> tuple[Tensor, list[int]]:
    sizes = [number(generator, 1, 6) for _ in range(number(generator, 2, 5))]
    return normal(generator, sum(sizes)), sizes


def two_models(generator: torch.Generator) -> tuple[Tensor, Tensor, int, float]:
    responses = 2 * number(generator, 1, 8)
    return *normal(generator, 2, responses), 1, beta(generator)


EXERCISES = [
    Exercise(
        "scored",
        "count from the end of the prompt: what follows the response is no part of its length",
        scored,
        lambda g: (ids(g, 1, 6), ids(g, 1, 6), [*ids(g, 0, 3), EOS]),
    ),
    Exercise(
        "join",
        "encode() adds BOS to each text; a template may have written it already",
        joined,
        two_texts,
    ),
    Exercise(
        "batch_labels",
        "where EOS is also the padding, an id does not tell which of the two it is: lengths do",
        labels_of_batch,
        lambda g: (*padded(g), EOS),
    ),
    Exercise(
        "step_loss",
        "a micro-batch of one pair must not weigh as much as one of five",
        step_loss,
        of_micro_batches,
        trained=(0,),
    ),
    Exercise(
        "last_rewards",
        "argmax finds the first padding id: also one inside of the prompt, and 0 if there is none",
        last_rewards,
        values_of_batch,
        trained=(0,),
    ),
    Exercise(
        "packed_loss",
        "at the start each pair has a loss of ln 2; how many pairs does one packed sequence have?",
        packed_loss,
        two_models,
        ((ZEROS := torch.zeros(12), ZEROS, 1, 0.1),),
        trained=(0,),
    ),
]
