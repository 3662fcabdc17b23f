"""The flags that train_rm.py and train_dpo.py share, and a parser whose errors are RunErrors."""

import argparse
import math
import os
from collections.abc import Callable

import torch

from nanoalign.distributed import TIMEOUT
from nanoalign.errors import RunError
from nanoalign.templates import TEMPLATES

EMBEDDED = "tiny"  # the embedded model and its data
# A GPU wants many tokens at a time; a CPU is as fast with few, which need less memory.
MICRO_BATCH_TOKENS = 8192 if torch.cuda.is_available() else 2048


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults in its help, and one way to fail."""

    def __init__(self, doc: str, **options):
        first, _, rest = doc.partition("\n")
        super().__init__(
            description=first,
            epilog=rest,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
            **options,
        )

    def print_help(self, file=None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)

    def error(self, message: str) -> None:
        raise RunError(f"{message} (see {self.prog} --help)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the script's own text as it stands, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


def number(
    kind: type[int] | type[float], at_least: float, below: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite number in [at_least, below)."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not at_least <= value < below:
            limits = f"of at least {at_least:g}" + (f" and below {below:g}" * (below < math.inf))
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {noun} {limits}, got '{text}'")
        return value

    return parse


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = number(float, 0.0)(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got '{text}'")
    return value


PREFERENCES = ("better", "safer")


def weights_by_name(text: str) -> tuple[str, float]:
    """An argparse type: NAME=NUMBER."""
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got '{text}'")
    return name, value


def add_combine_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--combine", nargs="+", type=weights_by_name, metavar="NAME=WEIGHT",
        help="one reward of a model of several preferences: theirs with these weights")  # fmt: skip


def add_forward_arguments(group: argparse._ArgumentGroup) -> None:
    """How a forward runs, in training and evaluation; none of it changes a result beyond rounding."""
    group.add_argument("--micro_batch_tokens", type=number(int, 1), default=MICRO_BATCH_TOKENS,
        help="tokens of one forward on one rank, at most (a longer pair runs alone)")  # fmt: skip
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of matrix products; auto: bf16 on CUDA, fp32 on a CPU")  # fmt: skip
    group.add_argument("--share_prefix", action=argparse.BooleanOptionalAction, default=True,
        help="one row for a prompt and its responses, or with --no-share_prefix one each")  # fmt: skip


def add_training_arguments(
    parser: Parser,
    out: str,
    data: str,
    lr: str,
    epochs: str,
    schedule: str,
    warmup: float,
    preferences: str | None = None,
) -> None:
    """Adds the shared groups of flags; what differs between the scripts is given here."""
    flag = argparse.BooleanOptionalAction
    count = number(int, 1)
    embedded = data

    data = parser.add_argument_group("data")
    data.add_argument("--data", nargs="+", default=[embedded], metavar="SOURCE",
        help="training pairs: paths (.jsonl, .json, also .gz; .parquet), 'tiny', 'tiny:tiny-a' (of one "
        "source), or hf://datasets/..., each also as NAME=SOURCE")  # fmt: skip
    data.add_argument("--eval_data", nargs="+", metavar="SOURCE",
        help="held-out pairs; default: the embedded data's test split with --data tiny, else "
        "--eval_share")  # fmt: skip
    data.add_argument("--eval_share", type=number(float, 0, 1), default=0.1,
        help="share of the prompts of --data that is held out where no --eval_data is given")  # fmt: skip
    data.add_argument("--template", choices=TEMPLATES, default="auto",
        help="how prompt and response become text; auto: the tokenizer's chat template, raw for HH-RLHF "
        "dialogues, else pku")  # fmt: skip
    data.add_argument(
        "--preference",
        choices=PREFERENCES,
        nargs=preferences,
        default=["better"] if preferences else "better",
        help="which label of PKU-SafeRLHF records orders a pair" + ", or both" * bool(preferences),
    )
    data.add_argument("--max_length", type=number(int, 2), default=1024,
        help="tokens of a prompt and one response; longer ones are cut and counted")  # fmt: skip
    data.add_argument("--cache", metavar="FOLDER",
        help="where encoded data and a reference's answers are kept for further runs; default: "
        "$NANOALIGN_CACHE, or nanoalign in $XDG_CACHE_HOME or ~/.cache")  # fmt: skip

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--batch_size", type=count, default=64,
        help="pairs (or ranked records) of one optimizer step, over all ranks")  # fmt: skip
    optimization.add_argument(
        "--epochs", type=count, help=f"passes over the data; default: {epochs}"
    )
    optimization.add_argument(
        "--steps", type=count, help="optimizer steps in all, in place of --epochs"
    )
    optimization.add_argument("--lr", type=positive, help=f"peak learning rate; default: {lr}")
    optimization.add_argument("--warmup", type=number(float, 0, 1), default=warmup,
        help="share of the steps in which the learning rate rises to its peak")  # fmt: skip
    optimization.add_argument("--schedule", choices=("cosine", "linear", "constant"), default=schedule,
        help="the learning rate's way down after the warm-up")  # fmt: skip
    optimization.add_argument("--weight_decay", type=number(float, 0), default=0.0,
        help="AdamW's, on matrices alone")  # fmt: skip
    optimization.add_argument("--max_grad_norm", type=positive, default=1.0,
        help="gradients are scaled down to this norm")  # fmt: skip
    optimization.add_argument(
        "--seed",
        type=number(int, 0),
        default=0,
        help="of the order of the pairs, the choice of held-out prompts, and a reward model's head",
    )

    machine = parser.add_argument_group("machine")
    add_forward_arguments(machine)
    machine.add_argument("--activation_checkpointing", action=flag, default=False,
        help="run each block again in the backward pass instead of keeping its activations")  # fmt: skip
    machine.add_argument("--shard_size", type=count, metavar="RANKS",
        help="ranks that share one copy of parameters, gradients and optimizer state, usually the GPUs of a "
        "host; each such group has its own; default: all ranks")  # fmt: skip
    machine.add_argument("--gradient_sync", choices=("micro_batch", "step"), default="micro_batch",
        help="when gradients are summed over ranks and cut: step communicates once a step, and each rank "
        "holds whole float32 gradients until then")  # fmt: skip
    machine.add_argument("--timeout", type=positive, default=TIMEOUT, metavar="SECONDS",
        help="what a rank waits for the others before it ends the run: more than rank 0 needs to read or "
        "write a model, and than hosts differ in starting")  # fmt: skip

    run = parser.add_argument_group("run")
    run.add_argument("--audit", type=count, metavar="N",
        help="print N training examples token by token, as the loss sees them, and a table of the whole "
        "data set; then stop")  # fmt: skip
    run.add_argument("--eval_every", type=count, metavar="STEPS",
        help="evaluate every so many steps, beside the start and the end of each epoch")  # fmt: skip
    run.add_argument("--save_every", type=count, metavar="STEPS",
        help="write a checkpoint to resume from every so many steps, and at the end")  # fmt: skip
    run.add_argument("--keep", type=count, default=2, help="checkpoints kept, the newest ones")
    run.add_argument("--stop_after", type=count, metavar="STEP",
        help="stop after this step with a checkpoint, to be continued with --resume")  # fmt: skip
    run.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in --out"
    )
    run.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    run.add_argument(
        "--out", default=out, help="folder of the run: model, metrics, curves, checkpoints"
    )
