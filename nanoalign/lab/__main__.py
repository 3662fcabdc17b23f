"""Alignment, looked at closely.

python -m nanoalign.lab                     lists the experiments
python -m nanoalign.lab beta --quick        runs one, and writes a page
python -m nanoalign.lab walk                one pair from text to gradient
python -m nanoalign.lab walk --stop 6       the debugger opens before place 6
python -m nanoalign.lab pipeline            demonstrations, pairs, own answers: what each gains
python -m nanoalign.lab golden              losses and gradients, for other frameworks
python -m nanoalign.lab check 3 mine.py     whether the solution of an exercise is right
"""

from pathlib import Path

from nanoalign import hosts, lab
from nanoalign.distributed import run
from nanoalign.flags import Parser
from nanoalign.lab import experiments


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m nanoalign.lab")
    lab.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.command is None:
        return print(overview())
    if args.command in experiments.NAMES:
        from nanoalign.lab.page import perform

        return perform(args.command, Path(args.out), args.quick)
    if args.command == "golden":
        from nanoalign.lab.golden import write

        return write(args.out)
    if args.command == "check":
        from nanoalign.lab.exercises import EXERCISES, check

        done = check(args.number, Path(args.file), args.stop)
        return print(f"right: {EXERCISES[args.number].name} of {args.file}, on {done} cases")
    if args.command == "pipeline":
        from nanoalign.lab.pipeline import pipeline

        steps, prompts = (8, 100) if args.quick else (None, 600)
        return pipeline(Path(args.out), steps, prompts, args.seed)
    from nanoalign.lab.walk import walk

    walk(args.record, args.beta, args.lr, args.stop)


def overview() -> str:
    lines = [f"    {name:<13}{experiments.load(name).QUESTION}" for name in experiments.NAMES]
    return f"{__doc__}\nexperiments\n{chr(10).join(lines)}"


if __name__ == "__main__":
    run(main, hosts.report_error)
