"""Results on the Hugging Face Hub: a model card, and the upload of a run's folder.

    python -m nanoalign.hub card runs/dpo
    python -m nanoalign.hub push OWNER/NAME runs/dpo

card.py     the model card (README.md) of a run: its data, settings, figures and command
push.py     which files are uploaded, and the upload
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True)
    card = commands.add_parser("card", help="write the model card, README.md, of a run")
    push = commands.add_parser("push", help="upload the model of a run, with its model card")
    push.add_argument("name", metavar="OWNER/NAME", help="the repository; it is made if needed")
    for each in (card, push):
        each.add_argument("run", metavar="RUN", help="folder of a run: runs/dpo")
    push.add_argument("--private", action="store_true", help="of a repository that is made")
    push.add_argument("--revision", help="branch; default: main")
