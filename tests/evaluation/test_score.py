"""python -m pytest tests/evaluation/test_score.py"""

import json
from pathlib import Path

import pytest
import torch
from evaluations import script, write_jsonl, write_reward_model
from processes import run_ranks
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import evaluate
from nanoalign.errors import RunError
from nanoalign.evaluation.candidates import kept, pairs_of, parse_keep, read_candidates

PAIR = {"prompt": "Say it.", "chosen": "It is nine.", "rejected": "No."}
RANKED = {"prompt": "Count.", "responses": ["One.", "One, two."], "scores": [2, 1]}
ANSWERS = [{"prompt": "Say it.", "answer": "Maybe."}, {"prompt": "Say it.", "answer": "No."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory, llama_folder, tokenizer) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("score") / "rm", llama_folder, tokenizer)


@pytest.fixture
def sources(tmp_path) -> list[str]:
    """Three formats; two of them have the same prompt, and one of its answers twice."""
    parts = {"pairs": [PAIR], "ranked": [RANKED], "answers": ANSWERS}
    return [str(write_jsonl(tmp_path / f"{name}.jsonl", own)) for name, own in parts.items()]


def scored(model: Path, out: Path, *flags: str, ranks: int = 1) -> list[dict]:
    argv = ["score", "--model", str(model), "--out", str(out), *flags]
    outcome = run_ranks(ranks, script, argv)
    assert outcome.codes == [0] * ranks, outcome.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rewards_are_those_of_each_text_alone(model, tmp_path, sources):
    """The oracle is the model as transformers loads it, on one text at a time; on 1 and 2 ranks."""
    lines = scored(model, tmp_path / "out.jsonl", "--data", *sources)
    expected = {"Say it.": ["It is nine.", "No.", "Maybe."], "Count.": ["One.", "One, two."]}
    texts = [(line["prompt"], line["completion"]) for line in lines]
    assert texts == [(prompt, text) for prompt, own in expected.items() for text in own]
    plain = AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for line in lines:
        ids = tokenizer(line["prompt"])["input_ids"]
        ids += tokenizer(line["completion"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            (reward,) = plain(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits[0].tolist()
        assert line["reward"] == pytest.approx(reward, abs=1e-5)
    again = scored(model, tmp_path / "ranks.jsonl", "--data", *sources, ranks=2)
    assert [line["reward"] for line in again] == pytest.approx([line["reward"] for line in lines])


def test_what_is_kept_and_paired_are_records_to_train_on(model, tmp_path, sources):
    everything = scored(model, tmp_path / "all.jsonl", "--data", *sources)
    flags = ["--data", *sources, "--keep", "best", "--pairs_out", str(tmp_path / "made.jsonl")]
    best = scored(model, tmp_path / "best.jsonl", *flags)
    pairs = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    for prompt, one, pair in zip(("Say it.", "Count."), best, pairs, strict=True):
        own = sorted(
            (line["reward"], line["completion"]) for line in everything if line["prompt"] == prompt
        )
        assert (one["reward"], one["completion"]) == own[-1]
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (prompt, own[-1][1], own[0][1])
        assert pair["margin"] == pytest.approx(own[-1][0] - own[0][0])
    found = read_candidates([str(tmp_path / "best.jsonl"), str(tmp_path / "made.jsonl")])
    assert [[*each.responses] for each in found] == [
        [pair["chosen"], pair["rejected"]] for pair in pairs
    ]


def line(reward: float, text: str) -> dict:
    return {"prompt": "p", "completion": text, "reward": reward}


def test_keep_and_pairs_by_hand():
    """Of equal rewards the first is the best; equal rewards alone make no pair."""
    lines = [[line(1, "a"), line(3, "b"), line(3, "c"), line(0, "d")], [line(2, "e"), line(2, "f")]]
    assert [each["completion"] for each in kept(lines, "best")] == ["b", "e"]
    assert [each["completion"] for each in kept(lines, 2.0)] == ["b", "c"]
    assert [each["completion"] for each in kept(lines, None)] == [*"abcdef"]
    assert pairs_of(lines) == [{"prompt": "p", "chosen": "b", "rejected": "d", "margin": 3}]
    assert [*map(parse_keep, (None, ["best"], ["above", "-1.5"]))] == [None, "best", -1.5]


def test_one_prompt_of_the_command_line(model, capsys, tmp_path, sources):
    """The rewards are those of the same texts in a file."""
    lines = scored(model, tmp_path / "out.jsonl", "--data", sources[0])
    texts = [line["completion"] for line in lines]
    argv = ["score", "--model", str(model), "--prompt", PAIR["prompt"], "--response", *texts]
    evaluate.main(argv)
    shown = [f"{line['reward']:9.4f}  {line['completion']}" for line in lines]
    assert capsys.readouterr().out.splitlines() == shown and len(shown) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give either --data, or --prompt and --response"),
        ("--prompt Hi", "--prompt and --response belong together"),
        ("--data tiny:test --out scores.json", "--out scores.json: give a file that ends with"),
        ("--data tiny:test --keep worst", "--keep worst: expected best, or above NUMBER"),
        ("--data tiny:test --keep above nan", "--keep above nan: expected best, or above NUMBER"),
        ("--data tiny:test --out a.jsonl --pairs_out ./a.jsonl", "are both a.jsonl; give two"),
    ],
)
def test_what_is_refused(model, flags, message):
    with pytest.raises(RunError, match=message):
        evaluate.main(["score", "--model", str(model), *flags.split()])


def test_a_file_that_exists_is_kept(model, tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", [PAIR])
    with pytest.raises(RunError, match="mine.jsonl exists; give another name, or remove it"):
        evaluate.main(["score", "--model", str(model), "--data", str(path), "--out", str(path)])
    assert json.loads(path.read_text()) == PAIR
