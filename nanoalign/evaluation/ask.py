"""Talking to a policy: what evaluate.py ask reads and prints."""

import sys
from collections.abc import Iterator

from nanoalign.distributed import World
from nanoalign.errors import RunError
from nanoalign.evaluation.answers import sample, sampler_of
from nanoalign.evaluation.generation import Sampling
from nanoalign.files.text import visible
from nanoalign.model import Policy
from nanoalign.records import Record


def read_lines() -> Iterator[str]:
    """Yields the lines of the standard input as they come, until it ends; not those without text.

    Prints "> " before each on a terminal. Raises RunError for a line that is not UTF-8.
    """
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(mark)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise RunError(f"the standard input is not UTF-8: {error}; convert it") from error
        if line.strip():
            yield line


def print_answers(
    prompt: str,
    policy: Policy,
    tokenizer,
    template: str,
    max_length: int,  # tokens of the prompt
    sampling: Sampling,
    world: World,
) -> None:
    """Samples and prints the answers to one prompt. Must be called in a run of one process.

    Prints a note to stderr if the prompt was cut or an answer reached --max_new_tokens. Raises
    RunError as sampler_of.
    """
    record = Record(prompt, (), (), name="the prompt")
    sampler = sampler_of(
        "--policy", policy, tokenizer, [record], template, max_length, sampling.max_new_tokens
    )
    for note in sampler.rows[0].notes:
        print(f"note: {note}", file=sys.stderr)
    answers = sample(sampler, sampling, world)
    for k, answer in enumerate(answers.written[0]):
        number = f"[{k + 1}] " if sampling.samples > 1 else ""
        print(f"{number}{visible(answer.answer.strip())}", flush=True)
        if not answer.ended:
            note = f"this answer was stopped at --max_new_tokens {sampling.max_new_tokens}"
            print(f"note: {note}", file=sys.stderr)
