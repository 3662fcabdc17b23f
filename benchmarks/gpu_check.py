"""Checks what a GPU alone can show: correctness, speed, and what single changes are worth.

    python benchmarks/gpu_check.py                          all, about 30 minutes
    python benchmarks/gpu_check.py --only correctness       one section, 10 minutes at most
    python benchmarks/gpu_check.py --steps versions masks   some steps
    python benchmarks/gpu_check.py --device cpu             what makes sense there, in small sizes

Every step is a process of its own with a time limit, so one that fails or hangs hides no other. The
cheapest go first. Nothing is downloaded: models are the embedded one and random weights in known
shapes. Results go to gpu_check.json after each step, and the output of a step to NAME.log, in the
folder $OUT, or --out where that is not set; a table is printed at the end. gpu/steps.py lists the
steps.
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

from gpu.steps import SECTIONS, STEPS, Check, Step  # noqa: E402

SECTION_SECONDS = 570.0  # steps of a section that would begin later are not run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
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
    steps: list[Step], out: Path, of_step: Callable[[Step], list[str]], device: str
) -> list[dict[str, object]]:
    """Runs each step's command; the results, which are also written after each step.

    A result has the step's name and section, its status (ok, failed, timed out, not run), the
    seconds it took, and its figures or the last line of its output.
    """
    begun: dict[str, float] = {}
    results = []
    for step in steps:
        now = time.monotonic()
        left = SECTION_SECONDS - (now - begun.setdefault(step.section, now))
        result = {"name": step.name, "section": step.section, "status": "not run", "seconds": 0.0}
        if left > 0:
            result |= _run(step, out, of_step(step), min(step.seconds, left), device)
        results.append(result)
        print(_line(result), flush=True)
        (out / "gpu_check.json").write_text(
            json.dumps({"device": device, "steps": results}, indent=1)
        )
    return results


def _run(
    step: Step, out: Path, command: list[str], seconds: float, device: str
) -> dict[str, object]:
    figures, log = out / f"{step.name}.json", out / f"{step.name}.log"
    figures.unlink(missing_ok=True)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = os.environ | hidden | {"NANOALIGN_CACHE": str(out / "cache")}
    begun = time.monotonic()
    with log.open("w") as output:
        # A session of its own: what the step itself has started ends with it.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, env=environment, start_new_session=True)  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    taken = {"seconds": round(time.monotonic() - begun, 1)}
    if code == 0 and figures.exists():
        return taken | {"status": "ok", "figures": json.loads(figures.read_text())}
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    status = "timed out" if code is None else "failed"
    return taken | {"status": status, "error": lines[-1][:300] if lines else f"exit code {code}"}


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
    args.out = Path(os.environ.get("OUT") or args.out).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    results = run_steps(chosen_steps(args), args.out, lambda step: command(step, args), args.device)
    print("\n| section | step | result | seconds | figures |\n|---|---|---|---|---|")
    print("\n".join(map(_line, results)))
    print(f"\n{args.out / 'gpu_check.json'}")
    return int(any(result["status"] != "ok" for result in results))


if __name__ == "__main__":
    sys.exit(main())
