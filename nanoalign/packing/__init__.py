"""The default layout: rows in one sequence without padding, a prompt computed once.

attention.py    attention of packed rows: each response sees its prompt and itself
flex.py         the same on CUDA, in blocks; its masks are made on the host
by_hand.py      attention with capped scores, or with sinks
plan.py         how rows are divided into micro-batches and dealt to ranks
batches.py      rows -> Batches
refusals.py     errors of models that can't share
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("packing").add_argument(
        "--share_prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute a prompt once for all its responses, without padding; "
        "--no-share_prefix: a padded line per response, for models that cannot share",
    )
