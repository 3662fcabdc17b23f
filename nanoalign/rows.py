"""Example -> token ids -> Row -> Batch.

A row is `prompt ++ response_1 ++ ... ++ response_K`. Positions restart after the prompt for each
response, and a token attends to what precedes it in the prompt and in its own response:

    tokens    p0 p1 p2 | c0 c1 c2 | r0 r1
    position   0  1  2 |  3  4  5 |  3  4
    segment    0  0  0 |  1  1  1 |  2  2

The log-probability of c0 is read at p2, of c1 at c0; of r0 at p2 too, of r1 at r0. A batch holds its rows one
behind the other (nanoalign/attention.py).

Shapes: B pairs, N lines, T tokens of a line, S responses, M scored tokens. N is 1 where rows are
packed, and one a response where prompts are not shared.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from nanoalign.attention import Tree, to_device
from nanoalign.errors import RunError
from nanoalign.records import Example, Pair
from nanoalign.templates import render, resolve_template

PADDING = -1  # the segment of padding
# What is counted of an example on its way to a row, in the order in which it is reported.
REASONS = (
    "prompts cut at their beginning",
    "responses cut at their end (no EOS)",
    "responses of white space alone",
    "ranked records dropped: all scores equal",
    "pairs dropped: both responses equal",
)
# What a reward model keeps beside its weights, and what encode does: rewards are read at that EOS.
EOS_RULE = "appended, unless the response was cut"


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A prompt and its responses as token ids, each response with its EOS unless it was cut."""

    pair_id: str
    prompt: np.ndarray  # (P,) int32
    responses: tuple[np.ndarray, ...]  # K arrays of int32
    pairs: tuple[Pair, ...] = (Pair(0, 1),)  # which of the responses are compared
    reference_logps: np.ndarray | None = None  # (K,) what a reference said of them, if it was asked

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    def separate(self) -> list["Row"]:
        """K rows of one response each: the layout without sharing."""
        return [
            Row(
                self.pair_id,
                self.prompt,
                (response,),
                (),
                None if self.reference_logps is None else self.reference_logps[k : k + 1],
            )
            for k, response in enumerate(self.responses)
        ]


@dataclass(slots=True)
class Batch:
    """Rows as tensors. Responses stand in the order of the rows, and of a preference pair's row so do
    its two: chosen, rejected, chosen, rejected, ...

    What a module says of the S responses is compared by pairs: scores[batch.chosen], (B,), against
    scores[batch.rejected], (B,).
    """

    tokens: Tensor  # (N, T) int64; padded on the right where N > 1
    positions: Tensor  # (N, T) int64
    segments: Tensor  # (N, T) int64: 0 prompt, 1..K responses, -1 padding
    reads: Tensor  # (M,) where in the flat (N * T) the token is that predicts each scored token
    targets: Tensor  # (M,) ids of the scored tokens
    lengths: Tensor  # (S,) scored tokens of each response; they sum to M
    ends: Tensor  # (S,) where in the flat (N * T) each response has its last token
    chosen: Tensor  # (B,) which of the S responses is the better one of each pair
    rejected: Tensor  # (B,) which is the worse one
    sides: Tensor  # (2, B) bool: whether there is a chosen, a rejected one; else the index is the other's
    margins: Tensor  # (B,) float32: by how much, as the data say
    dimensions: Tensor  # (B,) int64: which of several preferences says so
    weights: Tensor  # (B,) float32: those of a row's pairs sum to 1, or to 0 where it fills a place
    reference_logps: Tensor | None  # (S,) float32, where they were computed before
    tree: Tree | None  # who sees whom in packed rows; None: each line is a plain sequence

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(
            **{k: to_device(v, device) if isinstance(v, Tensor) else v for k, v in moved.items()}
        )


# --- text -> tokens -------------------------------------------------------------------------------


def encode(example: Example, tokenizer, template: str = "auto", max_length: int = 1024) -> Row:
    """Token ids of one example: tokenize(prompt) ++ tokenize(response) ++ EOS, each part tokenised alone.

    Longer than max_length (prompt and one response): the prompt loses its beginning, once for all
    its responses, but keeps at least half of max_length; then a response loses its end, and with it
    its EOS.
    """
    return encode_all([example], tokenizer, template, max_length)[0][0]


def encode_all(
    examples: list[Example],
    tokenizer,
    template: str = "auto",
    max_length: int = 1024,
    ended: Sequence[Sequence[bool | None]] | None = None,
) -> tuple[list[Row], Counter]:
    """All rows, in order, and what was cut on the way: a count for each reason.

    ended: for each response whether it ended by itself where it was sampled (None: not known). One that
        was cut there gets no EOS, nor what a chat template writes behind an answer.
    """
    rows, each = encode_each(examples, tokenizer, template, max_length, ended)
    counts: Counter = Counter()
    for own in each:
        counts.update(own)
    return rows, counts


def encode_each(
    examples: list[Example],
    tokenizer,
    template: str = "auto",
    max_length: int = 1024,
    ended: Sequence[Sequence[bool | None]] | None = None,
) -> tuple[list[Row], list[Counter]]:
    """As encode_all, with the counts of each example."""
    check_tokenizer(tokenizer, max_length)
    eos, begin = tokenizer.eos_token_id, tokenizer.bos_token_id  # to ask again is slow
    groups: dict[str, list[int]] = {}  # template -> examples
    for i, example in enumerate(examples):
        groups.setdefault(resolve_template(template, example, tokenizer), []).append(i)
    rows: list[Row | None] = [None] * len(examples)
    counts = [Counter() for _ in examples]
    for name, indices in groups.items():
        rendered = [render(examples[i], tokenizer, name) for i in indices]
        # A chat template writes its own BOS. Text under `pku` is only text: "<eos>" in it is five
        # characters.
        bos, plain = name != "chat", name == "pku"
        prompts = _tokenize([prompt for prompt, _ in rendered], tokenizer, bos, plain)
        end = tokenizer.eos_token
        texts = [_without_eos(text, end) for _, texts in rendered for text in texts]
        cut = [
            ended is not None and ended[i][k] is False
            for i in indices
            for k in range(len(examples[i].responses))
        ]
        own = [response for i in indices for response in examples[i].responses]
        texts = [
            _without_tail(text, answer) if open_ and name == "chat" else text
            for text, answer, open_ in zip(texts, own, cut, strict=True)
        ]
        # A cut answer of no tokens keeps its EOS: something must be read.
        responses = iter(
            ids if open_ and ids else [*ids, eos]
            for ids, open_ in zip(
                _tokenize_continuations(texts, tokenizer, plain), cut, strict=True
            )
        )
        for i, prompt in zip(indices, prompts, strict=True):
            pair_id = examples[i].pair_id
            if not prompt:
                raise RunError(f"{pair_id}: the prompt has no tokens in this tokenizer; remove it")
            whole = [next(responses) for _ in examples[i].responses]
            prompt, fitting = _fit(prompt, whole, max_length, begin, counts[i])
            ids = [np.asarray(part, dtype=np.int32) for part in (prompt, *fitting)]
            rows[i] = Row(pair_id, ids[0], tuple(ids[1:]), examples[i].pairs)
            blank = sum(not response.strip() for response in examples[i].responses)
            counts[i]["responses of white space alone"] += blank
    return rows, counts


def check_tokenizer(tokenizer, max_length: int) -> None:
    if tokenizer.eos_token_id is None:
        raise RunError(
            "the tokenizer has no EOS token, so a policy could not learn to stop; set eos_token in "
            "tokenizer_config.json"
        )
    if max_length < 2:
        raise RunError(
            f"--max_length {max_length}: must leave room for a prompt and a response, so at least 2"
        )


def _tokenize(texts: list[str], tokenizer, bos: bool, plain: bool) -> list[list[int]]:
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=bos, split_special_tokens=plain, verbose=False)
    if not bos:
        return ids["input_ids"]
    eos, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    return [_one_bos_no_eos(seq, eos, begin) for seq in ids["input_ids"]]


def _one_bos_no_eos(ids: list[int], eos: int | None, bos: int | None) -> list[int]:
    """A prompt as the tokenizer ends and begins it, but for an EOS, and for a BOS that the text has."""
    ids = ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == bos else ids


def _tokenize_continuations(texts: list[str], tokenizer, plain: bool) -> list[list[int]]:
    """Token ids of texts that follow others.

    SentencePiece puts a space before a text's start, which a response is not: with such a tokenizer
    each is tokenised behind a newline.
    """

    def ids_of(texts: list[str]) -> list[list[int]]:
        return _tokenize(texts, tokenizer, bos=False, plain=plain)

    alone = ids_of(texts)
    newline, x, both = ids_of(["\n", "x", "\nx"])
    if both == newline + x:
        return alone
    behind = ids_of(["\n" + text for text in texts])
    start = len(newline)
    return [
        seq[start:] if seq[:start] == newline else ids
        for seq, ids in zip(behind, alone, strict=True)
    ]


def decode_continuation(tokens: Sequence[int], tokenizer) -> str:
    """The text of a sampled response: what its tokens say behind others, with a space that begins it.

    A SentencePiece tokenizer drops a text's first space, so the tokens are decoded behind a newline.
    """
    newline = _tokenize(["\n"], tokenizer, bos=False, plain=False)[0]
    before, both = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (newline, [*newline, *tokens])
    )
    if before and both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _without_tail(text: str, answer: str) -> str:
    """A rendered response up to the end of the answer's own text."""
    own = answer.strip()
    if not own:
        return ""
    place = text.rfind(own)
    return text if place < 0 else text[: place + len(own)]


def _without_eos(text: str, eos: str) -> str:
    """The text without an EOS that template or data wrote (and the newline after it): we add the one."""
    stripped = text.rstrip()
    return stripped.removesuffix(eos) if stripped.endswith(eos) else text


def _fit(
    prompt: list[int],
    responses: list[list[int]],
    max_length: int,
    bos: int | None,
    counts: Counter,
) -> tuple[list[int], list[list[int]]]:
    """Prompt and responses cut to max_length."""
    longest = max(map(len, responses), default=0)  # prompts alone have no responses
    room = max(max_length - longest, max_length // 2)  # tokens of the prompt that may stay
    if len(prompt) > room:
        counts["prompts cut at their beginning"] += 1
        head = prompt[:1] if prompt[0] == bos and room > 1 else []
        prompt = head + prompt[len(prompt) - room + len(head) :]
    room = max_length - len(prompt)
    counts["responses cut at their end (no EOS)"] += sum(
        len(response) > room for response in responses
    )
    return prompt, [response[:room] for response in responses]


def lengths_of(rows: Sequence[Row]) -> np.ndarray:
    """Tokens of each row, (N,); stored rows know theirs."""
    known = getattr(rows, "lengths", None)
    return np.array([len(row) for row in rows]) if known is None else known


def check_fits(rows: Sequence[Row], vocabulary: int, positions: int | None) -> None:
    """Stops where a token id or a position is one that the model does not have."""
    # Stored rows know what none of them exceeds; only where that is too much the one is looked for.
    largest, longest = getattr(rows, "limits", (math.inf, math.inf))
    if largest < vocabulary and (positions is None or longest <= positions):
        return
    for row in rows:
        largest = max(int(part.max()) for part in (row.prompt, *row.responses))
        longest = len(row.prompt) + max(map(len, row.responses))
        if largest >= vocabulary:
            raise RunError(
                f"{row.pair_id}: holds the token id {largest}, but the model knows {vocabulary} ids; "
                "its tokenizer is not the model's"
            )
        if positions is not None and longest > positions:
            raise RunError(
                f"{row.pair_id}: has {longest} tokens, but the model knows {positions} positions; "
                f"give --max_length {positions} or less"
            )


def drop_equal(rows: list[Row], counts: Counter) -> list[Row]:
    """The rows without pairs of equal responses (after cutting), which teach nothing."""
    kept = []
    for row in rows:
        pairs = tuple(
            pair
            for pair in row.pairs
            if None in pair
            or not np.array_equal(row.responses[pair.chosen], row.responses[pair.rejected])
        )
        counts["ranked records dropped: all scores equal"] += not row.pairs
        counts["pairs dropped: both responses equal"] += len(row.pairs) - len(pairs)
        if pairs:
            kept.append(replace(row, pairs=pairs))
    return kept


def row_digest(row: Row) -> bytes:
    """16 bytes that tell every change of a row's tokens or pairs; its pair_id does not count."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (row.prompt, *row.responses):
        digest.update(len(part).to_bytes(4, "little") + part.tobytes())
    digest.update(repr([tuple(pair) for pair in row.pairs]).encode())
    return digest.digest()


# --- rows -> tensors ------------------------------------------------------------------------------


def collate(rows: list[Row], share_prefix: bool = True, weight: float = 1.0) -> Batch:
    """One Batch of the rows, packed into one line; without share_prefix padded, a line a response.

    weight: what each row counts for, shared evenly by its pairs.
    """
    first = np.cumsum([0] + [len(row.responses) for row in rows])  # the first response of each row
    pairs = [(first[n], pair, row) for n, row in enumerate(rows) for pair in row.pairs]
    tree = None
    if share_prefix:
        tree = Tree([(len(row.prompt), *map(len, row.responses)) for row in rows])
        starts = np.cumsum([0] + [len(row) for row in rows])  # of rows among all places
        shape = (1, starts[-1])
    else:
        rows = [part for row in rows for part in row.separate()]
        shape = (len(rows), max(map(len, rows)))
        starts = np.arange(len(rows)) * shape[1]
    tokens, positions = np.zeros((2, shape[0] * shape[1]), dtype=np.int64)
    segments = np.full(shape[0] * shape[1], PADDING, dtype=np.int64)
    reads, targets, lengths, ends = [], [], [], []
    for row, start in zip(rows, starts.tolist(), strict=False):
        width = len(row.prompt)
        prompt_end = end = start + width
        tokens[start:end] = row.prompt
        positions[start:end] = np.arange(width)
        segments[start:end] = 0
        for k, response in enumerate(row.responses, start=1):
            start, end = end, end + len(response)
            tokens[start:end] = response
            positions[start:end] = np.arange(width, width + len(response))
            segments[start:end] = k
            # The first token of a response is predicted by the prompt's last one, the others by the
            # one before.
            reads.append(np.concatenate(([prompt_end - 1], np.arange(start, end - 1))))
            targets.append(response)
            lengths.append(len(response))
            ends.append(end - 1)
    return Batch(
        tokens=torch.from_numpy(tokens.reshape(shape)),
        positions=torch.from_numpy(positions.reshape(shape)),
        segments=torch.from_numpy(segments.reshape(shape)),
        reads=torch.from_numpy(np.concatenate(reads)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        lengths=torch.tensor(lengths),
        ends=torch.tensor(ends),
        chosen=_indices([(start, pair.chosen, pair.rejected) for start, pair, _ in pairs]),
        rejected=_indices([(start, pair.rejected, pair.chosen) for start, pair, _ in pairs]),
        sides=torch.tensor([[side is not None for side in pair[:2]] for _, pair, _ in pairs])
        .reshape(-1, 2)
        .T,
        margins=torch.tensor([pair.margin for _, pair, _ in pairs]),
        dimensions=torch.tensor([pair.dimension for _, pair, _ in pairs], dtype=torch.int64),
        weights=torch.tensor([weight / len(row.pairs) for _, _, row in pairs]),
        reference_logps=_reference_logps(rows),
        tree=tree,
    )


def _reference_logps(rows: list[Row]) -> Tensor | None:
    if rows[0].reference_logps is None:
        return None
    return torch.from_numpy(np.concatenate([row.reference_logps for row in rows]))


def _indices(sides: list[tuple[int, int | None, int | None]]) -> Tensor:
    """The index of one side of each pair, or where there is none that of the other: (B,)."""
    return torch.tensor(
        [start + (other if side is None else side) for start, side, other in sides],
        dtype=torch.int64,
    )
