"""The answers of one side of a comparison: sampled from a policy, or made elsewhere and read from a file."""

import argparse
from dataclasses import dataclass, replace

import numpy as np

from nanoalign import weights
from nanoalign.checks import check_layout
from nanoalign.data import read_answers, read_prompts
from nanoalign.distributed import World, print0
from nanoalign.errors import RunError
from nanoalign.generate import Answer, Sampling, generate
from nanoalign.models import Policy
from nanoalign.prepare import compute_dtype, load_tokenizer
from nanoalign.records import Example
from nanoalign.rows import Row, decode_continuation, encode_all
from nanoalign.scoring import score_rows
from nanoalign.templates import common_template

SIDES = ("policy", "baseline")


@dataclass(frozen=True, slots=True)
class Answers:
    """What one side says: to every prompt equally many answers, as texts and as they were sampled."""

    texts: list[list[str]]
    sampled: list[list[Answer]] | None = None  # None where they were made elsewhere

    def ended(self, n: int, k: int) -> bool | None:
        """Whether the k-th answer to the n-th prompt ended by itself; None where that is not known."""
        return None if self.sampled is None else self.sampled[n][k].ended


@dataclass(frozen=True, slots=True)
class Asked:
    """A policy and the prompts as it reads them. Every rank holds the whole policy."""

    name: str
    policy: Policy
    tokenizer: object
    template: str
    rows: list[Row]


# --- answers of a file ----------------------------------------------------------------------------


def read_given(args: argparse.Namespace) -> tuple[list[Example], dict[str, Answers]]:
    """The prompts of --data, and for each side whose answers are in a file its answers to them.

    Without --data the prompts are those of the file, each once.
    """
    sources = {side: getattr(args, f"{side}_answers") for side in SIDES}
    sources = {side: source for side, source in sources.items() if source}
    if args.data:
        prompts = read_prompts(args.data)
    else:
        source = next(iter(sources.values()))
        once: dict[str, Example] = {}
        for prompt in read_prompts([source]):
            once.setdefault(prompt.prompt_key(), prompt)
        prompts = list(once.values())
    dealt = {side: _deal(source, prompts, args) for side, source in sources.items()}
    asked = [n for n in range(len(prompts)) if all(texts[n] for texts in dealt.values())]
    if not asked:
        raise RunError(f"none of the {len(prompts):,} prompts has answers of both sides")
    return [prompts[n] for n in asked], {
        side: Answers([texts[n] for n in asked]) for side, texts in dealt.items()
    }


def _deal(source: str, prompts: list[Example], args: argparse.Namespace) -> list[list[str] | None]:
    """The answers of a file, in order: to each prompt `args.samples` of them, or None where it lacks some.

    The file's prompts must be the given ones, with as many answers as asked for; with --allow_missing
    what has no counterpart is counted and left out.
    """
    waiting = read_answers(source)
    dealt, lacking = [], []
    for prompt in prompts:
        own = waiting.get(prompt.prompt_key(), [])
        enough = len(own) >= args.samples
        dealt.append([own.pop(0) for _ in range(args.samples)] if enough else None)
        if not enough:
            lacking.append(prompt)
    further = {prompt: own for prompt, own in waiting.items() if own}
    problems = []
    if lacking:
        problems.append(
            f"{len(lacking):,} of {len(prompts):,} prompts have fewer than {args.samples} answers for each "
            f"time they are asked, the first {lacking[0].pair_id}, {lacking[0].prompt_key()[:60]!r}"
        )
    if further:
        problems.append(
            f"{sum(map(len, further.values())):,} answers are to prompts that are not asked, or not so "
            f"often, the first to {next(iter(further))[:60]!r}"
        )
    if problems and not args.allow_missing:
        raise RunError(
            f"{source}: {'; '.join(problems)}. Complete the file, give --data or --samples that fit it, or "
            "leave these out with --allow_missing"
        )
    for problem in problems:
        print0(f"{'left out':<11} {source}: {problem}")
    return dealt


# --- answers of a policy --------------------------------------------------------------------------


def load_asked(name: str, prompts: list[Example], args: argparse.Namespace, world: World) -> Asked:
    """The policy of a name, and the prompts as its rows; stops where it could not answer them."""
    folder = weights.resolve_model(name)
    policy = Policy.load(folder, None, compute_dtype(args, world), trainable=False).to(world.device)
    tokenizer = load_tokenizer(folder)
    template = common_template(args.template, prompts, tokenizer)
    rows, counts = encode_all(prompts, tokenizer, template, args.max_length)
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row.prompt) for row in rows) + args.max_new_tokens
    if positions is not None and longest > positions:
        raise RunError(
            f"'{name}' knows {positions} positions, and the longest prompt with --max_new_tokens "
            f"{args.max_new_tokens} has {longest}; lower it, or --max_length"
        )
    tried, _ = encode_all(with_answer(prompts), tokenizer, template, args.max_length)
    check_layout(policy, tried, False, world, f"'{name}'")  # are its logits read as it makes them?
    notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items() if count)
    print0(
        f"{'model':<11} {name}: {policy.count_parameters():,} parameters; "
        f"{len(prompts):,} prompts, template {template}{notes}"
    )
    return Asked(name, policy, tokenizer, template, rows)


def sample(asked: Asked, args: argparse.Namespace, world: World) -> Answers:
    """The policy's answers to every prompt. Every rank must call it."""
    settings = Sampling(
        args.temperature, args.top_p, args.max_new_tokens, args.samples, args.seed, args.batch_size
    )
    eos = asked.policy.eos_ids(asked.tokenizer)
    sampled = generate(asked.policy, asked.rows, eos, settings, world)
    cut = sum(not answer.ended for some in sampled for answer in some)
    print0(
        f"{'sampled':<11} {asked.name}: {len(sampled) * args.samples:,} answers, of which {cut:,} did not "
        f"end by themselves within {args.max_new_tokens} tokens"
    )
    texts = [[decode_continuation(a.tokens, asked.tokenizer) for a in some] for some in sampled]
    return Answers(texts, sampled)


def kl_estimate(
    policy: Asked,
    baseline: Asked,
    answers: Answers,
    args: argparse.Namespace,
    world: World,
) -> dict[str, float]:
    """KL(policy || baseline), as the mean difference of log-probabilities on the policy's answers.

    That is its expectation where they were sampled at temperature 1 without top_p, and of one
    vocabulary: else there is no estimate. Of a cut answer the tokens that are there count.
    """
    if args.temperature != 1 or args.top_p != 1 or not share_vocabulary(policy, baseline):
        return {}
    logps, tokens = [], 0
    for side in (policy, baseline):
        sampled = [
            Row(row.pair_id, row.prompt, (np.array(answer.scored, np.int32),), ())
            for row, some in zip(side.rows, answers.sampled, strict=True)
            for answer in some
        ]
        logps.append(np.array(score_rows(side.policy, sampled, args, world))[:, 0])
        tokens = sum(len(row.responses[0]) for row in sampled)
    difference = logps[0] - logps[1]
    return {"kl_per_answer": difference.mean().item(), "kl_per_token": difference.sum() / tokens}


def share_vocabulary(one: Asked, other: Asked) -> bool:
    return one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def with_answer(prompts: list[Example]) -> list[Example]:
    """The prompts with an answer, to try out a model before others take hours to answer."""
    return [replace(prompt, responses=("I see.",)) for prompt in prompts]
