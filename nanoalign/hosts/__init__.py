"""Many ranks, on one host or several: docs/hosts.md.

report.py       who prints an error, and what is printed when a rank is lost
groups.py       groups of ranks that each hold a copy of the parameters (HSDP), rarer sums
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nanoalign.flags import number, positive

    add = parser.add_argument_group("many ranks").add_argument
    add("--shard_size", type=number(int, 1), metavar="RANKS",
        help="ranks that share one copy of parameters, gradients and optimizer state, usually the "
        "GPUs of a host; default: all ranks")  # fmt: skip
    add("--gradient_sync", choices=("micro_batch", "step"), default="micro_batch",
        help="when gradients are summed over ranks and sharded; step: once a step, and until then "
        "each rank holds all gradients in float32")  # fmt: skip
    add("--timeout", type=positive, default=600.0, metavar="SECONDS",
        help="how long a rank waits for the others before it ends the run: longer than rank 0 "
        "takes to read or write a model")  # fmt: skip
