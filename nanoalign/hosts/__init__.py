"""Many ranks, on one host or several: docs/hosts.md.

collectives.py  objects and errors of all ranks
report.py       prints an error once, and one line per host when a rank is lost
terminal.py     text of data and models, as a terminal or a page may show it
progress.py     progress bars
signals.py      signals end a run after its step
stopped.py      its checkpoint, and the line that says how to go on
lock.py         one writer of a folder at a time
locked.py       what a run does that did not get its lock
parent.py       ranks end when torchrun does
debug.py        a debugger on rank 0
groups.py       groups of ranks that each have a copy of the parameters (HSDP), gradient sums
"""

import argparse
import logging
from argparse import Namespace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nanoalign.flags import number

    add = parser.add_argument_group("many ranks").add_argument
    add("--shard_size", type=number(int, 1), metavar="RANKS",
        help="how many ranks share a copy of parameters, gradients and optimizer state, usually "
        "the GPUs of a host; default: all ranks")  # fmt: skip
    add("--gradient_sync", choices=("micro_batch", "step"), default="micro_batch",
        help="when gradients are summed over ranks and sharded; step: once a step, for which each "
        "rank needs memory for all gradients in float32")  # fmt: skip
    add("--timeout", type=number(float, above=0, below=1e9), default=600.0, metavar="SECONDS",
        help="the run ends if a rank waits this long for another one; it must be more than rank 0 "
        "takes to read or write a model")  # fmt: skip
    parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """Why --shard_size is refused, or None. It is called before anything is loaded."""
    from nanoalign.distributed import place

    _, ranks, _ = place()
    if args.shard_size and ranks % args.shard_size:
        return (
            f"--shard_size {args.shard_size} does not divide the {ranks} ranks of this run into "
            "equal groups; give a divisor of their number"
        )
    return None


def setup(args: Namespace):
    """The World of a script. With --shard_size, so many ranks share a copy of the parameters."""
    from nanoalign import distributed

    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(printable)  # what it prints of a config may have escape sequences
    if distributed.place()[1] > 1:
        from nanoalign.hosts.parent import end_with_parent

        end_with_parent()
    if not hasattr(args, "shard_size"):  # of evaluate.py
        return distributed.setup()
    world = distributed.setup(args.timeout)
    if args.shard_size:
        from nanoalign.hosts.groups import divide

        world = divide(world, args.shard_size, args.timeout)
    return world


def report_error(error: BaseException) -> int:
    """The `report` of distributed.run; imported in the branch of an error."""
    from nanoalign.hosts.report import report

    return report(error)


def printable(record: logging.LogRecord) -> bool:
    """A filter that keeps each line of a log, with controls as escapes."""
    letters = (c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in record.getMessage())
    record.msg, record.args = "".join(letters), ()
    return True


def launcher(ranks: int) -> list[str]:
    """The words before a script that start it on so many ranks of a host."""
    return ["torchrun", "--nproc_per_node", str(ranks)] if ranks > 1 else ["python"]
