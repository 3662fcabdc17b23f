"""The flags of evaluate.py, and what is refused of them."""

import argparse
from argparse import Namespace
from math import isfinite
from pathlib import Path

from nanoalign.data.rows import (
    PREFERENCES,
    TEMPLATE_HELP,
    TEMPLATES,
    add_keys_argument,
    add_template_args_argument,
)
from nanoalign.data.sources import SOURCES
from nanoalign.evaluation.benchmarks import BENCHMARKS
from nanoalign.flags import PRECISIONS, add_forward_arguments, number, positive
from nanoalign.packing import packed

REWARD_MODEL, POLICY = "runs/rm", "runs/dpo"  # where the training scripts write
RM_DOC = """Score preference pairs with a reward model: its accuracy, calibration and length bias.

Writes scores.jsonl (a line per response), metrics.json, a picture per subset, and cases.md (the
pairs ranked rightly and wrongly with the largest differences of reward, and the closest pairs).
"""
POLICY_DOC = """Sample a policy and a baseline on the same prompts, and compare their rewards.

Writes report.html (the result, and all answers side by side), answers.jsonl, metrics.json, a
picture, and the answers as AlpacaEval and Arena-Hard read them.
"""
TOKENS_DOC = """Show pairs token by token: what each adds to log(pi / pi_ref), or to a reward.

Writes report.html (why chosen responses became more or less probable, and pairs side by side with
coloured tokens), tokens.jsonl (the values of all tokens) and metrics.json.
"""
SCORE_DOC = """Score responses with a reward model, keep the best of them, and make pairs of them.

Writes a line for each response: prompt, completion, reward. train_dpo.py --loss sft learns from
what is kept, and train_dpo.py from --pairs_out.
"""
FRONTIER_DOC = """Draw what several policies gain over one baseline against their KL from it.

Training raises the reward, and the KL with it. Where the rewards still rise but people (or, in the
embedded world, the ground truth) no longer agree, the policy exploits the reward model (Gao et al.
2022, arXiv 2210.10760).
"""
BENCH_DOC = """Score published benchmarks with a reward model, and count as their leaderboards do.

Beside the score of each subset stands what rulers get that prefer the longest response, the
shortest one, or the one with most list items. Writes report.html (subset by subset, what the model
got wrong, most sure first), scores.jsonl (a line per response) and metrics.json.
"""
SUSPECTS_DOC = """Rank pairs by the probability that their label is wrong; estimate how many are.

The runs are of train_rm.py --fold 1/N ... N/N with two --seed or more, so each pair is scored by
the runs that held it out. Writes suspects.jsonl (a line per pair, the most doubtful first),
metrics.json and a picture; with --drop or --flip also cleaned data.
"""
ASK_DOC = """Talk to a policy: print its answer to a prompt.

Without a prompt, each line of the standard input is one: type on a terminal, or pipe a file. An
answer knows nothing of the prompts before it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the commands of evaluate.py, each with its flags."""
    commands = parser.add_subparsers(dest="command", parser_class=type(parser))
    for name, doc, add_flags, text in (
        ("rm", RM_DOC, add_rm_arguments, "a reward model, on preference pairs"),
        ("tokens", TOKENS_DOC, add_tokens_arguments, "pairs, token by token"),
        ("bench", BENCH_DOC, add_bench_arguments, "a reward model, on published benchmarks"),
        ("policy", POLICY_DOC, add_policy_arguments, "a policy, against a baseline"),
        ("score", SCORE_DOC, add_score_arguments, "responses, by a reward model"),
        ("frontier", FRONTIER_DOC, add_frontier_arguments, "several policies, by their KL"),
        ("suspects", SUSPECTS_DOC, add_suspects_arguments, "pairs whose label may be wrong"),
        ("ask", ASK_DOC, add_ask_arguments, "a policy answers a prompt"),
    ):
        add_flags(commands.add_parser(name, doc=doc, help=text))
    parser.derived.append(policy_defaults)
    parser.refusals.append(refusal)


def add_rm_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reward model and data")
    add = group.add_argument
    tiny = [f"{name}=tiny:test:{name}" for name in SOURCES]
    text = "preference pairs, a subset each: docs/data.md"
    add("--data", nargs="+", default=tiny, metavar="NAME=SOURCE", help=text)
    add("--cases", type=number(int, 0), default=5, help="pairs of each kind in cases.md")
    text = "the label of PKU-SafeRLHF that orders a pair; default: each that the model has"
    add("--preference", choices=PREFERENCES, help=text)
    add_keys_argument(add)
    add_reward_model_arguments(parser, group)
    text = (
        "a policy in place of --model: its rewards are beta times the log-ratio to --reference, "
        "summed over the tokens of a response, and divided by their number"
    )
    add_implicit_arguments(add, text, "; none: the log-probability alone")
    add_out_argument(group, "runs/rm_eval")


def add_tokens_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    text = f"a policy, which is compared with --reference; default: {POLICY}, which tiny became"
    add_implicit_arguments(add, text)
    text = "preference pairs: docs/data.md"
    add("--data", nargs="+", default=["tiny:test"], metavar="SOURCE", help=text)
    add("--cases", type=number(int, 0), default=20, help="pairs in report.html")
    text = "the label of PKU-SafeRLHF that orders a pair; a preference of the reward model"
    add("--preference", choices=PREFERENCES, help=text)
    add_keys_argument(add)
    add_reward_model_arguments(parser, group, "in place of a policy, a reward model")
    add_out_argument(group, "runs/tokens")


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reward model and benchmarks")
    add = group.add_argument
    add("name", nargs="+", choices=[*BENCHMARKS], help="the benchmarks")
    text = (
        "files or hf://datasets/... with the published keys of the one benchmark that is named; "
        "default: where it is published"
    )
    add("--data", nargs="+", metavar="SOURCE", help=text)
    add("--cases", type=number(int, 0), default=20, help="wrong pairs of a subset in report.html")
    add_reward_model_arguments(parser, group)
    add_out_argument(group, "runs/bench")


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reward model and responses")
    add = group.add_argument
    text = "prompts with responses, in records of any format: docs/data.md"
    add("--data", nargs="+", metavar="SOURCE", help=text)
    add("--prompt", metavar="TEXT", help="one prompt, in place of --data")
    add("--response", nargs="+", metavar="TEXT", help="responses to --prompt")
    add_keys_argument(add)
    add_reward_model_arguments(parser, group)
    text = (
        "best: the best response to each prompt; above NUMBER: all whose reward is larger; "
        "default: all"
    )
    add("--keep", nargs="+", metavar="WORD", help=text)
    add("--out", metavar="FILE", help="write what is kept to this new .jsonl file; default: none")
    text = (
        "write the best and the worst response to each prompt as pairs to this new .jsonl file; "
        "default: none"
    )
    add("--pairs_out", metavar="FILE", help=text)


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models and prompts")
    add = group.add_argument
    text = "the policy to evaluate: a model folder, OWNER/NAME on the Hub, or 'tiny'; default: "
    add("--policy", help=f"{text}{POLICY}")
    add("--baseline", help="the model to compare it with; same forms; default: tiny")
    text = (
        "data source of prompts with ready answers, used in place of sampling --policy; only "
        "prompts that --data (if given) and all answer files contain are compared"
    )
    add("--policy_answers", metavar="SOURCE", help=text)
    add("--baseline_answers", metavar="SOURCE", help="the same for the baseline")
    add("--reward", default=REWARD_MODEL, help="the reward model that scores the answers")
    text = (
        "prompts, alone or in preference records; default: the prompts of the given answers, "
        "else tiny:test"
    )
    add("--data", nargs="+", metavar="SOURCE", help=text)
    add_keys_argument(add)
    add_prompt_arguments(group)
    text = (
        "template with which the reward model was trained; give it to allow a template other "
        "than that of the policies; default: that of its training, which must equal theirs"
    )
    add("--reward_template", choices=TEMPLATES, help=text)
    text = (
        "maximum tokens of prompt plus answer for the reward model; default: the value of its "
        "training (1024 if unknown)"
    )
    add("--reward_max_length", type=number(int, 2), help=text)
    add_head_argument(group, "--reward_head")
    add_combine_argument(group, "required if the model has several")
    text = (
        "verdicts of another judge on these answers, which are compared with the rewards: the "
        "annotations.json of AlpacaEval, or judgments of Arena-Hard; default: none"
    )
    add("--verdicts", metavar="SOURCE", help=text)
    text = (
        'any text, as records {"text": ...}: how its log-likelihood differs between policy and '
        "baseline; default: that of the chosen responses of --data alone"
    )
    add("--retention", metavar="SOURCE", help=text)
    add_out_argument(group, "runs/dpo_eval")
    text = (
        "write the policy's best and worst answer to each prompt as pairs to this new .jsonl "
        "file; needs --samples 2 or more, or --policy_answers; default: none"
    )
    add("--pairs_out", metavar="FILE", help=text)
    sampling = parser.add_argument_group("sampling")
    add_sampling_arguments(sampling)
    text = "answers that each rank samples at a time"
    sampling.add_argument("--batch_size", type=number(int, 1), default=64, help=text)
    add_machine_arguments(parser)


def add_frontier_arguments(parser: argparse.ArgumentParser) -> None:
    text = "results of evaluate.py policy, all with one baseline, reward model and data"
    parser.add_argument("results", nargs="+", metavar="FOLDER", help=text)
    add_out_argument(parser, "runs/frontier")


def add_suspects_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("folds and cleaned data")
    add, share = group.add_argument, number(float, above=0, below=1)
    text = "runs of train_rm.py --fold K/N, one for each K and each of two or more --seed"
    add("runs", nargs="+", metavar="RUN", help=text)
    text = "write to --cleaned the records without this share of them, the most doubtful ones"
    add("--drop", type=share, metavar="SHARE", help=text)
    text = "write to --cleaned the records, with the labels of this share of them reversed"
    add("--flip", type=share, metavar="SHARE", help=text)
    text = "the new .jsonl file of --drop or --flip, in the format of the data; default: none"
    add("--cleaned", metavar="FILE", help=text)
    add_out_argument(group, "runs/suspects")
    add_machine_arguments(parser)


def add_ask_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("policy and prompt")
    group.add_argument("prompt", nargs="?", help="the prompt; default: each line of the input")
    group.add_argument("--policy", default=POLICY, help="a folder, OWNER/NAME, or 'tiny'")
    add_prompt_arguments(group)
    add_sampling_arguments(parser.add_argument_group("sampling"))
    machine = parser.add_argument_group("machine").add_argument
    machine("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 on GPUs with it")


def add_implicit_arguments(add, policy: str, without: str = "") -> None:
    """Adds the flags of a policy as a judge: see implicit.py. add: the add_argument of a group.

    policy: what --policy is. without: the text about no --reference.
    """
    add("--policy", metavar="MODEL", help=policy)
    text = f"the model that --policy started from{without}"
    add("--reference", metavar="MODEL", help=text)
    text = "beta of --policy; default: that of its training (0.1 if unknown)"
    add("--beta", type=positive, help=text)


def add_reward_model_arguments(
    parser: argparse.ArgumentParser,
    group: argparse._ActionsContainer,
    model: str = f"the reward model: a folder or OWNER/NAME; default: {REWARD_MODEL}",
) -> None:
    """Adds the flags of commands that read a reward model: of it to `group`, and others.

    model: what --model is.
    """
    add = group.add_argument
    add("--model", help=model)
    add("--template", choices=TEMPLATES, help="how a prompt becomes text; default: as in training")
    text = "maximum tokens of a prompt plus one response; default: the value of its training"
    add("--max_length", type=number(int, 2), help=text)
    add_head_argument(group, "--head")
    add_combine_argument(group)
    add_machine_arguments(parser)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of how the forwards of a model are computed."""
    add_forward_arguments(parser.add_argument_group("machine"))
    packed.add_arguments(parser)


def add_prompt_arguments(group: argparse._ActionsContainer) -> None:
    """Adds the flags of how a policy reads prompts."""
    group.add_argument("--template", choices=TEMPLATES, default="auto", help=TEMPLATE_HELP)
    text = "maximum tokens of a prompt; a longer one loses its beginning"
    group.add_argument("--max_length", type=number(int, 2), default=1024, help=text)
    add_template_args_argument(group.add_argument)


def add_sampling_arguments(group: argparse._ActionsContainer) -> None:
    """Adds the flags of how answers are drawn: the fields of generation.Sampling."""
    add, count = group.add_argument, number(int, 1)
    text = "divides the logits; 0: always the most probable token"
    add("--temperature", type=number(float, 0), default=1.0, help=text)
    text = (
        "sample only from the smallest set of most probable tokens whose total probability "
        "reaches this value"
    )
    add("--top_p", type=positive, default=1.0, help=text)
    text = "maximum tokens of an answer, at which sampling stops"
    add("--max_new_tokens", type=count, default=256, help=text)
    add("--samples", type=count, default=1, help="answers to each prompt")
    add("--seed", type=number(int, 0), default=0, help="random seed for sampling")


def add_out_argument(group: argparse._ActionsContainer, default: str) -> None:
    text = "folder of the results; replaces older results in it"
    group.add_argument("--out", default=default, help=text)


def add_head_argument(group: argparse._ActionsContainer, flag: str) -> None:
    text = (
        "take as the reward the logit of the token ID at the last token, of a language model that "
        "was published with its reward there; default: the head of the reward model"
    )
    group.add_argument(flag, type=token_of, metavar="token:ID", help=text)


def token_of(text: str) -> int:
    """An argparse type: token:ID -> ID."""
    kind, _, number = text.partition(":")
    if kind != "token" or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"expected token:ID, such as token:0, got '{text}'")
    return int(number)


def add_combine_argument(
    group: argparse._ActionsContainer, default: str = "default: each reward by itself"
) -> None:
    add, metavar = group.add_argument, "NAME=WEIGHT"
    text = f"weights of the reward model's outputs in one weighted sum; {default}"
    add("--combine", nargs="+", type=weight_by_name, metavar=metavar, help=text)


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
    """Default values of the flags of models and data, by other flags."""
    if args.command == "tokens":
        return {} if args.policy or args.model else {"policy": POLICY, "reference": "tiny"}
    if "model" in args:  # a policy may take the place of the reward model
        return {} if getattr(args, "policy", None) else {"model": REWARD_MODEL}
    if args.command != "policy":
        return {}
    return {
        "policy": None if args.policy_answers else POLICY,
        "baseline": None if args.baseline_answers else "tiny",
        "data": None if args.policy_answers or args.baseline_answers else ["tiny:test"],
    }


def refusal(args: Namespace) -> str | None:
    """What is wrong with the flags of a command; None if nothing is."""
    names = [name for name, _ in getattr(args, "combine", None) or ()]
    if len(set(names)) < len(names):
        return "--combine has a preference twice; give each one weight"
    if args.command == "tokens" and args.policy and args.reference in (None, "none"):
        return "tokens compares --policy with a --reference; give the model that it started from"
    if args.command in ("rm", "tokens"):
        return refusal_of_rm(args)
    if args.command == "bench" and args.data and len(set(args.name)) > 1:
        return f"--data is of one benchmark, but {' and '.join(args.name)} are named; name one"
    if args.command == "score":
        return refusal_of_score(args)
    if args.command == "suspects":
        return refusal_of_suspects(args)
    if args.command in ("policy", "ask"):
        return refusal_of_sampling(args)
    return None


def refusal_of_rm(args: Namespace) -> str | None:
    for flag in ("model", "head", "combine"):
        if args.policy and getattr(args, flag) is not None:
            return f"--policy and --{flag}: a policy takes the place of a reward model; give one"
    if args.policy and args.reference is None:
        return "--policy needs --reference: the model that it started from, or none"
    if not args.policy and (args.reference is not None or args.beta is not None):
        return "--reference and --beta are of a --policy; give it, or leave them out"
    return None


def refusal_of_score(args: Namespace) -> str | None:
    if (args.data is None) == (args.prompt is None):
        return "give either --data, or --prompt and --response"
    if (args.prompt is None) != (args.response is None):
        return "--prompt and --response belong together; give both"
    files = {Path(name).resolve() for name in (args.out, args.pairs_out) if name}
    if args.out and args.pairs_out and len(files) == 1:
        return f"--out and --pairs_out are both {args.out}; give two files"
    return None


def refusal_of_suspects(args: Namespace) -> str | None:
    if args.drop and args.flip:
        return "--drop and --flip both say what becomes of doubtful labels; give one of them"
    if bool(args.drop or args.flip) != (args.cleaned is not None):
        return "--cleaned is the file of --drop or --flip; give both, or neither"
    return None


def refusal_of_sampling(args: Namespace) -> str | None:
    """What is wrong with the flags of policy or ask."""
    if 0 < args.temperature < 1e-3:
        return f"--temperature {args.temperature:g}: give 0, or 0.001 and more"
    if args.top_p > 1:
        return f"--top_p {args.top_p:g} is a probability; give 1 or less"
    is_sampled = args.command == "ask" or args.policy or args.baseline
    if is_sampled and args.temperature == 0 and args.samples > 1:
        return (
            f"with --temperature 0 all --samples {args.samples} of a prompt are the same; give 1, "
            "or another temperature"
        )
    return refusal_of_policy(args) if args.command == "policy" else None


def refusal_of_policy(args: Namespace) -> str | None:
    for role in ("policy", "baseline"):
        if None not in (getattr(args, role), getattr(args, f"{role}_answers")):
            return f"--{role} and --{role}_answers both give the answers of the {role}; give one"
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
