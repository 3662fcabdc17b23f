"""python -m pytest tests/evaluation/test_published_outputs.py

Reward models of other programs in evaluate.py: which output is the reward, and its scores.
"""

from pathlib import Path

import pytest
from conftest import records, write_pairs
from evaluations import evaluated
from published_models import CASES, by_hand, write

import evaluate
from nanoalign.errors import RunError
from nanoalign.evaluation.scoring import Judge, load_judges
from nanoalign.packing.packed import PackedBatcher


def judge(folder: Path, world, *flags: str) -> Judge:
    words = ["rm", "--model", str(folder), "--template", "chat", *flags]
    (args,) = evaluate.parse_args(words)
    (one,) = load_judges(args, None, PackedBatcher(world, 300))
    return one


def test_a_published_model_in_evaluate_on_two_ranks(world, tmp_path):
    """scores.jsonl has the gated score of the plain lines, for the tokens that a judge reads."""
    case, folder = CASES["armorm"], tmp_path / "model"
    write(folder, case)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 5)
    argv = ["rm", "--model", folder, "--data", f"it={pairs}", "--template", "chat"]
    lines, _, printed = evaluated([*argv, "--out", tmp_path / "out"], ranks=2)
    assert "which is not run" in printed
    (encoded,) = judge(folder, world).encode(records(5))
    expected = [outputs[-1].item() for row in by_hand(case, encoded.rows) for outputs in row]
    assert [line["score"] for line in lines] == pytest.approx(expected, abs=1e-5)


def test_which_output_is_the_reward(world, tmp_path):
    """That of the description by default; --output counts from 0; --combine adds."""
    armorm = write(tmp_path / "armorm", CASES["armorm"])
    assert judge(armorm, world).view == ("", "better", {"gated": 1.0})
    assert judge(armorm, world, "--output", "4").view == ("", "better", {"LABEL_4": 1.0})
    flags = ["--combine", "LABEL_0=2", "gated=1", "--preference", "better"]
    with pytest.raises(RunError, match="--combine of several preferences needs --preference"):
        judge(armorm, world, *flags[:3])
    several = write(tmp_path / "several", CASES["outputs"])
    with pytest.raises(RunError, match=r"has 3 outputs .* --output N"):
        judge(several, world)


def test_a_logit_that_the_model_does_not_have(world, tmp_path):
    folder = write(tmp_path / "model", CASES["nemotron"])
    with pytest.raises(RunError, match="--head token:264: model .* has 264 tokens"):
        judge(folder, world, "--head", "token:264")
    with pytest.raises(RunError, match=r"LlamaForCausalLM.* without a reward head"):
        judge(folder, world)
    with pytest.raises(RunError, match="--head: expected token:ID, such as token:0, got 'logit:0'"):
        judge(folder, world, "--head", "logit:0")
