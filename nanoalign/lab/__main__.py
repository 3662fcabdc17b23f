"""Alignment, looked at closely.

python -m nanoalign.lab walk                one pair from text to gradient
python -m nanoalign.lab walk --stop 6       the debugger opens before place 6
"""

from nanoalign import hosts, lab
from nanoalign.distributed import run
from nanoalign.flags import Parser


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    lab.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.command == "golden":
        from nanoalign.lab.golden import write

        return write(args.out)
    from nanoalign.lab.walk import walk

    walk(args.record, args.beta, args.lr, args.stop)


if __name__ == "__main__":
    run(main, hosts.report_error)
