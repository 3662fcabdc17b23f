"""python -m pytest tests/evaluation/test_seen.py

What a run held out is evaluated, and what it was trained on is counted: from training to the files
of an evaluation.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import write_pairs
from evaluations import evaluated, write_jsonl

import train_dpo
import train_rm
from nanoalign.evaluation.seen import note_on_prompts, prompts_trained_on
from nanoalign.files.run_folder import RECORDS
from nanoalign.records import Record
from nanoalign.runs import result


@pytest.fixture(scope="module")
def runs(tmp_path_factory, llama_folder) -> Path:
    """A folder with pairs.jsonl, and a reward model and a policy that were trained on a part."""
    folder = tmp_path_factory.mktemp("held_out")
    write_pairs(folder / "pairs.jsonl", 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for main, out in ((train_rm, "rm"), (train_dpo, "dpo")):
            patch.setattr(result, "finish", lambda *args: None)
            argv = ["--model", str(llama_folder), "--data", "pairs.jsonl", "--template", "raw"]
            argv += ["--eval_share", "0.3", "--steps", "1", "--batch_size", "2", "--out", out]
            main.main(argv)
    return folder


def test_a_reward_model_is_scored_on_what_it_held_out(runs):
    """3 of 10 pairs; the others were trained on, also where their responses are swapped."""
    lines = [json.loads(line) for line in (runs / "pairs.jsonl").read_text().splitlines()]
    swapped = [
        {"prompt": x["prompt"], "chosen": x["rejected"], "rejected": x["chosen"]} for x in lines
    ]
    write_jsonl(runs / "swapped.jsonl", swapped)
    write_jsonl(runs / "new.jsonl", [line | {"rejected": "new"} for line in lines])
    data = [f"held_out:{runs / 'rm'}", *(runs / f"{x}.jsonl" for x in ("pairs", "swapped", "new"))]
    argv = ["rm", "--model", runs / "rm", "--out", runs / "rm_eval", "--data", *data]
    scores, figures, printed = evaluated(argv, ranks=2)
    names = [line["pair_id"] for line in scores if line["subset"] == "held_out:rm"]
    assert len(names) == 2 * 3
    assert {name.rpartition(":")[0] for name in names} == {"held_out:rm:pairs"}
    counts = {name: own["trained_on"] for name, own in figures["subsets"].items()}
    assert counts == {"held_out:rm": 0, "pairs": 7, "swapped": 7, "new": 0}
    assert figures["all"]["trained_on"] == 14
    assert (
        f"trained on  14 of 33 pairs were trained on by --model {runs / 'rm'}; for others: "
        f"--data held_out:{runs / 'rm'}\n"
    ) in printed
    first, second = printed[printed.index("\nsubset") + 1 :].splitlines()[:2]
    assert first.split()[:3] == ["subset", "pairs", "trained"] and second.split()[0] == "on"
    assert re.search(r"\nheld_out:rm +3 +0 .*\npairs +10 +7 .*\nswapped +10 +7 ", printed)


def policy(runs: Path, *flags: object) -> tuple[dict, str]:
    """(metrics.json, what was printed) of a comparison of answers of two tokens."""
    argv = ["policy", "--policy", runs / "dpo", "--reward", runs / "rm", "--template", "raw"]
    argv += ["--baseline_answers", runs / "answers.jsonl", "--out", runs / "dpo_eval"]
    return evaluated([*argv, "--max_new_tokens", 2, *flags])[1:]


def test_prompts_that_a_policy_was_trained_on_are_counted(runs):
    lines = [json.loads(line) for line in (runs / "pairs.jsonl").read_text().splitlines()]
    prompts = [line["prompt"] for line in lines] + ["Never seen."]
    write_jsonl(runs / "answers.jsonl", [{"prompt": p, "answer": "a"} for p in prompts])
    figures, printed = policy(runs)
    assert (figures["prompts"], figures["policy_trained_on"]) == (11, 7)
    assert figures["reward_trained_on"] == 7  # with the same seed it held out the same prompts
    sentence = "7 of 11 prompts were trained on by the policy, 7 by the reward model. A model does"
    assert sentence in printed
    assert sentence in (runs / "dpo_eval" / "report.html").read_text()
    figures, printed = policy(runs, "--data", f"held_out:{runs / 'dpo'}")
    assert figures["prompts"] == 3
    assert figures["policy_trained_on"] == figures["reward_trained_on"] == 0
    assert "\n0 of 3 prompts were trained on by the policy, 0 by the reward model.\n" in printed


def test_nothing_is_said_of_models_of_other_programs(runs):
    for name in ("rm", "dpo"):
        shutil.copytree(runs / name, runs / f"other_{name}")
        (runs / f"other_{name}" / RECORDS).unlink()
    argv = ["rm", "--model", runs / "other_rm", "--data", runs / "pairs.jsonl", "--out", runs / "e"]
    _, figures, printed = evaluated(argv)
    assert "trained_on" not in figures["all"] and "trained on" not in printed
    models = {"policy": str(runs / "other_dpo"), "reward": None}
    assert prompts_trained_on([Record("p", ())], models) == {}
    assert note_on_prompts({"prompts": 1}) is None
