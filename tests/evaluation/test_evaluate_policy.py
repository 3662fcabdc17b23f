"""python -m pytest tests/test_evaluate_policy.py

evaluate.py policy: two models on the same prompts, on any number of ranks; answers made elsewhere.
"""

import argparse
import base64
import html
import json
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import examples, tiny_llama
from ranks import run_ranks
from test_evaluate import script

import evaluate
from nanoalign.answers import Answers, Asked, kl_estimate
from nanoalign.comparison import Compared, new_pairs
from nanoalign.data import read_examples
from nanoalign.distributed import setup
from nanoalign.generate import Answer
from nanoalign.models import Policy, RewardModel
from nanoalign.records import Example
from nanoalign.rows import EOS_RULE, Row, collate


def policy_script(argv: list[str]) -> None:
    evaluate.policy_picture = lambda path, *rest: path.write_bytes(b"a picture")
    script(argv)


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    """Two language models, a reward model, 9 prompts of which two are the same, and answers to them."""
    folder = tmp_path_factory.mktemp("policies")
    for name, seed in (("policy", 0), ("baseline", 1)):
        language_model = tiny_llama(seed)
        # Of random tokens every fourth ends an answer: some end, and some are cut.
        language_model.generation_config.eos_token_id = [*range(0, 256, 4), tokenizer.eos_token_id]
        language_model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model = RewardModel.load(llama_folder, head_seed=0)
    model.scoring = {"template": "raw", "max_length": 256, "eos": EOS_RULE}
    (folder / "rm").mkdir()
    model.save(folder / "rm", tokenizer)
    prompts = [example.prompt for example in examples(8)]
    prompts.append(prompts[0])
    write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write(
        folder / "answers.jsonl",
        [{"prompt": p, "response": f"a{i}"} for i, p in enumerate(prompts)],
    )
    write(
        folder / "few.jsonl",
        [{"prompt": p, "answer": f"f{i}"} for i, p in enumerate(prompts[2:-1])],
    )
    further = [*prompts, "Another?", "One more?"]
    write(folder / "further.jsonl", [{"prompt": p, "answer": "a"} for p in further])
    write(folder / "strange.jsonl", [{"prompt": "Another?", "answer": "a"}])
    write(folder / "empty.jsonl", [])
    write(folder / "half.jsonl", [{"prompt": "p", "chosen": "c"}])
    return folder


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def argv(folder: Path, out: str, *flags: object) -> list[str]:
    base = ["policy", "--reward", folder / "rm", "--data", folder / "prompts.jsonl", "--out", folder / out,
            "--template", "raw", "--max_new_tokens", 6, "--batch_size", 4]  # fmt: skip
    for side in ("policy", "baseline"):
        if f"--{side}_answers" not in flags:
            base += [f"--{side}", folder / side]
    return [str(arg) for arg in [*base, *flags]]


def evaluated(folder: Path, out: str, *flags: object, ranks: int = 1) -> tuple[list[dict], dict]:
    outcome = run_ranks(ranks, policy_script, argv(folder, out, *flags))
    assert outcome.codes == [0] * ranks, outcome.stderr
    lines = [json.loads(line) for line in (folder / out / "answers.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def results(world) -> tuple[list[dict], dict]:
    return evaluated(world, "results", "--samples", 2)


def test_every_prompt_has_its_answers_and_repeated_prompts_stay_apart(results):
    lines, _ = results
    assert [line["id"] for line in lines] == [
        f"prompts:{i}#{k}" for i in range(1, 10) for k in (0, 1)
    ]
    answer = {line["id"]: line["policy_answer"] for line in lines}
    # Prompts 1 and 9 are the same, and get four different answers.
    assert len({answer[f"prompts:{i}#{k}"] for i in (1, 9) for k in (0, 1)}) == 4
    assert len(set(answer.values())) > 10
    assert any(line["policy_answer"] != line["baseline_answer"] for line in lines)


def test_metrics_are_those_of_the_answers_in_plain_python(results):
    lines, figures = results
    policy, baseline = (
        [line[f"{side}_score"] for line in lines] for side in ("policy", "baseline")
    )
    won = [(p > b) + (p == b) / 2 for p, b in zip(policy, baseline, strict=True)]
    expected = {
        "pairs": 18,
        "policy_mean": statistics.fmean(policy),
        "no_dpo_data_mean": statistics.fmean(baseline),
        "wins": won.count(1),
        "no_dpo_better_than_dpo_count": won.count(0),
        "ties": won.count(0.5),
        "win_rate": statistics.fmean(won),
        "policy_tokens_mean": statistics.fmean(line["policy_tokens"] for line in lines),
        "baseline_ended_share": statistics.fmean(line["baseline_ended"] for line in lines),
    }
    assert expected == pytest.approx({key: figures[key] for key in expected}, rel=1e-9)
    assert figures["win_rate_low"] <= figures["win_rate"] <= figures["win_rate_high"]
    assert figures["kl_per_answer"] > 0 and figures["kl_per_token"] > 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_results_do_not_depend_on_ranks(world, results, ranks):
    lines, figures = evaluated(world, f"ranks {ranks}", "--samples", 2, ranks=ranks)
    assert [line["policy_answer"] for line in lines] == [
        line["policy_answer"] for line in results[0]
    ]
    assert figures == pytest.approx(results[1], rel=1e-5, abs=1e-5)


def test_a_policy_against_itself_ties_everywhere(world):
    lines, figures = evaluated(world, "itself", "--baseline", world / "policy")
    assert figures["ties"] == 9 and figures["win_rate"] == 0.5
    assert figures["kl_per_answer"] == pytest.approx(0, abs=1e-6)


def test_answers_made_elsewhere_are_matched_in_order(world):
    lines, figures = evaluated(world, "files", "--policy_answers", world / "answers.jsonl",
                               "--baseline_answers", world / "answers.jsonl")  # fmt: skip
    assert [line["policy_answer"] for line in lines] == [f"a{i}" for i in range(9)]
    assert figures["policy_ended_share"] is None and "kl_per_answer" not in figures
    assert figures["length_controlled_win_rate"] == pytest.approx(0.5)


def test_pairs_for_a_next_round_are_the_best_against_the_worst(world):
    lines, _ = evaluated(world, "pairs", "--samples", 6, "--pairs_out", world / "pairs.jsonl")
    records = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    expected = []
    for n in range(0, 54, 6):
        some = [line for line in lines[n : n + 6] if line["policy_ended"] and line["policy_answer"]]
        some.sort(key=lambda line: line["policy_score"])
        if some and some[0]["policy_score"] < some[-1]["policy_score"]:
            best, worst = some[-1]["policy_answer"], some[0]["policy_answer"]
            expected.append({"prompt": some[0]["prompt"], "chosen": best, "rejected": worst})
    assert records == expected
    assert len(read_examples(str(world / "pairs.jsonl"))) == len(expected) > 2


def test_equal_answers_are_no_pair_whatever_rounding_says():
    compared = [
        Compared("1", "q", "same", "b", score, 0.0, 1, 1, True, True)
        for score in (1.65030241, 1.65030253)
    ]
    assert new_pairs([Example("t", "text", "q", (), pairs=())], compared, 2) == []


def test_pairs_of_dialogues_are_dialogues_and_ties_are_left_out():
    def lines(*scored):
        return [Compared("1", "p", a, "b", s, 0.0, 1, 1, True, True) for a, s in scored]

    dialogue = Example("d", "dialogue", "\n\nHuman: q\n\nAssistant:", (), pairs=())
    text = Example("t", "text", "q", (), pairs=())
    compared = lines((" x", 1.0), (" y", 2.0), ("u", 1.0), ("u", 1.0))
    assert new_pairs([dialogue, text], compared, 2) == [
        {"chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: x"}
    ]


def test_cut_answers_make_no_pairs():
    """The best and the worst were cut; of the two that are left the better is chosen."""
    compared = [
        Compared("1", "q", a, "b", score, 0.0, 1, 1, ended, True)
        for a, score, ended in (
            ("w", 0.0, False),
            ("x", 1.0, True),
            ("y", 2.0, None),
            ("z", 3.0, False),
        )
    ]
    text = Example("t", "text", "q", (), pairs=())
    assert new_pairs([text], compared, 4) == [{"prompt": "q", "chosen": "y", "rejected": "x"}]
    assert new_pairs([text, text], compared, 2) == []


def test_a_cut_answer_is_scored_as_it_was_cut(world, results, tokenizer):
    """The rewards of the file equal those of rows made by hand: EOS only where an answer ended."""
    model = RewardModel.load(world / "rm", trainable=False)
    lines, ended = results[0], set()
    for line in lines:
        for side in ("policy", "baseline"):
            text = (
                tokenizer(line["prompt"])["input_ids"],
                tokenizer(line[f"{side}_answer"])["input_ids"],
            )
            tokens = text[1] + [tokenizer.eos_token_id] * line[f"{side}_ended"]
            row = Row("x", np.array(text[0], np.int32), (np.array(tokens, np.int32),), ())
            with torch.no_grad():
                expected = model(collate([row])).item()
            assert line[f"{side}_score"] == pytest.approx(expected, abs=1e-5)
            assert line[f"{side}_tokens"] <= 6  # as it was sampled
            ended.add(line[f"{side}_ended"])
    assert ended == {True, False}


def test_without_data_the_prompts_are_those_of_the_answers(world):
    both = [
        "--policy_answers",
        world / "answers.jsonl",
        "--baseline_answers",
        world / "answers.jsonl",
    ]
    flags = [
        "policy",
        *both,
        "--reward",
        world / "rm",
        "--out",
        world / "no data",
        "--allow_missing",
    ]
    outcome = run_ranks(1, policy_script, [str(flag) for flag in flags])
    assert outcome.codes == [0], outcome.stderr
    lines = (world / "no data" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["policy_answer"] for line in lines] == [f"a{i}" for i in range(8)]


def test_prompts_without_answers_are_left_out_when_that_is_allowed(world):
    """few.jsonl answers prompts 3 to 8 of 9; further.jsonl two that are not asked."""
    lines, _ = evaluated(world, "missing", "--policy_answers", world / "few.jsonl", "--baseline_answers",
                         world / "further.jsonl", "--allow_missing")  # fmt: skip
    assert [line["policy_answer"] for line in lines] == [f"f{i}" for i in range(6)]
    assert [line["id"] for line in lines] == [f"prompts:{i}#0" for i in range(3, 9)]
    assert all(line["baseline_answer"] == "a" for line in lines)


def test_a_judge_of_another_template_is_allowed_where_it_is_meant(world):
    flags = ["--template", "pku", "--reward_template", "raw"]
    lines, _ = evaluated(world, "templates", *flags)
    assert len(lines) == 9


def test_the_frontier_is_drawn_of_results_with_one_baseline(world, results, monkeypatch):
    """Two seeds beside each other; another baseline, temperature or kind of folder is refused."""
    evaluated(world, "first", "--samples", 2, "--seed", 1)
    monkeypatch.chdir(world)
    for _ in range(2):  # an older frontier is replaced
        outcome = run_ranks(1, policy_script, ["frontier", "results", "first", "--out", "f"])
        assert outcome.codes == [0], outcome.stderr
    assert (world / "f" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((world / "first" / "metrics.json").read_text())
    row = rf"^first .*{figures['kl_per_answer']:.3f} .*{figures['win_rate']:.3f}"
    assert re.search(row, outcome.stdout, re.MULTILINE)
    evaluated(world, "other", "--baseline", world / "policy")
    evaluated(world, "hot", "--max_new_tokens", 5)
    evaluated(world, "greedy", "--temperature", 0)
    for key, value in (("combine", [["safer", 1.0]]), ("reward_template", "chat")):
        shutil.copytree(world / "results", world / key)
        settings = json.loads((world / key / "args.json").read_text())
        (world / key / "args.json").write_text(json.dumps(settings | {key: value}))
    (world / "strange").mkdir(exist_ok=True)
    (world / "strange" / "args.json").write_text("[]")
    (world / "strange" / "metrics.json").write_text("null")
    for name, message in (
        ("other", "other was evaluated with --baseline"),
        ("hot", "hot was evaluated with --max_new_tokens 5, results with 6"),
        ("combine", "combine was evaluated with --combine [['safer', 1.0]], results with None"),
        ("reward_template", "reward_template was evaluated with --reward_template chat"),
        ("greedy", "greedy has no kl_per_answer"),
        ("rm", "rm holds no results"),
        ("strange", "strange holds no results"),
    ):
        outcome = run_ranks(1, policy_script, ["frontier", "results", name, "--out", "f"])
        assert outcome.codes == [1] and message in outcome.stderr, outcome.stderr


def test_kl_is_the_mean_difference_of_the_models_own_log_probabilities(tokenizer):
    """The oracle: transformers' own forward. Each side reads its own prompt; two answers were cut."""
    prompts = {"policy": ([7, 8, 9], [1]), "baseline": ([7, 8], [2, 1])}
    answers = [
        [Answer((5, 6, 7), 258), Answer((), 258)],
        [Answer((9, 9), None), Answer((3,), None)],
    ]
    asked, logps = [], []
    for seed, (name, own) in enumerate(prompts.items()):
        policy = Policy(tiny_llama(seed))
        rows = [Row(name, np.array(prompt, np.int32), (), ()) for prompt in own]
        asked.append(Asked(name, policy, tokenizer, "raw", rows))
        for prompt, some in zip(own, answers, strict=True):
            for answer in some:
                tokens = [*answer.tokens, *([258] if answer.ended else [])]
                with torch.no_grad():
                    logits = policy.model(torch.tensor([prompt + tokens])).logits[
                        0, len(prompt) - 1 : -1
                    ]
                picked = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
                logps.append(picked.sum().item() * (1, -1)[seed])
    args = argparse.Namespace(temperature=1.0, top_p=1.0, micro_batch_tokens=20, share_prefix=True)
    found = kl_estimate(*asked, Answers([], answers), args, setup())
    assert found["kl_per_answer"] == pytest.approx(sum(logps) / 4, rel=1e-5)
    assert found["kl_per_token"] == pytest.approx(sum(logps) / 8, rel=1e-5)
    args.top_p = 0.9
    assert kl_estimate(*asked, Answers([], answers), args, setup()) == {}


def test_the_flags_reach_the_sampler(world):
    """Greedy answers, a small top_p, another seed and cut prompts each give other answers."""
    plain, _ = evaluated(world, "plain run")
    base = [line["policy_answer"] for line in plain]
    for name, flags in {
        "greedy run": ["--temperature", 0],
        "nucleus": ["--top_p", 0.05],
        "seed 5": ["--seed", 5],
        "cut prompts": ["--max_length", 4],
    }.items():
        lines, figures = evaluated(world, name, *flags)
        assert [line["policy_answer"] for line in lines] != base, name
        assert ("kl_per_answer" in figures) == (name in ("seed 5", "cut prompts"))


def test_the_report_is_written_whole(world):
    """Without stubs: the page has the verdict, the picture, the run's training and every answer."""
    log = [{"eval/logps/chosen": -9.0, "eval/logps/rejected": -9.0},
           {"eval/logps/chosen": -8.0, "eval/logps/rejected": -11.0}]  # fmt: skip
    torn = '{"eval/logps/ch'
    lines = "".join(json.dumps(line) + "\n" for line in log)
    (world / "policy" / "metrics.jsonl").write_text(f"3\n{lines}{torn}")
    outcome = run_ranks(1, script, argv(world, "whole"))
    (world / "policy" / "metrics.jsonl").unlink()
    assert outcome.codes == [0], outcome.stderr
    page = html.unescape((world / "whole" / "report.html").read_text())
    picture = (world / "whole" / "answers.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and base64.b64encode(picture).decode() in page
    assert "moved by +1.00 nats, the rejected ones' by -2.00" in page and "KL(policy" in page
    assert page.count("<article") == 9
    sentence = re.search(r'class="verdict">(.*?)</p>', page)[1]
    assert sentence in outcome.stdout


def test_a_judge_that_can_not_read_is_found_before_sampling(world, tmp_path, tokenizer):
    """It knows 64 positions, and is to read 256."""
    tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel.load(tmp_path, head_seed=0)
    model.scoring = {"template": "raw", "max_length": 256, "eos": EOS_RULE}
    (world / "short rm").mkdir()
    model.save(world / "short rm", tokenizer)
    outcome = run_ranks(1, policy_script, argv(world, "new", "--reward", world / "short rm"))
    assert outcome.codes == [1] and "sampled" not in outcome.stdout
    assert "knows 64 positions" in outcome.stderr, outcome.stderr


def test_a_judge_without_a_rule_reads_the_policies_template(world, tokenizer, llama_folder):
    model = RewardModel.load(llama_folder, head_seed=0)
    (world / "silent rm").mkdir(exist_ok=True)
    model.save(world / "silent rm", tokenizer)
    found = {}
    for template in ("raw", "pku"):
        flags = ["--policy_answers", world / "answers.jsonl", "--template", template]
        lines, _ = evaluated(world, f"silent {template}", "--reward", world / "silent rm", *flags)
        found[template] = [line["policy_score"] for line in lines]
    given = ["--policy_answers", world / "answers.jsonl", "--template", "raw"]
    spoken, _ = evaluated(world, "spoken", *given)
    assert found["raw"] == pytest.approx([line["policy_score"] for line in spoken], abs=1e-5)
    assert found["raw"] != pytest.approx(found["pku"], abs=1e-3)


def test_without_a_command_both_are_evaluated_with_their_defaults(monkeypatch):
    called = []
    monkeypatch.setattr(evaluate, "evaluate_rm", lambda args, _: called.append(args))
    monkeypatch.setattr(evaluate, "evaluate_policy", lambda args, _: called.append(args))
    evaluate.main([])
    assert [args.command for args in called] == ["rm", "policy"]
    assert (called[0].model, called[1].policy, called[1].baseline) == (
        "runs/rm",
        "runs/dpo",
        "tiny",
    )
    with pytest.raises(ValueError, match=r"say first what to evaluate: evaluate.py rm\|policy"):
        evaluate.main(["--model", "runs/rm"])


BAD_INPUT = {
    "pairs of one answer": (["--pairs_out", "x.jsonl"], "--samples is 1, give 2 or more"),
    "no prompts": (["--data", "empty.jsonl"], "empty.jsonl: holds no records"),
    "no policy": (["--policy", "nowhere"], "model folder '.*nowhere' does not exist"),
    "no reward model": (["--reward", "policy"], "has no reward head"),
    "too few answers": (["--policy_answers", "few.jsonl"], "few.jsonl: 3 of 9 prompts have fewer than 1 .*"
                        "the first prompts:1, .*--allow_missing"),
    "other prompts": (["--policy_answers", "further.jsonl"], "2 answers are to prompts that are not asked.*"
                      "'Another\\?'"),
    "no common prompt": (["--policy_answers", "strange.jsonl", "--allow_missing"], "none of the 9 prompts"),
    "another template": (["--template", "pku"], "reads the template raw, and '.*' is asked with pku; "
                         "give --template raw"),
    "another one of the judge": (["--reward_template", "pku"], "trained with template 'raw', .* "
                                 "give --reward_template raw"),
    "both": (["--policy", "policy", "--policy_answers", "answers.jsonl"], "both name the policy; give one"),
    "top_p": (["--top_p", "5"], "--top_p 5 is a probability"),
    "temperature": (["--temperature", "1e-300"], "--temperature 1e-300: give 0, or 0.001 and more"),
    "greedy samples": (["--temperature", "0", "--samples", "2"], "of a prompt are the same"),
    "half a pair": (["--data", "half.jsonl"], "half.jsonl:1: of 'chosen' and 'rejected' there must be both"),
    "the root": (["--out", "/"], "--out / is no folder that can be replaced"),
    "the same data twice": (["--data", "prompts.jsonl", "prompts.jsonl"], "two data sources are named"),
    "pairs that exist": (["--samples", "2", "--pairs_out", "few.jsonl"], "few.jsonl exists; give another"),
    "pairs of another kind": (["--samples", "2", "--pairs_out", "x.csv"], "a file that ends with .jsonl"),
    "pairs in the results": (["--samples", "2", "--pairs_out", "in_results"], "lies in --out"),
    "pairs in no folder": (["--samples", "2", "--pairs_out", "in_a_file"], "can't be written: "),
    "no answers": (["--policy_answers", "prompts.jsonl"], ":1: expected the keys 'prompt' and 'response'"),
    "too long": (["--max_new_tokens", "5000"], "knows 2048 positions, .* has 50"),
    "foreign folder": (["--out", "rm"], "holds files that are not an evaluation's"),
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_one_clear_error(world, ranks, subtests):
    for name, (flags, message) in BAD_INPUT.items():
        with subtests.test(name):
            paths = {path.name: str(path) for path in world.iterdir()}
            paths |= {
                "nowhere": str(world / "nowhere"),
                "in_results": str(world / "new" / "pairs.jsonl"),
                "in_a_file": str(world / "few.jsonl" / "pairs.jsonl"),
            }
            given = [paths.get(flag, flag) for flag in flags]
            outcome = run_ranks(ranks, policy_script, argv(world, "new", *given))
            assert outcome.codes == [1] * ranks, outcome.stderr
            lines = [
                x
                for x in outcome.stderr.splitlines()
                if x and "batch/s" not in x and "it/s" not in x
            ]
            assert len(lines) == 1 and re.search(f"^error: .*{message}", lines[0]), outcome.stderr
    assert not (world / "new").exists()
