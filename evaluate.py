"""Evaluate what was trained.

    python evaluate.py                                          both of these, on what the default runs made:
    python evaluate.py rm                                       runs/rm on the embedded test split
    python evaluate.py policy                                   runs/dpo against what it came from, by runs/rm
    torchrun --nproc_per_node 8 evaluate.py rm \\
        --model runs/rm --data harmless=pairs.jsonl helpful=others.jsonl --out runs/rm_eval
    torchrun --nproc_per_node 8 evaluate.py policy \\
        --policy runs/dpo --baseline Qwen/Qwen2.5-0.5B-Instruct --reward runs/rm --data prompts.jsonl

`evaluate.py rm --help` and `evaluate.py policy --help` explain the flags.
"""

import argparse
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from nanoalign import checkpoint, tiny, weights
from nanoalign.arguments import (
    EMBEDDED,
    Parser,
    add_forward_arguments,
    add_preference_argument,
    number,
    positive,
)
from nanoalign.checks import check_layout
from nanoalign.comparison import Compared, comparison_metrics
from nanoalign.data import read_answers, read_prompts, read_sources
from nanoalign.distributed import World, on_main, print0, run, setup
from nanoalign.errors import RunError
from nanoalign.generate import Sampling, generate
from nanoalign.models import Policy, RewardModel
from nanoalign.page import comparison_page, diagnosis, verdict
from nanoalign.prepare import compute_dtype, load_tokenizer
from nanoalign.records import Example
from nanoalign.report import policy_picture, reward_picture
from nanoalign.rows import Row, encode_all
from nanoalign.scoring import (
    Scored,
    cases,
    reward_metrics,
    score_examples,
    score_rows,
    scoring_rule,
    table,
    truth,
)
from nanoalign.templates import TEMPLATES

RM_DOC = """Score preference pairs with a reward model: what does it rank rightly, how surely, and by length?

Writes scores.jsonl (a line a response), metrics.json, a picture a subset, and cases.md (the surest
right, the surest wrong and the closest pairs).
"""
POLICY_DOC = """Sample a policy and a baseline on the same prompts, and let a reward model judge the answers.

Writes report.html (the verdict, and all answers side by side), answers.jsonl, metrics.json, and a picture.
"""
REWARD_MODEL = "runs/rm"  # where train_rm.py puts it
POLICY = "runs/dpo"  # where train_dpo.py puts it
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
    add_preference_argument(rm)
    add_forward_arguments(rm)

    policy = commands.add_parser("policy", doc=POLICY_DOC, help="a policy, against a baseline")
    models = policy.add_argument_group("models")
    models.add_argument("--policy", default=POLICY, help="folder, OWNER/NAME on the Hub, or 'tiny'")
    models.add_argument("--baseline", default=EMBEDDED, help="what it is compared with, likewise")
    models.add_argument("--policy_answers", metavar="SOURCE",
        help="answers made elsewhere, in place of --policy: records of prompt and response")  # fmt: skip
    models.add_argument("--baseline_answers", metavar="SOURCE", help="likewise for --baseline")
    models.add_argument("--reward", default=REWARD_MODEL, help="the reward model that judges")
    models.add_argument("--data", nargs="+", default=["tiny:test"], metavar="SOURCE",
        help="prompts, alone or in preference records: paths, embedded data, hf://datasets/...")  # fmt: skip
    models.add_argument("--template", choices=TEMPLATES, default="auto",
        help="how policy and baseline are asked; the reward model reads as it was trained")  # fmt: skip
    models.add_argument("--max_length", type=number(int, 2), default=1024,
        help="tokens of a prompt; longer ones lose their beginning")  # fmt: skip
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
    pictures: dict[str, str] = {"all.png": "the row of all"}
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


def load_policy(name: str, prompts: list[Example], args: argparse.Namespace, world: World):
    """(the whole policy on every rank, its tokenizer, the prompts as rows)."""
    folder = weights.resolve_model(name)
    policy = Policy.load(folder, None, compute_dtype(args, world), trainable=False).to(world.device)
    tokenizer = load_tokenizer(folder)
    rows, counts = encode_all(prompts, tokenizer, args.template, args.max_length)
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row.prompt) for row in rows) + args.max_new_tokens
    if positions is not None and longest > positions:
        raise RunError(
            f"'{name}' knows {positions} positions, and the longest prompt with --max_new_tokens "
            f"{args.max_new_tokens} has {longest}; lower it, or --max_length"
        )
    notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items() if count)
    print0(f"{'model':<11} {name}: {policy.count_parameters():,} parameters{notes}")
    return policy, tokenizer, rows


def sample_texts(
    policy: Policy, tokenizer, rows: list[Row], args: argparse.Namespace, world: World
):
    """(answers to every prompt as tokens, as texts)."""
    settings = Sampling(
        args.temperature, args.top_p, args.max_new_tokens, args.samples, args.seed, args.batch_size
    )
    answers = generate(policy, rows, policy.eos_ids(tokenizer), settings, world)
    texts = [
        tokenizer.batch_decode([answer.tokens for answer in some], skip_special_tokens=True)
        for some in answers
    ]
    return answers, texts


def given_answers(source: str, prompts: list[Example], samples: int) -> list[list[str]]:
    """The answers of a file, to each prompt `samples` of them, in order."""
    waiting = read_answers(source)
    texts = []
    for prompt in prompts:
        own = waiting.get(prompt.prompt_key(), [])
        if len(own) < samples:
            raise RunError(
                f"{source}: too few answers to the prompt of {prompt.pair_id}, "
                f"{prompt.prompt_key()[:60]!r}; it needs {samples} for every time it is asked"
            )
        texts.append([own.pop(0) for _ in range(samples)])
    return texts


def kl_estimate(
    policy: Policy,
    baseline: Policy,
    rows: list[Row],
    answers,
    args: argparse.Namespace,
    world: World,
) -> dict[str, float]:
    """KL(policy || baseline), as the mean difference of log-probabilities on the policy's answers."""
    sampled = [
        Row(row.pair_id, row.prompt, (np.array([*a.tokens, *([a.end] if a.ended else [])], np.int32),), ())
        for row, some in zip(rows, answers, strict=True)
        for a in some
    ]  # fmt: skip
    logps = [
        np.array(score_rows(model, sampled, args, world))[:, 0] for model in (policy, baseline)
    ]
    difference = logps[0] - logps[1]
    tokens = sum(len(row.responses[0]) for row in sampled)
    return {"kl_per_answer": difference.mean().item(), "kl_per_token": difference.sum() / tokens}


def new_pairs(prompts: list[Example], compared: list[Compared], samples: int) -> list[dict]:
    """Preference records of the policy's own answers: the best to each prompt against the worst.

    Where they have the same score, or are the same, nothing is preferred, and there is no record.
    """
    records = []
    for n, prompt in enumerate(prompts):
        answers = compared[n * samples : (n + 1) * samples]
        best = max(answers, key=lambda line: line.policy_score)
        worst = min(answers, key=lambda line: line.policy_score)
        chosen, rejected = best.policy_answer, worst.policy_answer
        if best.policy_score == worst.policy_score or not (chosen and rejected):
            continue
        if prompt.kind == "dialogue":
            record = {"chosen": prompt.prompt + chosen, "rejected": prompt.prompt + rejected}
        else:
            record = {"prompt": prompt.prompt, "chosen": chosen, "rejected": rejected}
        records.append(record)
    return records


def evaluate_policy(args: argparse.Namespace, world: World) -> None:
    if args.pairs_out and args.samples < 2:
        raise RunError(
            f"--pairs_out compares a prompt's answers; --samples is {args.samples}, give 2 or more"
        )
    if args.pairs_out and not args.pairs_out.endswith(".jsonl"):
        raise RunError(f"--pairs_out {args.pairs_out}: give a file that ends with .jsonl")
    made_by = {
        REWARD_MODEL: (args.reward, "train_rm.py"),
        POLICY: (None if args.policy_answers else args.policy, "train_dpo.py"),
    }
    for default, (name, script) in made_by.items():
        if name == default and not Path(default).exists():
            raise RunError(f"there is no model in {default} yet; train one: python {script}")
    on_main(world, partial(checkpoint.check_results, args))
    prompts = [example for source in args.data for example in read_prompts(source)]

    reward_model = RewardModel.load(args.reward, world, compute_dtype(args, world), trainable=False)
    template, max_length = scoring_rule(reward_model, args.reward, None, None)

    sides, models = {}, {}
    for side in ("policy", "baseline"):
        if source := getattr(args, f"{side}_answers"):
            sides[side] = None, given_answers(source, prompts, args.samples)
        else:
            policy, tokenizer, rows = load_policy(getattr(args, side), prompts, args, world)
            models[side] = policy, tokenizer, rows
            sides[side] = sample_texts(policy, tokenizer, rows, args, world)
    kl = {}
    if len(models) == 2:
        (policy, tokenizer, rows), (baseline, other, _) = models["policy"], models["baseline"]
        if tokenizer.get_vocab() == other.get_vocab():
            kl = kl_estimate(policy, baseline, rows, sides["policy"][0], args, world)

    judged = [
        replace(prompt, responses=(mine, its), pair_id=f"{prompt.pair_id}#{k}")
        for prompt, *texts in zip(prompts, sides["policy"][1], sides["baseline"][1], strict=True)
        for k, (mine, its) in enumerate(zip(*texts, strict=True))
    ]
    tokenizer = load_tokenizer(weights.resolve_model(args.reward))
    rows, _ = encode_all(judged, tokenizer, template, max_length)
    reward_model.check_fits(rows)
    check_layout(reward_model, rows, args.share_prefix, world, f"--reward {args.reward}")
    scores = score_rows(reward_model, rows, args, world)
    if not world.is_main:
        return

    ended = {
        side: [a.ended for some in answers for a in some] if answers else [None] * len(judged)
        for side, (answers, _) in sides.items()
    }
    compared = [
        Compared(
            example.pair_id,
            example.prompt,
            *example.responses,
            *scores[n],
            *(len(response) for response in rows[n].responses),
            ended["policy"][n],
            ended["baseline"][n],
        )
        for n, example in enumerate(judged)
    ]
    figures = comparison_metrics(compared) | kl
    with checkpoint.results_folder(args) as results:
        with (results / "answers.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(line.to_json() + "\n" for line in compared)
        (results / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
        policy_picture(results / "answers.png", compared, figures)
        log = None if args.policy_answers else weights.resolve_model(args.policy) / "metrics.jsonl"
        page = comparison_page(
            f"{args.policy_answers or args.policy} against {args.baseline_answers or args.baseline}, "
            f"judged by {args.reward}",
            compared,
            figures,
            diagnosis(figures, log if log and log.is_file() else None),
            results / "answers.png",
        )
        (results / "report.html").write_text(page, encoding="utf-8")
    if args.pairs_out:
        records = new_pairs(prompts, compared, args.samples)
        partial_file = Path(f"{args.pairs_out}.partial")
        partial_file.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
            encoding="utf-8",
        )
        partial_file.replace(args.pairs_out)
        print(f"{'pairs':<11} {args.pairs_out}: {len(records):,} of {len(prompts):,} prompts")
    for name, value in figures.items():
        print(f"{name:<28} {'-' if value is None else round(value, 4)}")
    print(f"\n{verdict(figures)}")
    print(f"{'saved':<11} {args.out}: report.html, answers.jsonl, metrics.json, answers.png")


def main(argv: list[str] | None = None) -> None:
    world = setup()
    args = parse_args(argv)
    if args.command in ("rm", None):
        evaluate_rm(args if args.command else parse_args(["rm"]), world)
    if args.command in ("policy", None):
        evaluate_policy(args if args.command else parse_args(["policy"]), world)


if __name__ == "__main__":
    run(main)
