"""The flags that train_rm.py and train_dpo.py share, and a parser whose errors are RunErrors."""

import argparse
import math
import os
from argparse import Namespace
from collections.abc import Callable

import torch

from nanoalign.encode import TEMPLATES
from nanoalign.errors import RunError

# A GPU needs many tokens at a time; a CPU is as fast with few, which take less memory.
MICRO_BATCH_TOKENS = 8192 if torch.cuda.is_available() else 2048


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults in its help; an error is a RunError.

    derived: functions from the parsed flags to defaults of further flags.
    refusals: functions from the parsed flags to what is wrong with them, or None.
    Subpackages append theirs in `add_arguments`.
    """

    def __init__(self, doc: str, **options):
        first, _, rest = doc.partition("\n")
        options |= {"allow_abbrev": False, "formatter_class": _HelpFormatter}
        super().__init__(description=first, epilog=rest, **options)
        self.derived: list[Callable[[Namespace], dict]] = []
        self.refusals: list[Callable[[Namespace], str | None]] = []

    def parse_args(self, argv: list[str] | None = None, namespace=None) -> Namespace:
        args = super().parse_args(argv, namespace)
        for derive in self.derived:
            self.set_defaults(**derive(args))
            args = super().parse_args(argv, namespace)
        for refusal in self.refusals:
            if message := refusal(args):
                raise RunError(message)
        return args

    def print_help(self, file=None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)

    def error(self, message: str) -> None:
        raise RunError(f"{message} (see {self.prog} --help)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the text of the script unchanged, and each default once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


def number(kind: type, at_least: float, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number in [at_least, below)."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not at_least <= value < below:
            noun = "a whole number" if kind is int else "a number"
            limit = f" and below {below:g}" * (below < math.inf)
            raise argparse.ArgumentTypeError(
                f"expected {noun} of at least {at_least:g}{limit}, got '{text}'"
            )
        return value

    return parse


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = number(float, 0.0)(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got '{text}'")
    return value


def add_forward_arguments(group: argparse._ArgumentGroup) -> None:
    """How a forward runs, in training and in evaluation; no result depends on it but for rounding."""
    add = group.add_argument
    add("--micro_batch_tokens", type=number(int, 1), default=MICRO_BATCH_TOKENS,
        help="tokens of one forward on one rank, at most (a longer row runs alone)")  # fmt: skip
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of matrix products; auto: bf16 on CUDA, fp32 on a CPU")  # fmt: skip


def add_training_arguments(
    parser: Parser, data: str, out: str, warmup: float, lr: float, tiny_lr: float, epochs: int = 1
) -> None:
    """The flags of both training scripts; what differs between them is given. epochs: with tiny."""
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=[data], metavar="SOURCE", help="training pairs: docs/data.md")
    add("--eval_data", nargs="+", metavar="SOURCE",
        help="held-out pairs; default: the test split of the embedded data, else --eval_share")  # fmt: skip
    add("--eval_share", type=number(float, 0, 1), default=0.1,
        help="share of the prompts of --data that is held out if there is no --eval_data")  # fmt: skip
    add("--max_length", type=number(int, 2), default=1024,
        help="tokens of a prompt and one response; longer ones are cut, and counted")  # fmt: skip
    add("--template", choices=TEMPLATES, default="auto",
        help="how prompt and response become text: nanoalign/encode.py")  # fmt: skip

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=number(int, 1), default=64,
        help="pairs (or ranked records) of one optimizer step, over all ranks")  # fmt: skip
    add("--epochs", type=number(int, 1),
        help=f"passes over the data; default: 1, with --model tiny {epochs}")  # fmt: skip
    add("--steps", type=number(int, 1), help="optimizer steps in all, in place of --epochs")
    add("--lr", type=positive,
        help=f"peak learning rate; default: {lr:g}, with --model tiny {tiny_lr:g}")  # fmt: skip
    add("--warmup", type=number(float, 0, 1), default=warmup,
        help="share of the steps in which the learning rate rises to its peak")  # fmt: skip
    add("--schedule", choices=("cosine", "linear", "constant"), default="cosine",
        help="how the learning rate falls after the warm-up")  # fmt: skip
    add("--weight_decay", type=number(float, 0), default=0.0, help="of AdamW, on matrices alone")
    add("--max_grad_norm", type=positive, default=1.0, help="longer gradients are scaled to this")
    add("--seed", type=number(int, 0), default=0,
        help="of the order of the pairs, the held-out prompts, and what is drawn at the start")  # fmt: skip

    add_forward_arguments(machine := parser.add_argument_group("machine"))
    machine.add_argument("--activation_checkpointing", action=argparse.BooleanOptionalAction,
        default=False, help="less memory: runs each block again in the backward pass")  # fmt: skip

    add = parser.add_argument_group("run").add_argument
    add("--eval_every", type=number(int, 1), metavar="STEPS",
        help="evaluate every so many steps, beside the start and the end of each epoch")  # fmt: skip
    add("--out", default=out, help="folder of the run: model, metrics, curves, checkpoints")
    add("--overwrite", action="store_true", help="replace the run in --out")
    parser.derived.append(
        lambda args: {
            "lr": tiny_lr if args.model == "tiny" else lr,
            "epochs": epochs if args.model == "tiny" else 1,
        }
    )
