"""Evaluate what was trained.

    python evaluate.py rm                                       runs/rm on the embedded test split
    torchrun --nproc_per_node 8 evaluate.py rm \\
        --model runs/rm --data harmless=pairs.jsonl helpful=others.jsonl --out runs/rm_eval

`evaluate.py rm --help` explains its flags.
"""

import argparse
import json
import re
from functools import partial
from pathlib import Path

from nanoalign import checkpoint, tiny, weights
from nanoalign.arguments import (
    Parser,
    add_forward_arguments,
    add_preference_argument,
    number,
)
from nanoalign.checks import check_layout
from nanoalign.data import read_sources
from nanoalign.distributed import World, on_main, print0, run, setup
from nanoalign.errors import RunError
from nanoalign.models import RewardModel
from nanoalign.prepare import compute_dtype, load_tokenizer
from nanoalign.report import reward_picture
from nanoalign.rows import encode_all
from nanoalign.scoring import (
    Scored,
    cases,
    reward_metrics,
    score_examples,
    scoring_rule,
    table,
    truth,
)
from nanoalign.templates import TEMPLATES

RM_DOC = """Score preference pairs with a reward model: what does it rank rightly, how surely, and by length?

Writes scores.jsonl (a line a response), metrics.json, a picture a subset, and cases.md (the surest
right, the surest wrong and the closest pairs).
"""
REWARD_MODEL = "runs/rm"  # where train_rm.py puts it
TINY_SUBSETS = [f"{name}=tiny:test:{name}" for name in tiny.SOURCE_NAMES]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    rm = commands.add_parser("rm", doc=RM_DOC, help="a reward model, on preference pairs")
    rm.add_argument("--model", default=REWARD_MODEL,
        help="the reward model: a folder or OWNER/NAME on the Hub")  # fmt: skip
    rm.add_argument("--data", nargs="+", default=TINY_SUBSETS, metavar="NAME=SOURCE",
        help="preference pairs, a source a subset: paths, embedded data, or hf://datasets/...")  # fmt: skip
    rm.add_argument("--out", default="runs/rm_eval",
        help="folder of the results; those of an older evaluation are replaced")  # fmt: skip
    rm.add_argument(
        "--template", choices=TEMPLATES, help="default: the one that the model was trained with"
    )
    rm.add_argument("--max_length", type=number(int, 2),
        help="tokens of a prompt and one response; default: as the model was trained")  # fmt: skip
    rm.add_argument(
        "--cases", type=number(int, 0), default=5, help="pairs of each kind in cases.md"
    )
    add_preference_argument(rm)
    add_forward_arguments(rm)
    return parser.parse_args(argv)


def write_results(
    folder: Path, scored: list[Scored], figures: dict, args: argparse.Namespace
) -> None:
    with (folder / "scores.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(line.to_json() + "\n" for line in scored)
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "cases.md").write_text(cases(scored, args.cases), encoding="utf-8")
    for subset, numbers in figures["subsets"].items():
        lines = [line for line in scored if line.subset == subset]
        reward_picture(folder / picture_name(subset), subset, lines, numbers)


def picture_name(subset: str) -> str:
    return re.sub(r"[^\w.-]", "_", subset) + ".png"


def evaluate_rm(args: argparse.Namespace, world: World) -> None:
    if args.model == REWARD_MODEL and not Path(args.model).exists():
        raise RunError(
            f"there is no reward model in {args.model} yet; train one: python train_rm.py"
        )
    on_main(world, partial(checkpoint.check_results, args))
    folder = weights.resolve_model(args.model)
    examples = read_sources(args.data, args.preference)
    judged = [example for example in examples if example.pairs]
    subsets = list(dict.fromkeys(example.subset for example in examples))
    pictures: dict[str, str] = {"all.png": "the total"}
    for name in subsets:
        if (other := pictures.setdefault(picture_name(name), name)) != name:
            raise RunError(f"the subset '{name}' would share its files with {other!r}; rename it")
        if all(example.subset != name for example in judged):
            raise RunError(
                f"the subset '{name}' has no pairs: all of its records' scores are equal"
            )

    model = RewardModel.load(folder, world, compute_dtype(args, world), trainable=False)
    tokenizer = load_tokenizer(folder)
    args.template, args.max_length = scoring_rule(model, args.model, args.template, args.max_length)
    rows, counts = encode_all(judged, tokenizer, args.template, args.max_length)
    counts["records left out: all scores equal"] = len(examples) - len(judged)
    notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items() if count)
    print0(
        f"{'data':<11} {' '.join(args.data)}: {sum(len(row.responses) for row in rows):,} responses to "
        f"{len(rows):,} prompts{notes}\n"
        f"{'model':<11} {args.model}: {model.count_parameters():,} parameters, {model.compute_dtype}; "
        f"template {args.template}, max_length {args.max_length}"
    )
    model.check_fits(rows)
    check_layout(model, rows, args.share_prefix, world, f"--model {args.model}")

    scored = score_examples(model, judged, rows, args, world)
    if not world.is_main:
        return
    figures = {"subsets": {}}
    for name in subsets:
        lines = [line for line in scored if line.subset == name]
        figures["subsets"][name] = reward_metrics(lines) | truth(lines, args.preference)
    figures["all"] = reward_metrics(scored) | truth(scored, args.preference)
    with checkpoint.results_folder(args) as results:
        write_results(results, scored, figures, args)

    print(f"\n{table(figures['subsets'] | {'all': figures['all']})}\n")
    for name, numbers in figures["subsets"].items():
        values = ", ".join(
            f"{k} = {numbers[k]:.4f}" for k in ("accuracy", "reward_mean", "reward_std")
        )
        print(f"{name:<11} Evaluation: {values}")
    print(f"{'saved':<11} {args.out}: scores.jsonl, metrics.json, cases.md, a picture a subset")


def main(argv: list[str] | None = None) -> None:
    world = setup()
    evaluate_rm(parse_args(argv), world)


if __name__ == "__main__":
    run(main)
