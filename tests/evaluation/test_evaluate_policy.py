"""python -m pytest tests/evaluation/test_evaluate_policy.py

evaluate.py policy: two models on the same prompts, on any number of ranks.
"""

import base64
import html
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from evaluations import (
    RULE,
    answers_of,
    by_prompt,
    check_figures,
    evaluated,
    mean_of_prompts,
    policy_argv,
    reward_alone,
    script,
    write_jsonl,
    write_policies,
    write_reward_model,
)
from processes import run_ranks

import evaluate
from nanoalign import loop
from nanoalign.batch import Row
from nanoalign.distributed import setup
from nanoalign.evaluation.answers import Answers, Sampler, log_ratios, share_vocabulary
from nanoalign.evaluation.generation import Answer
from nanoalign.model import Policy, RewardModel
from nanoalign.packing.packed import PackedBatcher


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    return write_policies(tmp_path_factory.mktemp("policies"), llama_folder, tokenizer)


@pytest.fixture(scope="module")
def results(world) -> tuple[list[dict], dict, str]:
    return evaluated(policy_argv(world, "results", "--samples", 2))


def test_every_prompt_has_its_answers_and_a_repeated_prompt_is_one(results):
    """Prompts 1 and 9 are the same."""
    lines, _, printed = results
    assert [(line["id"], line["side"]) for line in lines] == [
        (f"prompts:{i}", side) for i in range(1, 9) for side in ("policy",) * 2 + ("baseline",) * 2
    ]
    assert "9 records of 8 prompts, each used once" in printed
    assert len(set(answers_of(lines, "policy"))) > 10
    assert answers_of(lines, "policy") != answers_of(lines, "baseline")


def test_metrics_are_those_of_the_answers_in_plain_python(results):
    lines, figures, _ = results
    check_figures(lines, figures)
    ended = mean_of_prompts(by_prompt(lines, "baseline", "ended"))
    assert figures["baseline_ended_share"] == pytest.approx(ended)
    assert figures["pairs"] == 8 * 2 * 2 and figures["policy_cut_count"] == 0
    ratios = by_prompt(lines, "policy", "log_ratio")  # two answers to each of 8 prompts
    half = 2.365 * np.std(list(map(np.mean, ratios)), ddof=1) / 8**0.5
    kl, low, high = (figures[f"kl_per_answer{end}"] for end in ("", "_low", "_high"))
    assert kl == pytest.approx(np.mean(ratios)) and kl > 0
    assert (kl - low, high - kl) == pytest.approx((half, half), rel=1e-2)
    assert figures["kl_per_token"] == pytest.approx(kl / figures["policy_tokens_mean"])
    assert {line["log_ratio"] for line in lines if line["side"] == "baseline"} == {None}


def test_results_do_not_depend_on_ranks(world, results):
    lines, figures, _ = evaluated(policy_argv(world, "ranks", "--samples", 2), ranks=3)
    assert answers_of(lines, "policy") == answers_of(results[0], "policy")
    for found, expected in ((figures, results[1]), *zip_bins(figures, results[1])):
        plain = [{k: v for k, v in x.items() if k != "length_bins"} for x in (found, expected)]
        assert plain[0] == pytest.approx(plain[1], rel=1e-5, abs=1e-5)


def zip_bins(*each: dict) -> list[tuple[dict, dict]]:
    """The length_bins of two metrics.json, bin by bin."""
    first, second = (figures["length_bins"] for figures in each)
    assert first.keys() == second.keys()
    return list(zip(first.values(), second.values(), strict=True))


def test_a_policy_against_itself_ties_everywhere(world):
    _, figures, _ = evaluated(policy_argv(world, "itself", "--baseline", world / "policy"))
    assert figures["ties"] == 8 and figures["win_rate"] == 0.5
    assert figures["kl_per_answer"] == pytest.approx(0, abs=1e-6)


def test_a_stopped_answer_is_scored_without_eos(world, results, tokenizer):
    """The rewards of the file equal those of rows made by hand: EOS only where an answer ended.

    The tokens are those that were sampled, also where they are not those of the text.
    """
    model = RewardModel.load(world / "rm", trainable=False)
    lines, ended = results[0], set()
    for line in lines:
        prompt, answer = tokenizer(line["prompt"])["input_ids"], line["token_ids"]
        assert tokenizer.decode(answer) == line["answer"]
        answer = answer + [tokenizer.eos_token_id] * line["ended"] or [tokenizer.eos_token_id]
        assert line["score"] == pytest.approx(reward_alone(model, prompt, answer), abs=1e-5)
        assert line["tokens"] <= 6  # as it was sampled
        ended.add(line["ended"])
    assert ended == {True, False}


@pytest.mark.parametrize("layout", [loop.Batcher, PackedBatcher])
def test_kl_is_the_mean_difference_of_the_models_own_log_probabilities(tokenizer, layout):
    """The oracle is transformers' own forward. Each model has prompts of its own.

    Two answers were stopped.
    """
    prompts = {"policy": ([7, 8, 9], [1]), "baseline": ([7, 8], [2, 1])}
    answers = [
        [Answer((5, 6, 7), 258), Answer((), 258)],
        [Answer((9, 9), None), Answer((3,), None)],
    ]
    samplers, logps, batcher = [], np.zeros(4), layout(setup(), 20)
    for seed, (name, own) in enumerate(prompts.items()):
        policy = Policy(tiny_llama(seed))
        rows = [Row(name, np.array(prompt, np.int32), (), ()) for prompt in own]
        samplers.append(Sampler(name, policy, tokenizer, "raw", rows))
        batcher.prepare(policy)
        each = [(prompt, answer) for prompt, some in zip(own, answers, strict=True)
                for answer in some]  # fmt: skip
        for n, (prompt, answer) in enumerate(each):
            tokens = [*answer.tokens, *([258] if answer.ended else [])]
            with torch.no_grad():
                logits = policy.model(torch.tensor([prompt + tokens])).logits
            picked = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps[n] += picked[torch.arange(len(tokens)), tokens].sum().item() * (1, -1)[seed]
    found = log_ratios(*samplers, Answers([], answers), batcher)
    assert list(map(len, found)) == list(map(len, answers))
    assert list(chain(*found)) == pytest.approx(logps.tolist(), rel=1e-5)


def test_the_kl_needs_one_vocabulary_of_two_models(tokenizer):
    other = byte_tokenizer()
    other.add_tokens(["one more"])
    samplers = [Sampler("a", None, its, "raw", []) for its in (tokenizer, byte_tokenizer(), other)]
    assert share_vocabulary(samplers[:2])
    assert not share_vocabulary(samplers[1:]) and not share_vocabulary(samplers[:1])


def test_the_flags_reach_the_sampler(world):
    """Greedy answers, a small top_p, another seed and cut prompts each give other answers."""
    plain, _, _ = evaluated(policy_argv(world, "plain run"))
    base = answers_of(plain, "policy")
    for name, flags in {
        "greedy run": ["--temperature", 0],
        "nucleus": ["--top_p", 0.05],
        "seed 5": ["--seed", 5],
        "cut prompts": ["--max_length", 4],
    }.items():
        lines, figures, _ = evaluated(policy_argv(world, name, *flags))
        assert answers_of(lines, "policy") != base, name
        assert ("kl_per_answer" in figures) == (name in ("seed 5", "cut prompts"))


def test_the_report_is_written_whole(world):
    """The page has the conclusion, the picture, notes on the figures, and every answer."""
    _, _, printed = evaluated(policy_argv(world, "whole"), pictures=True)
    page = html.unescape((world / "whole" / "report.html").read_text())
    picture = (world / "whole" / "answers.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and base64.b64encode(picture).decode() in page
    assert "KL(policy || baseline) is " in page
    assert page.count("<article") == 8
    sentence = re.search(r'class="conclusion">(.*?)</p>', page)[1]
    assert sentence in printed


def test_a_judge_with_too_few_positions_is_refused_before_sampling(world, tmp_path, tokenizer):
    """The model has 64 positions, its rule 256 tokens."""
    tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_reward_model(world / "short rm", tmp_path, tokenizer, RULE)
    argv = policy_argv(world, "new", "--reward", world / "short rm")
    outcome = run_ranks(1, script, list(map(str, argv)))
    assert outcome.codes == [1] and "sampled" not in outcome.stdout
    assert "has 64 positions; give --reward_max_length 64" in outcome.stderr, outcome.stderr


def test_without_a_command_both_are_evaluated_with_their_defaults(monkeypatch):
    called = []
    for command in ("rm", "policy"):
        monkeypatch.setitem(evaluate.COMMANDS, command, lambda args, _: called.append(args))
    evaluate.main([])
    assert [args.command for args in called] == ["rm", "policy"]
    rm, policy = called
    assert (rm.model, policy.policy, policy.baseline) == ("runs/rm", "runs/dpo", "tiny")
    assert policy.data == ["tiny:test"]
    with pytest.raises(ValueError, match=r"the command goes first: evaluate.py rm\|tokens\|bench"):
        evaluate.main(["--model", "runs/rm"])


# name: (flags, error)
BAD_INPUT = {
    "pairs of one answer": (["--pairs_out", "x.jsonl"], "--samples is 1, give 2 or more"),
    "no policy": (["--policy", "nowhere"], "model folder '.*nowhere' does not exist"),
    "no reward model": (["--reward", "policy"], "without a reward head"),
    "no common prompt": (["--policy_answers", "strange.jsonl"], "no prompt is in all of .*strange"),
    "samples of files": (["--policy_answers", "few.jsonl", "--baseline_answers", "few.jsonl",
                          "--samples", "2"], "--samples 2 samples answers, but both files have"),
    "another template": (["--template", "pku"], "reads prompts with template raw, but model "
                         "'.*' with template pku; give --template raw"),
    "another one of the judge": (["--reward_template", "pku"], "trained with template 'raw', .*"
                                 "give --reward_template raw"),
    "both": (["--policy", "policy", "--policy_answers", "answers.jsonl"], "both give the answers"),
    "temperature": (["--temperature", "1e-300"], "--temperature 1e-300: give 0, or 0.001 and more"),
    "half a pair": (["--data", "half.jsonl"], "half.jsonl:1: give both 'chosen' and 'rejected'"),
    "the root": (["--out", "/"], "--out / can't be replaced by a folder of results"),
    "pairs that exist": (["--samples", "2", "--pairs_out", "few.jsonl"], "few.jsonl exists; give"),
    "pairs of another kind": (["--samples", "2", "--pairs_out", "x.csv"], "a file that ends with "),
    "pairs in the results": (["--samples", "2", "--pairs_out", "new/x.jsonl"], "is in --out"),
    "pairs in one": (["--samples", "2", "--pairs_out", "few.jsonl/x.jsonl"], "t be written: "),
    "foreign folder": (["--out", "rm"], "has files that are not an evaluation's"),
}  # fmt: skip


def test_bad_input_is_one_clear_error_on_two_ranks(world, subtests, monkeypatch):
    monkeypatch.chdir(world)
    write_jsonl(world / "strange.jsonl", [{"prompt": "Another?", "answer": "a"}])
    write_jsonl(world / "half.jsonl", [{"prompt": "p", "chosen": "c"}])
    for name, (flags, message) in BAD_INPUT.items():
        with subtests.test(name):
            outcome = run_ranks(2, script, list(map(str, policy_argv(world, "new", *flags))))
            assert outcome.codes == [1, 1], outcome.stderr
            lines = [
                x for x in outcome.stderr.splitlines() if x and not re.search("(batch|it)/s", x)
            ]
            assert len(lines) == 1 and re.search(f"^error: .*{message}", lines[0]), outcome.stderr
    assert not (world / "new").exists()
