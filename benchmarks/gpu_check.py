"""Checks what a GPU alone can show: correctness, speed, and what single changes are worth.

    python benchmarks/gpu_check.py                          all, about 30 minutes
    python benchmarks/gpu_check.py --only correctness       one section, --seconds (570) at most
    python benchmarks/gpu_check.py --steps versions masks   some steps
    python benchmarks/gpu_check.py --jobs 8                 eight steps of `correctness` at a time
    python benchmarks/gpu_check.py --device cpu             what makes sense there, in small sizes

Every step is a process of its own with a time limit, so one that fails or hangs hides no other. The
cheapest go first; what is timed runs alone. Nothing is downloaded: models are the embedded one and
random weights in known shapes. Results go to gpu_check.json after each step, and the output of a
step to NAME.log, in the folder --out; a table is printed at the end. gpu/steps.py lists the steps.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu.steps import SECTIONS, STEPS, Check, Step


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--jobs", type=int, default=1, help="steps of `correctness` at a time")
    parser.add_argument(
        "--seconds",
        type=float,
        default=570,
        metavar="S",
        help="of a section: its steps are ended then, and those left are not run",
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)  # a step, in this process
    args = parser.parse_args(argv)
    if unknown := sorted({*(args.steps or ())} - {step.name for step in STEPS}):
        names = ", ".join(step.name for step in STEPS)
        parser.error(f"unknown steps {', '.join(unknown)}; expected some of {names}")
    return args


def chosen_steps(args: argparse.Namespace) -> list[Step]:
    """The steps that a command line asks for, in their order."""
    if args.steps:
        return [step for step in STEPS if step.name in args.steps]
    fit = [step for step in STEPS if step.on_cpu or args.device == "cuda"]
    return [step for step in fit if step.section in args.only]


def run_one(name: str, check: Check) -> None:
    """Runs a step in this process, and writes its figures."""
    if check.device == "cuda":
        import torch  # not at the head: what fails to import is the failure of a step

        assert torch.cuda.is_available(), "torch finds no GPU; --device cpu runs a part without one"
    (step,) = [step for step in STEPS if step.name == name]
    figures = step.run(check)
    (check.work / f"{name}.json").write_text(json.dumps(figures))


def command(step: Step, args: argparse.Namespace) -> list[str]:
    script = str(Path(__file__).resolve())
    return [sys.executable, script, "--run", step.name, "--device", args.device, "--out",
            str(args.out)]  # fmt: skip


def run_steps(
    steps: list[Step], of_step: Callable[[Step], list[str]], args: argparse.Namespace
) -> list[dict[str, object]]:
    """Runs each step's command; the results in the order of `steps`, also written after each one.

    A result has the step's name and section, its status (ok, failed, timed out, not run), the
    seconds it took, and its figures or the last line of its output.
    """
    results: dict[str, dict[str, object]] = {}
    for section in dict.fromkeys(step.section for step in steps):
        end = time.monotonic() + args.seconds
        waiting = [step for step in steps if step.section == section]
        at_a_time = args.jobs if section == "correctness" else 1
        running: list[_Process] = []
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time and time.monotonic() < end:
                    step = waiting.pop(0)
                    running.append(_Process(step, args.out, of_step(step), end, args.device))
                time.sleep(0.05)
                ended = {p.step.name: result for p in running if (result := p.result())}
                running = [p for p in running if p.step.name not in ended]
                if time.monotonic() >= end:
                    ended |= {step.name: _result(step, "not run") for step in waiting}
                    waiting = []
                for name, result in ended.items():
                    results[name] = result
                    print(_line(result), flush=True)
                if ended:
                    done = [results[step.name] for step in steps if step.name in results]
                    (args.out / "gpu_check.json").write_text(
                        json.dumps({"device": args.device, "steps": done}, indent=1)
                    )
        finally:
            for process in running:
                process.end()
    return [results[step.name] for step in steps]


def _result(step: Step, status: str, seconds: float = 0.0, **more: object) -> dict[str, object]:
    seconds = round(seconds, 1)
    return {"name": step.name, "section": step.section, "status": status, "seconds": seconds} | more


class _Process:
    """A step that runs, in a session of its own: what it has started itself ends with it."""

    def __init__(self, step: Step, out: Path, command: list[str], end: float, device: str):
        self.step, self.begun = step, time.monotonic()
        self.until = min(self.begun + step.seconds, end)
        self.figures, self.log = out / f"{step.name}.json", out / f"{step.name}.log"
        self.figures.unlink(missing_ok=True)
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | hidden | {"NANOALIGN_CACHE": str(out / "cache")},
            )

    def result(self) -> dict[str, object] | None:
        """None while it runs. Ends it where its time is over."""
        code, seconds = self.process.poll(), time.monotonic() - self.begun
        if code is None and time.monotonic() < self.until:
            return None
        self.end()
        if code == 0 and self.figures.exists():
            figures = json.loads(self.figures.read_text())
            return _result(self.step, "ok", seconds, figures=figures)
        lines = [x for x in self.log.read_text(errors="replace").splitlines() if x.strip()]
        error = lines[-1][:300] if lines else f"exit code {code}"
        status = "timed out" if code is None else "failed"
        return _result(self.step, status, seconds, error=error)

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _line(result: dict) -> str:
    """A row of the table."""
    figures = ", ".join(f"{name} {value}" for name, value in result.get("figures", {}).items())
    text = figures or result.get("error", "")
    return (
        f"| {result['section']} | {result['name']} | {result['status']} | {result['seconds']:.1f} "
        f"| {text.replace('|', '/')} |"
    )


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if all steps that were run are ok."""
    args = parse_args(argv)
    if args.run:
        run_one(args.run, Check(args.device, args.out))
        return 0
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    results = run_steps(chosen_steps(args), lambda step: command(step, args), args)
    print("\n| section | step | result | seconds | figures |\n|---|---|---|---|---|")
    print("\n".join(map(_line, results)))
    print(f"\n{args.out / 'gpu_check.json'}")
    return int(any(result["status"] != "ok" for result in results))


if __name__ == "__main__":
    sys.exit(main())
