"""One pair from text to gradient: each place calls a function and prints its result.

The policy starts as the reference, so log-ratios are 0 and the loss is ln 2. After one step of
AdamW they are not, and the log-probabilities, the loss and its gradient are printed once more.
"""

import bdb
import inspect
import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from nanoalign import records
from nanoalign.batch import Batch, Row, collate
from nanoalign.data.formats import formats
from nanoalign.data.sources import open_source
from nanoalign.data.templates import render
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.logps import sums_of_responses
from nanoalign.losses import dpo_loss
from nanoalign.model import TINY, Policy
from nanoalign.tiny.world import SIZES

ROOT = Path(__file__).parents[2]
RESPONSES = ("chosen", "rejected")
T = TypeVar("T")


class Places:
    """Numbers the places of a walk, and prints the file and line of the function of each."""

    def __init__(self, stop: int | None):
        self.number, self.stop = 0, stop

    def call(self, title: str, function: Callable[..., T], *args: object, **options: object) -> T:
        """Begins a place: prints its title and calls function(*args, **options).

        Before place `stop` it opens the debugger, in which `step` enters the function.
        """
        self.number += 1
        inner = inspect.unwrap(function)  # without decorators
        path, (_, line) = Path(inspect.getsourcefile(inner)), inspect.getsourcelines(inner)
        root = ROOT if path.is_relative_to(ROOT) else Path(torch.__file__).parents[1]
        where = f"{path.relative_to(root)}:{line}"
        print(f"\n{self.number}. {title}   ({function.__qualname__}, {where})\n", flush=True)
        if self.number == self.stop:
            breakpoint()
        return function(*args, **options)


def walk(number: int, beta: float, lr: float, stop: int | None) -> None:
    """Prints one pair on its way from text to gradient.

    number: of the record in the embedded data, from 1. beta: of DPO. lr: of the step of AdamW.
    stop: the place before which the debugger opens. Raises RunError if there is no such record.
    """
    places = Places(stop)
    try:
        pass_places(places, number, beta, lr)
    except bdb.BdbQuit:
        print(f"left the debugger at place {places.number}")


def pass_places(places: Places, number: int, beta: float, lr: float) -> None:
    # text
    where, line = line_of(number)
    _, record = places.call(
        "A line of a file becomes a record", records.parse, line, where, formats()
    )
    print(f"prompt    {record.prompt!r}")
    for name, response in zip(RESPONSES, record.responses, strict=True):
        print(f"{name:<9} {response!r}")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = places.call(
        "A template writes the prompt as the model was trained to read it",
        render,
        record,
        tokenizer,
        template="pku",
    )
    print(f"prompt    {text.prompt!r}")

    # tokens
    (row,) = places.call(
        "Text becomes token ids; each response ends with EOS",
        encode_all,
        [record],
        tokenizer,
        template=lambda record, tokenizer: text,
    )
    show_row(row, tokenizer)
    batch = places.call("A line per response, behind its prompt: tensors", collate, [row])
    show_batch(batch)

    # log-probabilities
    disable_progress_bar()
    policy, reference = Policy.load(TINY), Policy.load(TINY, trainable=False)
    hidden = places.call("The transformer: a state of every place", policy.hidden, batch)
    first = batch.predicted_at[0].item()
    print(f"hidden    {shape(hidden)}, of place {first}: {numbers(hidden[first, :4])} ...")
    tokens = places.call("The log-probability of every scored token", policy.tokens, batch)
    with torch.no_grad():
        reference_tokens = reference.tokens(batch)
        textbook = policy.textbook(batch)
    show_tokens(batch, tokenizer, {"reference": reference_tokens, "policy": tokens})
    logps = places.call(
        "Their sums: log pi(y | x), in nats", sums_of_responses, tokens, batch.lengths
    )
    print(f"policy    {shape(logps)} {numbers(logps)}")
    print(f"by all logits of the model's own forward (Policy.textbook): {numbers(textbook)}")
    reference_logps = sums_of_responses(reference_tokens, batch.lengths)

    # loss and gradient
    four = [
        logps[batch.chosen],
        logps[batch.rejected],
        reference_logps[batch.chosen],
        reference_logps[batch.rejected],
    ]
    losses = show_loss(places, four, beta)
    show_gradient(losses, four, beta)

    # a step
    optimizer = torch.optim.AdamW(policy.parameter_groups(0.0), lr=lr)
    places.call("Back to all parameters", losses.mean().backward)
    print(f"gradient of {policy.count_parameters(trainable=True):,} parameters")
    norm = places.call(
        "Their gradient is clipped to a norm of 1",
        torch.nn.utils.clip_grad_norm_,
        list(policy.parameters()),
        1.0,
    )
    print(f"norm      {norm.item():.4f} before")
    before = torch.cat([p.detach().flatten() for p in policy.parameters()])
    places.call(f"One step of AdamW, with a learning rate of {lr:g}", optimizer.step)
    moved = (torch.cat([p.detach().flatten() for p in policy.parameters()]) - before).abs()
    print(f"a parameter has moved by {moved.mean():.2g} on average, by {moved.max():.2g} at most")
    after = places.call("The log-probability of every scored token, again", policy.tokens, batch)
    show_tokens(batch, tokenizer, {"before": tokens, "after": after})
    logps = sums_of_responses(after, batch.lengths)
    four = [logps[batch.chosen], logps[batch.rejected], *four[2:]]
    losses = show_loss(places, four, beta, "The loss of DPO, again")
    show_gradient(losses, four, beta)


def line_of(number: int) -> tuple[str, str]:
    """(path and line, JSON text) of record `number` of the embedded training data, from 1."""
    for where, *_, line in islice(open_source("tiny"), number - 1, number):
        return where, line
    raise RunError(f"--record {number}: the embedded data have {SIZES['train']:,} records")


# --- what is printed ------------------------------------------------------------------------------


def show_row(row: Row, tokenizer) -> None:
    for name, ids in zip(("prompt", *RESPONSES), (row.prompt, *row.responses), strict=True):
        print(f"{name:<9} ({len(ids)},) int32")
        print(f"          {' '.join(f'{n}={tokenizer.decode([n])!r}' for n in ids.tolist())}")


def show_batch(batch: Batch) -> None:
    ids = batch.inputs["input_ids"]
    print(f"input_ids {shape(ids)}")
    scored = torch.zeros(ids.numel(), dtype=torch.bool)
    scored[batch.predicted_at + 1] = True
    for n, (name, line) in enumerate(zip(RESPONSES, scored.view(ids.shape).tolist(), strict=True)):
        print(f"  line {n} {name:<9} scored: {''.join('1' if token else '.' for token in line)}")
    print(f"predicted_at {shape(batch.predicted_at)} {ends(batch.predicted_at)}")
    print("          each the place before its token, counted through both lines:")
    print(f"          line 1 begins at {ids.shape[1]}")
    print(f"targets   {shape(batch.targets)} {ends(batch.targets)}: the scored tokens")
    print(f"lengths   {shape(batch.lengths)} {batch.lengths.tolist()}")
    print(f"chosen    {batch.chosen.tolist()}, rejected {batch.rejected.tolist()}: which response")


def show_tokens(batch: Batch, tokenizer, columns: dict[str, Tensor]) -> None:
    """A line per scored token: its log-probability in each column, its probability in the last."""
    last = f"p {list(columns)[-1]}"
    print(f"{'':<10}{'token':<14}{''.join(f'{name:>11}' for name in columns)}{last:>12}")
    places = iter(range(len(batch.targets)))
    for name, length in zip(RESPONSES, batch.lengths.tolist(), strict=True):
        for _ in range(length):
            place = next(places)
            token = repr(tokenizer.decode([batch.targets[place].item()]))
            values = [column[place].item() for column in columns.values()]
            shown = "".join(f"{value:>11.4f}" for value in values)
            print(f"{name:<10}{token:<14}{shown}{math.exp(values[-1]):>12.4f}")


def show_loss(
    places: Places, four: Sequence[Tensor], beta: float, title: str = "The loss of DPO"
) -> Tensor:
    """The loss of DPO, and the same by hand."""
    losses, chosen, rejected = places.call(title, dpo_loss, *four, beta)
    pi_w, pi_l, ref_w, ref_l = (value.item() for value in four)
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    by_hand = np.logaddexp(0, -margin)
    print(f"log-ratio of chosen    {pi_w:.4f} - {ref_w:.4f} = {pi_w - ref_w:+.4f}")
    print(f"log-ratio of rejected  {pi_l:.4f} - {ref_l:.4f} = {pi_l - ref_l:+.4f}")
    print(f"h = {beta:g} * difference   = {margin:+.4f}")
    print(f"rewards   chosen {chosen.item():+.4f}, rejected {rejected.item():+.4f}")
    print(f"loss      {shape(losses)} {losses.item():.4f}; -log sigmoid(h) by hand: {by_hand:.4f}")
    return losses


def show_gradient(losses: Tensor, four: Sequence[Tensor], beta: float) -> None:
    """The gradient by the log-probabilities of the policy, by autograd and by hand."""
    found = torch.autograd.grad(losses.sum(), four[:2], retain_graph=True)
    pi_w, pi_l, ref_w, ref_l = (value.item() for value in four)
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    weight = beta * math.exp(-np.logaddexp(0, margin))  # beta * sigmoid(-h)
    print(
        "\nd loss / d log pi: -beta sigmoid(-h) for the chosen response, +beta sigmoid(-h) for the"
    )
    print("rejected one; no gradient goes into the reference, which is not trained")
    print(f"  autograd  chosen {found[0].item():+.5f}  rejected {found[1].item():+.5f}")
    print(f"  by hand   chosen {-weight:+.5f}  rejected {weight:+.5f}")


def shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def ends(tensor: Tensor) -> str:
    """The first and the last numbers of a tensor."""
    first, last = tensor[:4].tolist(), tensor[-2:].tolist()
    return f"{' '.join(map(str, first))} ... {' '.join(map(str, last))}"


def numbers(tensor: Tensor) -> str:
    return " ".join(f"{value:.4f}" for value in tensor.flatten().tolist())
