"""The flags that train_rm.py and train_dpo.py share, and a parser whose errors are RunErrors."""

import argparse
import copy
import math
from argparse import Namespace
from collections.abc import Callable

import torch

from nanoalign.distributed import environment_ranks
from nanoalign.errors import RunError, check_words

SCHEDULES, PRECISIONS = ("cosine", "linear", "constant"), ("auto", "fp32", "bf16", "fp16")
# A GPU needs many tokens at a time; a CPU is as fast with few, which take less memory.
MICRO_BATCH_TOKENS = 8192 if torch.cuda.is_available() else 2048


class Parser(argparse.ArgumentParser):
    """argparse with defaults in its help and without abbreviations; an error is a RunError.

    Subpackages append functions:
        derived     the flags -> values of other flags, for those that were not given (None)
        refusals    the flags -> what is wrong with them, or None
    """

    def __init__(self, doc: str, **options):
        first, _, rest = doc.partition("\n")
        options |= {"allow_abbrev": False, "formatter_class": HelpFormatter, "add_help": False}
        super().__init__(description=first, epilog=rest, **options)
        self.derived: list[Callable[[Namespace], dict]] = []
        self.refusals: list[Callable[[Namespace], str | None]] = []
        self.further: list[argparse._ArgumentGroup] = []  # groups that --help all shows alone
        help_options = {"nargs": "?", "choices": ["all"], "default": argparse.SUPPRESS}
        self.add_argument("-h", "--help", action=Help, help="this page", **help_options)

    def extend(self, *add_arguments: Callable[["Parser"], None]) -> None:
        """Adds the flags of subpackages, whose groups --help does not show; --help all does."""
        first = len(self._action_groups)
        for add in add_arguments:
            add(self)
        self.further += self._action_groups[first:]

    def parse_args(self, argv: list[str] | None = None) -> Namespace:
        """Raises RunError for control characters, what argparse refuses, and the first refusal."""
        check_words(argv)
        args = super().parse_args(argv)
        for derive in self.derived:
            missing = {k: v for k, v in derive(args).items() if getattr(args, k) is None}
            args = Namespace(**vars(args) | missing)
        for message in filter(None, (refusal(args) for refusal in self.refusals)):
            raise RunError(message)
        return args

    def help_text(self, everything: bool) -> str:
        """The page of --help; everything: also the groups of subpackages, as --help all shows."""
        page = copy.copy(self)
        if self.further:
            page.usage = "%(prog)s [--FLAG VALUE ...]"
        if self.further and not everything:
            page._action_groups = [g for g in self._action_groups if g not in self.further]
            titles = "".join(f"\n  {group.title}" for group in self.further)
            page.epilog = f"--help all also explains the flags of{titles}\n{self.epilog}"
        return page.format_help()

    def error(self, message: str) -> None:
        raise RunError(f"{message} (see {self.prog} --help)")


class Help(argparse.Action):
    """--help [all]: prints the page on rank 0 of those that torchrun starts, and exits."""

    def __call__(self, parser: Parser, args: Namespace, value: str | None, flag: str = "") -> None:
        if environment_ranks()[0] == 0:
            print(parser.help_text(everything=value == "all"))
        parser.exit()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring unchanged, and the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def number(
    kind: type, at_least: float = -math.inf, below: float = math.inf, above: float = -math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite number in [at_least, below) that is above `above`.

    kind: int or float.
    """
    limits = {"of at least": at_least, "above": above, "below": below}
    limits = [f"{word} {value:g}" for word, value in limits.items() if math.isfinite(value)]
    expected = f"expected a {'whole ' * (kind is int)}number {' and '.join(limits)}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (at_least <= value < min(below, 2**53) and value > above):
            raise argparse.ArgumentTypeError(f"{expected}, got '{text}'")
        return value

    return parse


positive = number(float, above=0)


def add_forward_arguments(group: argparse._ArgumentGroup, word: str | None = None) -> None:
    """Adds the flags of a forward, in training and evaluation; they change results by rounding.

    With --precision bf16 that is the rounding of bfloat16. word: auto, in training.
    """
    add, count = group.add_argument, number(int, 1)
    text = "most tokens of one forward on one rank" + ", or auto: as many as fit" * bool(word)
    size = word if word and torch.cuda.is_available() else MICRO_BATCH_TOKENS
    number_or_word = lambda text: text if text == word else count(text)  # noqa: E731
    add("--micro_batch_tokens", type=number_or_word, default=size, help=text)
    text = "type of matrix products; auto: bf16 on GPUs that have it; fp16: for GPUs that do not"
    add("--precision", choices=PRECISIONS, default="auto", help=text)


def add_training_arguments(
    parser: Parser, data: str, out: str, warmup: float, lr: float, tiny_lr: float, epochs: int = 1
) -> None:
    """Adds the flags of both training scripts. Arguments beside the parser are defaults of flags.

    tiny_lr, epochs: of --lr and --epochs with --model tiny; lr, and 1 epoch: with other models.
    """
    count, share = number(int, 1), number(float, 0, 1)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=[data], metavar="SOURCE", help="training pairs (docs/data.md)")
    text = "held-out pairs; default: tiny:test for --data tiny, else --eval_share of --data"
    add("--eval_data", nargs="+", metavar="SOURCE", help=text)
    text = "share of the prompts of --data to hold out; not with --eval_data, --fold, --data tiny"
    add("--eval_share", type=share, default=0.1, help=text)
    text = (
        "maximum tokens of a prompt plus one response; if there are more, the prompt's beginning "
        "is cut first (at least half of this limit stays), then the response's end"
    )
    add("--max_length", type=number(int, 2), default=1024, help=text)

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=count, default=64, help="records a step of all ranks; 8 GPUs: 256+")
    text = "passes over the data; default: 1" + f" (with --model tiny: {epochs})" * (epochs > 1)
    add("--epochs", type=count, help=text)
    add("--steps", type=count, help="optimizer steps in all; default: as many as --epochs needs")
    text = f"peak learning rate; default: {lr:g} (with --model tiny: {tiny_lr:g})"
    add("--lr", type=positive, help=text)
    text = "share of the steps in which the learning rate rises to --lr"
    add("--warmup", type=share, default=warmup, help=text)
    add("--schedule", choices=SCHEDULES, default="cosine", help="how --lr falls after --warmup")
    text = "weight decay of AdamW, only on matrices"
    add("--weight_decay", type=number(float, 0), default=0.0, help=text)
    add("--max_grad_norm", type=positive, default=1.0, help="gradients are clipped to this norm")
    text = "seed of the held-out prompts, of the order of the rows, and of new parameters"
    add("--seed", type=number(int, 0), default=0, help=text)

    add_forward_arguments(machine := parser.add_argument_group("machine"), "auto")
    text = "compute each block again in the backward pass, which takes less memory"
    action = argparse.BooleanOptionalAction
    machine.add_argument("--activation_checkpointing", action=action, default=False, help=text)

    add = parser.add_argument_group("run").add_argument
    text = "steps between two evaluations; default: about ten evaluations a run"
    add("--eval_every", type=count, metavar="STEPS", help=text)
    add("--out", default=out, help="folder of the run: model, metrics, curves, checkpoints")
    add("--overwrite", action="store_true", help="replace the run in --out")
    tiny, others = {"lr": tiny_lr, "epochs": epochs}, {"lr": lr, "epochs": 1}
    parser.derived.append(lambda args: tiny if args.model == "tiny" else others)
