"""Checks solutions of exercises: a function of a student's file against what is expected.

`check` calls it on many inputs, and shows the first of them on which it is wrong. A result may be a
tensor, an array, a number, or a list of these: numbers are compared, not types. But what is trained
has to be a tensor, whose gradient is compared, too.
"""

import contextlib
import copy
import hashlib
import importlib.util
import json
import pdb
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line
from nanoalign.lab.exercises import bugs, formulas, parts
from nanoalign.lab.exercises.exercise import Exercise, Wrong
from nanoalign.lab.lab_commands import parse

# Number -> exercise; six a level.
EXERCISES = dict(enumerate(formulas.EXERCISES + bugs.EXERCISES + parts.EXERCISES, start=1))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.hint:
        hints = [
            f"{number:>2} {EXERCISES[number].name}: {EXERCISES[number].hint}"
            for number in args.numbers
        ]
        return print("\n".join(hints))
    if args.file is None:
        raise RunError(
            "give the file with your function, or a folder with files like 04_accuracy.py"
        )
    if len(args.numbers) > 1 or args.json:
        return print(scores(args.numbers, args.file, args.seed, args.json))
    (number,) = args.numbers
    done = check(number, args.file, args.seed, args.stop)
    print(f"right: {EXERCISES[number].name} of {args.file}, on {done} case{'s' * (done > 1)}")


def scores(numbers: list[int], path: Path, seed: str, as_json: bool) -> str:
    """A point for each solution that is right: lines of text, or the results.json of Gradescope."""
    problems = {}
    for number in numbers:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what a solution prints
                check(number, path, seed)
            problems[number] = ""
        except RunError as error:
            problems[number] = str(error)
    score = sum(not problem for problem in problems.values())
    if as_json:
        tests = [
            {
                "number": str(number),
                "name": EXERCISES[number].name,
                "score": int(not problem),
                "max_score": 1,
                "status": "failed" if problem else "passed",
                "output": problem or "right",
            }
            for number, problem in problems.items()
        ]
        return json.dumps({"score": score, "tests": tests}, indent=2)
    lines = [
        f"{number:>2} {EXERCISES[number].name:<15} {problem or 'right'}"
        for number, problem in problems.items()
    ]
    return "\n".join([*lines, f"score {score} of {len(problems)}"])


def check(number: int, path: Path, seed: str = "0", stop: bool = False) -> int:
    """Raises RunError with the first case on which a solution is wrong; returns how many it passed.

    path: of the file with the function, or of a folder that has it. seed: any text, from which the
    inputs are drawn. stop: enters the function in the debugger before the error is raised.
    """
    exercise, path = EXERCISES[number], file_of(number, path)
    function = getattr(load(path, exercise.seconds), exercise.name, None)
    if not callable(function):
        raise RunError(f"{path} has no function {exercise.name}")
    for done, inputs in enumerate(cases(exercise, seed)):
        if wrong := mistake(exercise, function, inputs, path):
            call = f"{exercise.name}({', '.join(map(text, inputs))}) {wrong}"
            if stop:
                print(f"{call}\n")
                with contextlib.suppress(Exception):  # which `call` has told
                    exercise.use(partial(pdb.runcall, function), *copied(inputs, exercise))
            raise RunError(f"{call}; right cases before it: {done}")
    return done + 1


def cases(exercise: Exercise, seed: str = "0") -> Iterator[tuple]:
    """Yields the inputs of the drawn cases, the same for the same seed, then of the extremes."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    for _ in range(exercise.cases):
        yield exercise.inputs(generator)
    yield from exercise.extremes


# --- the file -------------------------------------------------------------------------------------


def file_of(number: int, path: Path) -> Path:
    """The file of an exercise: `path`, or in this folder the one that begins with its number."""
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"{number:02d}_*.py"))
    if len(found) != 1:
        raise RunError(
            f"{path} has {len(found)} files {number:02d}_*.py; give it one, with your function "
            f"{EXERCISES[number].name}"
        )
    return found[0]


def load(path: Path, seconds: int):
    """The module of a file. Raises RunError if it can't be imported."""
    spec = importlib.util.spec_from_file_location("solution", path)
    if spec is None or not path.is_file():
        what = "is no Python file" if path.exists() else "is not there"
        raise RunError(f"{path} {what}; give the file with your function")
    module = importlib.util.module_from_spec(spec)
    try:
        with limited(seconds):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RunError(f"{path} can't be imported: {in_a_line(error)}") from error
    return module


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises Wrong in what runs longer: one loop without an end must not cost the other scores."""

    def stop(*signal_and_frame: object) -> None:
        raise Wrong(f"has not ended after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- what is wrong --------------------------------------------------------------------------------


def mistake(
    exercise: Exercise, function: Callable[..., object], inputs: tuple, path: Path
) -> str | None:
    """What is wrong with the function on some inputs, as the end of a sentence; None: nothing."""
    given, own = (copied(inputs, exercise) for _ in range(2))
    expected = exercise.expected(*own)
    try:
        with limited(exercise.seconds):
            found = exercise.use(function, *given)
            if wrong := difference(found, expected, exercise.close):
                return wrong
            if exercise.trained:
                return wrong_gradient(found, given, expected, own, exercise)
            if exercise.detached and isinstance(found, Tensor) and found.requires_grad:
                return "lets a gradient through; detach it"
    except NotImplementedError as error:
        raise RunError(
            f"{exercise.name} is not written yet: {path} raises NotImplementedError"
        ) from error
    except Wrong as wrong:
        return str(wrong)
    except (Exception, SystemExit) as error:
        return f"raises {in_a_line(error)}{line_of(error, path)}"
    return None


def copied(inputs: tuple, exercise: Exercise) -> tuple:
    """The inputs, of which a function may spoil its own, with requires_grad where it is needed."""
    copies = copy.deepcopy(inputs)
    for n, value in enumerate(copies):
        if n in exercise.trained or exercise.detached:
            value.requires_grad_()
    return copies


def wrong_gradient(
    found: object, given: tuple, expected: object, own: tuple, exercise: Exercise
) -> str | None:
    """What is wrong with the gradient of the sum of the first result, likewise; None: nothing.

    given, own: the inputs of which `found` and `expected` were computed.
    """
    results = [each[0] if isinstance(each, tuple | list) else each for each in (found, expected)]
    if not isinstance(results[0], Tensor):
        return f"is {text(found)}, without a gradient; {kind(expected)} is expected"
    for result in results:
        if result.requires_grad:  # a constant has a gradient of 0
            result.sum().backward()
    for n in exercise.trained:
        zero = torch.zeros_like(own[n])
        of_found, of_expected = (zero if x.grad is None else x.grad for x in (given[n], own[n]))
        if wrong := difference(of_found, of_expected, exercise.close):
            if not results[0].requires_grad:
                return "has no gradient: it was not computed from its inputs by torch"
            return f"has a wrong gradient by argument {n + 1}, which {wrong}"
    return None


def line_of(error: BaseException, path: Path) -> str:
    """The line of the file where an error was raised, as the end of a sentence; "": of no line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f" in line {lines[-1]} of {path}" if lines else ""


def difference(found: object, expected: object, close: float) -> str | None:
    """How a result differs from what is expected, as the end of a sentence; None: not at all.

    A tuple with tensors is compared result by result. close: the relative tolerance.
    """
    if isinstance(expected, tuple) and isinstance(expected[0], Tensor):
        if not isinstance(found, tuple | list | Tensor | np.ndarray) or len(found) != len(expected):
            return f"is {text(found)}; {len(expected)} results are expected"
        for n, pair in enumerate(zip(found, expected, strict=True), start=1):
            if wrong := difference(*pair, close):
                return f"has a wrong result {n}, which {wrong}"
        return None
    values, right = numbers_of(found), numbers_of(expected)
    if values is None:
        return f"is {text(found)}, of type {type(found).__name__}; {kind(expected)} is expected"
    if values.numel() == right.numel() and (right.ndim == 0 or not isinstance(expected, Tensor)):
        values = values.reshape(right.shape)  # [[1, 2]] for (1, 2), [0.5] for 0.5
    if values.shape != right.shape:
        return f"is {text(found)}, {kind(found)}; {kind(expected)} is expected"
    wrong = ~torch.isclose(values, right, rtol=close, atol=close / 10)
    if not wrong.any():
        return None
    first = wrong.flatten().nonzero()[0].item()
    place = f", first at place {first}" if isinstance(expected, list) else ""
    return f"is {text(found)}, and should be {text(expected)}{place}"


def numbers_of(value: object) -> Tensor | None:
    """A number, tensor, array, or a list of these, as one tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64)
    if isinstance(value, tuple | list):
        parts = list(map(numbers_of, value))
        if any(part is None or part.shape != parts[0].shape for part in parts):
            return None
        return torch.stack(parts) if parts else torch.zeros(0, dtype=torch.float64)
    if isinstance(value, int | float | np.ndarray | np.generic):
        return torch.as_tensor(np.asarray(value, dtype=np.float64))
    return None


def kind(value: object) -> str:
    """What a value is, in words."""
    if isinstance(value, Tensor | np.ndarray):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of length {len(value)}"
    return "a number"


def text(value: object) -> str:
    """A value in a few characters."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        if value.ndim > 2 or value.size > 40:
            return f"numbers of shape {tuple(value.shape)}"
        value = value.tolist()
    if isinstance(value, float):
        return f"{value + 0.0:.6g}"  # no -0
    if isinstance(value, tuple | list):
        inner = ", ".join(map(text, value[:20])) + ", ..." * (len(value) > 20)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return repr(value)


if __name__ == "__main__":
    main()
