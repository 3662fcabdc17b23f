"""python -m pytest tests/test_gpu_check.py

benchmarks/gpu_check.py, as far as a CPU shows it.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks/gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)


def test_a_section_and_a_device_choose_steps():
    def chosen(*argv: str) -> list[str]:
        return [step.name for step in gpu_check.chosen_steps(gpu_check.parse_args([*argv]))]

    names = [step.name for step in gpu_check.STEPS]
    assert chosen() == names and len(set(names)) == len(names) > 30
    assert all(callable(step.function()) for step in gpu_check.STEPS)
    assert chosen("--only", "speed", "--device", "cpu") == ["small"]
    assert chosen("--steps", "rm", "masks") == ["masks", "rm"]
    with pytest.raises(SystemExit):
        chosen("--steps", "mask")


def step(name: str, seconds: float = 20, section: str = "correctness") -> gpu_check.Step:
    return gpu_check.Step(name, section, seconds, "runs.dpo")


def arguments(out: Path, *flags: str) -> argparse.Namespace:
    return gpu_check.parse_args(["--device", "cpu", "--out", str(out), *flags])


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path, capsys):
    """Also what a step has started itself is ended with it."""
    written = "import json, pathlib; pathlib.Path({!r}).write_text(json.dumps({{'speed': 7}}))"
    child = "import time; time.sleep(30)"
    code = {
        "fails": "print('before'); raise ValueError('a mistake')",
        "hangs": f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        " print(p.pid, flush=True); p.wait()",
        "silent": "pass",
        "works": written.format(str(tmp_path / "works.json")),
    }
    (tmp_path / "silent.json").write_text('{"of": "an earlier run"}')
    steps = [step("fails"), step("hangs", 0.5), step("silent"), step("works")]

    def command(step: gpu_check.Step) -> list[str]:
        return [sys.executable, "-c", code[step.name]]

    results = gpu_check.run_steps(steps, command, arguments(tmp_path))
    assert [result["status"] for result in results] == ["failed", "timed out", "failed", "ok"]
    assert results[0]["error"] == "ValueError: a mistake"
    assert 0.5 <= results[1]["seconds"] < 10
    assert results[3]["figures"] == {"speed": 7}
    kept = json.loads((tmp_path / "gpu_check.json").read_text())
    assert kept == {"device": "cpu", "steps": results}
    assert "| correctness | works | ok |" in capsys.readouterr().out
    status = Path("/proc", results[1]["error"], "status")  # the hanging step's own process
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.02)
    else:
        raise AssertionError("the process that the step had started still runs")


@pytest.mark.parametrize("name", ["masks", "widths", "sequences", "small"])
def test_a_step_writes_its_figures(name, tmp_path):
    gpu_check.run_one(name, gpu_check.Check("cpu", tmp_path))
    assert json.loads((tmp_path / f"{name}.json").read_text())


def test_attention_that_is_off_by_a_thousandth_fails_a_step(tmp_path, monkeypatch):
    from gpu import attention

    right = attention.tree_attention
    wrong = lambda *args: (1.001 * right(*args)[0], None)  # noqa: E731
    monkeypatch.setattr(attention, "tree_attention", wrong)
    with pytest.raises(AssertionError, match="off by .*: T 100, groups 2, d 32"):
        gpu_check.run_one("widths", gpu_check.Check("cpu", tmp_path))


def test_packed_rows_as_sequences_of_their_own():
    """The example of gpu/varlen.py, and a prompt alone."""
    from gpu.varlen import Sequences

    found = Sequences([(3, 2, 1), (2,)], torch.device("cpu"))
    assert found.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert found.starts_q.tolist() == [0, 3, 5, 6, 8]
    assert found.starts_k.tolist() == [0, 3, 8, 12, 14]
    assert (found.longest_q, found.longest_k) == (3, 5)
    assert found.copies.tolist() == [
        [0, 1, 2, 6, 7, 11, 12, 13],
        [3, 4, 5, 14, 14, 14, 14, 14],
        [8, 9, 10, 14, 14, 14, 14, 14],
    ]


def test_the_command_of_a_step_runs_it(tmp_path):
    """One process, as main starts it; the exit code is 1 if a step is not ok."""
    (versions,) = (step for step in gpu_check.STEPS if step.name == "versions")
    args = arguments(tmp_path)
    subprocess.run(gpu_check.command(versions, args), check=True)
    assert "torch" in json.loads((tmp_path / "versions.json").read_text())
