"""python -m pytest tests/evaluation/test_retention.py

The change of log-likelihoods, against transformers' own forward.
"""

import json

import pytest
import torch
from evaluations import evaluated, policy_argv, write_jsonl, write_policies
from transformers import AutoModelForCausalLM

from nanoalign.data.formats import formats
from nanoalign.errors import RunError
from nanoalign.evaluation.diagnosis import retention_note
from nanoalign.evaluation.retention import chosen_alone, read_chosen, rows_of_texts
from nanoalign.records import parse


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer):
    return write_policies(tmp_path_factory.mktemp("policies"), llama_folder, tokenizer)


def mean_logp(folder, sequences: list[tuple[list[int], list[int]]]) -> float:
    """The log-probability per token of responses to prompts, each a sequence by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    total, count = 0.0, 0
    for prompt, response in sequences:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        total += logps[len(prompt) - 1 :].sum().item()
        count += len(response)
    return total / count


def test_the_change_is_that_of_transformers(world, tokenizer):
    """Of chosen responses with EOS behind raw prompts, and of whole texts behind their BOS."""
    pairs = [
        {"prompt": f"Say {n}.", "chosen": f"It is {'n' * n}.", "rejected": "No."} for n in range(6)
    ]
    texts = ["A first text.", "Another one, which is longer.", "x"]
    write_jsonl(world / "pairs.jsonl", pairs)
    write_jsonl(world / "texts.jsonl", [{"text": text} for text in texts])
    argv = policy_argv(world, "retention", "--retention", world / "texts.jsonl")
    argv[argv.index("--data") + 1] = world / "pairs.jsonl"
    _, figures, printed = evaluated(argv)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins_with_bos = tokenizer("a")["input_ids"][0] == bos
    chosen = [([bos] * begins_with_bos + ids(x["prompt"]), [*ids(x["chosen"]), eos]) for x in pairs]
    whole = [[bos] * begins_with_bos + ids(text) for text in texts]
    whole = [(tokens[:1], tokens[1:]) for tokens in whole if len(tokens) > 1]
    for name, sequences in (("chosen_logps", chosen), ("text_logps", whole)):
        policy, baseline = (mean_logp(world / role, sequences) for role in ("policy", "baseline"))
        assert figures[f"{name}_policy"] == pytest.approx(policy, abs=1e-4)
        assert figures[f"{name}_baseline"] == pytest.approx(baseline, abs=1e-4)
        assert figures[f"{name}_change"] == pytest.approx(policy - baseline, abs=1e-4)
        assert figures[f"{name}_tokens"] == sum(len(response) for _, response in sequences)
        assert figures[f"{name}_change_low"] < policy - baseline < figures[f"{name}_change_high"]
    assert retention_note(figures) in printed
    argv[argv.index("--policy") + 1], argv[argv.index("--out") + 1] = (
        world / "baseline",
        world / "s",
    )
    _, figures, _ = evaluated(argv)
    assert figures["chosen_logps_change"] == figures["text_logps_change"] == 0


def test_prompts_alone_have_no_chosen_responses(world):
    _, figures, _ = evaluated(policy_argv(world, "prompts"))
    assert not any(name.startswith("chosen_logps") for name in figures)
    assert read_chosen([str(world / "prompts.jsonl")]) == []


def test_chosen_responses_are_those_that_no_other_beats(tmp_path):
    """Of three ranked ones two are the best; a demonstration has no pair."""
    line = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [2, 1, 2]}
    record = chosen_alone(parse(json.dumps(line), "x:1", formats())[1])
    assert (record.responses, record.pairs, record.extra) == (["a", "c"], (), {})
    line = {"prompt": "p", "completion": "a"}
    _, record = parse(json.dumps(line), "x:1", formats(unpaired="sft"))
    assert chosen_alone(record).responses == []
    path = write_jsonl(tmp_path / "renamed.jsonl", [{"q": "p", "good": "a", "bad": "b"}])
    keys = ["prompt=q", "chosen=good", "rejected=bad"]
    assert [x.responses for x in read_chosen([str(path)], keys)] == [["a"]]


def test_prompts_may_stand_between_pairs_of_several_formats(tmp_path):
    """evaluate.py policy reads the prompts of all of them."""
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    ranked = {"prompt": "q", "responses": ["c", "d"], "scores": [2, 1]}
    for lines in ([pair, {"prompt": "r"}, ranked], [{"prompt": "r"}, pair, ranked]):
        path = write_jsonl(tmp_path / "data.jsonl", lines)
        assert [x.responses for x in read_chosen([str(path)])] == [["a"], ["c"]]


def test_chosen_responses_of_all_formats_of_pairs_are_read(tmp_path):
    lines = [
        {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -2},
        {"context": [{"role": "user", "content": "p"}], "response1": "a", "response2": "b",
         "overall_preference": -1},
        {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        {"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
    ]  # fmt: skip
    for record in lines:
        path = write_jsonl(tmp_path / "data.jsonl", [record])
        assert [each.responses for each in read_chosen([str(path)])] == [["a"]], record


def test_text_that_can_not_be_read_is_an_error(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "abc"}, {"prompt": "p"}])
    with pytest.raises(
        RunError, match=r"t\.jsonl:2: --retention needs records with the key 'text'"
    ):
        rows_of_texts(str(path), tokenizer, 10)
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": ""}])
    with pytest.raises(RunError, match=r"t\.jsonl:1: the text is empty"):
        rows_of_texts(str(path), tokenizer, 10)
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "abcdef"}])
    (row,) = rows_of_texts(str(path), tokenizer, 4)
    assert len(row.prompt) + len(row.responses[0]) == 4


def test_one_text_has_no_interval():
    figures = {"text_logps_change": -0.5, "text_logps_policy": -2.5, "text_logps_baseline": -2.0}
    figures |= {"text_logps_change_low": None, "text_logps_change_high": None}
    assert "baseline: -0.500 a token of the texts of --retention, from -2.000 to -2.500." in (
        retention_note(figures)
    )
    assert retention_note({}) is None
