"""python -m pytest tests/evaluation/test_published_outputs.py

Reward models of other programs in evaluate.py: which output is the reward, and its scores.
"""

from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer, records, write_pairs
from evaluations import evaluated
from published_models import CASES, by_hand, llama3_tokenizer, write

import evaluate
from nanoalign.batch import Row
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
    """That of the description by default, else that of --combine; labels are those of better."""
    armorm = write(tmp_path / "armorm", CASES["armorm"])
    assert judge(armorm, world).view == ("", "better", {"gated": 1.0})
    for shares in ({"LABEL_4": 1.0}, {"LABEL_0": 2.0, "gated": 1.0}):
        flags = ["--combine", *(f"{name}={weight}" for name, weight in shares.items())]
        assert judge(armorm, world, *flags).view == ("", "better", shares)
    several = write(tmp_path / "several", CASES["outputs"])
    with pytest.raises(RunError, match=r"has 3 outputs .* --combine LABEL_0=1"):
        judge(several, world)


def test_a_logit_that_the_model_does_not_have(world, tmp_path):
    folder = write(tmp_path / "model", CASES["nemotron"])
    with pytest.raises(RunError, match="--head token:264: model .* has 264 tokens"):
        judge(folder, world, "--head", "token:264")
    with pytest.raises(RunError, match=r"LlamaForCausalLM.* without a reward head"):
        judge(folder, world)
    with pytest.raises(RunError, match="--head: expected token:ID, such as token:0, got 'logit:0'"):
        judge(folder, world, "--head", "logit:0")


@pytest.mark.parametrize("name", ["ultrarm", "grm", "beaver", "nemotron", "inf-orm", "bias"])
def test_where_a_head_is_read_if_the_template_ends_with_the_pad_token(name, world, tmp_path):
    """Programs that take the last token of the attention mask read it there, others before it."""
    case, tokenizer = CASES[name], llama3_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    folder = write(tmp_path / "model", case, pad_token_id=end, eos_token_id=end)
    one = judge(folder, world, *([] if case.token is None else ["--head", f"token:{case.token}"]))
    rewards = one.score(one.encode(records(3)))
    for record, own in zip(records(3), rewards, strict=True):
        for response, reward in zip(record.responses, own, strict=True):
            turns = [("user", record.prompt), ("assistant", response)]
            ids = tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in turns], return_dict=False
            )
            assert ids[-1] == end
            read = ids[:-1] if name in ("inf-orm", "bias") else ids
            ((expected,),) = by_hand(case, [Row("", np.array(read[:1]), (np.array(read[1:]),), ())])
            assert reward == pytest.approx(expected.item(), abs=1e-5)


def test_a_head_that_is_read_at_the_pad_token_may_pad_with_eos(world, tmp_path):
    """Without a chat template its program and ours both read the EOS behind the text."""
    for name in ("ultrarm", "inf-orm"):
        folder = write(tmp_path / name, CASES[name], pad_token_id=258, eos_token_id=258)
        byte_tokenizer().save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert judge(tmp_path / "ultrarm", world, "--template", "pku").published is None
    with pytest.raises(RunError, match="pads with EOS, so transformers reads its rewards"):
        judge(tmp_path / "inf-orm", world, "--template", "pku")
