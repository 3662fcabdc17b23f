"""A reward model as the judge of two sides' answers: how it reads them, and what it says of each."""

import argparse
from dataclasses import replace

from nanoalign import weights
from nanoalign.answers import SIDES, Answers, Asked, with_answer
from nanoalign.checks import check_layout
from nanoalign.comparison import Compared
from nanoalign.distributed import World, print0
from nanoalign.errors import RunError
from nanoalign.models import RewardModel
from nanoalign.prepare import load_tokenizer
from nanoalign.records import Example
from nanoalign.scoring import encode_for, score_encoded, scoring_rule


def reward_rule(
    model: RewardModel, asked: list[Asked], args: argparse.Namespace
) -> tuple[str, int]:
    """(template, max_length) that the judge reads answers with: those of its training.

    One that does not say how it was trained reads the template that the policies are asked with.
    """
    template, max_length = scoring_rule(
        model, args.reward, args.reward_template, args.reward_max_length, "reward_"
    )
    if args.reward_template is not None:
        return template, max_length
    if template == "auto":
        template = asked[0].template if asked else args.template
    for side in asked:
        if side.template != template:
            raise RunError(
                f"reward model '{args.reward}' reads the template {template}, and '{side.name}' is asked "
                f"with {side.template}; give --template {template}, or, where the difference is meant, "
                f"--reward_template {template}"
            )
    return template, max_length


def judge_shares(model: RewardModel, args: argparse.Namespace) -> dict[str, float]:
    """The weights of the judge's preferences: --combine, where it has several."""
    if args.combine is None and len(model.preferences) > 1:
        raise RunError(
            f"reward model '{args.reward}' judges by {', '.join(model.preferences)}; say which with "
            f"--combine, as --combine {model.preferences[0]}=1"
        )
    shares = dict(args.combine or [(model.preferences[0], 1.0)])
    model.combine(shares)  # are they its own?
    return shares


def try_judge(
    model: RewardModel,
    rule: tuple[str, int],
    shares: dict[str, float],
    prompts: list[Example],
    args: argparse.Namespace,
    world: World,
) -> None:
    """Lets the judge read all prompts with an answer, before hours are spent on real ones."""
    tokenizer = load_tokenizer(weights.resolve_model(args.reward))
    for rows, _, _ in encode_for(model, shares, with_answer(prompts), tokenizer, rule):
        model.check_fits(rows)
        check_layout(model, rows, args.share_prefix, world, f"--reward {args.reward}")
    positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and rule[1] > positions:
        raise RunError(
            f"reward model '{args.reward}' knows {positions} positions; give --reward_max_length "
            f"{positions} or less"
        )


def judge(
    model: RewardModel,
    rule: tuple[str, int],
    shares: dict[str, float],
    prompts: list[Example],
    answers: dict[str, Answers],
    own_tokens: bool,
    args: argparse.Namespace,
    world: World,
) -> list[Compared]:
    """Each prompt's k-th answers of both sides, in one row, scored. Every rank must call it.

    own_tokens: whether lengths are those that were sampled, in place of the judge's.
    """
    sides = [answers[side] for side in SIDES]
    places = [(n, k) for n in range(len(prompts)) for k in range(args.samples)]
    judged = [
        replace(
            prompts[n],
            responses=tuple(side.texts[n][k] for side in sides),
            pair_id=f"{prompts[n].pair_id}#{k}",
        )
        for n, k in places
    ]
    ended = [tuple(side.ended(n, k) for side in sides) for n, k in places]
    tokenizer = load_tokenizer(weights.resolve_model(args.reward))
    encoded = encode_for(model, shares, judged, tokenizer, rule, ended)
    counts = encoded[0].counts
    notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items() if count)
    print0(
        f"{'judge':<11} {args.reward}: {model.count_parameters():,} parameters; template {rule[0]}, "
        f"max_length {rule[1]}{notes}"
    )
    scores = score_encoded(model, encoded, args, world)
    tokens = [
        [len(side.sampled[n][k].scored) for side in sides]
        if own_tokens
        else map(len, row.responses)
        for (n, k), row in zip(places, encoded[0].rows, strict=True)
    ]
    return [
        Compared(example.pair_id, example.prompt, *example.responses, *rewards, *lengths, *of_both)
        for example, rewards, lengths, of_both in zip(judged, scores, tokens, ended, strict=True)
    ]
