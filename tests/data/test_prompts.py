"""python -m pytest tests/data/test_prompts.py"""

import pytest
from stores import write

from nanoalign.data.prompts import Written, prompt_key, read_answers, read_prompts
from nanoalign.errors import RunError

HI = [{"role": "user", "content": "Hi"}]
DIALOGUE = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "p"}, "p"),
        ({"prompt": HI}, HI),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p"),
        ({"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}, DIALOGUE),
        ({"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}, "p"),
        ({"prompt": "p", "completion": "c", "label": True}, "p"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}, "p"),
        ({"prompt": "p", "answer": ""}, "p"),
    ],
)
def test_the_prompt_of_a_record(tmp_path, record, prompt):
    (found,) = read_prompts([f"mine={write(tmp_path / 'a.jsonl', record)}"])
    assert (found.prompt, found.name, found.subset) == (prompt, "mine:1", "mine")
    assert found.responses == () and found.pairs == ()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "p"}, "unknown keys ['question']; the nearest format is question"),
        ({"chosen": "c"}, "give both 'chosen' and 'rejected'"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "the prompt must be text"),
        ({"prompt": [{"role": "user"}]}, "expected {'role': text, 'content': text}"),
        (["p"], "expected a JSON object, found list"),
    ],
)
def test_a_record_without_a_prompt_is_an_error_with_its_line(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", {"prompt": "p"}, record)
    with pytest.raises(RunError) as error:
        read_prompts([path])
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


SAMPLED = {"prompt": "p", "answer": "a", "ended": True, "tokenizer": "t", "token_ids": [1, 2]}


def test_sampled_tokens_of_answers_are_read_where_a_record_has_them(tmp_path):
    """An answers.jsonl has the answers of both roles; other files do not say whose theirs are."""
    path = write(
        tmp_path / "a.jsonl",
        SAMPLED | {"side": "policy"},
        SAMPLED | {"side": "baseline", "answer": "b", "ended": False},
        SAMPLED | {"side": "policy", "answer": "c", "token_ids": None, "tokenizer": None},
        {"prompt": "p", "answer": "d", "side": "left", "ended": "yes"},
    )
    _, answers = read_answers(path, "policy")
    assert answers == {"p": [Written("a", True, "t", [1, 2]), Written("c"), Written("d")]}
    assert [each.answer for each in read_answers(path)[1]["p"]] == ["a", "b", "c", "d"]
    path = write(tmp_path / "b.jsonl", SAMPLED | {"side": "policy"})
    with pytest.raises(RunError, match="b.jsonl: has no answers of the baseline; give others"):
        read_answers(path, "baseline")


def test_answers_are_grouped_by_prompt_in_their_order(tmp_path):
    """An answer may be empty; messages are a prompt too; programs name an answer differently."""
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "p", "answer": "1"},
        {"prompt": HI, "response": "2"},
        {"prompt": "p", "response": ""},
        {"prompt": "p", "completion": "3"},
        {"prompt": "p", "output": "4"},
    )
    prompts, answers = read_answers(path)
    texts = {key: [each.answer for each in own] for key, own in answers.items()}
    assert texts == {"p": ["1", "", "3", "4"], prompt_key(HI): ["2"]}
    assert [(record.prompt, record.name) for record in prompts] == [("p", "a:1"), (HI, "a:2")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p"}, "expected the key 'prompt' and exactly one of 'response', 'answer', 'co"),
        (3, "'completion', 'output', found []"),
        ({"answer": "a"}, "'completion', 'output', found ['answer']"),
        ({"prompt": "p", "answer": "42", "response": "It."}, "found ['answer', 'prompt', 'resp"),
        ({"prompt": "p", "answer": None}, "the answer must be text"),
        ({"prompt": "p", "response": "\ud800"}, "the response has half a character"),
        ({"prompt": "", "answer": "a"}, "the prompt is empty"),
        (SAMPLED | {"token_ids": [1, -2]}, "token_ids must be a list of token ids, found [1, -2]"),
        (SAMPLED | {"ended": "no"}, "ended must be true, false or null, found no"),
    ],
)
def test_a_wrong_answer_is_an_error_with_its_line(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", record)
    with pytest.raises(RunError) as error:
        read_answers(path)
    assert str(error.value).startswith(f"{path}:1: ") and message in str(error.value)
