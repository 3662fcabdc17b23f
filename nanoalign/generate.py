"""Sampling from a policy: batched, with its KV cache, every rank its share of the prompts.

What an answer's random numbers are depends on the seed, the prompt and the answer's number alone: not
on the batch it is computed in, nor on the rank. Every rank holds the whole policy; nothing is sharded.

Shapes: B answers of a batch, T tokens of the longest prompt, V vocabulary.
"""

import hashlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nanoalign.distributed import World, autocast
from nanoalign.models import Policy
from nanoalign.rows import Row

SHRINK = 0.75  # ended answers leave the batch when at most this share of it goes on


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float = 1.0  # 0: always the most probable token
    top_p: float = 1.0  # only the most probable tokens that together have this probability
    max_new_tokens: int = 256
    samples: int = 1  # answers to each prompt
    seed: int = 0
    batch_size: int = 64  # answers computed at a time, on each rank


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled response: its tokens, and the EOS that ended it; None where it was cut."""

    tokens: tuple[int, ...]
    end: int | None

    @property
    def ended(self) -> bool:
        return self.end is not None

    @property
    def scored(self) -> list[int]:
        """All tokens that were drawn, the EOS too."""
        return [*self.tokens, *([self.end] if self.ended else [])]


def next_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row, by inversion: logits (B, V), uniform (B,) in [0, 1) -> (B,).

    Of the tokens in the order of their probability, only the first are kept that together reach top_p
    (Holtzman et al. 2020, arXiv 1904.09751, section 3.1); of these it is the one at which the cumulated
    probability, made to sum to 1 again, exceeds `uniform`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / temperature).softmax(-1)
    probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulated = probabilities.cumsum(-1)  # (B, V)
    kept = cumulated - probabilities < top_p
    total = (probabilities * kept).sum(-1)
    place = (cumulated <= (uniform * total)[:, None]).sum(-1)  # (B,)
    # Rounding may let the last sum fall short of the total.
    place = place.minimum(kept.sum(-1) - 1)
    return tokens.gather(-1, place[:, None]).squeeze(-1)


@torch.no_grad()
def generate(
    policy: Policy, prompts: list[Row], eos: Collection[int], sampling: Sampling, world: World
) -> list[list[Answer]]:
    """`sampling.samples` answers to every prompt, the same on every rank. Every rank must call it.

    prompts: rows, of which only the prompt is looked at.
    eos: the ids that end an answer.
    """
    wanted = [(i, k) for i in range(len(prompts)) for k in range(sampling.samples)]
    wanted.sort(key=lambda ik: -len(prompts[ik[0]].prompt))  # similar lengths together
    asked: Counter = Counter()  # a prompt that comes again gets further answers, not the same
    times = []
    for prompt in prompts:
        times.append(asked[prompt.prompt.tobytes()])
        asked[prompt.prompt.tobytes()] += 1
    size = sampling.batch_size
    batches = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    answers: dict[tuple[int, int], Answer] = {}
    mine = batches[world.rank :: world.size]
    for batch in tqdm(mine, desc="sampling", unit="batch", disable=not world.is_main):
        uniform = [
            _uniform(prompts[i], times[i] * sampling.samples + k, sampling) for i, k in batch
        ]
        drawn = _sample(policy, [prompts[i] for i, _ in batch], uniform, eos, sampling, world)
        answers |= dict(zip(batch, drawn, strict=True))
    if world.size > 1:
        everyones: list[dict] = [{}] * world.size
        dist.all_gather_object(everyones, answers)
        answers = {key: answer for part in everyones for key, answer in part.items()}
    return [[answers[i, k] for k in range(sampling.samples)] for i in range(len(prompts))]


def _uniform(prompt: Row, number: int, sampling: Sampling) -> np.ndarray:
    """(max_new_tokens,) random numbers in [0, 1) of the number-th answer to a prompt."""
    digest = hashlib.sha256(prompt.prompt.astype("<i4").tobytes()).digest()
    key = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.default_rng((sampling.seed, number, *key)).random(sampling.max_new_tokens)


def _sample(
    policy: Policy,
    rows: list[Row],
    uniform: list[np.ndarray],
    eos: Collection[int],
    sampling: Sampling,
    world: World,
) -> list[Answer]:
    width = max(len(row.prompt) for row in rows)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for n, row in enumerate(rows):  # padded on the left, so that all end where their answers begin
        tokens[n, width - len(row.prompt) :] = row.prompt
        mask[n, width - len(row.prompt) :] = 1
    tokens, mask = (torch.from_numpy(x).to(world.device) for x in (tokens, mask))  # (B, T)
    chances = torch.from_numpy(np.stack(uniform)).to(world.device)  # (B, max_new_tokens)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T)
    drawn: list[list[int]] = [[] for _ in rows]
    ends: list[int | None] = [None] * len(rows)
    going = list(range(len(rows)))  # which answer each line of the batch is
    cache = None
    for step in range(sampling.max_new_tokens):
        with autocast(world.device, policy.compute_dtype):
            output = policy.model.base_model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = policy.logits(output.last_hidden_state[:, -1])  # (B, V)
        cache = output.past_key_values
        token = next_tokens(logits, chances[:, step], sampling.temperature, sampling.top_p)  # (B,)
        for n, drawn_token in zip(going, token.tolist(), strict=True):  # CPU-GPU sync point
            if ends[n] is None and drawn_token in eos:
                ends[n] = drawn_token
            elif ends[n] is None:
                drawn[n].append(drawn_token)
        left = [line for line, n in enumerate(going) if ends[n] is None]
        if not left:
            break
        tokens, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        if len(left) <= SHRINK * len(going):
            going = [going[line] for line in left]
            lines = torch.tensor(left, device=world.device)
            tokens, positions, mask, chances = (
                x[lines] for x in (tokens, positions, mask, chances)
            )
            cache.batch_select_indices(lines)
    return [Answer(tuple(some), end) for some, end in zip(drawn, ends, strict=True)]
