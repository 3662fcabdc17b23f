"""The answers of the policy and of the baseline: sampled from a model, or read from a file."""

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanoalign.batch import Row
from nanoalign.data.chat_template import with_arguments
from nanoalign.data.dialogues import messages_of
from nanoalign.data.messages import is_of_assistant
from nanoalign.data.prompts import Written, prompt_key, read_answers, read_prompts
from nanoalign.data.templates import (
    encode_records,
    end_of_calls,
    frame_of_answers,
    resolve_template,
    tokenizer_name,
)
from nanoalign.distributed import World, compute_dtype, print0
from nanoalign.encode import tokenize_continuations
from nanoalign.errors import RunError
from nanoalign.evaluation.generation import Answer, Sampling, decode_continuation, eos_ids, generate
from nanoalign.evaluation.scoring import score_rows
from nanoalign.files.text import named
from nanoalign.loop import Batcher
from nanoalign.model import Policy
from nanoalign.packing import rope
from nanoalign.packing.self_check import check_layout
from nanoalign.records import Record
from nanoalign.weights import adapters
from nanoalign.weights.folders import load_tokenizer
from nanoalign.weights.slices import read_slices

ROLES = ("policy", "baseline")  # of the two models of a comparison


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of one model, one or more to every prompt."""

    written: list[list[Written]]  # [prompt][answer]
    sampled: list[list[Answer]] | None = None  # None if they are from a file

    def summary(self, max_new_tokens: int) -> str:
        """A sentence: the number of answers, and of those that were stopped. They are sampled."""
        ended = [answer.ended for answers in self.sampled for answer in answers]
        return (
            f"{len(ended):,} answers, {ended.count(False):,} of them stopped at --max_new_tokens "
            f"{max_new_tokens}"
        )


@dataclass(frozen=True, slots=True)
class Sampler:
    """A policy, whole on every rank, and the prompts as its rows."""

    name: str
    policy: Policy
    tokenizer: object
    template: str  # which "auto" has selected; "auto" where it selects another for some prompts
    rows: list[Row]
    prompts: Sequence[str | list[dict]] = ()  # of the rows


# --- answers of a file ----------------------------------------------------------------------------


def read_given(
    sources: dict[str, str], data: list[str] | None, keys: Sequence[str] = ()
) -> tuple[list[Record], dict[str, Answers], int]:
    """Returns (prompts, Answers of files by role, number of prompts that were left out).

    The prompts are those that `data` and all sources of answers have, each once. Prints how many
    records the sources have.
    sources: the sources of answers, by role. data: sources of prompts, or None. keys: of --keys,
        for data.
    Raises RunError if no prompt is left.
    """
    prompts: dict[str, dict[str, Record]] = {}  # by role, or of the data; by prompt_key
    given: dict[str, dict[str, list[Written]]] = {}  # by role: the answers by prompt_key
    if data:
        records = read_prompts(data, keys)
        once = prompts["data"] = by_key(records)
        if len(once) < len(records):
            count = f"{len(records):,} records of {len(once):,} prompts"
            print0(f"{'data':<11} {count}, each used once")
    for role, source in sources.items():
        records, given[role] = read_answers(source, role)
        prompts[role] = by_key(records)
        own = [answer for some in given[role].values() for answer in some]
        as_tokens = sum(answer.token_ids is not None for answer in own)
        print0(
            f"{'answers':<11} {named([source])}: {len(own):,} answers to {len(records):,} prompts"
            + (f", {as_tokens:,} with the tokens that the {role} sampled" if as_tokens else "")
        )
    names = [*([" ".join(data)] if data else []), *sources.values()]
    first, *others = prompts.values()
    common = {key: record for key, record in first.items() if all(key in other for other in others)}
    if not common:
        raise RunError(f"no prompt is in all of {', '.join(names)}: a prompt must be the same text")
    if left_out := len(set().union(*prompts.values())) - len(common):
        print0(f"{'left out':<11} {left_out:,} prompts that are not in all of {named(names)}")
    answers = {role: Answers([own[key] for key in common]) for role, own in given.items()}
    return list(common.values()), answers, left_out


def by_key(records: Sequence[Record]) -> dict[str, Record]:
    """The first record of each prompt, by its prompt_key."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(prompt_key(record.prompt, record.tools), record)
    return first


# --- answers of a policy --------------------------------------------------------------------------


def load_policy(name: str, args: Namespace, world: World) -> tuple[Policy, object]:
    """Loads (frozen policy, tokenizer with --template_args) of a folder, OWNER/NAME or "tiny".

    Every rank has the whole policy.
    """
    folder, dtype = adapters.model_folder(name), compute_dtype(args.precision, world.device)
    read = adapters.reading(read_slices)
    policy = Policy.load(folder, None, dtype, trainable=False, read=read).to(world.device)
    return policy, with_arguments(load_tokenizer(folder), args.template_args)


def load_sampler(name: str, prompts: Sequence[Record], args: Namespace, world: World) -> Sampler:
    """Loads the policy `name`, encodes the prompts for it by the flags, and prints a line."""
    policy, tokenizer = load_policy(name, args, world)
    sampler = sampler_of(
        name, policy, tokenizer, prompts, args.template, args.max_length, args.max_new_tokens
    )
    counts = Counter(note for row in sampler.rows for note in row.notes)
    notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items())
    print0(
        f"{'model':<11} {name}: {policy.count_parameters():,} parameters; "
        f"{len(prompts):,} prompts, template {sampler.template}{notes}"
    )
    return sampler


def sampler_of(
    name: str,
    policy: Policy,
    tokenizer,
    prompts: Sequence[Record],
    template: str,
    max_length: int,  # tokens of a prompt
    max_new_tokens: int,
) -> Sampler:
    """Encodes the prompts for a policy.

    Raises RunError if the longest prompt and max_new_tokens have more tokens than it has positions,
    or if an answer might cross the border of LongRoPE, where all earlier keys would change.
    """
    templates = {resolve_template(template, record.prompt, tokenizer) for record in prompts}
    template = templates.pop() if len(templates) == 1 else template
    rows = encode_records(prompts, tokenizer, max_length, template)
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row.prompt) for row in rows) + max_new_tokens
    if positions is not None and longest > positions:
        raise RunError(
            f"model '{name}' has {positions} positions, but the longest prompt and "
            f"--max_new_tokens {max_new_tokens} have {longest} tokens; lower one of "
            "--max_new_tokens and --max_length"
        )
    rope.read_marks(policy.model)
    border = rope.border_of(policy.model.config)
    crossing = [
        row for row in rows if len(row.prompt) <= (border or 0) < len(row.prompt) + max_new_tokens
    ]
    if crossing:
        raise RunError(
            f"{crossing[0].name}: has {len(crossing[0].prompt)} tokens, so an answer of "
            f"--max_new_tokens {max_new_tokens} might cross token {border}, where model '{name}' "
            "changes its rotary frequencies (LongRoPE); lower --max_new_tokens, or remove the "
            "prompt"
        )
    texts = [record.prompt for record in prompts]
    return Sampler(name, policy, tokenizer, template, rows, texts)


def check_sampler(
    sampler: Sampler, prompts: Sequence[Record], max_length: int, batcher: Batcher
) -> None:
    """Compares the policy's log-probabilities of a batch with those of its own forward.

    Raises RunError where they differ. max_length: tokens of a prompt.
    """
    rows = encode_records(with_answer(prompts), sampler.tokenizer, max_length, sampler.template)
    batcher.prepare(sampler.policy)
    check_layout(sampler.policy, rows, batcher, f"'{sampler.name}'")


def with_answer(prompts: Sequence[Record]) -> list[Record]:
    """Returns the prompts with one short answer each, to check a model before sampling."""
    return [replace(prompt, responses=("I see.",)) for prompt in prompts]


def sample(sampler: Sampler, settings: Sampling, world: World) -> Answers:
    """Samples the answers of the policy to every prompt, the same on all ranks. A collective."""
    eos = eos_ids(sampler.policy, sampler.tokenizer)
    sampled = generate(sampler.policy, sampler.rows, eos, settings, world)
    tokenizer = sampler.tokenizer
    templates = [resolve_template(sampler.template, x, tokenizer) for x in sampler.prompts]
    frames = {name: frame_of_answers(tokenizer, name) for name in {*templates}}
    names = {name: tokenizer_name(tokenizer, name) for name in {*templates}}
    behind_calls = end_of_calls(tokenizer) if "chat" in names else ""
    written = []
    for name, prompt, answers in zip(templates, sampler.prompts, sampled, strict=True):
        before, after = frames[name]
        if is_of_assistant(messages_of(prompt)[-1]):
            before = ""  # the answer continues a message
        texts = [decode_continuation(answer.tokens, tokenizer, after) for answer in answers]
        ends = (after, behind_calls if name == "chat" else "")
        tokens = [whole_tokens(answer, ends, tokenizer) for answer in answers]
        written.append(
            [
                Written(text.removeprefix(before), answer.ended, names[name], ids)
                for text, answer, ids in zip(texts, answers, tokens, strict=True)
            ]
        )
    return Answers(written, sampled)


def whole_tokens(answer: Answer, ends: Sequence[str], tokenizer) -> list[int]:
    """The sampled tokens of an answer up to its EOS, which encoding appends.

    ends: what the template writes between an answer and EOS, and behind the argument of a call. An
    answer that another token ended gets what the template writes from this token on, as in
    training; a token that it does not write is left out.
    """
    if answer.end in (None, tokenizer.eos_token_id):
        return list(answer.tokens)
    after, behind_call = tokenize_continuations(ends, tokenizer)
    # The end of a tool call is the last token that is written behind it: "<|call|>".
    tails = after, behind_call[-1:] if answer.end in tokenizer.added_tokens_decoder else []
    tail = next((tail for tail in tails if tail[:1] == [answer.end]), [])
    return [*answer.tokens, *tail]


def share_vocabulary(samplers: Sequence[Sampler]) -> bool:
    """Whether both models are sampled, and have the same tokens."""
    vocabularies = [sampler.tokenizer.get_vocab() for sampler in samplers]
    return len(vocabularies) == 2 and vocabularies[0] == vocabularies[1]


def log_ratios(
    policy: Sampler, baseline: Sampler, answers: Answers, batcher: Batcher
) -> list[list[float]]:
    """Returns log(policy / baseline) of each answer to each prompt, in nats. A collective.

    answers: of the policy; a stopped one counts with the tokens that it has. If they were sampled
        at temperature 1 without top_p, and the models have one vocabulary, their mean is an
        unbiased estimate of KL(policy || baseline).
    """
    logps = []  # of the policy and of the baseline: (answers,)
    for sampler in (policy, baseline):
        batcher.prepare(sampler.policy)  # another model may have prepared it since
        rows = [
            Row(row.name, row.prompt, (np.array(answer.drawn, np.int32),), ())
            for row, sampled in zip(sampler.rows, answers.sampled, strict=True)
            for answer in sampled
        ]
        logps.append(np.array(score_rows(sampler.policy, rows, batcher, f"'{sampler.name}'"))[:, 0])
    ratios = iter((logps[0] - logps[1]).tolist())
    return [[next(ratios) for _ in sampled] for sampled in answers.sampled]
