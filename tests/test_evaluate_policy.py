"""python -m pytest tests/test_evaluate_policy.py

evaluate.py policy: two models on the same prompts, on any number of ranks; answers made elsewhere.
"""

import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import examples, tiny_llama
from ranks import run_ranks
from test_evaluate import script

import evaluate
from nanoalign.comparison import Compared
from nanoalign.data import read_examples
from nanoalign.models import RewardModel
from nanoalign.records import Example
from nanoalign.rows import EOS_RULE


def policy_script(argv: list[str]) -> None:
    evaluate.policy_picture = lambda path, *rest: path.write_bytes(b"a picture")
    script(argv)


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    """Two language models, a reward model, 9 prompts of which two are the same, and answers to them."""
    folder = tmp_path_factory.mktemp("policies")
    for name, seed in (("policy", 0), ("baseline", 1)):
        tiny_llama(seed).save_pretrained(folder / name)
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
    write(folder / "few.jsonl", [{"prompt": p, "answer": "a"} for p in prompts[:-1]])
    write(folder / "empty.jsonl", [])
    return folder


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def argv(folder: Path, out: str, *flags: object) -> list[str]:
    base = ["policy", "--policy", folder / "policy", "--baseline", folder / "baseline", "--reward",
            folder / "rm", "--data", folder / "prompts.jsonl", "--out", folder / out, "--template", "raw",
            "--max_new_tokens", 6, "--batch_size", 4]  # fmt: skip
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
    assert (
        len({(line["prompt"], line["policy_answer"]) for line in lines}) == 16
    )  # one seed, one answer
    assert all(line["policy_answer"] != line["baseline_answer"] for line in lines)


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
    lines, _ = evaluated(world, "pairs", "--samples", 3, "--pairs_out", world / "pairs.jsonl")
    records = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    expected = []
    for n in range(0, 27, 3):
        some = sorted(lines[n : n + 3], key=lambda line: line["policy_score"])
        expected.append(
            {
                "prompt": some[0]["prompt"],
                "chosen": some[-1]["policy_answer"],
                "rejected": some[0]["policy_answer"],
            }
        )
    assert records == expected
    assert len(read_examples(str(world / "pairs.jsonl"))) == 9


def test_pairs_of_dialogues_are_dialogues_and_ties_are_left_out():
    def lines(*scored):
        return [Compared("1", "p", a, "b", s, 0.0, 1, 1, True, True) for a, s in scored]

    dialogue = Example("d", "dialogue", "\n\nHuman: q\n\nAssistant:", (), pairs=())
    text = Example("t", "text", "q", (), pairs=())
    compared = lines((" x", 1.0), (" y", 2.0), ("u", 1.0), ("u", 1.0))
    assert evaluate.new_pairs([dialogue, text], compared, 2) == [
        {"chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: x"}
    ]


BAD_INPUT = {
    "pairs of one answer": (["--pairs_out", "x.jsonl"], "--samples is 1, give 2 or more"),
    "no prompts": (["--data", "empty.jsonl"], "empty.jsonl: holds no records"),
    "no policy": (["--policy", "nowhere"], "model folder '.*nowhere' does not exist"),
    "no reward model": (["--reward", "policy"], "has no reward head"),
    "too few answers": (["--policy_answers", "few.jsonl"], "too few answers to the prompt of prompts:9"),
    "no answers": (["--policy_answers", "prompts.jsonl"], ":1: expected the keys 'prompt' and 'response'"),
    "too long": (["--max_new_tokens", "5000"], "knows 2048 positions, .* has 50"),
    "foreign folder": (["--out", "rm"], "holds files that are not an evaluation's"),
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_one_clear_error(world, ranks, subtests):
    for name, (flags, message) in BAD_INPUT.items():
        with subtests.test(name):
            paths = {path.name for path in world.iterdir()} | {"nowhere"}
            given = [str(world / flag) if flag in paths else flag for flag in flags]
            outcome = run_ranks(ranks, policy_script, argv(world, "new", *given))
            assert outcome.codes == [1] * ranks, outcome.stderr
            lines = [
                x
                for x in outcome.stderr.splitlines()
                if x and "batch/s" not in x and "it/s" not in x
            ]
            assert len(lines) == 1 and re.search(f"^error: .*{message}", lines[0]), outcome.stderr
    assert not (world / "new").exists()
