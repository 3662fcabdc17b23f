"""A reward model that scores the answers of policy and baseline."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from nanoalign.batch import Row
from nanoalign.distributed import print0
from nanoalign.errors import RunError
from nanoalign.evaluation.answers import ROLES, Answers, Sampler, with_answer
from nanoalign.evaluation.comparison import Compared, Judged
from nanoalign.evaluation.scoring import Encoded, Judge, check_one, load_reward_model, views
from nanoalign.loop import Batcher
from nanoalign.packing.self_check import check_fits
from nanoalign.records import Record
from nanoalign.rewards.published import Published, reading_of
from nanoalign.rewards.several import Mixed, SeveralRewards


def load_judge(
    prompts: Sequence[Record], samplers: Sequence[Sampler], batcher: Batcher, args: Namespace
) -> Judge:
    """Loads the judge of --reward, and checks it before anything is sampled.

    Raises RunError if the model can't be loaded, can't read every prompt with an answer, or has
    fewer positions than its max_length; and as views, check_one and rule_for.
    """
    model, tokenizer = load_reward_model(args.reward, args.precision, batcher, args.reward_head)
    found = views(model, args.combine and args.combine[0][0], args.combine)
    check_one(found)
    view, (rule, published) = found[0], rule_for(model, tokenizer, samplers, args)
    mixed = Mixed(model, view.shares)
    judge = Judge(args.reward, mixed, tokenizer, view, rule, batcher, published)
    judge.check(judge.encode(with_answer(prompts)))
    positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and rule[1] > positions:
        raise RunError(
            f"reward model '{args.reward}' has {positions} positions; give --reward_max_length "
            f"{positions} or less"
        )
    return judge


def rule_for(
    model: SeveralRewards, tokenizer, samplers: Sequence[Sampler], args: Namespace
) -> tuple[tuple[str, int], Published | None]:
    """Returns what reading_of returns of the judge: the template is that of its training.

    A reward model of another program without a chat template gets the template of the policies.
    Raises RunError if the template of a model with a rule, or without a chat template, is not that
    of the policies, unless --reward_template is given; and as reading_of.
    """
    flags = args.reward_template, args.reward_max_length, "reward_"
    (template, max_length), published = reading_of(model, tokenizer, args.reward, *flags)
    if published or args.reward_template is not None:
        return (template, max_length), published
    if template == "auto":
        template = samplers[0].template if samplers else args.template
    for sampler in samplers:
        if sampler.template != template:
            raise RunError(
                f"reward model '{args.reward}' reads prompts with template {template}, but model "
                f"'{sampler.name}' with template {sampler.template}; give --template {template} to "
                f"use it for both, or --reward_template {template} to confirm that they differ"
            )
    return (template, max_length), None


def compare(
    judge: Judge,
    prompts: Sequence[Record],
    answers: dict[str, Answers],
    as_sampled: bool,
) -> list[Compared]:
    """Computes the rewards of all answers to each prompt, and prints a line. A collective.

    answers: by role. as_sampled: whether the length of an answer is the number of tokens that were
        sampled, not of those that the judge's tokenizer makes of its text.
    """
    places = [
        (n, role, k)
        for n in range(len(prompts))
        for role in ROLES
        for k in range(len(answers[role].written[n]))
    ]
    # Each answer by itself, so that its reward does not depend on how long the others are.
    own = [answers[role].written[n][k] for n, role, k in places]
    records = [
        replace(
            prompts[n],
            responses=[each.answer],
            sampled=None if each.token_ids is None else (each.tokenizer, [each.token_ids]),
        )
        for (n, _, _), each in zip(places, own, strict=True)
    ]
    ended = [each.ended for each in own]
    encoded = judge.encode(records, ended)
    notes = "".join(f"; {count:,} {reason}" for reason, count in encoded[0].counts(records).items())
    print0(
        f"{'judge':<11} {judge.name}: {judge.model.count_parameters():,} parameters; template "
        f"{judge.rule[0]}, max_length {judge.rule[1]}{notes}"
    )
    for part in encoded:  # the token ids of a file may be wrong
        check_fits(judge.model, part.rows, f"reward model '{judge.name}'")
    scores = np.sum([rewards_of(judge, part) for part in encoded], axis=0).tolist()
    lengths = judge.lengths(records, encoded, ended)
    judged = {(n, role): [] for n in range(len(prompts)) for role in ROLES}
    for i, (n, role, k) in enumerate(places):
        ((tokens, read_share),) = lengths[i]
        if as_sampled:
            tokens = len(answers[role].sampled[n][k].drawn)
        about = {"score": scores[i], "tokens": tokens, "read_share": read_share}
        judged[n, role].append(Judged(**own[i]._asdict(), **about))
    return [
        Compared(
            prompt.name, prompt.prompt, *(tuple(judged[n, role]) for role in ROLES), prompt.tools
        )
        for n, prompt in enumerate(prompts)
    ]


def rewards_of(judge: Judge, encoded: Encoded) -> list[float]:
    """The reward of the one response of each row, in the order of the rows. A collective.

    Responses to the same tokens of a prompt are computed in shared rows of about `batcher.tokens`
    tokens. Equal ones are scored once, because rounding differs between rows, so two rewards of
    equal responses might differ.
    """
    shared: dict[bytes, tuple[Row, dict[bytes, np.ndarray]]] = {}  # by prompt, by response
    keys = []
    for row in encoded.rows:
        prompt, response = row.prompt.tobytes(), row.responses[0].tobytes()
        shared.setdefault(prompt, (row, {}))[1][response] = row.responses[0]
        keys.append((prompt, response))
    rows = []
    for row, responses in shared.values():
        alone = tuple(responses.values())
        size = max(1, judge.batcher.tokens // (len(row.prompt) + max(map(len, alone))))
        rows += [replace(row, responses=alone[i : i + size]) for i in range(0, len(alone), size)]
    scores = chain(*judge.score([Encoded(rows, encoded.factor)]))
    places = [(prompt, response) for prompt, (_, once) in shared.items() for response in once]
    known = dict(zip(places, scores, strict=True))
    return [known[key] for key in keys]
