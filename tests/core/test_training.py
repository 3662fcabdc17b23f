"""python -m pytest tests/core/test_training.py

Whole runs of train_dpo.py on a tiny random Llama: what the curve may depend on, and what not.
"""

import json
import math
import shutil
import subprocess
from functools import partial

import numpy
import pytest
import torch
import transformers
from conftest import records, tiny_llama, write_pairs
from processes import run_ranks
from trainings import assert_same_curve, losses
from transformers import AutoModelForCausalLM, AutoTokenizer

import nanoalign
import train_dpo
from nanoalign.model import Policy
from nanoalign.runs.folder import versions


def test_the_first_loss_is_ln_2_and_training_learns(one_rank):
    assert losses(one_rank)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert one_rank[0]["step"] == 0 and one_rank[0]["eval/rewards/accuracies"] == 0.5
    assert one_rank[1]["rewards/chosen"] == one_rank[1]["rewards/rejected"] == 0.0
    assert losses(one_rank)[-1] < 0.5
    assert one_rank[-2]["rewards/accuracies"] > 0.8


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_curve_does_not_depend_on_the_number_of_ranks(train, one_rank, tmp_path, ranks):
    """Batches of 7 and of 4 pairs, in micro-batches: on 8 ranks some have none."""
    assert_same_curve(one_rank, train(tmp_path / "run", "--micro_batch_tokens", 60, ranks=ranks))


@pytest.mark.parametrize(
    "flags",
    [
        "--micro_batch_tokens 1",
        "--no-share_prefix",
        "--activation_checkpointing",
    ],
)
def test_the_curve_does_not_depend_on_micro_batches_or_layout(train, one_rank, tmp_path, flags):
    assert_same_curve(one_rank, train(tmp_path / "run", *flags.split()))


def test_bfloat16_stays_close(train, one_rank, tmp_path):
    """Within 0.05 of the losses in float32, over 10 steps that halve them."""
    coarse = losses(train(tmp_path / "run", "--precision", "bf16", ranks=2))
    assert coarse != losses(one_rank)
    assert coarse == pytest.approx(losses(one_rank), abs=0.05)


# --- results


def plain_logps(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    """log pi(response | prompt), token by token, from the full logits of one sequence."""
    logits = model(torch.tensor([prompt + response])).logits[0].double()  # (T, V)
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(
        float(logits[place].log_softmax(-1)[token])
        for place, token in zip(places, response, strict=True)
    )


@torch.no_grad()
def test_the_saved_model_has_the_log_probabilities_of_the_last_evaluation(
    train, tmp_path, tokenizer, llama_folder
):
    """The oracle: transformers' own loaders and forward, and a loop over tokens.

    And the rewards: beta times what the log-probabilities have gained over the first model.
    """
    eval_pairs = write_pairs(tmp_path / "eval.jsonl", 9, seed=1)
    last = train(tmp_path / "run", "--eval_data", eval_pairs, ranks=2)[-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    before = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    saved_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.dtype == torch.float32
    assert saved_tokenizer.get_vocab() == tokenizer.get_vocab()
    for side, name in enumerate(("chosen", "rejected")):
        logps, rewards = [], []
        for record in records(9, seed=1):
            prompt = saved_tokenizer(record.prompt)["input_ids"]
            response = saved_tokenizer(record.responses[side])["input_ids"]
            response.append(saved_tokenizer.eos_token_id)
            logps.append(plain_logps(model, prompt, response))
            rewards.append(0.1 * (logps[-1] - plain_logps(before, prompt, response)))
        assert last[f"eval/logps/{name}"] == pytest.approx(sum(logps) / 9, rel=1e-6)
        assert last[f"eval/rewards/{name}"] == pytest.approx(sum(rewards) / 9, rel=1e-4)


def test_args_json_has_the_flags_and_the_versions(train, tmp_path, pairs):
    train(tmp_path / "run", "--beta", 0.3, steps=1)
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["beta"] == 0.3 and args["data"] == [str(pairs)] and args["loss"] == "dpo"
    assert args["nanoalign"] == nanoalign.__version__
    assert args["torch"] == torch.__version__ and args["numpy"] == numpy.__version__
    assert args["transformers"] == transformers.__version__


def test_the_commit_is_never_that_of_another_project(tmp_path, monkeypatch):
    """A package that was installed in an ignored folder of a checkout has no commit."""
    git = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git(["git", "init"])
    package = tmp_path / "site-packages" / "nanoalign" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("")
    (tmp_path / ".gitignore").write_text("site-packages\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    git(["git", "add", ".gitignore"])
    git(["git", *who, "commit", "-m", "theirs"])
    monkeypatch.setattr(nanoalign, "__file__", str(package))
    assert versions()["commit"] is None
    git(["git", "add", "--force", str(package)])
    git(["git", *who, "commit", "-m", "ours"])
    head = git(["git", "rev-parse", "HEAD"], text=True).stdout.strip()
    assert versions()["commit"] == head
    package.write_text("changed = True\n")
    assert versions()["commit"] == f"{head}-dirty"


def test_overwrite_removes_the_old_run_and_nothing_else(train, tmp_path):
    train(tmp_path / "run", "--save_every", 5)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    metrics = train(tmp_path / "run", "--overwrite", steps=3)
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


# --- the reference


def _run_and_compare_parameters(argv: list[str]) -> tuple[bool, ...]:
    """Of each model that is loaded: whether its tensors are the same after the run as before."""
    loaded, load = [], Policy.load

    def load_and_copy(*args, **kwargs):
        policy = load(*args, **kwargs)
        loaded.append((policy, [p.full_tensor().clone() for p in policy.parameters()]))
        return policy

    train_dpo.Policy.load = load_and_copy
    train_dpo.main(argv)
    same = []
    for policy, before in loaded:
        policy.reshard()
        after = [p.full_tensor() for p in policy.parameters()]
        same.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return tuple(same)


def test_training_moves_the_policy_and_not_the_reference(llama_folder, pairs, tmp_path):
    argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", "--lr", "1e-2"]
    outcome = run_ranks(2, _run_and_compare_parameters, [str(arg) for arg in argv])
    assert outcome.results == [(False, True)] * 2, outcome.stderr


def test_another_reference_gives_other_first_losses(train, tmp_path, tokenizer):
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    metrics = train(tmp_path / "run", "--reference", tmp_path / "other", steps=1)
    assert abs(losses(metrics)[0] - math.log(2)) > 0.1


def test_only_matrices_decay():
    policy = Policy(tiny_llama(attention_bias=True))
    groups = policy.parameter_groups(weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in policy.named_parameters()}
    vectors = ("bias", "norm.weight", "layernorm.weight")
    assert found == {name: 0.0 if name.endswith(vectors) else 0.3 for name in found}
    assert sorted(set(found.values())) == [0.0, 0.3]
