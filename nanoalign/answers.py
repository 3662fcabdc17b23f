"""The answers of one side of a comparison: sampled from a policy, or made elsewhere and read from a file."""

import argparse
from dataclasses import dataclass

import numpy as np

from nanoalign import weights
from nanoalign.data import read_answers, read_prompts
from nanoalign.distributed import World, print0
from nanoalign.errors import RunError
from nanoalign.generate import Answer, Sampling, generate
from nanoalign.models import Policy
from nanoalign.prepare import compute_dtype, load_tokenizer
from nanoalign.records import Example
from nanoalign.rows import Row, encode_all
from nanoalign.scoring import score_rows
from nanoalign.templates import common_template


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
    sources = {side: getattr(args, f"{side}_answers") for side in ("policy", "baseline")}
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
    if left := len(prompts) - len(asked):
        print0(f"{'left out':<11} {left:,} of {len(prompts):,} prompts, which lack answers")
    return [prompts[n] for n in asked], {
        side: Answers([texts[n] for n in asked]) for side, texts in dealt.items()
    }


def _deal(source: str, prompts: list[Example], args: argparse.Namespace) -> list[list[str] | None]:
    """The answers of a file, in order: to each prompt `args.samples` of them, or None where it lacks some.

    Without --allow_missing the file's prompts must be the given ones, with as many answers as asked for.
    """
    waiting = read_answers(source)
    dealt, lacking = [], []
    for prompt in prompts:
        own = waiting.get(prompt.prompt_key(), [])
        enough = len(own) >= args.samples
        dealt.append([own.pop(0) for _ in range(args.samples)] if enough else None)
        if not enough:
            lacking.append(prompt)
    if args.allow_missing:
        return dealt
    if lacking:
        raise RunError(
            f"{source}: {len(lacking):,} of {len(prompts):,} prompts have fewer than {args.samples} "
            f"answers for each time they are asked, the first {_named(lacking[0])}; "
            "complete the file, or leave these prompts out with --allow_missing"
        )
    if further := {prompt: own for prompt, own in waiting.items() if own}:
        count = sum(map(len, further.values()))
        raise RunError(
            f"{source}: {count:,} answers are to prompts that are not asked, or not so often; the first "
            f"is to {next(iter(further))[:60]!r}. Give --data with these prompts, more --samples, or "
            "leave the answers out with --allow_missing"
        )
    return dealt


def _named(prompt: Example) -> str:
    return f"{prompt.pair_id}, {prompt.prompt_key()[:60]!r}"


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
    texts = [
        asked.tokenizer.batch_decode([a.tokens for a in some], skip_special_tokens=True)
        for some in sampled
    ]
    return Answers(texts, sampled)


def kl_estimate(
    policy: Asked,
    baseline: Asked,
    answers: Answers,
    args: argparse.Namespace,
    world: World,
) -> dict[str, float]:
    """KL(policy || baseline), as the mean difference of log-probabilities on the policy's answers.

    Unbiased for answers sampled at temperature 1 without top_p: else it is the mean log-ratio on
    answers that another distribution gave. Of a cut answer only the tokens that are there count.
    """
    sampled = [
        Row(row.pair_id, row.prompt, (np.array(_with_end(answer), np.int32),), ())
        for row, some in zip(policy.rows, answers.sampled, strict=True)
        for answer in some
    ]
    logps = [
        np.array(score_rows(side.policy, sampled, args, world))[:, 0] for side in (policy, baseline)
    ]
    difference = logps[0] - logps[1]
    tokens = sum(len(row.responses[0]) for row in sampled)
    return {"kl_per_answer": difference.mean().item(), "kl_per_token": difference.sum() / tokens}


def _with_end(answer: Answer) -> list[int]:
    return [*answer.tokens, *([answer.end] if answer.ended else [])]
