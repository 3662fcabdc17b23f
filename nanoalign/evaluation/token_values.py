"""What each token adds to the log-ratio of a policy, or to the reward of a reward model.

    policy         added_t = log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)
    reward model   added_t = r(x, y_<=t) - r(x, y_<t)

Their sums over a response are what training reads: log(pi(y | x) / pi_ref(y | x)), and r(x, y) less
the reward that the model gives where the prompt ends. A pair is split into four kinds of tokens:

    chosen     The capital is Paris of course EOS     shared shared shared own beyond beyond eos
    rejected   The capital is Lyon EOS                shared shared shared own eos

Shapes: P pairs, M scored tokens of a batch, S responses, n tokens of one response.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoalign.batch import Batch, Row
from nanoalign.data.formats import formats
from nanoalign.data.sources import check_sources, read_records
from nanoalign.distributed import print0
from nanoalign.errors import RunError
from nanoalign.evaluation import implicit, scoring
from nanoalign.evaluation.implicit import PolicyJudge
from nanoalign.evaluation.scoring import Judge, check_finite, prompt_keys, values_of_rows
from nanoalign.evaluation.statistics import Figures, ratio_interval
from nanoalign.files.text import named
from nanoalign.loop import Batcher
from nanoalign.records import Record
from nanoalign.rewards.published_heads import Gated

SIDES = ("chosen", "rejected")
KINDS = ("shared", "own", "beyond", "eos")  # of tokens; a number is a place in this list


class Response(NamedTuple):
    """A response of a pair, token by token: (n,) each."""

    ids: np.ndarray
    added: np.ndarray  # float64, in nats or as a reward
    values: dict[str, np.ndarray]  # by model: log-probabilities; or "reward" behind each token
    kinds: np.ndarray  # places in KINDS


class Pair(NamedTuple):
    """A pair of a record: its two responses are those of SIDES."""

    record: Record
    responses: tuple[Response, Response]

    @property
    def chosen_added(self) -> float:
        """What all tokens of the chosen response add."""
        return float(self.responses[0].added.sum())

    @property
    def margin(self) -> float:
        """The same less what those of the rejected response add."""
        return self.chosen_added - float(self.responses[1].added.sum())


def load_judge(args: Namespace, batcher: Batcher) -> Judge:
    """Loads --policy and --reference, or --model. Raises RunError unless it has one reward."""
    if args.policy:
        return implicit.load_judges(args, batcher)[0]
    judges = scoring.load_judges(args, args.preference, batcher)
    if len(judges) > 1:
        names = ", ".join(judge.view.name for judge in judges)
        raise RunError(f"'{args.model}' has several rewards ({names}); give one as --preference")
    if isinstance(judges[0].model.model, Gated):
        raise RunError(
            f"'{args.model}' weighs its rewards by the prompt; its tokens can't be shown"
        )
    return judges[0]


def read_pairs(judge: Judge, sources: Sequence[str], keys: Sequence[str]) -> list[Pair]:
    """Returns the pairs of some sources, whose tokens are those of training; prints their number.

    A collective. Pairs of two equal responses are left out, as in training. keys: of --keys.
    Raises RunError for data without pairs, or that can't be read, and for values that are not
    finite.
    """
    check_sources(sources)
    read = read_records(formats(judge.view.preference), sources, keys)
    none = RunError(f"{named(sources)}: there are no pairs of two different responses")
    if not (records := [record for record in read if record.pairs]):
        raise none
    encoded = judge.encode(records)
    if len(encoded) > 1:
        raise RunError("a sum of conditioned rewards has no reward of a token; leave --combine out")
    judge.check(encoded)
    ((rows, factor),) = encoded
    if isinstance(judge, PolicyJudge):
        columns = of_policy(judge, rows)
    else:
        columns = {"reward": [factor * values for values in of_reward_model(judge, rows)]}
    eos, pairs = judge.tokenizer.eos_token_id, []
    for n, (record, row) in enumerate(zip(records, rows, strict=True)):
        lengths = np.array([len(response) for response in row.responses])
        each = {name: by_response(values[n], lengths) for name, values in columns.items()}
        for both in record.pairs:
            ids = [row.responses[i] for i in both]
            if np.array_equal(*ids):
                continue
            kinds = [kinds_of(*ids, eos), kinds_of(*ids[::-1], eos)]
            values = [{name: own[i] for name, own in each.items()} for i in both]
            pairs.append(Pair(record, tuple(map(response_of, ids, values, kinds))))
    if not pairs:
        raise none
    notes = "".join(f"; {n:,} {reason}" for reason, n in encoded[0].counts(records).items() if n)
    print0(f"{'data':<11} {named(sources)}: {len(pairs):,} pairs{notes}")
    return pairs


def of_policy(judge: PolicyJudge, rows: Sequence[Row]) -> dict[str, list[np.ndarray]]:
    """By "policy" and "reference": the log-probabilities of all scored tokens of each row."""
    sizes = [sum(map(len, row.responses)) for row in rows]
    columns = {}
    for role, (name, model) in zip(
        ("policy", "reference"), judge.log_ratios.models.items(), strict=True
    ):
        judge.batcher.prepare(model)  # the other model may have prepared it since
        columns[role] = values_of_rows(model.tokens, rows, sizes, judge.batcher)
        for row, values in zip(rows, columns[role], strict=True):
            check_finite(row, values, name)
    return columns


def of_reward_model(judge: Judge, rows: Sequence[Row]) -> list[np.ndarray]:
    """Of each row and response the reward where the prompt ends, and that behind each token.

    Raises RunError for a row without a prompt.
    """
    for row in rows:
        if not len(row.prompt):
            raise RunError(f"{row.name}: --max_length leaves no prompt that responses share")

    def rewards(batch: Batch) -> Tensor:
        before, ends = batch.predicted_at.split(batch.lengths.tolist()), batch.ends_at.split(1)
        both = zip(before, ends, strict=True)
        places = torch.cat([part for response in both for part in response])  # (M + S,)
        return judge.model(replace(batch, ends_at=places))

    sizes = [sum(len(response) + 1 for response in row.responses) for row in rows]
    values = values_of_rows(rewards, rows, sizes, judge.batcher)
    for row, own in zip(rows, values, strict=True):
        check_finite(row, own, judge.name)
    return values


def by_response(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The values of a row as those of each response; with a value more where the prompt ends."""
    more = (len(values) - lengths.sum()) // len(lengths)
    return np.split(values, np.cumsum(lengths + more)[:-1])


def response_of(ids: np.ndarray, values: dict[str, np.ndarray], kinds: np.ndarray) -> Response:
    if "reward" in values:
        reward = values["reward"]  # (n + 1,)
        return Response(ids, np.diff(reward), {"reward": reward[1:]}, kinds)
    return Response(ids, values["policy"] - values["reference"], values, kinds)


def kinds_of(ids: np.ndarray, others: np.ndarray, eos: int) -> np.ndarray:
    """The kinds of the tokens of a response, (n,), beside the other response of its pair.

    shared: the other one has the same token at this place. own: it has another one there. beyond:
    it has ended before. eos: the EOS at the end, which a response that was cut lacks.
    """
    end, others_end = (len(each) - int(each[-1] == eos) for each in (ids, others))
    both = min(end, others_end)
    kinds = np.full(len(ids), KINDS.index("beyond"))
    kinds[:both] = np.where(ids[:both] == others[:both], *map(KINDS.index, ("shared", "own")))
    kinds[end:] = KINDS.index("eos")
    return kinds


def figures_of(pairs: Sequence[Pair], beta: float | None) -> Figures:
    """The figures of all pairs: means over pairs, whose intervals are over prompts.

    SIDE_added is what all tokens of a response add, SIDE_KIND_added what those of one kind add,
    SIDE_KIND_tokens their number; margin_... is that of chosen less that of rejected. SIDE_policy
    and SIDE_reference are log-probabilities, SIDE_reward is the reward at the end of a response:
    that of a policy is beta times the log-ratio.
    """
    prompts = prompt_keys([pair.record for pair in pairs])
    group = np.unique(prompts, return_inverse=True)[1]
    figures = {"pairs": len(pairs), "prompts": int(group.max()) + 1}

    def enter(name: str, values: np.ndarray) -> None:
        mean, low, high = ratio_interval(np.bincount(group, values), np.bincount(group))
        figures.update({name: mean, f"{name}_low": low, f"{name}_high": high})

    sums = {}  # by side: what tokens of each kind add, (P, kinds)
    for n, side in enumerate(SIDES):
        responses = [pair.responses[n] for pair in pairs]
        count = {"minlength": len(KINDS)}
        sums[side] = np.array([np.bincount(r.kinds, r.added, **count) for r in responses])
        tokens = np.array([np.bincount(r.kinds, **count) for r in responses])
        figures |= {f"{side}_{k}_tokens": float(tokens[:, i].mean()) for i, k in enumerate(KINDS)}
        for name in responses[0].values:
            is_reward = name == "reward"
            ends = [r.values[name][-1] if is_reward else r.values[name].sum() for r in responses]
            figures[f"{side}_{name}"] = float(np.mean(ends))
        if beta is not None:
            figures[f"{side}_reward"] = beta * float(sums[side].sum(1).mean())
    sums["margin"] = sums["chosen"] - sums["rejected"]
    for side, values in sums.items():
        enter(f"{side}_added", values.sum(1))
        for i, kind in enumerate(KINDS):
            enter(f"{side}_{kind}_added", values[:, i])
    return figures
