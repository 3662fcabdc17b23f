"""Trains the embedded policy with every loss, by the defaults of its paper, and compares them.

    python benchmarks/losses.py                             all losses, about 40 minutes
    python benchmarks/losses.py sigmoid simpo               some of them
    python benchmarks/losses.py --curves docs/losses.png    a picture of the losses, no training

The base, the pairs, the reward model (runs/rm: python train_rm.py), the evaluation and the learning
rate are the same for all. Results go to runs/losses: a folder for each loss, and table.md. A loss
whose evaluation is there is not trained again.
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

from nanoalign.family import losses  # noqa: E402
from nanoalign.family.losses import FIELDS, KIND, LOSSES  # noqa: E402

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
    """Trains and evaluates one loss by the project's commands; returns the seconds of training."""
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
    """The figures of a loss, which is trained if they are not there."""
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

# Against the margin, of which chosen has one half and rejected the other; else one of them is 0.
TOGETHER = [name for name in LOSSES if KIND[name] in (losses.MARGIN, losses.SORTED, losses.MEANS)]
# Against the log-probability per token, around -1.
FREE = [name for name in LOSSES if KIND[name] in (losses.POLICY, losses.POLICY_MEANS)]
PER_TOKEN = [name for name in LOSSES if KIND[name] == losses.MEANS]


def value(name: str, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """A loss of log-ratios (B,), or for FREE and PER_TOKEN of those per token, of 20 tokens."""
    if name == "kto":
        yes = torch.ones_like(chosen, dtype=torch.bool)
        return (losses.kto(chosen, yes, 0.0) + losses.kto(rejected, ~yes, 0.0)) / 2
    lengths = torch.full_like(chosen, 20.0)
    if name in FREE or name in PER_TOKEN:
        chosen, rejected = chosen * lengths, rejected * lengths
    zero = torch.zeros_like(chosen)
    pairs = {
        "chosen_logps": chosen, "rejected_logps": rejected, "chosen_logratios": chosen,
        "rejected_logratios": rejected, "chosen_lengths": lengths, "rejected_lengths": lengths,
        "shift": zero, "matched_gaps": zero,
    }  # fmt: skip
    return LOSSES[name](*(pairs[field] for field in FIELDS[name]))


def draw(path: Path) -> None:
    """Draws every loss and its gradient with the default hyperparameters: a panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = sorted(LOSSES, key=lambda name: (name in FREE, name not in TOGETHER))
    rows = -(-len(names) // 6)
    figure, axes = plt.subplots(rows, 6, figsize=(22, 3.3 * rows))
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.subplots_adjust(0.035, 0.045, 0.965, 0.92, wspace=0.32, hspace=0.36)
    for axis, name in zip(axes.flat, names, strict=False):
        centre, width = (
            (-1.0, 1.0) if name in FREE else (0.0, 8.0) if name in PER_TOKEN else (0.0, 60.0)
        )
        x = torch.linspace(-width, width, 401, dtype=torch.float64)
        twin = axis.twinx()
        together = name in TOGETHER
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
        unit = "nats per token" if name in FREE or name in PER_TOKEN else "nats"
        what = "margin" if together else "log-probability" if name in FREE else "log-ratio"
        axis.set_xlabel(f"{what}, {unit}")
        axis.grid(alpha=0.3)
        if not together:
            axis.legend(fontsize="small")
    figure.suptitle(
        "loss (solid, left axis) and its gradient (dashed, right axis): against the margin, or "
        "against one response with the other fixed", fontsize="x-large",
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
        parser.error("runs/rm is not there; train a reward model: python train_rm.py")
    OUT.mkdir(parents=True, exist_ok=True)
    text = table(args.names or list(LOSSES))
    (OUT / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
