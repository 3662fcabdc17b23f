"""python -m pytest tests/evaluation/test_frontier.py"""

import json
import re
import shutil
from pathlib import Path

import pytest
from evaluations import evaluated, policy_argv, script, write_policies
from processes import run_ranks


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    """Results of two seeds, and results that cannot be compared with these."""
    folder = write_policies(tmp_path_factory.mktemp("policies"), llama_folder, tokenizer)
    for name, flags in {
        "results": ["--samples", 2],
        "first": ["--samples", 2, "--seed", 1],
        "other": ["--baseline", folder / "policy"],
        "short": ["--max_new_tokens", 5],
        "greedy": ["--temperature", 0],
    }.items():
        evaluated(policy_argv(folder, name, *flags))
    shutil.copytree(folder / "first", folder / "head")  # of another head of the reward model
    settings = json.loads((folder / "head" / "args.json").read_text())
    (folder / "head" / "args.json").write_text(json.dumps(settings | {"reward_head": "token:1"}))
    (folder / "strange").mkdir()
    (folder / "strange" / "args.json").write_text("[]")
    (folder / "strange" / "metrics.json").write_text("null")
    return folder


def test_the_frontier_is_drawn_of_results_with_one_baseline(world, monkeypatch):
    """Two seeds; an older frontier is replaced."""
    monkeypatch.chdir(world)
    for _ in range(2):
        outcome = run_ranks(1, script, ["frontier", "results", "first", "--out", "f"], True)
        assert outcome.codes == [0], outcome.stderr
    assert (world / "f" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((world / "first" / "metrics.json").read_text())
    row = rf"^first .*{figures['kl_per_answer']:.3f} .*{figures['win_rate']:.3f}"
    assert re.search(row, outcome.stdout, re.MULTILINE)
    written = json.loads((world / "f" / "metrics.json").read_text())
    assert list(written) == ["results", "first"]
    assert written["first"]["kl_per_answer"] == figures["kl_per_answer"]
    assert written["first"]["policy_cut_share"] == 0
    assert written["first"]["policy_true_mean"] is None  # of no embedded prompts


@pytest.mark.parametrize(
    ("name", "message"),
    [("other", "other was evaluated with --baseline"),
     ("short", "short was evaluated with --max_new_tokens 5, results with 6"),
     ("head", "head was evaluated with --reward_head token:1, results with"),
     ("greedy", "greedy has no kl_per_answer"),
     ("rm", "rm has no results"),
     ("strange", "strange has no results")],
)  # fmt: skip
def test_other_baselines_settings_and_folders_are_refused(world, monkeypatch, name, message):
    monkeypatch.chdir(world)
    outcome = run_ranks(1, script, ["frontier", "results", name, "--out", "refused"], True)
    assert outcome.codes == [1] and f"error: {message}" in outcome.stderr, outcome.stderr
    assert not (world / "refused").exists()
