"""Row -> Batch: a prompt with its responses as token ids, and rows as tensors.

`collate` puts every response on a line of its own, behind its prompt and padded on the right: the
textbook layout. nanoalign/packing fills the same Batch with rows that compute a prompt once.

    tokens    p0 p1 p2 c0 c1 c2      line 0, T = 6: c0 is predicted at place 2, c1 at 3, c2 at 4
              p0 p1 p2 r0 r1  .      line 1:        r0 is predicted at place 6 + 2, r1 at 6 + 3

Shapes: B pairs, N lines, T tokens of a line, S responses, M scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from nanoalign.errors import RunError


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A prompt and its responses as token ids; each response ends with EOS unless it was cut."""

    name: str  # file and line, for errors
    prompt: np.ndarray  # (P,) int32
    responses: tuple[np.ndarray, ...]  # K arrays of int32
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)  # (chosen, rejected): indices of responses
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # a value per pair (or response)
    notes: tuple[str, ...] = ()  # what encoding changed, to be counted

    def __len__(self) -> int:
        """The number of tokens of the prompt, counted once, plus those of all responses."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def longest(self) -> int:
        """The number of tokens of the prompt plus those of its longest response."""
        return len(self.prompt) + max(map(len, self.responses), default=0)


@dataclass(slots=True)
class Batch:
    """Rows as tensors. Of scores (S,), scores[chosen] and scores[rejected], (B,), are compared."""

    inputs: dict[str, object]  # keyword arguments of the transformer
    predicted_at: Tensor  # (M,) place in the flat (N * T) whose state predicts each scored token
    targets: Tensor  # (M,) ids of the scored tokens
    lengths: Tensor  # (S,) scored tokens of each response; they sum to M
    ends_at: Tensor  # (S,) place in the flat (N * T) of the last token of each response
    chosen: Tensor  # (B,) index of the chosen response of each pair, among the S
    rejected: Tensor  # (B,) index of the rejected response
    weights: Tensor  # (B,) float32: those of a row's pairs sum to 1, or to 0 in a filler batch
    extra: dict[str, Tensor]  # the rows' `extra`, concatenated: (B,) or (S,) each
    rows: Sequence[int] = ()  # which rows of the step these are; none in a filler batch

    def to(self, device: torch.device) -> "Batch":
        """A Batch whose tensors, also those of inputs and extra, are on the device."""
        return Batch(**{f.name: to_device(getattr(self, f.name), device) for f in fields(self)})


def collate(rows: Sequence[Row], weight: float = 1.0) -> Batch:
    """Returns a Batch with one line per response.

    weight: of each row, shared evenly by its pairs.
    Raises RunError if the rows do not have the same names in `extra`.
    """
    lines = [(row.prompt, response) for row in rows for response in row.responses]
    width = max(len(prompt) + len(response) for prompt, response in lines)
    tokens = np.zeros((len(lines), width), dtype=np.int64)  # no token sees the padding behind it
    predicted_at, ends_at = [], []
    for n, (prompt, response) in enumerate(lines):
        start, end = len(prompt), len(prompt) + len(response)
        tokens[n, :end] = np.concatenate((prompt, response))
        predicted_at.append(n * width + np.arange(start - 1, end - 1))
        ends_at.append(n * width + end - 1)
    return Batch(
        inputs={"input_ids": torch.from_numpy(tokens)},
        predicted_at=torch.from_numpy(np.concatenate(predicted_at)),
        ends_at=torch.tensor(ends_at),
        **comparisons(rows, weight),
    )


def comparisons(rows: Sequence[Row], weight: float) -> dict[str, object]:
    """Returns the fields of a Batch, by name, that do not depend on the layout of the rows.

    Raises RunError if the rows do not have the same names in `extra`.
    """
    responses, pairs = [], []
    for row in rows:
        pairs += [(len(responses) + w, len(responses) + r) for w, r in row.pairs]
        responses += row.responses
    if other := next((row for row in rows if row.extra.keys() != rows[0].extra.keys()), None):
        raise RunError(
            f"{other.name} has the values {[*other.extra]}, but {rows[0].name} has "
            f"{[*rows[0].extra]}; train on them in separate runs"
        )
    extra = {name: [row.extra[name] for row in rows] for name in rows[0].extra}
    chosen, rejected = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    return {
        "targets": torch.from_numpy(np.concatenate(responses).astype(np.int64)),
        "lengths": torch.tensor([len(response) for response in responses]),
        "chosen": chosen,
        "rejected": rejected,
        "weights": torch.tensor([weight / len(row.pairs) for row in rows for _ in row.pairs]),
        "extra": {name: torch.from_numpy(np.concatenate(parts)) for name, parts in extra.items()},
    }


def to_device(value: object, device: torch.device) -> object:
    """Returns a tensor, or the tensors of a dict, on the device; other values are unchanged."""
    if isinstance(value, dict):
        return {name: to_device(each, device) for name, each in value.items()}
    if isinstance(value, Tensor) and device.type == "cuda":  # pinned: copied without waiting
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device) if isinstance(value, Tensor) else value


def lengths_of(rows: Sequence[Row]) -> np.ndarray:
    """The number of tokens of each row, (N,) int64. Rows that have `lengths` are not read."""
    known = getattr(rows, "lengths", None)
    return np.array([len(row) for row in rows], dtype=np.int64) if known is None else known
