"""python -m pytest tests/evaluation/test_leaderboards.py

Answers and verdicts in the formats of AlpacaEval and Arena-Hard.
"""

import json
import math
from pathlib import Path

import pytest
from evaluations import evaluated, files_argv, policy_argv, write_jsonl, write_policies

from nanoalign.data.prompts import read_answers
from nanoalign.errors import RunError
from nanoalign.evaluation.comparison import Compared, Judged
from nanoalign.evaluation.leaderboards import (
    read_uids,
    read_verdicts,
    verdict_figures,
    write_answers,
)

NAMES = {"policy": "ours", "baseline": "theirs"}
ARENA_HARD = (
    "<|User Prompt|>\n{}\n\n<|The Start of Assistant A's Answer|>\n{}\n<|The End of Assistant A's "
    "Answer|>\n\n<|The Start of Assistant B's Answer|>\n{}\n<|The End of Assistant B's Answer|>"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer):
    return write_policies(tmp_path_factory.mktemp("policies"), llama_folder, tokenizer)


def compared(prompt, policy: dict[str, float], baseline: dict[str, float]) -> Compared:
    """Answers with their rewards."""
    sides = [
        tuple(Judged(text, score, 5, None, 1.0) for text, score in own.items())
        for own in (policy, baseline)
    ]
    return Compared("1", prompt, *sides)


def annotation(prompt: str, first: str, second: str, preference: object) -> dict:
    outputs = {"output_1": first, "generator_1": "x", "output_2": second, "generator_2": "y"}
    return {"instruction": prompt, **outputs, "preference": preference}


def judgment(prompt: str, baseline: str, model: str, *scores: str | None) -> dict:
    """A line of model_judgment: in the first game A is the baseline, in the second the model."""
    games = [
        {
            "score": score,
            "judgment": {"answer": "..."},
            "prompt": [
                {"role": "system", "content": "Judge."},
                {"role": "user", "content": ARENA_HARD.format(prompt, *answers)},
            ],
        }
        for score, answers in zip(scores, ((baseline, model), (model, baseline)), strict=True)
    ]
    return {"uid": "1", "judge": "j", "model": "m", "baseline": "b", "games": games}


CASES = [
    compared("p", {"a": 1.0}, {"b": 0.0}),
    compared("q", {"c": 1.0}, {"d": 2.0}),
    compared([{"role": "user", "content": "r"}], {"e": 3.0}, {"f": 3.0}),
    compared("s", {"g": 1.0, "h": -1.0}, {"i": 0.0}),
]


def test_verdicts_of_alpaca_eval_by_hand(tmp_path, capsys):
    """Shares of the policy 0.75, 0.9 (places changed), 0 and 0.5 (0 is the old name of a tie).

    Rewards: a win, a loss, a tie, a win. Of the three that are no ties they agree with one and,
    where they tie, a half.
    """
    lines = [
        annotation("p", "b", "a", 1.75),
        annotation("q", "c", "d", 1.1),
        annotation("r", "f", "e", 1),
        annotation("s", "i", "g", 0),
        annotation("s", "i", "another", 2),
        annotation("s", "i", "h", None),
        annotation("s", "i", "h", math.nan),
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(lines))
    found = verdict_figures(CASES, read_verdicts(str(path)))
    assert "5; 2 records without one" in capsys.readouterr().out
    assert (found["verdicts_pairs"], found["verdicts_elsewhere"]) == (4, 1)
    assert found["verdicts_win_rate"] == pytest.approx((0.75 + 0.9 + 0 + 0.5) / 4)
    assert found["verdicts_reward_win_rate"] == pytest.approx(2.5 / 4)
    assert found["verdicts_agreement"] == pytest.approx(1.5 / 3)
    low, high = (found[f"verdicts_agreement_{end}"] for end in ("low", "high"))
    assert 0 < low < 0.5 < high < 1


def test_of_two_equal_answers_the_second_is_the_policys(tmp_path):
    """As AlpacaEval's leaderboard counts: output_2 is the model's."""
    path = write_jsonl(tmp_path / "annotations.jsonl", [annotation("p", "x", "x", 1.75)])
    equal = compared("p", {"x": 1.0}, {"x": 1.0})
    assert verdict_figures([equal], read_verdicts(str(path)))["verdicts_win_rate"] == 0.75


def test_verdicts_of_arena_hard_as_its_leaderboard_counts_them(tmp_path):
    """Its table of labels: of both games a list of 1, 0 and 1/2, three times where it is strong."""
    labels = [("B>>A", "A>B"), ("A=B", "B>A"), ("A>B", "A<<B"), ("A<B", "B<A")]
    for_first = {"B>>A": [0] * 3, "A>B": [1], "A=B": [0.5], "B>A": [0], "A<<B": [0] * 3}
    for_first |= {"A<B": [0], "B<A": [1]}
    pairs = [("p", "b", "a"), ("q", "d", "c"), ("r", "f", "e"), ("s", "i", "h")]
    lines = [judgment(*pair, *own) for pair, own in zip(pairs, labels, strict=True)]
    lines.append(judgment("s", "i", "g", None, "A>B"))
    votes = [
        vote
        for first, second in labels
        for vote in (*for_first[second], *(1 - x for x in for_first[first]))
    ]
    found = verdict_figures(CASES, read_verdicts(str(write_jsonl(tmp_path / "j.jsonl", lines))))
    assert found["verdicts_win_rate"] == pytest.approx(sum(votes) / len(votes))
    # The policy's share of p is 1, of q 1/4, of r 0, of s 1: the rewards win, lose, tie, lose.
    assert found["verdicts_agreement"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (annotation("p", "b", "a", 2.5), r"preference is 2.5; expected a number from 1 to 2"),
        (annotation("p", "b", "a", True), r"preference is True"),
        (annotation("p", "b", "a", "1"), r"preference is '1'"),
        (annotation("p", "b", None, 1), r"must be text"),
        ({"prompt": "p"}, r"expected instruction, output_1.*found \['prompt'\]"),
        (judgment("p", "b", "a", "A>A", "A>B"), r"the score is 'A>A'"),
        ({"games": [{"score": "A>B"}] * 2}, r"a game without the prompt of its judge"),
        ({"games": []}, r"games must be a list of two"),
        ({"games": ["A>B", "A>B"]}, r"games must be a list of two"),
    ],
)
def test_a_wrong_verdict_is_an_error_with_its_line(line, message, tmp_path):
    good = annotation("p", "b", "a", 2)
    path = write_jsonl(tmp_path / "verdicts.jsonl", [good, line])
    with pytest.raises(RunError, match=rf"verdicts\.jsonl:2: .*{message}"):
        read_verdicts(str(path))


def test_verdicts_on_other_answers_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "v.jsonl", [annotation("p", "b", "x", 2)])
    with pytest.raises(RunError, match="none of the 1 verdicts .* give the judged answers as"):
        verdict_figures(CASES, read_verdicts(str(path)))


def texts_in(path: Path) -> dict[str, list[str]]:
    """The answers that read_answers finds in a file, by prompt."""
    _, answers = read_answers(str(path))
    return {prompt: [answer.answer for answer in own] for prompt, own in answers.items()}


def test_answers_come_back_as_they_were_written(tmp_path):
    """Of Arena-Hard the first answer to each prompt; without uids its files are not written."""
    questions = [{"uid": f"u{p}", "category": "x", "prompt": p} for p in "pqrs"]
    uids = read_uids([str(write_jsonl(tmp_path / "question.jsonl", questions))])
    (tmp_path / "a").mkdir()
    write_answers(tmp_path / "a", CASES, NAMES, uids)
    alpaca = json.loads((tmp_path / "a/alpaca_eval/policy.json").read_text())
    assert alpaca[0] == {"instruction": "p", "output": "a", "generator": "ours"}
    arena = [json.loads(line) for line in (tmp_path / "a/arena_hard/baseline.jsonl").open()]
    assert [(x["uid"], x["model"], x["messages"][-1]) for x in arena][:2] == [
        ("up", "theirs", {"role": "assistant", "content": {"answer": "b"}}),
        ("uq", "theirs", {"role": "assistant", "content": {"answer": "d"}}),
    ]
    assert texts_in(tmp_path / "a/alpaca_eval/policy.json") == {
        "p": ["a"],
        "q": ["c"],
        "r": ["e"],
        "s": ["g", "h"],
    }
    assert texts_in(tmp_path / "a/arena_hard/policy.jsonl") == {
        "p": ["a"],
        "q": ["c"],
        "r": ["e"],
        "s": ["g"],
    }
    assert read_uids([str(tmp_path / "a/arena_hard/policy.jsonl")]) == uids
    (tmp_path / "b").mkdir()
    write_answers(tmp_path / "b", CASES, NAMES, {"p": "1"})
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["alpaca_eval"]


def test_an_answer_of_arena_hard_without_one_is_an_error(tmp_path):
    user = {"role": "user", "content": "p"}
    for messages in ([user], [user, user], "p", [user, {"role": "assistant", "content": "a"}]):
        path = write_jsonl(tmp_path / "m.jsonl", [{"uid": "1", "messages": messages}])
        with pytest.raises(RunError, match=r"m\.jsonl:1: messages must end with"):
            read_answers(str(path))


def test_an_evaluation_with_verdicts(world):
    """Answers of AlpacaEval's files, which it writes again; a judge that prefers the policy's."""
    prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").open()][:-1]
    for name in "xy":
        outputs = [
            {"instruction": p, "output": f"{name}{n}", "generator": name}
            for n, p in enumerate(prompts)
        ]
        (world / f"{name}.json").write_text(json.dumps(outputs))
    lines = [annotation(p, f"y{n}", f"x{n}", 2.0) for n, p in enumerate(prompts)]
    (world / "v.json").write_text(json.dumps(lines))
    argv = files_argv(world, "verdicts", world / "x.json", world / "y.json")
    _, figures, printed = evaluated([*argv, "--verdicts", world / "v.json"])
    assert figures["verdicts_win_rate"] == 1.0
    assert figures["verdicts_agreement"] == pytest.approx(figures["win_rate"])
    assert "By the verdicts the policy wins 100.0%" in printed
    again = json.loads((world / "verdicts/alpaca_eval/policy.json").read_text())
    assert [line["output"] for line in again] == [f"x{n}" for n in range(len(prompts))]
    argv = policy_argv(world, "uids", "--policy_answers", world / "x.json")
    with pytest.raises(AssertionError, match="--retention compares two models of one vocabulary"):
        evaluated([*argv, "--retention", world / "prompts.jsonl"])
