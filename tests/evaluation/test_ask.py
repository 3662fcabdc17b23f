"""python -m pytest tests/evaluation/test_ask.py

evaluate.py ask: a policy answers a prompt of the command line, of a pipe, or of a terminal.
"""

import io
from pathlib import Path

import pytest
from evaluations import by_prompt, evaluated, policy_argv, script, write_policies
from processes import run_ranks

import evaluate
from nanoalign.errors import RunError
from nanoalign.files.text import visible


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    return write_policies(tmp_path_factory.mktemp("policies"), llama_folder, tokenizer)


@pytest.fixture(scope="module")
def answered(world) -> dict[str, list[str]]:
    """What ask is to print to each prompt: the two answers that evaluate.py policy samples."""
    lines, _, _ = evaluated(policy_argv(world, "results", "--samples", 2))
    prompts = list(dict.fromkeys(line["prompt"] for line in lines))
    texts = by_prompt(lines, "policy", "answer")
    return {
        prompt: [f"{visible(text.strip())}\n" for text in own]
        for prompt, own in zip(prompts, texts, strict=True)
    }


def argv(world: Path, *flags: object) -> list[str]:
    base = ["ask", "--policy", world / "policy", "--template", "raw", "--max_new_tokens", 6]
    return list(map(str, [*base, *flags]))


def test_the_answers_are_those_of_evaluate_policy(world, answered, capsys):
    """With the same seed; without --samples the first of them. A stopped answer is named."""
    stopped = 0
    for prompt, (first, second) in answered.items():
        evaluate.main(argv(world, prompt))
        printed, notes = capsys.readouterr()
        assert printed == first
        stopped += "this answer was stopped at --max_new_tokens 6" in notes
        evaluate.main(argv(world, prompt, "--samples", 2))
        assert capsys.readouterr().out == f"[1] {first}[2] {second}"
    assert 0 < stopped < len(answered)


@pytest.mark.parametrize("terminal", [False, True])
def test_each_line_of_the_input_is_answered(world, answered, capsys, monkeypatch, terminal):
    """From a pipe and on a terminal, which shows where to type; empty lines are left out."""
    prompts = list(answered)[:3]
    stdin = io.StringIO("\n".join([prompts[0], "", " ", prompts[1], prompts[2]]))
    stdin.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdin", stdin)
    evaluate.main(argv(world))
    printed = capsys.readouterr().out
    assert printed.count("> ") == 6 * terminal  # 5 lines, and the end
    assert printed.replace("> ", "") == "".join(answered[prompt][0] for prompt in prompts)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["Hi", "--max_new_tokens", 5000], "has 2048 positions, .* have 50.. tokens; lower one of"),
        (["Hi", "--temperature", 0, "--samples", 2], "all --samples 2 of a prompt are the same"),
        (["Hi", "--top_p", 2], "--top_p 2 is a probability"),
    ],
)
def test_what_is_refused(world, flags, message):
    with pytest.raises(RunError, match=message):
        evaluate.main(argv(world, *flags))


def test_several_processes_are_refused(world):
    outcome = run_ranks(2, script, argv(world, "Hi"))
    assert outcome.codes == [1, 1] and "start it without torchrun" in outcome.stderr
