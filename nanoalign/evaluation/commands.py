"""The flags of evaluate.py, and what is refused of them."""

import argparse
from argparse import Namespace
from math import isfinite

from nanoalign.data.readers import SOURCES
from nanoalign.data.rows import PREFERENCES, TEMPLATES, add_keys_argument
from nanoalign.flags import add_forward_arguments, number, positive
from nanoalign.packing import packed

REWARD_MODEL, POLICY = "runs/rm", "runs/dpo"  # where the training scripts write
RM_DOC = """Score preference pairs with a reward model: its accuracy, calibration and length bias.

Writes scores.jsonl (a line per response), metrics.json, a picture per subset, and cases.md (the
pairs ranked rightly and wrongly with the largest differences of reward, and the closest pairs).
"""
POLICY_DOC = """Sample a policy and a baseline on the same prompts, and compare their rewards.

Writes report.html (the result, and all answers side by side), answers.jsonl, metrics.json, and a
picture.
"""
SCORE_DOC = """Score responses with a reward model, keep the best of them, and make pairs of them.

Writes a line for each response: prompt, completion, reward. train_dpo.py --loss sft learns from
what is kept, and train_dpo.py from --pairs_out.
"""
FRONTIER_DOC = """Draw what several policies gain over one baseline against their KL from it.

Training raises the reward, and the KL with it. Where the rewards still rise but people (or, in the
embedded world, the true rule) no longer agree, the policy exploits the reward model (Gao et al.
2022, arXiv 2210.10760).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the commands rm, policy, score and frontier, each with its flags."""
    commands = parser.add_subparsers(dest="command", parser_class=type(parser))
    rm = commands.add_parser("rm", doc=RM_DOC, help="a reward model, on preference pairs")
    add_rm_arguments(rm)
    policy = commands.add_parser("policy", doc=POLICY_DOC, help="a policy, against a baseline")
    add_policy_arguments(policy)
    score = commands.add_parser("score", doc=SCORE_DOC, help="responses, by a reward model")
    add_score_arguments(score)
    frontier = commands.add_parser(
        "frontier", doc=FRONTIER_DOC, help="several policies, by their KL from the baseline"
    )
    frontier.add_argument("results", nargs="+", metavar="FOLDER",
        help="results of evaluate.py policy, all with one baseline, reward model and "
        "data")  # fmt: skip
    add_out_argument(frontier, "runs/frontier")
    parser.derived.append(policy_defaults)
    parser.refusals.append(refusal)


def add_rm_arguments(parser: argparse.ArgumentParser) -> None:
    subsets = [f"{name}=tiny:test:{name}" for name in SOURCES]
    group = parser.add_argument_group("reward model and data")
    add = group.add_argument
    add("--model", default=REWARD_MODEL, help="the reward model: a folder or OWNER/NAME")
    add("--data", nargs="+", default=subsets, metavar="NAME=SOURCE",
        help="preference pairs, a subset each: docs/data.md")  # fmt: skip
    add_keys_argument(add)
    add("--template", choices=TEMPLATES, help="text of a prompt; default: that of its training")
    add("--max_length", type=number(int, 2),
        help="tokens of a prompt and one response; default: those of its training")  # fmt: skip
    add("--cases", type=number(int, 0), default=5, help="pairs of each kind in cases.md")
    add("--preference", choices=PREFERENCES,
        help="the label of PKU-SafeRLHF that orders a pair; default: each that the model "
        "has")  # fmt: skip
    add_combine_argument(group)
    add_out_argument(group, "runs/rm_eval")
    add_forward_arguments(parser.add_argument_group("machine"))
    packed.add_arguments(parser)


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reward model and responses")
    add = group.add_argument
    add("--model", default=REWARD_MODEL, help="the reward model: a folder or OWNER/NAME")
    add("--data", nargs="+", metavar="SOURCE",
        help="prompts with responses, in records of any format: docs/data.md")  # fmt: skip
    add_keys_argument(add)
    add("--prompt", metavar="TEXT", help="one prompt, in place of --data")
    add("--response", nargs="+", metavar="TEXT", help="responses to --prompt")
    add("--template", choices=TEMPLATES, help="text of a prompt; default: that of its training")
    add("--max_length", type=number(int, 2),
        help="tokens of a prompt and one response; default: those of its training")  # fmt: skip
    add_combine_argument(group)
    add("--keep", nargs="+", metavar="WORD",
        help="best: one response to each prompt; above NUMBER: those of a larger reward; default: "
        "all")  # fmt: skip
    add("--out", metavar="FILE", help="a new file (.jsonl) for what is kept; default: none")
    add("--pairs_out", metavar="FILE",
        help="a new file (.jsonl) for pairs of the best and the worst response to a prompt; "
        "default: none")  # fmt: skip
    add_forward_arguments(parser.add_argument_group("machine"))
    packed.add_arguments(parser)


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    count = number(int, 1)
    group = parser.add_argument_group("models and prompts")
    add = group.add_argument
    add("--policy", help=f"a folder, OWNER/NAME, or 'tiny'; default: {POLICY}")
    add("--baseline", help="the model that it is compared with, likewise; default: tiny")
    add("--policy_answers", metavar="SOURCE",
        help="answers of another program, in place of --policy: records of prompt and answer, all "
        "of which are compared; prompts that are not in all files are left out")  # fmt: skip
    add("--baseline_answers", metavar="SOURCE", help="likewise, in place of --baseline")
    add("--reward", default=REWARD_MODEL, help="the reward model that scores the answers")
    add("--data", nargs="+", metavar="SOURCE",
        help="prompts, alone or in preference records; default: those of the given answers, "
        "else tiny:test")  # fmt: skip
    add_keys_argument(add)
    add("--template", choices=TEMPLATES, default="auto",
        help="of the prompts, for both models; and of the reward model")  # fmt: skip
    add("--reward_template", choices=TEMPLATES,
        help="of the reward model, if it was trained with another one; default: "
        "--template")  # fmt: skip
    add("--max_length", type=number(int, 2), default=1024,
        help="tokens of a prompt; a longer one loses its beginning")  # fmt: skip
    add("--reward_max_length", type=number(int, 2),
        help="tokens of a prompt and an answer for the reward model; default: those of its "
        "training")  # fmt: skip
    add_combine_argument(group)
    add_out_argument(group, "runs/dpo_eval")

    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=number(float, 0), default=1.0,
        help="of the answers; 0: always the most probable token")  # fmt: skip
    add("--top_p", type=positive, default=1.0,
        help="only the most probable tokens that together have this probability")  # fmt: skip
    add("--max_new_tokens", type=count, default=256,
        help="tokens of an answer at which sampling stops")  # fmt: skip
    add("--samples", type=count, default=1, help="answers sampled to each prompt")
    add("--seed", type=number(int, 0), default=0, help="of the answers")
    add("--pairs_out", metavar="FILE",
        help="write the best answer of the policy to each prompt and its worst as preference "
        "pairs (.jsonl), with --samples of 2 or more; default: no pairs")  # fmt: skip
    add("--batch_size", type=count, default=64, help="answers sampled at a time on each rank")
    add_forward_arguments(parser.add_argument_group("machine"))
    packed.add_arguments(parser)


def add_out_argument(group: argparse._ActionsContainer, default: str) -> None:
    group.add_argument("--out", default=default,
        help="folder of the results; it replaces an older one of the same command")  # fmt: skip


def add_combine_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument("--combine", nargs="+", type=weight_by_name, metavar="NAME=WEIGHT",
        help="of a reward model of several preferences: the weighted sum of its rewards; "
        "default: each by itself")  # fmt: skip


def weight_by_name(text: str) -> tuple[str, float]:
    """An argparse type: NAME=NUMBER -> (NAME, NUMBER)."""
    name, _, number = text.partition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    if not name or not isfinite(weight):
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got '{text}'")
    return name, weight


def policy_defaults(args: Namespace) -> dict:
    """The values of `evaluate.py policy` that depend on its other flags."""
    if args.command != "policy":
        return {}
    return {
        "policy": None if args.policy_answers else POLICY,
        "baseline": None if args.baseline_answers else "tiny",
        "data": None if args.policy_answers or args.baseline_answers else ["tiny:test"],
    }


def refusal(args: Namespace) -> str | None:
    """What is wrong with the flags of a command, if anything is."""
    combine = [name for name, _ in getattr(args, "combine", None) or ()]
    if len(set(combine)) < len(combine):
        return "--combine has a preference twice; give each one weight"
    if args.command == "score" and (args.data is None) == (args.prompt is None):
        return "give either --data, or --prompt and --response"
    if args.command == "score" and (args.prompt is None) != (args.response is None):
        return "--prompt and --response belong together; give both"
    if args.command != "policy":
        return None
    for role in ("policy", "baseline"):
        if None not in (getattr(args, role), getattr(args, f"{role}_answers")):
            return f"--{role} and --{role}_answers both give the answers of the {role}; give one"
    if 0 < args.temperature < 1e-3:
        return f"--temperature {args.temperature:g}: give 0, or 0.001 and more"
    if args.top_p > 1:
        return f"--top_p {args.top_p:g} is a probability; give 1 or less"
    if args.temperature == 0 and args.samples > 1 and (args.policy or args.baseline):
        return (
            f"with --temperature 0 all --samples {args.samples} of a prompt are the same; give 1, "
            "or another temperature"
        )
    if args.samples > 1 and not (args.policy or args.baseline):
        return (
            f"--samples {args.samples} samples answers, but both files have theirs, which are all "
            "compared; leave it out"
        )
    if args.pairs_out is not None and args.policy and args.samples < 2:
        return (
            f"--pairs_out compares the answers to a prompt; --samples is {args.samples}, give 2 or "
            "more"
        )
    return None
