"""Evaluate what was trained.

    python evaluate.py                                          both of these, on what the default runs made:
    python evaluate.py rm                                       runs/rm on the embedded test split
    python evaluate.py policy                                   runs/dpo against what it came from, by runs/rm
    torchrun --nproc_per_node 8 evaluate.py rm \\
        --model runs/rm --data harmless=pairs.jsonl helpful=others.jsonl --out runs/rm_eval
    torchrun --nproc_per_node 8 evaluate.py policy \\
        --policy runs/dpo --baseline Qwen/Qwen2.5-0.5B-Instruct --reward runs/rm --data prompts.jsonl
    python evaluate.py frontier runs/a_eval runs/b_eval         several policies in one picture

`evaluate.py rm --help` and so on explain the flags.
"""

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

from nanoalign import checkpoint, tiny, weights
from nanoalign.answers import (
    SIDES,
    kl_estimate,
    load_asked,
    read_given,
    sample,
    share_vocabulary,
)
from nanoalign.arguments import (
    EMBEDDED,
    PREFERENCES,
    Parser,
    add_combine_argument,
    add_forward_arguments,
    number,
    positive,
)
from nanoalign.checks import check_layout
from nanoalign.comparison import Compared, comparison_metrics, new_pairs
from nanoalign.data import read_sources
from nanoalign.distributed import World, on_main, print0, run, setup
from nanoalign.errors import RunError, in_a_line
from nanoalign.judge import judge, judge_shares, reward_rule, try_judge
from nanoalign.models import RewardModel
from nanoalign.page import comparison_page, diagnosis, read_log, verdict
from nanoalign.prepare import compute_dtype, load_tokenizer
from nanoalign.records import Example
from nanoalign.report import frontier_picture, policy_picture, reward_picture
from nanoalign.scoring import (
    Scored,
    cases,
    encode_for,
    reward_metrics,
    score_encoded,
    scored_lines,
    scoring_rule,
    table,
    truth,
    views,
)
from nanoalign.templates import TEMPLATES

RM_DOC = """Score preference pairs with a reward model: what does it rank rightly, how surely, and by length?

Writes scores.jsonl (a line a response), metrics.json, a picture a subset, and cases.md (the surest
right, the surest wrong and the closest pairs).
"""
POLICY_DOC = """Sample a policy and a baseline on the same prompts, and let a reward model judge the answers.

Writes report.html (the verdict, and all answers side by side), answers.jsonl, metrics.json, and a picture.
"""
FRONTIER_DOC = """Draw what several policies gain over one baseline against how far they have moved from it.

More reward by the judge at a larger KL is what training asks for; where people (or, in the embedded
world, the true rule) no longer agree, the policy exploits the judge (Gao et al. 2022, arXiv 2210.10760).
"""
REWARD_MODEL = "runs/rm"  # where train_rm.py puts it
POLICY = "runs/dpo"  # where train_dpo.py puts it
COMPARABLE = ("baseline", "baseline_answers", "reward", "combine", "reward_template", "data", "template",
              "max_length", "temperature", "top_p", "max_new_tokens")  # fmt: skip
FRONTIER = ("kl_per_answer", "policy_mean", "win_rate", "policy_true_mean", "true_win_rate",
            "policy_tokens_mean", "policy_ended_share")  # fmt: skip
TINY_SUBSETS = [f"{name}=tiny:test:{name}" for name in tiny.SOURCE_NAMES]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", parser_class=Parser)
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
    rm.add_argument("--preference", choices=PREFERENCES,
        help="which PKU-SafeRLHF label orders a pair; default: all that the model knows")  # fmt: skip
    add_combine_argument(rm)
    add_forward_arguments(rm)

    policy = commands.add_parser("policy", doc=POLICY_DOC, help="a policy, against a baseline")
    models = policy.add_argument_group("models")
    models.add_argument("--policy",
        help=f"folder, OWNER/NAME on the Hub, or 'tiny'; default: {POLICY}")  # fmt: skip
    models.add_argument("--baseline",
        help=f"what it is compared with, likewise; default: {EMBEDDED}")  # fmt: skip
    models.add_argument("--policy_answers", metavar="SOURCE",
        help="answers made elsewhere, in place of --policy: records of prompt and response")  # fmt: skip
    models.add_argument("--baseline_answers", metavar="SOURCE", help="likewise for --baseline")
    models.add_argument("--reward", default=REWARD_MODEL, help="the reward model that judges")
    add_combine_argument(models)
    models.add_argument("--data", nargs="+", metavar="SOURCE",
        help="prompts, alone or in preference records: paths, embedded data, hf://datasets/...; default: "
        "those of the answers that are given, else tiny:test")  # fmt: skip
    models.add_argument("--allow_missing", action="store_true",
        help="leave out prompts that lack answers, and answers to prompts that are not asked")  # fmt: skip
    models.add_argument("--template", choices=TEMPLATES, default="auto",
        help="how policy and baseline are asked, and the reward model was trained")  # fmt: skip
    models.add_argument("--reward_template", choices=TEMPLATES,
        help="that of the reward model, where it is to be another than --template")  # fmt: skip
    models.add_argument("--max_length", type=number(int, 2), default=1024,
        help="tokens of a prompt; longer ones lose their beginning")  # fmt: skip
    models.add_argument("--reward_max_length", type=number(int, 2),
        help="tokens of a prompt and an answer for the reward model; default: as it was trained")  # fmt: skip
    models.add_argument("--out", default="runs/dpo_eval",
        help="folder of the results; those of an older evaluation are replaced")  # fmt: skip
    sampling = policy.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=number(float, 0), default=1.0,
        help="of the answers; 0: always the most probable token")  # fmt: skip
    sampling.add_argument("--top_p", type=positive, default=1.0,
        help="only the most probable tokens that together have this probability")  # fmt: skip
    sampling.add_argument("--max_new_tokens", type=number(int, 1), default=256,
        help="tokens after which an answer is cut")  # fmt: skip
    sampling.add_argument(
        "--samples", type=number(int, 1), default=1, help="answers to each prompt"
    )
    sampling.add_argument("--seed", type=number(int, 0), default=0, help="of the answers")
    sampling.add_argument("--pairs_out", metavar="FILE",
        help="write the policy's best answer to each prompt against its worst, as preference records "
        "(.jsonl) to train on; needs --samples of 2 or more")  # fmt: skip
    sampling.add_argument("--batch_size", type=number(int, 1), default=64,
        help="answers sampled at a time, on each rank")  # fmt: skip
    add_forward_arguments(policy.add_argument_group("machine"))

    frontier = commands.add_parser(
        "frontier", doc=FRONTIER_DOC, help="several policies, against their KL from the baseline"
    )
    frontier.add_argument("results", nargs="+", metavar="FOLDER",
        help="results of evaluate.py policy, all with one baseline, reward model and data")  # fmt: skip
    frontier.add_argument("--out", default="runs/frontier",
        help="folder of the results; those of an older frontier are replaced")  # fmt: skip
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        parser.error(
            f"say first what to evaluate: evaluate.py {'|'.join(commands.choices)} {argv[0]}"
        )
    args = parser.parse_args(argv)
    if args.command == "policy":
        for side, default in (("policy", POLICY), ("baseline", EMBEDDED)):
            if getattr(args, f"{side}_answers") is None:
                setattr(args, side, getattr(args, side) or default)
            elif getattr(args, side) is not None:
                parser.error(f"--{side} and --{side}_answers both name the {side}; give one")
        if not (args.policy_answers or args.baseline_answers):
            args.data = args.data or ["tiny:test"]
    return args


def write_results(
    folder: Path, scored: list[Scored], figures: dict, args: argparse.Namespace
) -> None:
    checkpoint.write_records(folder / "scores.jsonl", (asdict(line) for line in scored))
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "cases.md").write_text(cases(scored, args.cases), encoding="utf-8")
    for subset, numbers in figures["subsets"].items():
        lines = [line for line in scored if line.subset == subset]
        reward_picture(folder / picture_name(subset), subset, lines, numbers)


def picture_name(subset: str) -> str:
    return re.sub(r"[^\w.-]", "_", subset) + ".png"


def check_subsets(examples: list[Example], judged: list[Example]) -> None:
    """Stops where subsets can't be told apart, or one has nothing to compare."""
    pictures: dict[str, str] = {"all.png": "the row of all"}
    for name in dict.fromkeys(example.subset for example in examples):
        if (other := pictures.setdefault(picture_name(name), name)) != name:
            raise RunError(f"the subset '{name}' would share its files with {other!r}; rename it")
        if all(example.subset != name for example in judged):
            raise RunError(
                f"the subset '{name}' has no pairs: all of its records' scores are equal"
            )


def evaluate_rm(args: argparse.Namespace, world: World) -> None:
    if args.model == REWARD_MODEL and not Path(args.model).exists():
        raise RunError(
            f"there is no reward model in {args.model} yet; train one: python train_rm.py"
        )
    on_main(world, partial(checkpoint.check_results, args))
    folder = weights.resolve_model(args.model)
    model = RewardModel.load(folder, world, compute_dtype(args, world), trainable=False)
    tokenizer = load_tokenizer(folder)
    args.template, args.max_length = scoring_rule(model, args.model, args.template, args.max_length)
    print0(
        f"{'model':<11} {args.model}: {model.count_parameters():,} parameters, {model.compute_dtype}; "
        f"template {args.template}, max_length {args.max_length}"
    )
    read = []  # of each view what it compares: all before anything is scored
    for view in views(model, args.preference, args.combine):
        examples = read_sources(args.data, view.preference)
        judged = [example for example in examples if example.pairs]
        check_subsets(examples, judged)
        encoded = encode_for(
            model, view.shares, judged, tokenizer, (args.template, args.max_length)
        )
        counts = sum((each.counts for each in encoded), Counter())
        counts["records left out: all scores equal"] = len(examples) - len(judged)
        notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items() if count)
        responses = sum(len(row.responses) for row in encoded[0].rows)
        print0(
            f"{'data':<11} {' '.join(args.data)}: {responses:,} responses to {len(judged):,} prompts, "
            f"labels {view.preference}{notes}"
        )
        for each in encoded:
            model.check_fits(each.rows)
        check_layout(model, encoded[0].rows, args.share_prefix, world, f"--model {args.model}")
        read.append((view, judged, encoded))

    scored, figures = [], {"subsets": {}}
    for view, judged, encoded in read:
        model.combine(view.shares)
        scores = score_encoded(model, encoded, args, world)
        lines = scored_lines(judged, encoded[0].rows, scores, view.name)
        for name in dict.fromkeys(line.subset for line in lines):
            own = [line for line in lines if line.subset == name]
            figures["subsets"][name] = reward_metrics(own) | truth(own, view.preference)
        scored += lines
    if not world.is_main:
        return
    figures["all"] = reward_metrics(scored)
    if len(read) == 1:
        figures["all"] |= truth(scored, read[0][0].preference)
    with checkpoint.results_folder(args) as results:
        write_results(results, scored, figures, args)

    print(f"\n{table(figures['subsets'] | {'all': figures['all']})}\n")
    for name, numbers in figures["subsets"].items():
        values = ", ".join(
            f"{k} = {numbers[k]:.4f}" for k in ("accuracy", "reward_mean", "reward_std")
        )
        print(f"{name:<11} Evaluation: {values}")
    print(f"{'saved':<11} {args.out}: scores.jsonl, metrics.json, cases.md, a picture a subset")


def check_policy_flags(args: argparse.Namespace) -> None:
    """Stops before anything is loaded where flags contradict each other or a file can't be written."""
    for default, name, script in (
        (REWARD_MODEL, args.reward, "train_rm.py"), (POLICY, args.policy, "train_dpo.py")
    ):  # fmt: skip
        if name == default and not Path(default).exists():
            raise RunError(f"there is no model in {default} yet; train one: python {script}")
    if 0 < args.temperature < 1e-3:
        raise RunError(f"--temperature {args.temperature:g}: give 0, or 0.001 and more")
    if args.top_p > 1:
        raise RunError(f"--top_p {args.top_p:g} is a probability; give 1 or less")
    if args.temperature == 0 and args.samples > 1 and (args.policy or args.baseline):
        raise RunError(
            f"at --temperature 0 all --samples {args.samples} of a prompt are the same; give 1, or another "
            "temperature"
        )
    checkpoint.check_results(args)
    if args.pairs_out is None:
        return
    if args.samples < 2:
        raise RunError(
            f"--pairs_out compares a prompt's answers; --samples is {args.samples}, give 2 or more"
        )
    if Path(args.out).resolve() in Path(args.pairs_out).resolve().parents:
        raise RunError(
            f"--pairs_out {args.pairs_out} lies in --out, which the next evaluation replaces; give "
            "another place"
        )
    checkpoint.check_file("--pairs_out", args.pairs_out, ".jsonl")


def write_comparison(
    folder: Path, compared: list[Compared], figures: dict, log: list[dict], args: argparse.Namespace
) -> None:
    checkpoint.write_records(folder / "answers.jsonl", (asdict(line) for line in compared))
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    policy_picture(folder / "answers.png", compared, figures)
    page = comparison_page(
        f"{args.policy_answers or args.policy} against {args.baseline_answers or args.baseline}, "
        f"judged by {args.reward}",
        compared,
        figures,
        diagnosis(figures, log),
        folder / "answers.png",
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def write_pairs(name: str, records: list[dict], prompts: int) -> None:
    if not records:
        print(f"{'pairs':<11} none, and so no {name}: no two answers to a prompt differ in reward")
        return
    try:
        checkpoint.write_records(Path(name), records)
    except OSError as error:
        raise RunError(f"--pairs_out {name} can't be written: {in_a_line(error)}") from error
    print(f"{'pairs':<11} {name}: {len(records):,} of {prompts:,} prompts")


def evaluate_policy(args: argparse.Namespace, world: World) -> None:
    on_main(world, partial(check_policy_flags, args))
    prompts, answers = read_given(args)
    reward_model = RewardModel.load(args.reward, world, compute_dtype(args, world), trainable=False)
    names = {side: getattr(args, side) for side in SIDES if side not in answers}
    # By name: where policy and baseline are one model, it is asked once.
    asked = {name: load_asked(name, prompts, args, world) for name in dict.fromkeys(names.values())}
    rule = reward_rule(reward_model, list(asked.values()), args)
    shares = judge_shares(reward_model, args)
    try_judge(reward_model, rule, shares, prompts, args, world)
    log = read_log(weights.resolve_model(args.policy) / "metrics.jsonl") if args.policy else []

    sampled = {name: sample(one, args, world) for name, one in asked.items()}
    answers |= {side: sampled[name] for side, name in names.items()}
    both = [asked[name] for name in names.values()]
    comparable = len(both) == 2 and share_vocabulary(*both)
    compared = judge(reward_model, rule, shares, prompts, answers, comparable, args, world)
    kl = kl_estimate(*both, answers["policy"], args, world) if len(both) == 2 else {}
    if not world.is_main:
        return

    figures = comparison_metrics(compared) | kl
    with checkpoint.results_folder(args) as results:
        write_comparison(results, compared, figures, log, args)
    if args.pairs_out:
        write_pairs(args.pairs_out, new_pairs(prompts, compared, args.samples), len(prompts))
    for name, value in figures.items():
        print(f"{name:<28} {'-' if value is None else round(value, 4)}")
    print(f"\n{verdict(figures)}")
    print(f"{'saved':<11} {args.out}: report.html, answers.jsonl, metrics.json, answers.png")


def evaluate_frontier(args: argparse.Namespace) -> None:
    checkpoint.check_results(args)
    policies = {name: checkpoint.read_results(name) for name in args.results}
    first = args.results[0]
    for name, (settings, figures) in policies.items():
        if missing := [
            key for key in ("kl_per_answer", "policy_tokens_mean") if key not in figures
        ]:
            raise RunError(
                f"{name} has no {missing[0]}; it needs evaluate.py policy on two models with one vocabulary, "
                "at temperature 1 without top_p"
            )
        for key in COMPARABLE:
            its, firsts = settings.get(key), policies[first][0].get(key)
            if its != firsts:
                raise RunError(
                    f"{name} was evaluated with --{key} {its}, {first} with {firsts}; they can't be compared"
                )
    results = {name: figures for name, (_, figures) in policies.items()}
    shown = {name: {key: each.get(key) for key in FRONTIER} for name, each in results.items()}
    with checkpoint.results_folder(args) as folder:
        (folder / "metrics.json").write_text(json.dumps(shown, indent=2) + "\n")
        frontier_picture(folder / "frontier.png", results)
    print(table(shown, "policy"))
    print(f"{'saved':<11} {args.out}: frontier.png, metrics.json")


def main(argv: list[str] | None = None) -> None:
    world = setup()
    args = parse_args(argv)
    if args.command == "frontier":
        on_main(world, partial(evaluate_frontier, args))
    if args.command in ("rm", None):
        evaluate_rm(args if args.command else parse_args(["rm"]), world)
    if args.command in ("policy", None):
        evaluate_policy(args if args.command else parse_args(["policy"]), world)


if __name__ == "__main__":
    run(main)
