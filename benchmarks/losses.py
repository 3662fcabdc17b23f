"""Trains the embedded policy with every loss, by the defaults of its paper, and compares them.

    python benchmarks/losses.py                             all losses, about 40 minutes
    python benchmarks/losses.py dpo simpo                   some of them
    python benchmarks/losses.py --curves docs/losses.png    a picture of the losses, no training
    python benchmarks/losses.py --weights docs/course/weights.svg    of how they weight a pair

The base, the pairs, the reward model (runs/rm: python train_rm.py), the evaluation and the learning
rate are the same for all. Results go to runs/losses: a folder for each loss, and table.md. A loss
whose evaluation is there is not trained again.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from nanoalign.family import losses
from nanoalign.family.losses import FIELDS, KIND, LOSSES

OUT = Path("runs/losses")
NAMES = [name for name in LOSSES if name != "sigmoid"]  # which is dpo
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
    training = [sys.executable, ROOT / "train_dpo.py", "--loss", name, "--out", OUT / name,
                "--overwrite"]  # fmt: skip
    subprocess.run(training, check=True)
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
        log = (OUT / name / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in log]
        accuracy = [line["eval/rewards/accuracies"] for line in lines if "eval/loss" in line][-1]
        path.write_text(json.dumps(results | {"accuracy": accuracy, "seconds": seconds}, indent=2))
    return json.loads(path.read_text())


def table(names: list[str]) -> str:
    """The figures of some losses as a Markdown table."""
    lines = [f"| loss | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in names:
        found = figures(name)
        cells = {column: f"{found[key]:.2f}" for column, key in COLUMNS.items()}
        interval = f"[{found['true_win_rate_low']:.2f}, {found['true_win_rate_high']:.2f}]"
        cells["true win rate"] += f" {interval}"
        cells["held-out accuracy"] = f"{found['accuracy']:.3f}"
        cells["tokens"] = f"{found['policy_tokens_mean']:.1f}"
        cells["seconds"] = f"{found['seconds']:.0f}"
        lines.append(f"| {name} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


# --- the picture ----------------------------------------------------------------------------------

# Drawn against the margin; the others against each response, with the other one fixed.
OF_MARGIN = [name for name in LOSSES if KIND[name] in (losses.MARGIN, losses.SORTED, losses.MEANS)]
# Drawn against log-probabilities per token, around -1.
WITHOUT_REFERENCE = [name for name in LOSSES if KIND[name] in (losses.POLICY, losses.POLICY_MEANS)]
# Drawn against log-ratios per token.
PER_TOKEN = [name for name in LOSSES if KIND[name] == losses.MEANS]
PANELS = 6  # side by side
# Colour of a curve, and what one nat on its x-axis adds to chosen and to rejected.
CURVES = {
    "margin": ("black", 0.5, -0.5),
    "chosen": ("tab:blue", 1.0, 0.0),
    "rejected": ("tab:orange", 0.0, 1.0),
}


def value(name: str, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """The losses (B,) of responses with 20 tokens.

    chosen, rejected: log-ratios (B,); of PER_TOKEN those per token; of WITHOUT_REFERENCE the
        log-probabilities per token.
    """
    if name == "kto":
        yes = torch.ones_like(chosen, dtype=torch.bool)
        return (losses.kto(chosen, yes, 0.0) + losses.kto(rejected, ~yes, 0.0)) / 2
    lengths = torch.full_like(chosen, 20.0)
    if name in WITHOUT_REFERENCE or name in PER_TOKEN:
        chosen, rejected = chosen * lengths, rejected * lengths
    zero = torch.zeros_like(chosen)
    pairs = {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logratios": chosen,
        "rejected_logratios": rejected,
        "chosen_lengths": lengths,
        "rejected_lengths": lengths,
        "shift": zero,
        "matched_gaps": zero,
    }
    return LOSSES[name](*(pairs[field] for field in FIELDS[name]))


def draw(path: Path) -> None:
    """Draws every loss and its gradient with the default hyperparameters: a panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = sorted(NAMES, key=lambda name: (name in WITHOUT_REFERENCE, name not in OF_MARGIN))
    rows = math.ceil(len(names) / PANELS)
    figure, axes = plt.subplots(rows, PANELS, figsize=(22, 3.3 * rows), layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        draw_loss(axis, name)
    figure.suptitle(
        "loss (solid, left axis) and its gradient (dashed, right axis): against the margin, or "
        "against one response with the other fixed",
        fontsize="x-large",
    )
    handles = [plt.Line2D([], [], c=c, lw=4, label=curve) for curve, (c, *_) in CURVES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(CURVES))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)


def draw_loss(axis, name: str) -> None:
    """One panel: the loss, and its gradient with respect to what is on the x-axis."""
    centre, width = 0.0, 60.0
    if name in WITHOUT_REFERENCE:
        centre, width = -1.0, 1.0
    elif name in PER_TOKEN:
        width = 8.0
    x = torch.linspace(-width, width, 401, dtype=torch.float64)
    twin = axis.twinx()
    for curve in ("margin",) if name in OF_MARGIN else ("chosen", "rejected"):
        colour, of_chosen, of_rejected = CURVES[curve]
        chosen, rejected = centre + of_chosen * x, centre + of_rejected * x
        if name == "apo_down" and curve == "chosen":
            rejected = rejected - 20  # at 0 the two parts cancel
        if name in WITHOUT_REFERENCE:
            chosen, rejected = chosen.clamp(max=-1e-3), rejected.clamp(max=-1e-3)
        shift = torch.zeros_like(x, requires_grad=True)
        values = value(name, chosen + of_chosen * shift, rejected + of_rejected * shift)
        (gradient,) = torch.autograd.grad(values.sum(), shift)
        axis.plot(centre + x, values.detach(), color=colour, lw=2)
        twin.plot(centre + x, gradient, color=colour, lw=1, ls="--")
    axis.axvline(centre, color="black", lw=0.5)
    twin.axhline(0, color="black", lw=0.5, ls=":")
    axis.set_title(name)
    quantity = "log-probability" if name in WITHOUT_REFERENCE else "log-ratio"
    quantity = "margin" if name in OF_MARGIN else quantity
    per_token = name in WITHOUT_REFERENCE or name in PER_TOKEN
    axis.set_xlabel(f"{quantity}, nats" + " per token" * per_token)
    axis.grid(alpha=0.3)
    for each in (axis, twin):
        each.ticklabel_format(axis="y", scilimits=(-3, 4))


def draw_weights(path: Path) -> None:
    """Draws how strongly five losses raise the chosen response, against the margin.

    The weight is -d loss / d log pi of the chosen response, divided by its value at margin 0. The
    chosen response has half of the margin as its log-ratio, the rejected one the opposite; both
    have 20 tokens, and -1 nat a token by the reference.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    margins = torch.linspace(-30, 30, 121, dtype=torch.float64)  # the middle one is 0
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanoalign"}):
        figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
        styles = {"dpo": "-", "ipo_sum": "--", "kto": "-.", "simpo": ":"}
        styles["orpo"] = (0, (6, 1, 1, 1, 1, 1))
        for name, style in styles.items():
            chosen, rejected = (margins / 2).requires_grad_(), -margins / 2
            given = (chosen, rejected)
            if name in WITHOUT_REFERENCE:  # takes log-probabilities per token
                given = (each / 20 - 1 for each in given)
            (gradient,) = torch.autograd.grad(value(name, *given).sum(), chosen)
            axis.plot(margins, gradient / gradient[60], ls=style, lw=2, label=name)
        axis.axhline(0, color="black", lw=0.5)
        axis.axvline(0, color="black", lw=0.5)
        axis.set(xlabel="margin m, nats", ylabel="weight, as a multiple of that at 0")
        axis.grid(alpha=0.3)
        axis.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="LOSS", help="losses to train; default: all")
    parser.add_argument("--curves", type=Path, metavar="PNG", help="draw the losses, train none")
    parser.add_argument("--weights", type=Path, metavar="SVG", help="draw how they weight a pair")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - LOSSES.keys()):
        parser.error(f"unknown losses {', '.join(unknown)}; expected some of {', '.join(LOSSES)}")
    if args.curves:
        draw(args.curves)
    if args.weights:
        draw_weights(args.weights)
    if args.curves or args.weights:
        return
    if not Path("runs/rm").exists():
        parser.error(
            "there is no reward model in runs/rm; train a reward model: python train_rm.py"
        )
    OUT.mkdir(parents=True, exist_ok=True)
    text = table(args.names or NAMES)
    (OUT / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
