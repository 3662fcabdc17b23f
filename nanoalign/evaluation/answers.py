"""The answers of the policy and of the baseline: sampled from a model, or read from a file."""

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanoalign.batch import Row
from nanoalign.checkpoints.folders import local_folder
from nanoalign.checkpoints.guards import load_tokenizer
from nanoalign.checkpoints.slices import read_slices
from nanoalign.checks import check_layout
from nanoalign.distributed import World, compute_dtype, print0
from nanoalign.encode import Record, encode_all, resolve_template
from nanoalign.errors import RunError
from nanoalign.evaluation.generation import Answer, Sampling, eos_ids, generate
from nanoalign.evaluation.rows import decode_continuation
from nanoalign.evaluation.scoring import score_rows
from nanoalign.formats.prompts import prompt_key, read_answers, read_prompts
from nanoalign.loop import Batches
from nanoalign.model import Policy

ROLES = ("policy", "baseline")  # of the two models of a comparison


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of one model, equally many to every prompt: as texts, and as sampled tokens."""

    texts: list[list[str]]  # [prompt][answer]
    sampled: list[list[Answer]] | None = None  # None if they are from a file

    def ended(self, n: int, k: int) -> bool | None:
        """Whether answer k to prompt n ended with EOS; None if that is not known."""
        return None if self.sampled is None else self.sampled[n][k].ended


@dataclass(frozen=True, slots=True)
class Sampler:
    """A policy, whole on every rank, and the prompts as its rows."""

    name: str
    policy: Policy
    tokenizer: object
    template: str  # the one that `auto` selected; `auto` where it selected several
    rows: list[Row]


# --- answers of a file ----------------------------------------------------------------------------


def read_given(
    sources: dict[str, str], data: list[str] | None, samples: int, allow_missing: bool
) -> tuple[list[Record], dict[str, Answers]]:
    """The prompts of a comparison, and by role the answers to them that are in files.

    sources: of answers, by role. data: sources of prompts; if it is None, the prompts are those of
        the first source of answers, each once. samples: answers to each prompt. allow_missing: see
        `match`.
    Raises RunError if no prompt has answers of all files.
    """
    if data:
        prompts = read_prompts(data)
    else:
        once: dict[str, Record] = {}
        for prompt in read_prompts([next(iter(sources.values()))]):
            once.setdefault(prompt_key(prompt.prompt), prompt)
        prompts = list(once.values())
    texts = {role: match(each, prompts, samples, allow_missing) for role, each in sources.items()}
    complete = [n for n in range(len(prompts)) if all(each[n] for each in texts.values())]
    if not complete:
        raise RunError(f"none of the {len(prompts):,} prompts has answers of both models")
    return [prompts[n] for n in complete], {
        role: Answers([each[n] for n in complete]) for role, each in texts.items()
    }


def match(
    source: str, prompts: Sequence[Record], samples: int, allow_missing: bool
) -> list[list[str] | None]:
    """Of each prompt its `samples` answers of a file, in the order of the file; None: too few.

    Raises RunError if a prompt has too few answers, or answers are left over; with allow_missing
    these are counted and left out.
    """
    remaining = read_answers(source)
    matched, lacking = [], []
    for prompt in prompts:
        own = remaining.get(prompt_key(prompt.prompt), [])
        enough = len(own) >= samples
        matched.append([own.pop(0) for _ in range(samples)] if enough else None)
        if not enough:
            lacking.append(prompt)
    remaining = {prompt: own for prompt, own in remaining.items() if own}
    problems = []
    if lacking:
        first = lacking[0]
        problems.append(
            f"{len(lacking):,} of {len(prompts):,} prompts have fewer than {samples} answers for "
            f"each time they occur, the first {first.name}, {prompt_key(first.prompt)[:60]!r}"
        )
    if remaining:
        problems.append(
            f"{sum(map(len, remaining.values())):,} answers are to other prompts than those of the "
            f"data, or to these more often, the first to {next(iter(remaining))[:60]!r}"
        )
    if problems and not allow_missing:
        raise RunError(
            f"{source}: {'; '.join(problems)}. Complete the file, give --data or --samples that "
            "fit it, or leave these out with --allow_missing"
        )
    for problem in problems:
        print0(f"{'left out':<11} {source}: {problem}")
    return matched


# --- answers of a policy --------------------------------------------------------------------------


def load_sampler(name: str, prompts: Sequence[Record], args: Namespace, world: World) -> Sampler:
    """The policy of a name and its prompts. Raises RunError if its answers could be too long."""
    folder, dtype = local_folder(name), compute_dtype(args.precision, world.device)
    policy = Policy.load(folder, None, dtype, trainable=False, read=read_slices).to(world.device)
    tokenizer = load_tokenizer(folder)
    templates = {resolve_template(args.template, each.prompt, tokenizer) for each in prompts}
    template = templates.pop() if len(templates) == 1 else args.template
    rows = encode_all(prompts, tokenizer, args.max_length, template)
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row.prompt) for row in rows) + args.max_new_tokens
    if positions is not None and longest > positions:
        raise RunError(
            f"model '{name}' has {positions} positions, but the longest prompt and "
            f"--max_new_tokens {args.max_new_tokens} have {longest} tokens; lower it, or "
            "--max_length"
        )
    counts = Counter(note for row in rows for note in row.notes)
    notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items())
    print0(
        f"{'model':<11} {name}: {policy.count_parameters():,} parameters; "
        f"{len(prompts):,} prompts, template {template}{notes}"
    )
    return Sampler(name, policy, tokenizer, template, rows)


def check_sampler(
    sampler: Sampler, prompts: Sequence[Record], max_length: int, batches: Batches
) -> None:
    """Raises RunError if log-probabilities of batches are not those of the policy's own forward."""
    rows = encode_all(with_answer(prompts), sampler.tokenizer, max_length, sampler.template)
    batches.prepare(sampler.policy)
    check_layout(sampler.policy, rows, batches, f"'{sampler.name}'")


def with_answer(prompts: Sequence[Record]) -> list[Record]:
    """The prompts with an answer, so that a model is checked before hours of sampling."""
    return [replace(prompt, responses=("I see.",)) for prompt in prompts]


def sample(sampler: Sampler, settings: Sampling, world: World) -> Answers:
    """The answers of the policy to every prompt. A collective."""
    eos = eos_ids(sampler.policy, sampler.tokenizer)
    sampled = generate(sampler.policy, sampler.rows, eos, settings, world)
    cut = sum(not answer.ended for some in sampled for answer in some)
    print0(
        f"{'sampled':<11} {sampler.name}: {len(sampled) * settings.samples:,} answers, {cut:,} of "
        f"them cut at {settings.max_new_tokens} tokens"
    )
    texts = [[decode_continuation(a.tokens, sampler.tokenizer) for a in some] for some in sampled]
    return Answers(texts, sampled)


def share_vocabulary(samplers: Sequence[Sampler]) -> bool:
    first, *others = (sampler.tokenizer.get_vocab() for sampler in samplers)
    return all(each == first for each in others)


def kl_is_known(samplers: Sequence[Sampler], temperature: float, top_p: float) -> bool:
    """Whether kl_estimate is unbiased: temperature 1, no top_p, and one vocabulary."""
    if len(samplers) < 2 or temperature != 1 or top_p != 1:
        return False
    return share_vocabulary(samplers)


def kl_estimate(
    policy: Sampler, baseline: Sampler, answers: Answers, batches: Batches
) -> dict[str, float]:
    """KL(policy || baseline): the mean difference of log-probabilities, in nats, of the answers.

    answers: of the policy, at temperature 1 without top_p. A cut answer counts with the tokens that
    it has.
    """
    logps = []  # of policy and baseline: (answers,) each
    for sampler in (policy, baseline):
        rows = [
            Row(row.name, row.prompt, (np.array(answer.drawn, np.int32),), ())
            for row, some in zip(sampler.rows, answers.sampled, strict=True)
            for answer in some
        ]
        logps.append(np.array(score_rows(sampler.policy, rows, batches, f"'{sampler.name}'"))[:, 0])
    difference = logps[0] - logps[1]
    tokens = sum(len(answer.drawn) for some in answers.sampled for answer in some)
    return {"kl_per_answer": difference.mean().item(), "kl_per_token": difference.sum() / tokens}
