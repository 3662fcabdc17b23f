"""python -m pytest tests/evaluation/test_judge.py

The answers of a comparison as the reward model reads them: whole, or cut by its max_length.
"""

import html
import re
from pathlib import Path

import pytest
from evaluations import (
    RULE,
    answers_of,
    evaluated,
    files_argv,
    policy_argv,
    reward_alone,
    write_jsonl,
    write_policies,
    write_reward_model,
)

from nanoalign.model import RewardModel


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    """A reward model that reads 20 tokens, and answers to 4 prompts of 4 letters.

    With their EOS the policy's answers have 4, 4, 4 and 31 tokens, the baseline's 31, 31, 4 and 16:
    16 beside the prompt are read whole.
    """
    folder = write_policies(tmp_path_factory.mktemp("policies"), llama_folder, tokenizer)
    write_reward_model(folder / "short", llama_folder, tokenizer, RULE | {"max_length": 20})
    for name, lengths in (("short answers", (3, 3, 3, 30)), ("long answers", (30, 30, 3, 15))):
        texts = [(f"{n}{name}x" * 9)[:length] for n, length in enumerate(lengths)]
        lines = [{"prompt": f"ask{n}", "answer": text} for n, text in enumerate(texts)]
        write_jsonl(folder / f"{name}.jsonl", lines)
    return folder


@pytest.fixture(scope="module")
def results(world) -> tuple[list[dict], dict, str]:
    files = (world / f"{name} answers.jsonl" for name in ("short", "long"))
    return evaluated([*files_argv(world, "cut", *files), "--reward", world / "short"])


def test_answers_that_max_length_cut_are_marked_and_have_their_true_length(results):
    """Two of the baseline's answers and one of the policy's; one of exactly 16 tokens is whole."""
    lines, figures, _ = results
    assert answers_of(lines, "policy", "tokens") == [4, 4, 4, 31]
    assert answers_of(lines, "baseline", "tokens") == [31, 31, 4, 16]
    assert answers_of(lines, "policy", "cut") == [False, False, False, True]
    assert answers_of(lines, "baseline", "cut") == [True, True, False, False]
    assert figures["policy_tokens_mean"] == (4 + 4 + 4 + 31) / 4
    assert figures["baseline_tokens_mean"] == (31 + 31 + 4 + 16) / 4
    assert (figures["policy_cut_share"], figures["baseline_cut_share"]) == (0.25, 0.5)
    assert [line["read_share"] < 1 for line in lines] == [line["cut"] for line in lines]
    assert lines[1]["read_share"] == 16 / 31


def test_a_cut_answer_is_scored_at_its_last_token_that_is_read(world, results, tokenizer):
    """The rewards equal those of rows made by hand: 16 tokens of an answer, EOS where it fits."""
    model = RewardModel.load(world / "short", trainable=False)
    for line in results[0]:
        prompt, answer = (tokenizer(line[key])["input_ids"] for key in ("prompt", "answer"))
        expected = reward_alone(model, prompt, [*answer, tokenizer.eos_token_id][:16])
        assert line["score"] == pytest.approx(expected, abs=1e-5)


def test_the_figures_are_there_without_cut_answers_and_the_result_says_what_it_rests_on(
    world, results
):
    """Of the four pairs, the third alone has no cut answer."""
    lines, figures, printed = results
    policy, baseline = lines[4:6]
    whole = figures["without_cut"]
    assert (whole["pairs"], whole["policy_mean"]) == (1, policy["score"])
    assert whole["baseline_mean"] == baseline["score"]
    assert whole["win_rate"] == (policy["score"] > baseline["score"])
    assert whole["policy_tokens_mean"] == whole["baseline_tokens_mean"] == 4
    assert (figures["policy_cut_count"], figures["baseline_cut_count"]) == (1, 2)
    sentence = (
        "The reward model read only the beginning of 1 of the policy's 4 answers and 2 of the "
        "baseline's 4 answers: its max_length of 20 tokens cut them. The result rests on these "
        "beginnings."
    )
    assert sentence in printed
    assert sentence in html.unescape((world / "cut" / "report.html").read_text())
    assert re.search(r"^baseline_tokens_mean +20.5000 +4.0000$", printed, re.MULTILINE)


def test_an_answer_may_be_stopped_and_cut(world):
    """Sampling stops at 20 tokens, of which the reward model reads up to 10; all 20 are counted."""
    flags = ["--reward", world / "short", "--max_new_tokens", 20]
    lines, _, printed = evaluated(policy_argv(world, "both", *flags))
    kinds = {(line["ended"], line["cut"]) for line in lines}
    assert {(False, True), (True, False)} <= kinds
    assert all(line["tokens"] == 20 for line in lines if not line["ended"])
    stopped = sum(not line["ended"] for line in lines if line["side"] == "policy")
    assert f"8 answers, {stopped} of them stopped at --max_new_tokens 20" in printed
    page = (world / "both" / "report.html").read_text()
    assert page.count('<span class="mark">cut: ') == sum(line["cut"] for line in lines)
    marks = page.count('<span class="mark">sampling stopped')
    assert marks == sum(not line["ended"] for line in lines)


def test_rewards_do_not_depend_on_how_many_answers_share_a_row(world):
    """14 answers in one packed row, or in padded rows of one; equal answers tie exactly."""
    lines = [{"prompt": "ask", "answer": f"answer {'abcdefg'[k % 4] * k}"} for k in range(7)]
    write_jsonl(world / "seven.jsonl", lines)
    argv, scores = files_argv(world, "rows", *[world / "seven.jsonl"] * 2), []
    for flags in (["--micro_batch_tokens", 1, "--no-share_prefix"], ["--micro_batch_tokens", 9999]):
        found, figures, _ = evaluated([*argv, *flags])
        scores.append([line["score"] for line in found])
        assert scores[-1][:7] == scores[-1][7:] and len(set(scores[-1])) == 7
        assert (figures["ties"], figures["win_rate"]) == (7, 0.5)
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_reward_does_not_depend_on_the_other_answers(world, tokenizer):
    """A prompt of 14 tokens is read whole with "fine" and its EOS, cut to 10 for a long answer."""
    model = RewardModel.load(world / "short", trainable=False)
    texts = "fine", "a long answer of 27 letters", "another one of some letters"
    lines = [{"prompt": "fourteen words", "answer": text} for text in texts]
    files = [write_jsonl(world / f"{n} alone.jsonl", lines[:n]) for n in (1, 3)]
    argv = [*files_argv(world, "alone", *files), "--reward", world / "short"]
    found, _, printed = evaluated(argv)
    assert "; 1 prompts cut at their beginning" in printed  # also where several answers cut it
    for line, (start, end) in zip(found, ((0, 5), (0, 5), (4, 10), (4, 10)), strict=True):
        tokens, answer = (tokenizer(line[key])["input_ids"] for key in ("prompt", "answer"))
        answer = [*answer, tokenizer.eos_token_id][:end]
        expected = reward_alone(model, tokens[start:], answer)
        assert line["score"] == pytest.approx(expected, abs=1e-5)
