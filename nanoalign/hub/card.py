"""The model card of a run, from args.json and metrics.jsonl."""

import json
import shlex
from pathlib import Path

from nanoalign.checkpoints.runs import ARGS, METRICS
from nanoalign.errors import RunError

CARD = "README.md"
SHOWN = ("loss", "accuracy", "rewards/accuracies", "rewards/margins")
SETTINGS = ("loss", "beta", "label_smoothing", "lr", "schedule", "warmup", "weight_decay",
            "batch_size", "epochs", "steps", "max_length", "template", "lora_rank", "seed",
            "ranks")  # fmt: skip


def write_card(run: Path) -> Path:
    """Writes README.md into the folder of a run, unless there is one. Returns its path.

    Raises RunError for a folder that is no finished run.
    """
    path = run / CARD
    if not path.exists():
        path.write_text(card(run))
    return path


def read_run(run: Path) -> tuple[dict, list[dict]]:
    """(args.json, the lines of metrics.jsonl) of a run whose model is written."""
    for name, what in (
        (ARGS, "is no run"),
        (METRICS, "is no run"),
        ("config.json", "has no model"),
    ):
        if not (run / name).is_file():
            raise RunError(f"'{run}' {what}: there is no {name}; give the folder of a finished run")
    lines = (run / METRICS).read_text().splitlines()
    return json.loads((run / ARGS).read_text()), [json.loads(line) for line in lines]


def card(run: Path) -> str:
    """The text of the card."""
    args, lines = read_run(run)
    architecture = json.loads((run / "config.json").read_text())["architectures"][0]
    is_reward_model = "ForSequenceClassification" in architecture
    kind = "reward model" if is_reward_model else f"policy, trained with {args['loss']}"
    script = "train_rm.py" if is_reward_model else "train_dpo.py"
    base, words = args["model"], args["argv"][1:]
    # Only a name of the Hub is a link there; a path means nothing to others.
    known = base.count("/") == 1 and not Path(base).exists() and not base.startswith((".", "runs/"))
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if is_reward_model else "text-generation",
        **({"base_model": base.partition("@")[0]} if known else {}),
        "tags": ["nanoalign", "reward-model" if is_reward_model else args["loss"]],
    }
    yaml = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    settings = [
        f"| {key} | {args[key]} |" for key in SETTINGS if args.get(key) not in (None, False)
    ]
    return "\n".join([
        "---", *yaml, "---", "",
        f"# {run.resolve().name}", "",
        f"A {kind}, from {named(base)}, made with nanoalign {args['nanoalign']}.", "",
        f"Data: {', '.join(map(named, args['data']))}. {figures(lines)}", "",
        "```bash", shlex.join(["python", script, *map(named, words)]), "```", "",
        "| setting | |", "|---|---|", *settings, "",
        f"torch {args['torch']}, transformers {args['transformers']}, Python {args['python']}.", "",
    ])  # fmt: skip


def named(text: str) -> str:
    """The text; of an absolute path, which tells of a machine, the last part alone."""
    before, equals, place = text.rpartition("=")
    return before + equals + Path(place).name if Path(place).is_absolute() else text


def figures(lines: list[dict]) -> str:
    """The held-out metrics before training and after it."""
    held_out = [line for line in lines if "eval/loss" in line]
    if not held_out:
        return "Nothing was held out."
    first, last = held_out[0], held_out[-1]
    keys = [key for key in SHOWN if f"eval/{key}" in last]
    shown = [f"{key} {first[f'eval/{key}']:.4f} -> {last[f'eval/{key}']:.4f}" for key in keys]
    return f"On held-out records, before and after {last['step']} steps: {', '.join(shown)}."
