"""The homework of a course on alignment, from preference pairs to judged answers, as one page.

It runs the scripts: a reward model, its scores on subsets, DPO, and the answers of the policy
beside those of its base. The page has the records' keys, the curves, three figures of each subset,
four counters, pictures of sorted rewards, cases with an empty column for an analysis, and eight
questions, each with the experiment that answers it.
"""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from nanoalign.data.sources import open_source, test_of
from nanoalign.errors import RunError
from nanoalign.evaluation.render import cell, render, share
from nanoalign.evaluation.statistics import Figures
from nanoalign.lab.figures import read
from nanoalign.records import decode
from nanoalign.tiny.world import true_reward

TEMPLATE = Path(__file__).with_name("homework.html")
ROOT = Path(__file__).parents[2]
CASES = 12  # of each kind
COUNTERS = {
    "better_data_mean": "mean reward of the better responses",
    "worse_data_mean": "mean reward of the worse responses",
    "worse_better_than_better_count": "pairs whose worse response has the higher reward",
    "worse_worse_than_better_count": "pairs whose worse response has the lower reward",
}
POLICY_COUNTERS = {
    "dpo_data_mean": "mean reward of the policy's answers",
    "no_dpo_data_mean": "mean reward of its base's answers",
    "no_dpo_better_than_dpo_count": "prompts to which the base's answer has the higher reward",
    "no_dpo_worse_than_dpo_count": "prompts to which the base's answer has the lower reward",
}
# Question -> where its answer is: experiments of the lab, and pages.
QUESTIONS = {
    "Where are reward models used?": "best_of_n: choosing and filtering without training",
    "When do reward models fail, and how does one find such a case?": "overfitting, elsewhere, "
    "attack",
    "Why do reward models prefer long answers, and what helps?": "length",
    "People want different things. How can a reward model learn that?": "several",
    "Does DPO learn on-policy or off-policy, online or offline, and what does that cost?": "own_"
    "samples, reinforce",
    "Which part of RLHF does DPO replace, and which idea makes that possible?": "reinforce; "
    "docs/course/3_dpo.md",
    "What are the limits of DPO beside RLHF that samples?": "why_lose, reinforce, beta",
    "What do KTO, SimPO, ORPO and others change in DPO?": "losses; docs/course/6_family.md",
}


def homework(out: Path, data: str, model: str) -> None:
    """Runs all commands, each with its output in log.txt, and writes index.html.

    data: preference pairs, of which both trainings hold out a part; "tiny" has a test part. model:
    the base of both models. A command that was done is not run again, so an interrupted homework
    continues. Raises RunError if a command fails, or if `out` is the homework of other inputs.
    """
    inputs, given = out / "inputs.json", {"data": data, "model": model}
    if inputs.exists() and (before := json.loads(inputs.read_text())) != given:
        raise RunError(
            f"--out {out} is the homework of --data {before['data']} --model {before['model']}; "
            "give another --out, or remove the folder"
        )
    is_tiny = (data, model) == ("tiny", "tiny")
    start = [] if is_tiny else ["--data", data, "--model", model]
    rm, dpo = str(out / "rm"), str(out / "dpo")
    held_out = {
        folder: [] if is_tiny else ["--data", test_of(data) or f"held_out:{folder}"]
        for folder in (rm, dpo)
    }
    judged = ["--policy", dpo, "--baseline", model, "--reward", rm, *held_out[dpo]]
    commands = {
        "rm": ["train_rm.py", *start],
        "rm_eval": ["evaluate.py", "rm", "--model", rm, *held_out[rm]],
        "dpo": ["train_dpo.py", *start],
        "dpo_eval": ["evaluate.py", "policy", *judged],
    }
    out.mkdir(parents=True, exist_ok=True)
    inputs.write_text(json.dumps(given))
    for name, words in commands.items():
        words += ["--out", str(out / name)]
        done = out / f"{name}.done"
        if not done.exists():
            shutil.rmtree(out / name, ignore_errors=True)  # of a command that was interrupted
            run(words, out / "log.txt")
            done.touch()
    write_page(out, data, [shlex.join(["python", *words]) for words in commands.values()])
    print(f"saved       {out / 'index.html'}: results, pictures, cases and eight questions")


def run(words: list[str], log: Path) -> None:
    """Runs a script in a process of its own; its output is appended to the log."""
    print(f"  {shlex.join(['python', *words])}", flush=True)
    with log.open("a") as file:
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RunError(f"{words[0]} has failed; the end of {log} has its error")


def write_page(out: Path, data: str, commands: list[str]) -> None:
    """Writes index.html from the results of the commands in the folder `out`."""
    ranked, compared = (
        json.loads((out / name / "metrics.json").read_text()) for name in ("rm_eval", "dpo_eval")
    )
    where, _, _, raw = next(open_source(data))
    knows_truth = "true_win_rate" in compared
    page = render(
        TEMPLATE,
        where=Path(where).name,
        record={key: str(value) for key, value in decode(raw, where).items()},
        commands=commands,
        subsets=[
            (name, share(figures, "accuracy"), cell(figures["reward_mean"], 2),
             cell(figures["reward_std"], 2))
            for name, figures in (ranked["subsets"] | {"all": ranked["all"]}).items()
        ],
        counters=[*counted(COUNTERS, ranked["all"]), *counted(POLICY_COUNTERS, compared)],
        wins=f"{compared['wins']} : {compared['losses']}, and {compared['ties']} ties",
        rate=share(compared, "win_rate"),
        true_rate=share(compared, "true_win_rate") if knows_truth else None,
        curves=[(name, out / name / "curves.png") for name in ("rm", "dpo")],
        orders=[*sorted((out / "rm_eval").glob("*.png")), out / "dpo_eval" / "answers.png"],
        cases=cases(out / "dpo_eval", knows_truth),
        questions=QUESTIONS.items(),
    )  # fmt: skip
    (out / "index.html").write_text(page, encoding="utf-8")


def counted(names: dict[str, str], figures: Figures) -> list[tuple[str, str, str]]:
    """(name in metrics.json, meaning, value) of each counter."""
    return [(name, meaning, cell(figures[name], 2)) for name, meaning in names.items()]


def cases(folder: Path, knows_truth: bool) -> list[dict]:
    """The prompts at which the policy loses most, and those at which it gains most, by the reward.

    Each has the first answers of policy and base, their rewards, and with `knows_truth` their true
    rewards.
    """
    first: dict[str, dict[str, dict]] = {}  # prompt -> side -> its first answer
    for line in read(folder / "answers.jsonl"):
        first.setdefault(line["prompt"], {}).setdefault(line["side"], line)
    both = [(prompt, sides["policy"], sides["baseline"]) for prompt, sides in first.items()]
    both.sort(key=lambda case: case[1]["score"] - case[2]["score"])
    picked = both[:CASES] + both[CASES:][-CASES:][::-1]
    return [
        {
            "prompt": prompt,
            "answers": [
                (
                    name,
                    x["answer"],
                    f"{x['score']:+.2f}",
                    f"{true_reward(prompt, x['answer']):+.1f}" if knows_truth else "",
                )
                for name, x in (("policy", ours), ("base", theirs))
            ],
        }
        for prompt, ours, theirs in picked
    ]
