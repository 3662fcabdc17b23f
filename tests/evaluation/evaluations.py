"""Shared by the tests of whole evaluations: evaluate.py on some ranks, models and data for it."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import records, tiny_llama
from processes import run_ranks

import evaluate
from nanoalign.batch import Row, collate
from nanoalign.distributed import run
from nanoalign.evaluation import plots
from nanoalign.model import RewardModel
from nanoalign.ranks.report import report
from nanoalign.rewards.rule import EOS_RULE
from nanoalign.weights.write import write_model

RULE = {"template": "raw", "max_length": 256, "eos": EOS_RULE}


def script(argv: list[str], pictures: bool = False) -> None:
    """evaluate.py. Without `pictures`, files take their place: they need most of the time."""
    sys.argv = ["evaluate.py", *argv]
    if not pictures:

        def write(path: Path, *rest: object) -> None:
            path.write_bytes(b"a picture")

        plots.policy_picture = plots.reward_picture = write
    run(evaluate.main, report)


def evaluated(
    argv: list[object], ranks: int = 1, pictures: bool = False
) -> tuple[list[dict], dict, str]:
    """(lines of scores.jsonl or answers.jsonl, metrics.json, what was printed) of an evaluation."""
    outcome = run_ranks(ranks, script, list(map(str, argv)), pictures)
    assert outcome.codes == [0] * ranks, outcome.stderr
    out = Path(argv[argv.index("--out") + 1])
    lines = out / ("answers.jsonl" if argv[0] == "policy" else "scores.jsonl")
    metrics = json.loads((out / "metrics.json").read_text())
    return [json.loads(line) for line in lines.read_text().splitlines()], metrics, outcome.stdout


def write_jsonl(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_reward_model(folder: Path, base: Path, tokenizer, rule: dict | None = RULE) -> Path:
    """A reward model with a random head. rule: of its training; None: of another program."""
    model = RewardModel.load(base, head_seed=0)
    if rule is not None:
        model.model.config.nanoalign = rule
    write_model(model, tokenizer, folder)
    return folder


def write_policies(folder: Path, base: Path, tokenizer) -> Path:
    """Two language models, a reward model, and 9 prompts, of which the first is also the last."""
    for name, seed in (("policy", 0), ("baseline", 1)):
        model = tiny_llama(seed)
        # Of random tokens every fourth ends an answer: some end, and some are cut.
        model.generation_config.eos_token_id = [*range(0, 256, 4), tokenizer.eos_token_id]
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_reward_model(folder / "rm", base, tokenizer)
    prompts = [record.prompt for record in records(8)]
    prompts.append(prompts[0])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    answers = [{"prompt": prompt, "response": f"a{i}"} for i, prompt in enumerate(prompts)]
    write_jsonl(folder / "answers.jsonl", answers)
    few = [{"prompt": prompt, "answer": f"f{i}"} for i, prompt in enumerate(prompts[2:-1])]
    write_jsonl(folder / "few.jsonl", few)
    further = [*prompts, "Another?", "One more?"]
    write_jsonl(folder / "further.jsonl", [{"prompt": p, "answer": "a"} for p in further])
    return folder


def answers_of(lines: list[dict], side: str, key: str = "answer") -> list:
    """One value of every line of answers.jsonl that is of the side, "policy" or "baseline"."""
    return [line[key] for line in lines if line["side"] == side]


def reward_alone(model: RewardModel, prompt: list[int], answer: list[int]) -> float:
    """The reward of an answer to a prompt by a row that is made by hand of their tokens."""
    row = Row("x", np.array(prompt, np.int32), (np.array(answer, np.int32),), ())
    with torch.no_grad():
        return model(collate([row])).item()


def by_prompt(lines: list[dict], side: str, key: str = "score") -> list[list]:
    """The same of each prompt, in the order of the file."""
    found: dict[str, list] = {line["id"]: [] for line in lines}
    for line in lines:
        if line["side"] == side:
            found[line["id"]].append(line[key])
    return list(found.values())


def mean_of_prompts(values: list[list[float]]) -> float:
    return statistics.fmean(map(statistics.fmean, values))


def check_figures(lines: list[dict], figures: dict) -> None:
    """The figures are those of the lines in plain Python, each prompt counting as one."""
    policy, baseline = (by_prompt(lines, side) for side in ("policy", "baseline"))
    won = [
        [(x > y) + (x == y) / 2 for x in own for y in others]
        for own, others in zip(policy, baseline, strict=True)
    ]
    flat = [x for own in won for x in own]
    expected = {
        "pairs": len(flat),
        "prompts": len(won),
        "policy_mean": mean_of_prompts(policy),
        "no_dpo_data_mean": mean_of_prompts(baseline),
        "wins": flat.count(1),
        "no_dpo_better_than_dpo_count": flat.count(0),
        "ties": flat.count(0.5),
        "win_rate": mean_of_prompts(won),
        "policy_tokens_mean": mean_of_prompts(by_prompt(lines, "policy", "tokens")),
    }
    assert expected == pytest.approx({key: figures[key] for key in expected}, rel=1e-9)
    assert figures["win_rate_low"] <= figures["win_rate"] <= figures["win_rate_high"]


def policy_argv(folder: Path, out: str, *flags: object) -> list[object]:
    """The command line of `policy` in a folder of write_policies; --out is `out` in this folder."""
    base = ["policy", "--reward", folder / "rm", "--out", folder / out, "--template", "raw"]
    base += ["--data", folder / "prompts.jsonl", "--max_new_tokens", 6, "--batch_size", 4]
    for role in ("policy", "baseline"):
        if f"--{role}_answers" not in flags:
            base += [f"--{role}", folder / role]
    return [*base, *flags]


def files_argv(folder: Path, out: str, *files: Path) -> list[object]:
    """The command line of `policy` with answers of the policy and the baseline in two files."""
    base = ["policy", "--reward", folder / "rm", "--out", folder / out]
    return [*base, "--policy_answers", files[0], "--baseline_answers", files[1]]
