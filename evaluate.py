"""Evaluate what was trained.

    python evaluate.py rm                           runs/rm, on the embedded test pairs
    python evaluate.py policy                       runs/dpo against tiny, by the rewards of runs/rm
    python evaluate.py                              both
    torchrun --nproc_per_node 8 evaluate.py rm \\
        --model runs/rm --data harmless=pairs.jsonl helpful=others.jsonl --out runs/rm_eval
    python evaluate.py rm --policy runs/dpo --reference tiny     the rewards that a policy implies
    python evaluate.py tokens --policy runs/dpo --reference tiny     pairs, token by token
    torchrun --nproc_per_node 8 evaluate.py policy --policy runs/dpo \\
        --baseline Qwen/Qwen2.5-0.5B-Instruct --reward runs/rm --data prompts.jsonl
    python evaluate.py bench rewardbench2 rmbench --model OWNER/NAME
    python evaluate.py score --data answers.jsonl --keep best --out best.jsonl
    python evaluate.py frontier runs/a_eval runs/b_eval     several policies in one picture
    python evaluate.py suspects runs/fold_*                 which labels to doubt
    python evaluate.py ask "What is 2 plus 3?"              what runs/dpo answers

`python evaluate.py rm --help` lists the flags of a command.
"""

import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from nanoalign.data.dialogues import DIFFER_EARLIER
from nanoalign.data.formats import formats
from nanoalign.data.held_out import recall
from nanoalign.data.sources import check_sources, parse_source, read_records
from nanoalign.data.split import EQUAL_SCORES
from nanoalign.distributed import World, print0, run
from nanoalign.errors import RunError
from nanoalign.evaluation import (
    answers,
    bench,
    bench_page,
    candidates,
    commands,
    comparison,
    diagnosis,
    implicit,
    plots,
    ranking,
    render,
    results,
    scoring,
    seen,
    suspects,
    token_page,
    token_values,
)
from nanoalign.evaluation.ask import print_answers, read_lines
from nanoalign.evaluation.benchmarks import BENCHMARKS
from nanoalign.evaluation.generation import Sampling
from nanoalign.evaluation.judge import compare, load_judge
from nanoalign.evaluation.leaderboards import (
    read_uids,
    read_verdicts,
    verdict_figures,
    write_answers,
)
from nanoalign.evaluation.ranking import TrueRule
from nanoalign.evaluation.retention import held_out_texts, retention
from nanoalign.files.text import named, visible
from nanoalign.flags import Parser
from nanoalign.packing import packed
from nanoalign.ranks import groups, report
from nanoalign.ranks.collectives import on_main
from nanoalign.records import Record
from nanoalign.tiny import world as embedded
from nanoalign.weights.adapters import model_folder, run_of


def parse_args(argv: list[str] | None = None) -> list[Namespace]:
    """Returns the flags of each command to run: of the one in argv; without one, of rm and policy.

    argv: the words of the command line; None: those of this process.
    """
    parser = Parser(__doc__)
    commands.add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        parser.error(f"the command goes first: evaluate.py {'|'.join(COMMANDS)} {argv[0]}")
    return [parser.parse_args(words) for words in ([argv] if argv else [["rm"], ["policy"]])]


def embedded_truth() -> TrueRule:
    """The rule of the embedded world and of others, which knows the prompts of tiny, tiny:7, ..."""
    rewards = {"better": embedded.true_reward, "safer": embedded.true_safety}
    return TrueRule(embedded.is_prompt, rewards)


def evaluate_rm(args: Namespace, world: World) -> None:
    flag, name = ("--policy", args.policy) if args.policy else ("--model", args.model)
    on_main(world, partial(results.check_models, [name]))
    check_names(parse_source(source).name for source in args.data)
    check_sources(args.data)
    on_main(world, partial(results.check_out, args.out))
    batcher = packed.layout(args)(world, args.micro_batch_tokens)

    # reward model, or a policy in place of it
    if args.policy:
        judges = implicit.load_judges(args, batcher)
    else:
        judges = scoring.load_judges(args, args.preference, batcher)
    model, (template, max_length) = judges[0].model, judges[0].rule
    print0(
        f"{'model':<11} {name}: {model.count_parameters():,} parameters, {model.dtype}; "
        f"template {template}, max_length {max_length}"
    )

    # the data of all views, before anything is scored
    prepared, printed = [], ""
    for judge in judges:
        view = judge.view
        records = list(read_records(formats(view.preference), args.data, args.keys))
        check_names((record.subset for record in records), [each.view.name for each in judges])
        compared = [record for record in records if record.pairs]
        if empty := {x.subset for x in records} - {x.subset for x in compared}:
            subset = sorted(empty)[0]
            raise RunError(
                f"the subset '{subset}' has no pairs: in each record all scores are equal"
            )
        encoded = judge.encode(compared)
        left_out = Counter(
            DIFFER_EARLIER if DIFFER_EARLIER in record.notes else EQUAL_SCORES
            for record in records
            if not record.pairs
        )
        counts = encoded[0].counts(compared) | left_out
        notes = "".join(f"; {count:,} {reason}" for reason, count in counts.items() if count)
        responses = sum(len(record.responses) for record in compared)
        prompts = len(set(scoring.prompt_keys(compared)))
        line = (
            f"{'data':<11} {named(args.data)}: {responses:,} responses to {prompts:,} "
            f"prompts, labels {view.preference}{notes}"
        )
        if line != printed:  # two views of a policy have the same labels
            print0(printed := line)
        judge.check(encoded)
        prepared.append((judge, compared, encoded))

    # scores, figures
    truth, known = embedded_truth(), recall(run_of(model_folder(name)))
    by_view, subsets = {}, {}
    for judge, records, encoded in prepared:
        scores, view = judge.score(encoded), judge.view
        lengths, rule = judge.lengths(records, encoded), truth.rule(view.preference)
        lines = ranking.scored_lines(records, lengths, scores, view.name, rule)
        for subset in dict.fromkeys(line.subset for line in lines):
            of_subset = [line for line in lines if line.subset == subset]
            subsets[subset] = ranking.reward_metrics(of_subset)
            subsets[subset] |= ranking.true_figures(of_subset, view.preference, truth)
        by_view[view.name] = lines
        if known is not None:
            for subset, count in seen.pairs_trained_on(known, records, lines).items():
                subsets[subset]["trained_on"] = count
    if not world.is_main:
        return
    scored = [line for lines in by_view.values() for line in lines]
    of_all = by_view.get("", scored)  # the view without a name, where there is one
    figures = {"subsets": subsets, "all": ranking.reward_metrics(of_all)}
    if "" in by_view:
        figures["all"] |= ranking.true_figures(of_all, view.preference, truth)
    if known is not None:
        counts = {line.subset: subsets[line.subset]["trained_on"] for line in of_all}
        figures["all"]["trained_on"] = sum(counts.values())

    # files, result
    settings = vars(args) | {"template": template, "max_length": max_length}
    with results.results_folder(args.out, settings) as out:
        results.write_ranking(out, scored, figures, args.cases)
    table = ranking.table(figures["subsets"] | {"all": figures["all"]})
    print(f"\n{visible(table)}\n")
    for subset, subset_figures in figures["subsets"].items():
        print(visible(f"{subset:<11} {ranking.summary(subset_figures)}"))
        if rests_on := ranking.about_cut(subset_figures):
            print(visible(f"{subset:<11} {rests_on}"))
    if known is not None:
        print(f"{'trained on':<11} {seen.note_on_pairs(figures['all'], flag, name, known)}")
    print(f"{'saved':<11} {args.out}: scores.jsonl, metrics.json, cases.md, a picture a subset")


def evaluate_bench(args: Namespace, world: World) -> None:
    on_main(world, partial(results.check_models, [args.model]))
    on_main(world, partial(results.check_out, args.out))
    batcher = packed.layout(args)(world, args.micro_batch_tokens)

    # benchmarks, reward model
    read_cases = {}
    for name in args.name:
        sources = args.data or BENCHMARKS[name].sources
        read_cases[name], dropped = bench.read_cases(name, sources)
        note = f"; {dropped:,} ties left out" if dropped else ""
        print0(f"{'data':<11} {name}: {len(read_cases[name]):,} records of {named(sources)}{note}")
    judge = bench.load_judge(args, batcher)
    template, max_length = judge.rule
    print0(f"{'model':<11} {args.model}: template {template}, max_length {max_length}")

    # scores, files, result
    done = {name: bench.evaluate(name, cases, judge) for name, cases in read_cases.items()}
    if not world.is_main:
        return
    settings = vars(args) | {"template": template, "max_length": max_length}
    with results.results_folder(args.out, settings) as out:
        bench_page.write_results(out, args.model, done, args.cases)
    for name, result in done.items():
        print(f"\n{visible(render.figures_table(result.figures, name))}")
        if note := bench.missing(name, result):
            print(note)
    print(f"\n{'saved':<11} {args.out}: report.html, scores.jsonl, metrics.json")


def evaluate_tokens(args: Namespace, world: World) -> None:
    name = args.policy or args.model
    on_main(world, partial(results.check_models, [name]))
    on_main(world, partial(results.check_out, args.out))
    batcher = packed.layout(args)(world, args.micro_batch_tokens)
    judge = token_values.load_judge(args, batcher)
    template, max_length = judge.rule
    print0(f"{'model':<11} {name}: template {template}, max_length {max_length}")
    pairs = token_values.read_pairs(judge, args.data, args.keys)
    if not world.is_main:
        return
    beta = getattr(judge, "beta", None)
    figures = token_values.figures_of(pairs, beta)
    title = f"{named(args.data)}, token by token: {name}"
    title += f" against {args.reference}" if args.policy else ""
    settings = vars(args) | {"beta": beta, "template": template, "max_length": max_length}
    with results.results_folder(args.out, settings) as out:
        token_page.write_results(out, title, pairs, figures, judge.tokenizer, args.cases)
    table = render.table([row[:-1] for row in token_page.table(figures)])
    print(f"\n{table}\n")
    for text in (token_page.conclusion(figures), *token_page.notes_of(figures)):
        print(text)
    print(f"{'saved':<11} {args.out}: report.html, tokens.jsonl, metrics.json")


def check_names(subsets: Iterable[str], views: Sequence[str] = ("",)) -> None:
    """Raises RunError if two subsets would have one picture, or one would have the name "all"."""
    pictures = {results.picture_name("all"): "the row of all"}
    for name in (ranking.with_view(x, view) for x in dict.fromkeys(subsets) for view in views):
        if other := pictures.get(results.picture_name(name)):
            raise RunError(f"the subset '{name}' would share its files with {other!r}; rename it")
        pictures[results.picture_name(name)] = name


def evaluate_policy(args: Namespace, world: World) -> None:
    on_main(world, partial(results.check_models, [args.reward, args.policy]))
    on_main(world, partial(results.check_out, args.out))
    if args.pairs_out is not None:
        on_main(world, partial(results.check_new_file, "--pairs_out", args.pairs_out, args.out))
    batcher = packed.layout(args)(world, args.micro_batch_tokens)

    # prompts, given answers, policies, reward model
    given = {role: getattr(args, f"{role}_answers") for role in answers.ROLES}
    given = {role: source for role, source in given.items() if source}
    prompts, given_answers, left_out = answers.read_given(given, args.data, args.keys)
    names = {role: getattr(args, role) for role in answers.ROLES if role not in given}
    samplers = {  # by name: where policy and baseline are one model, it is loaded once
        name: answers.load_sampler(name, prompts, args, world)
        for name in dict.fromkeys(names.values())
    }
    both = [samplers[name] for name in names.values()]
    as_sampled = answers.share_vocabulary(both)
    if args.retention and not as_sampled:
        raise RunError("--retention compares two models of one vocabulary; leave it out")
    texts = (args.data, args.keys, args.retention, args.max_length)
    held_out = held_out_texts(both[0], *texts) if as_sampled else {}
    verdicts = read_verdicts(args.verdicts) if args.verdicts else []
    kl_is_known = as_sampled and args.temperature == args.top_p == 1
    # Only the KL needs packed rows, so a policy that can't share rows can still be sampled.
    checked = batcher if kl_is_known else packed.PaddedBatcher(world, args.micro_batch_tokens)
    for sampler in samplers.values():
        answers.check_sampler(sampler, prompts, args.max_length, checked)
    judge = load_judge(prompts, list(samplers.values()), batcher, args)

    # answers, rewards, KL
    sampling = Sampling(
        args.temperature, args.top_p, args.max_new_tokens, args.samples, args.seed, args.batch_size
    )
    sampled = {}
    for name, sampler in samplers.items():
        sampled[name] = answers.sample(sampler, sampling, world)
        print0(f"{'sampled':<11} {name}: {sampled[name].summary(args.max_new_tokens)}")
    for role, name in names.items():
        on_main(world, partial(results.keep_answers, args.out, role, prompts, sampled[name]))
    all_answers = given_answers | {role: sampled[name] for role, name in names.items()}
    compared = compare(judge, prompts, all_answers, as_sampled)
    if kl_is_known:
        ratios = answers.log_ratios(*both, all_answers["policy"], batcher)
        compared = comparison.with_log_ratios(compared, ratios)
    forgotten = retention(held_out, both, checked)
    if not world.is_main:
        return

    # figures, files
    truth = embedded_truth()
    figures = comparison.comparison_metrics(compared, judge.rule[1], truth) | forgotten
    figures["prompts_left_out"] = left_out
    models = {"policy_trained_on": args.policy, "reward_trained_on": args.reward}
    figures |= seen.prompts_trained_on(prompts, models)
    if verdicts:
        figures |= verdict_figures(compared, verdicts)
    best_of_n = comparison.best_of_n(compared, truth)
    sides = {role: given.get(role) or names[role] for role in answers.ROLES}
    title = f"{sides['policy']} against {sides['baseline']}, judged by {args.reward}"
    with results.results_folder(args.out, vars(args)) as out:
        results.write_comparison(out, title, compared, figures, best_of_n, truth)
        write_answers(out, compared, sides, read_uids([*(args.data or ()), *given.values()]))
    if args.pairs_out:
        results.write_pairs(args.pairs_out, compared)

    # result
    print(render.table(diagnosis.figure_rows(figures), left=3))
    if len(best_of_n) > 1:
        print("\nthe best of n answers of the policy, by the reward model")
        print(render.figures_table({f"best of {line['n']}": line for line in best_of_n}, ""))
    print(f"\n{diagnosis.conclusion(figures)}")
    for note in (*diagnosis.warnings_of(figures), *diagnosis.notes_of(figures)):
        print(note)
    more = ", best_of_n.jsonl" if len(best_of_n) > 1 else ""
    files = f"report.html, answers.jsonl, metrics.json, answers.png{more}, alpaca_eval"
    print(f"{'saved':<11} {args.out}: {files}")


def evaluate_score(args: Namespace, world: World) -> None:
    keep = candidates.parse_keep(args.keep)
    on_main(world, partial(results.check_models, [args.model]))
    for flag in ("out", "pairs_out"):
        if (name := getattr(args, flag)) is not None:
            on_main(world, partial(results.check_new_file, f"--{flag}", name))
    batcher = packed.layout(args)(world, args.micro_batch_tokens)

    # reward model, responses
    judges = scoring.load_judges(args, args.combine and "better", batcher)
    if args.data:
        check_sources(args.data)
        prompts = candidates.read_candidates(args.data, args.keys)
    else:
        responses = tuple(dict.fromkeys(args.response))
        prompts = [Record(args.prompt, responses, (), name="--prompt")]

    # rewards
    rewards = {}
    for judge in judges:
        encoded = judge.encode(prompts)
        judge.check(encoded)
        rewards[judge.view.name] = judge.score(encoded)
    if not world.is_main:
        return
    lines = candidates.scored_lines(prompts, rewards)
    kept, pairs = candidates.kept(lines, keep), candidates.pairs_of(lines)

    # files, result
    if args.prompt is not None:
        for line in kept:
            print(f"{line['reward']:9.4f}  {visible(line['completion'])}")
    if args.data:
        counts = "".join(f"; {n:,} {reason}" for reason, n in encoded[0].counts(prompts).items())
        print(f"{'data':<11} {named(args.data)}: {len(prompts):,} prompts{counts}")
        print(render.figures_table(candidates.quantiles(lines, kept), "rewards"))
    for path, written in ((args.out, kept), (args.pairs_out, pairs)):
        if path is not None:
            results.write_records(Path(path), written)
            print(f"{'saved':<11} {path}: {len(written):,} records")


def evaluate_frontier(args: Namespace, world: World) -> None:
    def draw() -> None:
        results.check_out(args.out)
        policies = results.read_comparable(args.results)
        shown = {
            name: {key: figures.get(key) for key in results.FRONTIER}
            for name, figures in policies.items()
        }
        with results.results_folder(args.out, vars(args)) as out:
            (out / results.METRICS).write_text(json.dumps(shown, indent=2) + "\n")
            plots.frontier_picture(out / "frontier.png", policies)
        print(render.figures_table(shown, "policy"))
        print(f"{'saved':<11} {args.out}: frontier.png, metrics.json")

    on_main(world, draw)


def evaluate_suspects(args: Namespace, world: World) -> None:
    on_main(world, partial(results.check_out, args.out))
    if args.cleaned is not None:
        on_main(world, partial(results.check_new_file, "--cleaned", args.cleaned, args.out))
    batcher = packed.layout(args)(world, args.micro_batch_tokens)

    # pairs, and their margins by the runs that have held them out
    folds = suspects.read_folds(args.runs)
    lines = suspects.read_lines(folds)
    if args.cleaned is not None:
        suspects.check_cleaning(lines, bool(args.flip), folds)
    pairs = suspects.pairs_of(lines)
    margins = suspects.held_out_margins(folds, lines, pairs, args.precision, batcher)
    if not world.is_main:
        return

    # figures, files
    found = suspects.doubt(lines, pairs, margins, folds, embedded_truth())
    with results.results_folder(args.out, vars(args)) as out:
        suspects.write(out, lines, pairs, found)
    print(suspects.summary(found.figures))
    print(f"{'saved':<11} {args.out}: suspects.jsonl, metrics.json, suspects.png")
    if args.cleaned is not None:
        written = suspects.cleaned(lines, pairs, found, args.drop, args.flip, folds)
        results.write_records(Path(args.cleaned), written)
        print(f"{'saved':<11} {args.cleaned}: {len(written):,} of {len(lines):,} records")


def ask(args: Namespace, world: World) -> None:
    if world.size > 1:
        raise RunError("evaluate.py ask answers on one process; start it without torchrun")
    results.check_models([args.policy])
    policy, tokenizer = answers.load_policy(args.policy, args, world)
    sampling = Sampling(
        args.temperature, args.top_p, args.max_new_tokens, args.samples, args.seed, args.samples
    )
    for prompt in read_lines() if args.prompt is None else [args.prompt]:
        print_answers(prompt, policy, tokenizer, args.template, args.max_length, sampling, world)


COMMANDS = {
    "rm": evaluate_rm,
    "tokens": evaluate_tokens,
    "bench": evaluate_bench,
    "policy": evaluate_policy,
    "score": evaluate_score,
    "frontier": evaluate_frontier,
    "suspects": evaluate_suspects,
    "ask": ask,
}


def main(argv: list[str] | None = None) -> None:
    each_args = parse_args(argv)
    world = groups.setup(each_args[0])
    for args in each_args:
        COMMANDS[args.command](args, world)


if __name__ == "__main__":
    run(main, report.report)
