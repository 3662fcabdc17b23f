"""python -m nanoalign.hub card RUN; python -m nanoalign.hub push OWNER/NAME RUN"""

import argparse
from pathlib import Path

from nanoalign import hosts, hub
from nanoalign.distributed import run
from nanoalign.hub.card import write_card
from nanoalign.hub.push import push


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m nanoalign.hub", allow_abbrev=False)
    hub.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.command == "card":
        return print(write_card(Path(args.run)))
    print(push(Path(args.run), args.name, args.private, args.revision))


if __name__ == "__main__":
    run(main, hosts.report_error)
