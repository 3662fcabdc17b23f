"""One pair from text to gradient: each place calls a function and prints its result.

The policy starts as the reference, so log-ratios are 0 and the loss is ln 2. After one step of
AdamW they are not, and the log-probabilities, the loss and its gradient are printed once more. The
walk of a reward model has its rewards in place of log-probabilities.
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

from nanoalign import batch as padded
from nanoalign import records
from nanoalign.batch import Batch, Row
from nanoalign.data.formats import formats
from nanoalign.data.sources import open_source
from nanoalign.data.templates import render
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.logps import sums_of_responses
from nanoalign.losses import dpo_loss, pairwise_reward_loss
from nanoalign.model import TINY, Policy, RewardModel, Scorer
from nanoalign.packing.attention import use_tree_attention
from nanoalign.packing.packed import collate
from nanoalign.packing.tree import spans
from nanoalign.records import Record
from nanoalign.tiny.world import SIZES, true_reward
from nanoalign.weights.slices import read_slices

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


def walk(number: int, beta: float, lr: float, stop: int | None, rm: bool = False) -> None:
    """Prints one pair on its way from text to gradient.

    number: of the record in the embedded data, from 1. beta: of DPO. lr: of the step of AdamW.
    stop: the place before which the debugger opens. rm: trains a reward model, not a policy.
    Raises RunError if there is no such record or place.
    """
    last, kind = (12, walk_reward_model) if rm else (13, walk_policy)
    if stop is not None and not 1 <= stop <= last:
        raise RunError(f"--stop {stop}: this walk has the places 1 to {last}")
    places = Places(stop)
    try:
        row, tokenizer = text_to_tokens(places, number)
        batch = places.call("The prompt once, both responses behind it: tensors", collate, [row])
        show_batch(batch, tokenizer)
        kind(places, row, batch, tokenizer, beta, lr)
    except bdb.BdbQuit:
        print(f"left the debugger at place {places.number}")


def text_to_tokens(places: Places, number: int) -> tuple[Row, object]:
    """The first three places: a line of the data, its text for the model, its token ids."""
    where, line = line_of(number)
    title = "A line of a file becomes a record"
    _, record = places.call(title, records.parse, line, where, formats())
    show_record(record)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    title = "A template writes the prompt as the model was trained to read it"
    text = places.call(title, render, record, tokenizer, template="pku")
    print(f"prompt    {text.prompt!r}")
    title = "Text becomes token ids; each response ends with EOS"
    rendered = {"template": lambda record, tokenizer: text}
    (row,) = places.call(title, encode_all, [record], tokenizer, **rendered)
    for name, ids in zip(("prompt", *RESPONSES), (row.prompt, *row.responses), strict=True):
        print(f"{name:<9} ({len(ids)},) int32")
        print(f"          {' '.join(f'{n}={tokenizer.decode([n])!r}' for n in ids.tolist())}")
    return row, tokenizer


def walk_policy(places: Places, row: Row, batch: Batch, tokenizer, beta: float, lr: float) -> None:
    # log-probabilities
    policy, reference = (Policy.load(TINY, trainable=t, read=read_slices) for t in (True, False))
    for model in (policy, reference):
        use_tree_attention(model.model)  # so that the responses do not see each other
    show_hidden(places, policy, batch)
    tokens = places.call("The log-probability of every scored token", policy.tokens, batch)
    with torch.no_grad():
        reference_tokens = reference.tokens(batch)
        textbook = policy.textbook(padded.collate([row]))
    show_tokens(batch, tokenizer, {"reference": reference_tokens, "policy": tokens})
    title = "Their sums: log pi(y | x), in nats"
    logps = places.call(title, sums_of_responses, tokens, batch.lengths)
    print(f"policy    {shape(logps)} {numbers(logps)}")
    print(
        f"each response alone behind its prompt, by all logits (Policy.textbook): "
        f"{numbers(textbook)}"
    )
    reference_logps = sums_of_responses(reference_tokens, batch.lengths)

    # loss, gradient, a step
    four = [each[n] for each in (logps, reference_logps) for n in (batch.chosen, batch.rejected)]
    losses = show_dpo(places, four, beta, "The loss of DPO")
    step(places, policy, losses, lr)
    after = places.call("The log-probability of every scored token, again", policy.tokens, batch)
    columns = {"before": tokens, "after": after, "delta": after - tokens}
    show_tokens(batch, tokenizer, columns)
    logps = sums_of_responses(after, batch.lengths)
    four = [logps[batch.chosen], logps[batch.rejected], *four[2:]]
    show_dpo(places, four, beta, "The loss of DPO, again")


def walk_reward_model(
    places: Places, row: Row, batch: Batch, tokenizer, beta: float, lr: float
) -> None:
    # rewards
    model = RewardModel.load(TINY, head_seed=0, read=read_slices)
    use_tree_attention(model.model)  # so that the responses do not see each other
    show_hidden(places, model, batch)
    title = "A new linear head reads each response at its last token"
    rewards = places.call(title, model.outputs, batch)[:, 0]
    for name, place, reward in zip(RESPONSES, batch.ends_at, rewards.tolist(), strict=True):
        token = tokenizer.decode(batch.inputs["input_ids"][0, place])
        print(f"{name:<9} at place {place}, {token!r}: reward {reward:.4f}")
    with torch.no_grad():
        textbook = model.textbook(padded.collate([row]))
    print(f"each response alone behind its prompt (RewardModel.textbook): {numbers(textbook)}")

    # loss, gradient, a step
    pair = [rewards[batch.chosen], rewards[batch.rejected]]
    losses = show_pairwise(places, pair, "The loss of a reward model")
    step(places, model, losses, lr)
    after = places.call("The rewards, again", model.outputs, batch)[:, 0]
    for name, old, new in zip(RESPONSES, rewards.tolist(), after.tolist(), strict=True):
        print(f"{name:<9} before {old:.4f}, after {new:.4f}, delta {new - old:+.4f}")
    pair = [after[batch.chosen], after[batch.rejected]]
    show_pairwise(places, pair, "The loss of a reward model, again")


def step(places: Places, model: Scorer, losses: Tensor, lr: float) -> None:
    """Three places: the backward pass, clipping, a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=lr)
    places.call("Back to all parameters", losses.mean().backward)
    print(f"gradient of {model.count_parameters(trainable=True):,} parameters")
    clip, parameters = torch.nn.utils.clip_grad_norm_, list(model.parameters())
    norm = places.call("Their gradient is clipped to a norm of 1", clip, parameters, 1.0)
    print(f"norm      {norm.item():.4f} before")
    before = torch.cat([p.detach().flatten() for p in parameters])
    places.call(f"One step of AdamW, with a learning rate of {lr:g}", optimizer.step)
    moved = (torch.cat([p.detach().flatten() for p in parameters]) - before).abs()
    print(f"a parameter has moved by {moved.mean():.2g} on average, by {moved.max():.2g} at most")


def line_of(number: int) -> tuple[str, str]:
    """(path and line, JSON text) of record `number` of the embedded training data, from 1."""
    if not 1 <= number <= SIZES["train"]:
        raise RunError(f"--record {number}: the embedded data have {SIZES['train']:,} records")
    where, *_, line = next(islice(open_source("tiny"), number - 1, None))
    return where, line


# --- what is printed ------------------------------------------------------------------------------


def show_record(record: Record) -> None:
    """The texts, and the true rewards by which the label was drawn (nanoalign/tiny/world.py)."""
    print(f"prompt    {record.prompt!r}")
    rewards = [true_reward(record.prompt, response) for response in record.responses]
    for name, response, reward in zip(RESPONSES, record.responses, rewards, strict=True):
        print(f"{name:<9} {response!r}, true reward {reward:g}")
    lead = rewards[0] - rewards[1]
    words = "is right by" if lead > 0 else "contradicts"
    print(
        f"the label {words} the rule; it was drawn with the probability sigmoid({lead:g}) = "
        f"{1 / (1 + math.exp(-lead)):.3f}"
    )


def show_batch(batch: Batch, tokenizer) -> None:
    ids, positions = (batch.inputs[name][0].tolist() for name in ("input_ids", "position_ids"))
    print(f"input_ids {shape(batch.inputs['input_ids'])}, position_ids likewise")
    parts, start = batch.inputs["tree"].parts, 0
    for name, length in zip(("prompt", *RESPONSES), parts, strict=True):
        end = start + length - 1
        print(
            f"  {name:<9} places {start:>3} to {end:>3}, "
            f"positions {positions[start]:>3} to {positions[end]:>3}"
        )
        start += length
    of_responses = batch.predicted_at.split(batch.lengths.tolist())
    for name, places in zip(RESPONSES, of_responses, strict=True):
        print(f"predicted_at, {name:<9} {ends(places)}")
    print("          each the place before its token; the first token of a response is predicted")
    print("          at the last token of the prompt")
    print(f"targets   {shape(batch.targets)} {ends(batch.targets)}: the scored tokens")
    print(f"lengths   {shape(batch.lengths)} {batch.lengths.tolist()}")
    print(f"chosen    {batch.chosen.tolist()}, rejected {batch.rejected.tolist()}: which response")

    print("\nwho sees whom, of some tokens: a line has an x below each token that it sees")
    prompt, chosen, _ = parts
    shown = [0, prompt - 1, prompt, prompt + 1, prompt + chosen - 1, prompt + chosen,
             prompt + chosen + 1, len(ids) - 1]  # fmt: skip
    print(" " * 36 + "".join(f"{place:>4}" for place in shown))
    of_prompt, before, own, itself = spans(batch.inputs["tree"].rows, None)
    for q in shown:
        seen = [of_prompt[q] <= k < before[q] or own[q] <= k < itself[q] for k in shown]
        what = f"place {q:>3}, position {positions[q]:>3} {tokenizer.decode([ids[q]])!r}"
        print(f"{what:<36}" + "".join("   x" if each else "   ." for each in seen))


def show_hidden(places: Places, model: Scorer, batch: Batch) -> None:
    hidden = places.call("The transformer: a state of every place", model.hidden, batch)
    first = batch.predicted_at[0].item()
    print(f"hidden    {shape(hidden)}, of place {first}: {numbers(hidden[first, :4])} ...")


def show_tokens(batch: Batch, tokenizer, columns: dict[str, Tensor]) -> None:
    """A line per scored token: its value in each column, its probability by the second one."""
    names = list(columns)
    print(f"{'':<10}{'token':<14}{''.join(f'{name:>11}' for name in names)}{'p ' + names[1]:>12}")
    table = torch.stack(list(columns.values()), dim=1).tolist()
    rows = iter(zip(batch.targets.tolist(), table, strict=True))
    for name, length in zip(RESPONSES, batch.lengths.tolist(), strict=True):
        for target, values in islice(rows, length):
            token = repr(tokenizer.decode([target]))
            shown = "".join(f"{value:>11.4f}" for value in values)
            print(f"{name:<10}{token:<14}{shown}{math.exp(values[1]):>12.4f}")


def show_dpo(places: Places, four: Sequence[Tensor], beta: float, title: str) -> Tensor:
    """The loss of DPO and its gradient, by the functions and by hand."""
    losses, chosen, rejected = places.call(title, dpo_loss, *four, beta)
    pi_w, pi_l, ref_w, ref_l = (value.item() for value in four)
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    print(f"log-ratio of chosen    {pi_w:.4f} - {ref_w:.4f} = {pi_w - ref_w:+.4f}")
    print(f"log-ratio of rejected  {pi_l:.4f} - {ref_l:.4f} = {pi_l - ref_l:+.4f}")
    print(f"h = {beta:g} * difference   = {margin:+.4f}")
    print(f"rewards   chosen {chosen.item():+.4f}, rejected {rejected.item():+.4f}")
    show_gradient(losses, four[:2], margin, beta, "log pi")
    return losses


def show_pairwise(places: Places, pair: Sequence[Tensor], title: str) -> Tensor:
    """The loss of a reward model and its gradient, likewise."""
    losses = places.call(title, pairwise_reward_loss, *pair)
    chosen, rejected = (value.item() for value in pair)
    print(f"h = r(chosen) - r(rejected) = {chosen:.4f} - {rejected:.4f} = {chosen - rejected:+.4f}")
    show_gradient(losses, pair, chosen - rejected, 1.0, "r")
    return losses


def show_gradient(
    losses: Tensor, pair: Sequence[Tensor], h: float, factor: float, name: str
) -> None:
    """The loss, and its gradient by the two values that are called `name`, likewise."""
    found = torch.autograd.grad(losses.sum(), pair, retain_graph=True)
    by_hand = np.logaddexp(0, -h)
    print(f"loss      {shape(losses)} {losses.item():.4f}; -log sigmoid(h) by hand: {by_hand:.4f}")
    weight = factor * math.exp(-np.logaddexp(0, h))  # factor * sigmoid(-h)
    print(
        f"\nd loss / d {name}: -{factor:g} * sigmoid(-h) for the chosen response, and the opposite"
    )
    print("for the rejected one: the surer the pair is ranked right, the smaller")
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
