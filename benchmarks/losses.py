"""Trains the embedded policy with every loss, each as its paper has it, and compares what came of it.

    python benchmarks/losses.py                     all losses, one after the other, about 40 minutes
    python benchmarks/losses.py sigmoid simpo       some of them
    python benchmarks/losses.py --curves docs/losses.png     only the picture of the losses themselves

The base, the pairs, the reward model (runs/rm: python train_rm.py) and the evaluation are the same for
all, and so is the learning rate. Results go to runs/losses: a folder a loss, and table.md. A loss whose
evaluation is there already is not trained again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from nanoalign import losses  # noqa: E402
from nanoalign.losses import LOSSES  # noqa: E402

OUT = Path("runs/losses")
COLUMNS = {
    "held-out accuracy": "accuracy",
    "true reward": "policy_true_mean",
    "true win rate": "true_win_rate",
    "win rate": "win_rate",
    "KL": "kl_per_answer",
    "tokens": "policy_tokens_mean",
    "seconds": "seconds",
}


def train(name: str) -> float:
    """Trains and evaluates one loss by the project's own commands; returns the seconds of training."""
    start = time.perf_counter()
    run = [
        sys.executable,
        ROOT / "train_dpo.py",
        "--loss",
        name,
        "--out",
        OUT / name,
        "--overwrite",
    ]
    subprocess.run(run, check=True)
    seconds = time.perf_counter() - start
    evaluation = [sys.executable, ROOT / "evaluate.py", "policy", "--policy", OUT / name,
                  "--out", OUT / f"{name}_eval"]  # fmt: skip
    subprocess.run(evaluation, check=True)
    return seconds


def figures(name: str) -> dict:
    """The figures of a loss, trained if need be."""
    path = OUT / f"{name}.json"
    if not path.exists():
        seconds = train(name)
        results = json.loads((OUT / f"{name}_eval" / "metrics.json").read_text())
        lines = [
            json.loads(line) for line in (OUT / name / "metrics.jsonl").read_text().splitlines()
        ]
        accuracy = [line["eval/rewards/accuracies"] for line in lines if "eval/loss" in line][-1]
        path.write_text(json.dumps(results | {"accuracy": accuracy, "seconds": seconds}, indent=2))
    return json.loads(path.read_text())


def table(names: list[str]) -> str:
    lines = [f"| loss | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in names:
        found = figures(name)
        cells = {column: f"{found[key]:.2f}" for column, key in COLUMNS.items()}
        interval = f"[{found['true_win_rate_low']:.2f}, {found['true_win_rate_high']:.2f}]"
        cells["true win rate"] += f" {interval}"
        cells["held-out accuracy"] = f"{found['accuracy']:.3f}"
        cells["seconds"], cells["tokens"] = (
            f"{found['seconds']:.0f}",
            f"{found['policy_tokens_mean']:.1f}",
        )
        lines.append(f"| {name} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


# --- the picture ----------------------------------------------------------------------------------

# What is drawn against the margin: chosen rises by half of it, rejected falls by half.
MARGIN = ["sigmoid", "cdpo", "robust", "hinge", "exo_pair", "discopop", "ipo_sum", "aot"]
# What is drawn against each side, the other being held at 0.
SIDES = ["apo_zero", "apo_down", "nca_pair", "bco_pair", "kto", "sppo_hard"]
# What is drawn against log-probabilities a token, around -1.
FREE = ["simpo", "cpo", "orpo", "sft"]
MEANS = ["ipo", "sigmoid_norm"]


def value(name: str, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """A loss of log-ratios (B,), or for those without a reference of log-probabilities a token."""
    length = torch.full_like(chosen, 20.0)
    if name == "kto":
        yes = torch.ones_like(chosen, dtype=torch.bool)
        return (losses.kto(chosen, yes, 0.0) + losses.kto(rejected, ~yes, 0.0)) / 2
    if name == "bco_pair":
        return losses.bco_pair(chosen, rejected, 0.0)
    if name == "aot":
        return losses.aot(chosen, rejected, torch.zeros_like(chosen))
    if name in MEANS:
        return LOSSES[name](chosen * length, rejected * length, length, length)
    if name in ("simpo", "orpo"):
        return LOSSES[name](chosen * length, rejected * length, length, length)
    if name == "cpo":
        return losses.cpo(chosen * length, rejected * length, length)
    if name == "sft":
        return losses.sft(chosen * length, length)
    return LOSSES[name](chosen, rejected)


def draw(path: Path) -> None:
    """Every loss and its gradient, by its default hyperparameters: a panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [*MARGIN, *MEANS, *SIDES, *FREE]
    assert set(names) == set(LOSSES)
    figure, axes = plt.subplots(4, 5, figsize=(19, 13))
    figure.subplots_adjust(0.035, 0.045, 0.965, 0.92, wspace=0.32, hspace=0.36)
    for axis, name in zip(axes.flat, names, strict=True):
        centre, width = (
            (-1.0, 1.0) if name in FREE else (0.0, 8.0) if name in MEANS else (0.0, 60.0)
        )
        x = torch.linspace(-width, width, 401, dtype=torch.float64)
        twin = axis.twinx()
        together = name in MARGIN or name in MEANS
        for side, colour in (("margin", "tab:blue"),) if together else (
            ("chosen", "tab:green"), ("rejected", "tab:red")
        ):  # fmt: skip
            chosen = centre + x * {"margin": 0.5, "chosen": 1.0, "rejected": 0.0}[side]
            rejected = centre - x * {"margin": 0.5, "chosen": 0.0, "rejected": -1.0}[side]
            if name == "apo_down" and side == "chosen":
                rejected = rejected - 20  # at 0 the two parts cancel
            if name in FREE:
                chosen, rejected = chosen.clamp(max=-1e-3), rejected.clamp(max=-1e-3)
            at = x + centre
            shift = torch.zeros_like(x, requires_grad=True)
            step = {"margin": 0.5, "chosen": 1.0, "rejected": 0.0}[side]
            back = {"margin": 0.5, "chosen": 0.0, "rejected": -1.0}[side]
            found = value(name, chosen + step * shift, rejected - back * shift)
            (slope,) = torch.autograd.grad(found.sum(), shift)
            axis.plot(at, found.detach(), color=colour, lw=2, label=side)
            twin.plot(at, slope, color=colour, lw=1, ls="--")
        axis.axvline(centre, color="black", lw=0.5)
        twin.axhline(0, color="black", lw=0.5, ls=":")
        axis.set_title(name)
        unit = "nats a token" if name in FREE or name in MEANS else "nats"
        what = "margin" if together else "log-probability" if name in FREE else "log-ratio"
        axis.set_xlabel(f"{what}, {unit}")
        axis.grid(alpha=0.3)
        if not together:
            axis.legend(fontsize="small")
    figure.suptitle(
        "loss (solid, left axis) and its gradient (dashed, right axis): against the margin, or against one "
        "side with the other held fixed", fontsize="x-large",
    )  # fmt: skip
    figure.savefig(path, dpi=75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="LOSS", help="default: all that there are")
    parser.add_argument(
        "--curves", type=Path, metavar="PNG", help="draw the losses, and train none"
    )
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - LOSSES.keys()):
        parser.error(f"no such loss: {', '.join(unknown)}; there are {', '.join(LOSSES)}")
    if args.curves:
        draw(args.curves)
        return
    if not Path("runs/rm").exists():
        parser.error("there is no reward model in runs/rm yet; train one: python train_rm.py")
    OUT.mkdir(parents=True, exist_ok=True)
    text = table(args.names or list(LOSSES))
    (OUT / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
