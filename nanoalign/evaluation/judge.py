"""A reward model that scores the answers of policy and baseline."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np

from nanoalign.checkpoints.folders import local_folder
from nanoalign.checkpoints.guards import load_tokenizer
from nanoalign.distributed import compute_dtype, print0
from nanoalign.encode import Record
from nanoalign.errors import RunError
from nanoalign.evaluation.answers import ROLES, Answers, Sampler, with_answer
from nanoalign.evaluation.comparison import Compared, Judged
from nanoalign.evaluation.scoring import (
    Encoded,
    check_encoded,
    encode_for,
    load_reward_model,
    score_encoded,
)
from nanoalign.loop import Batches
from nanoalign.model import RewardModel
from nanoalign.rewards.rule import scoring_rule
from nanoalign.rewards.several import Mixed, preferences_of


@dataclass(frozen=True, slots=True)
class Judge:
    """A reward model, its tokenizer, and how it reads answers."""

    name: str
    model: Mixed
    tokenizer: object
    shares: dict[str, float]  # what the reward of each preference is multiplied by
    rule: tuple[str, int]  # template, max_length


def load_judge(
    prompts: Sequence[Record], samplers: Sequence[Sampler], batches: Batches, args: Namespace
) -> Judge:
    """The judge of --reward.

    Raises RunError before anything is sampled if the model cannot read every prompt with an answer.
    """
    folder, world = local_folder(args.reward), batches.world
    model = load_reward_model(folder, world, compute_dtype(args.precision, world.device))
    shares = shares_of(model, args.reward, args.combine)
    rule = rule_for(model, samplers, args)
    judge = Judge(args.reward, Mixed(model, shares), load_tokenizer(folder), shares, rule)
    batches.prepare(model)
    encoded = encode_for(model, shares, with_answer(prompts), judge.tokenizer, rule)
    check_encoded(judge.model, encoded, batches, f"--reward {judge.name}")
    positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and rule[1] > positions:
        raise RunError(
            f"reward model '{args.reward}' has {positions} positions; give --reward_max_length "
            f"{positions} or less"
        )
    return judge


def shares_of(
    model: RewardModel, name: str, combine: list[tuple[str, float]] | None
) -> dict[str, float]:
    """The factor of each preference. Raises RunError if there are several and no --combine."""
    names = preferences_of(model)
    if combine is None and len(names) > 1:
        raise RunError(
            f"reward model '{name}' has the preferences {', '.join(names)}; give the factor of "
            f"each that counts, as --combine {' '.join(f'{name}=1' for name in names)}"
        )
    return dict(combine or [(names[0], 1.0)])


def rule_for(model: RewardModel, samplers: Sequence[Sampler], args: Namespace) -> tuple[str, int]:
    """(template, max_length) of the answers as the judge reads them: those of its training.

    A reward model of another program, which has no rule, gets the template of the policies.
    Raises RunError if its template is not that of the policies, unless --reward_template is given.
    """
    template, max_length = scoring_rule(
        model, args.reward, args.reward_template, args.reward_max_length, "reward_"
    )
    if args.reward_template is not None:
        return template, max_length
    if template == "auto":
        template = samplers[0].template if samplers else args.template
    for sampler in samplers:
        if sampler.template != template:
            raise RunError(
                f"reward model '{args.reward}' has the template {template}, but the prompts of "
                f"'{sampler.name}' have {sampler.template}; give --template {template}, or, if the "
                f"difference is intended, --reward_template {template}"
            )
    return template, max_length


def compare(
    judge: Judge, prompts: Sequence[Record], answers: dict[str, Answers], as_sampled: bool,
    batches: Batches,
) -> list[Compared]:  # fmt: skip
    """All answers of both models to each prompt, and their rewards. A collective.

    as_sampled: counts the tokens that were sampled, not those of the judge's tokenizer.
    """
    both = [answers[role] for role in ROLES]
    records = [
        replace(prompt, responses=[text for each in both for text in each.texts[n]])
        for n, prompt in enumerate(prompts)
    ]
    ended = [[flag for each in both for flag in each.ended(n)] for n in range(len(prompts))]
    encode = partial(encode_for, judge.model, judge.shares, records, judge.tokenizer)
    encoded = encode(judge.rule, ended)
    notes = "".join(f"; {count:,} {reason}" for reason, count in encoded[0].counts().items())
    print0(
        f"{'judge':<11} {judge.name}: {judge.model.count_parameters():,} parameters; template "
        f"{judge.rule[0]}, max_length {judge.rule[1]}{notes}"
    )
    rewards = [rewards_of(judge, each, batches) for each in encoded]  # [preference][prompt][answer]
    whole = encode((judge.rule[0], sys.maxsize), ended)[0].rows
    compared = []
    for n, record in enumerate(records):
        lengths = [len(response) for response in whole[n].responses]
        read = np.array([[len(r) for r in each.rows[n].responses] for each in encoded]).min(0)
        tokens = lengths
        if as_sampled:
            tokens = [len(answer.drawn) for each in both for answer in each.sampled[n]]
        scores = np.sum([own[n] for own in rewards], axis=0).tolist()
        judged = [
            Judged(*values)
            for values in zip(
                record.responses, scores, tokens, ended[n], (read / lengths).tolist(), strict=True
            )
        ]
        first = len(both[0].texts[n])
        sides = tuple(judged[:first]), tuple(judged[first:])
        compared.append(Compared(record.name, record.prompt, *sides))
    return compared


def rewards_of(judge: Judge, encoded: Encoded, batches: Batches) -> list[list[float]]:
    """The reward of every response of each row. A collective.

    A prompt may have many answers, so they are divided into rows of `batches.tokens` tokens, all
    with the same prompt. Equal responses are scored once: in another row rounding differs, and they
    would no longer tie.
    """
    distinct = [{r.tobytes(): r for r in row.responses} for row in encoded.rows]
    rows = []
    for row, responses in zip(encoded.rows, distinct, strict=True):
        some, size = tuple(responses.values()), max(1, batches.tokens // row.longest)
        rows += [replace(row, responses=some[i : i + size]) for i in range(0, len(some), size)]
    parts = [Encoded(rows, encoded.factor)]
    scores = chain(*score_encoded(judge.model, parts, batches, f"--reward {judge.name}"))
    known = [dict(zip(responses, scores, strict=False)) for responses in distinct]
    return [
        [own[response.tobytes()] for response in row.responses]
        for row, own in zip(encoded.rows, known, strict=True)
    ]
