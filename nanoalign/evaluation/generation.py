"""Sampling from a policy: in batches, with its KV cache; each rank samples its share.

The random numbers of an answer depend on the seed, the prompt and the number of the answer alone,
not on the batch or the rank. Every rank has the whole policy; nothing is sharded.

Shapes: B answers of a batch, T tokens of the longest prompt, V vocabulary.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from nanoalign.batch import Row
from nanoalign.distributed import World, autocast, progress_bar
from nanoalign.encode import tokenize
from nanoalign.model import Policy
from nanoalign.packing import rope
from nanoalign.ranks.collectives import gather

# What transformers calls a KV cache: since 5.24 by the first name.
CACHE = next(x for x in ("cache", "past_key_values") if hasattr(BaseModelOutputWithPast, x))

SHRINK = 0.75  # finished answers are removed from a batch when at most this share is unfinished


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
    """One sampled response."""

    tokens: tuple[int, ...]  # without the EOS
    end: int | None  # the id of the EOS that ended it; None: sampling stopped at max_new_tokens

    @property
    def ended(self) -> bool:
        return self.end is not None

    @property
    def drawn(self) -> list[int]:
        """The sampled tokens of the answer, and its EOS if it ended with one."""
        return [*self.tokens, *([self.end] if self.ended else [])]


def eos_ids(policy: Policy, tokenizer) -> set[int]:
    """The ids that end an answer: the tokenizer's EOS, and those of the generation config."""
    configured = getattr(policy.model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {i for i in (tokenizer.eos_token_id, *configured) if i is not None}


def next_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draws a token per row by inversion: logits (B, V), uniform (B,) in [0, 1) -> ids (B,).

    Tokens are ordered by their probability, and the first that together reach top_p are kept
    (Holtzman et al. 2020, arXiv 1904.09751, section 3.1). Among these, the first token at which the
    cumulated probability, normalised to 1, exceeds `uniform` is drawn.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / temperature).softmax(-1)
    probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulated = probabilities.cumsum(-1)  # (B, V)
    kept = cumulated - probabilities < top_p
    total = (probabilities * kept).sum(-1)
    place = (cumulated <= (uniform * total)[:, None]).sum(-1)  # (B,)
    place = place.minimum(kept.sum(-1) - 1)  # by rounding, the last sum may be below the total
    return tokens.gather(-1, place[:, None]).squeeze(-1)


@torch.no_grad()
def generate(
    policy: Policy, rows: Sequence[Row], eos: Collection[int], sampling: Sampling, world: World
) -> list[list[Answer]]:
    """Samples `sampling.samples` answers to the prompt of every row: [row][answer]. A collective.

    The answers are the same on all ranks. eos: the ids that end an answer.
    """
    wanted = [(i, k) for i in range(len(rows)) for k in range(sampling.samples)]
    wanted.sort(key=lambda ik: -len(rows[ik[0]].prompt))  # similar lengths together
    size = sampling.batch_size
    batcher = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    sampled: dict[tuple[int, int], Answer] = {}
    share = batcher[world.rank :: world.size]
    shown = world.is_main and len(share) > 1
    with progress_bar(len(share), "batch", shown, desc="sampling") as progress:
        for batch in share:
            uniform = [_uniform(rows[i], k, sampling) for i, k in batch]
            drawn = _sample(policy, [rows[i] for i, _ in batch], uniform, eos, sampling, world)
            sampled |= dict(zip(batch, drawn, strict=True))
            progress.update()
    answers = {key: answer for part in gather(sampled, world) for key, answer in part.items()}
    return [[answers[i, k] for k in range(sampling.samples)] for i in range(len(rows))]


def _uniform(row: Row, number: int, sampling: Sampling) -> np.ndarray:
    """(max_new_tokens,) random numbers in [0, 1), which depend on prompt, seed and number alone.

    number: that of the answer among those to its prompt, from 0.
    """
    digest = hashlib.sha256(row.prompt.astype("<i4").tobytes()).digest()
    key = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.default_rng((sampling.seed, number, *key)).random(sampling.max_new_tokens)


def _sample(
    policy: Policy,
    rows: Sequence[Row],
    uniform: list[np.ndarray],
    eos: Collection[int],
    sampling: Sampling,
    world: World,
) -> list[Answer]:
    """Samples one answer to the prompt of each row.

    uniform: for each row (max_new_tokens,) random numbers in [0, 1).
    """
    width = max(len(row.prompt) for row in rows)
    tokens, mask = np.zeros((2, len(rows), width), dtype=np.int64)
    for n, row in enumerate(rows):  # padded on the left, so that all answers begin at one place
        tokens[n, width - len(row.prompt) :] = row.prompt
        mask[n, width - len(row.prompt) :] = 1
    tokens, mask = (torch.from_numpy(x).to(world.device) for x in (tokens, mask))  # (B, T)
    chances = torch.from_numpy(np.stack(uniform)).to(world.device)  # (B, max_new_tokens)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T)
    border = rope.border_of(policy.model.config)
    if border is not None:  # no answer crosses it, see answers.sampler_of
        positions += (mask.sum(1, keepdim=True) > border) * rope.LONG
    drawn: list[list[int]] = [[] for _ in rows]
    ends: list[int | None] = [None] * len(rows)
    lines = list(range(len(rows)))  # which answer each line of the batch is
    cache = None
    for step in range(sampling.max_new_tokens):
        with autocast(world.device, policy.dtype):
            output = policy.model.base_model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{CACHE: cache},
            )
            logits = policy.head(output.last_hidden_state[:, -1])  # (B, V)
        cache = output[CACHE]
        token = next_tokens(logits, chances[:, step], sampling.temperature, sampling.top_p)  # (B,)
        for n, new in zip(lines, token.tolist(), strict=True):  # waits for the GPU
            if ends[n] is None and new in eos:
                ends[n] = new
            elif ends[n] is None:
                drawn[n].append(new)
        unfinished = [line for line, n in enumerate(lines) if ends[n] is None]
        if not unfinished:
            break
        tokens, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        if len(unfinished) <= SHRINK * len(lines):
            lines = [lines[line] for line in unfinished]
            picked = torch.tensor(unfinished, device=world.device)
            tokens, positions, mask, chances = (
                x[picked] for x in (tokens, positions, mask, chances)
            )
            cache.batch_select_indices(picked)
    return [Answer(tuple(tokens), end) for tokens, end in zip(drawn, ends, strict=True)]


def decode_continuation(tokens: Sequence[int], tokenizer, after: str = "") -> str:
    """The text of a sampled response, also of its special tokens, with a space that it begins with.

    after: what the chat template writes between an answer and EOS. If the last special token is one
        of it, and white space alone follows, both are removed. Other special tokens stay: they end
        tool calls. A SentencePiece tokenizer removes the first space of a text, so the tokens are
        decoded behind a newline.
    """
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = max((n for n, token in enumerate(tokens) if token in special), default=len(tokens))
    is_end = last < len(tokens) and tokenizer.decode(tokens[last]) in after
    if is_end and not tokenizer.decode(tokens[last + 1 :]).strip():
        tokens = tokens[:last]
    newline = tokenize(["\n"], tokenizer)[0]
    before, both = (tokenizer.decode(ids) for ids in (newline, [*newline, *tokens]))
    return both[len(before) :] if before and both.startswith(before) else tokenizer.decode(tokens)
