"""Results on the Hugging Face Hub: `python -m nanoalign.hub push OWNER/NAME runs/dpo`.

push.py   uploads the files of a model, its card and its figures
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("push",), help="push: upload the result of a run")
    parser.add_argument("name", metavar="OWNER/NAME", help="the model on the Hub")
    parser.add_argument("folder", help="of a run that has finished: its --out")
    parser.add_argument("--private", action="store_true", help="create the model as a private one")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="created where it is not; default: main"
    )
