"""Runs a command of the lab: all but `check`, which needs few of these imports."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from nanoalign.distributed import run
from nanoalign.lab.findings import estimate
from nanoalign.lab.golden import write
from nanoalign.lab.homework import homework
from nanoalign.lab.lab_commands import EXPERIMENTS, parse
from nanoalign.lab.perform import perform
from nanoalign.lab.speedrun import PROMPTS, graded, speedrun
from nanoalign.lab.walk import walk
from nanoalign.ranks import report
from nanoalign.tiny import world
from nanoalign.weights.folders import local_folder


def grade(args: Namespace) -> None:
    grades = graded(local_folder(args.policy), PROMPTS, args.seed, args.world)
    print(f"true reward {estimate(grades[None])}")


def described(seed: int) -> str:
    """The rule and the facts of the world tiny:SEED, and how well its labels can be predicted."""
    rule, ceiling = world.rule(seed), world.label_ceiling(world.records("test", seed=seed))
    lines = [f"labels     P(first is better) = sigmoid(difference of rewards / {rule.noise:g})"]
    lines += [f"           the best expected accuracy is {ceiling:.3f}"]
    lines += [f"{name:<10} {weight:+g} times its points" for name, weight in rule.weights.items()]
    facts = [task for task in world.tasks(seed) if task.kind == "fact"]
    return "\n".join([*lines, *(f"{fact.subject}: {fact.answers[0]}" for fact in facts)])


COMMANDS: dict[str, Callable[[Namespace], object]] = {
    "walk": lambda args: walk(args.record, args.beta, args.lr, args.stop, args.rm),
    "golden": lambda args: write(args.out),
    "grade": grade,
    "world": lambda args: print(described(args.world)),
    "speedrun": lambda args: speedrun(args.entry, args.against),
    "homework": lambda args: homework(args.out, args.data, args.model),
}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.command in EXPERIMENTS:
        perform(args.command, Path(args.out), args.quick, args.seeds)
    else:
        COMMANDS[args.command](args)


if __name__ == "__main__":
    run(main, report.report)
