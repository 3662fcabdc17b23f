"""python -m pytest tests/data/test_messages.py messages, tools and system prompts of records"""

import json

import pytest
from stores import parsed, write

from nanoalign.data.prompts import prompt_key, prompt_text, read_answers, read_prompts
from nanoalign.data.table_files import without_null
from nanoalign.errors import RunError

HI, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", "Hi"), ("assistant", "yes"), ("assistant", "no"))
)
BE = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
FOUND = {"role": "tool", "content": "42", "name": "look"}


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        {"prompt": [HI], "chosen": [YES], "rejected": [NO]},
        {"prompt": json.dumps([HI]), "chosen": "yes", "rejected": "no"},
        {"prompt": json.dumps([HI]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])},
        {"chosen": json.dumps([HI, YES], indent=1), "rejected": json.dumps([HI, NO])},
        {"prompt": [HI], "chosen": YES, "rejected": [NO]},
        {"prompt": None, "chosen": [HI, YES], "rejected": [HI, NO]},
        {"prompt": [], "chosen": [HI, YES], "rejected": [HI, NO]},
        {"prompt": "Hi", "chosen": [HI, YES], "rejected": [HI, NO]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}],
         "chosen": "yes", "rejected": "no"},
        {"prompt": "Hi", "responses": [[NO], YES], "scores": [1, 2]},
        {"prompt": json.dumps([HI]), "response_0": "yes", "response_1": "no",
         "better_response_id": 0},
    ],
)  # fmt: skip
def test_messages_in_all_their_forms(record):
    """Also as JSON text, of one message, and with parts of text."""
    found = parsed(record)
    assert found.prompt in ("Hi", [HI]) and found.responses == ("yes", "no")
    assert (found.answers, found.tools, found.notes) == ((), None, ())
    found = parsed(record | {"system": "Be brief."})
    assert found.prompt == [BE, HI] and found.responses == ("yes", "no")
    found = parsed(record | {"system": "", "tools": None})
    assert found.prompt in ("Hi", [HI]) and found.tools is None


@pytest.mark.parametrize(
    "record",
    [
        {"responses": ["no", json.dumps([YES])], "scores": [1, 2]},
        {"response_0": json.dumps([YES]), "response_1": "no", "better_response_id": 0},
        {"chosen": "yes", "rejected": json.dumps([NO])},
        {"chosen": [YES], "rejected": " " + json.dumps([NO])},
    ],
)
def test_a_response_may_be_json_text_whatever_the_others_are(record):
    found = parsed({"prompt": "Hi"} | record)
    assert found.prompt in ("Hi", [HI]) and found.responses == ("yes", "no")


def test_responses_of_several_preferences_may_be_json_text():
    record = {"prompt": "Hi", "response_0": json.dumps([NO]), "response_1": "yes"}
    labels = {"better_response_id": 1, "safer_response_id": 0}
    found = parsed(record | labels, preference=["better", "safer"])
    assert found.responses == ("yes", "no") and found.pairs == ((0, 1), (1, 0))


def test_text_that_is_json_of_something_else_stays_text():
    for text in ("[1]", "[", '[{"a": 1}]', "[]", '{"role": "user"}', "[x] [y]"):
        found = parsed(PAIR | {"prompt": text, "chosen": text})
        assert found.prompt == text and found.responses == (text, "no")
    for text in ("[1]", "[", '[{"role": "admin"}]', '[{"role": 1, "content": "x"}]'):
        found = parsed({"prompt": "Hi", "responses": [text, "no"], "scores": [2, 1]})
        assert found.responses == (text, "no")


def test_tools_calls_and_reasoning_are_kept():
    """Arguments as JSON text become objects, keys without a value are left out."""
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    calling = {"role": "assistant", "content": None, "reasoning": None, "tool_calls": [call]}
    thinking = YES | {"reasoning_content": "Well.", "tool_calls": []}
    empty = {"name": None, "tool_calls": None}
    record = {
        "prompt": [HI | empty, calling, FOUND],
        "chosen": [thinking],
        "rejected": [calling],
        "tools": json.dumps(TOOLS),
    }
    for each in (record, record | {"tools": TOOLS}):
        found = parsed(each)
        assert found.tools == TOOLS and found.prompt == [HI, CALLING, FOUND]
        assert found.answers == (YES | {"reasoning_content": "Well."}, CALLING)
        assert list(map(json.loads, found.responses)) == list(found.answers)
    flat = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": "{}"}]}
    found = parsed({"prompt": "Hi", "completion": [flat], "label": True}, unpaired="kto")
    assert found.answers[0]["tool_calls"] == [{"name": "look", "arguments": {}}]
    found = parsed({"prompt": "Hi", "responses": ["no", calling], "scores": [1, 2]})
    assert found.answers == (CALLING, NO) and found.responses[1] == "no"


def test_a_system_prompt_goes_before_the_turns_of_a_dialogue():
    begin = "\n\nHuman: Hi\n\nAssistant: yes\n\nHuman: Why\n\nAssistant:"
    record = {"chosen": begin + " a", "rejected": begin + " b", "system": "Be brief."}
    found = parsed(record)
    assert found.prompt == [BE, HI, YES, {"role": "user", "content": "Why"}]
    assert found.responses == ("a", "b")  # the space belongs to the header
    found = parsed(PAIR | {"prompt": [BE, HI], "system": "Be brief."})
    assert found.prompt == [BE, HI]


IMAGE = {"type": "image_url", "image_url": "x"}
BAD = {
    "two system prompts": (PAIR | {"prompt": [BE, HI], "system": "Be long."}, "different system"),
    "system of a list": (PAIR | {"system": [BE]}, "system prompt must be text"),
    "tools of text": (PAIR | {"tools": "look"}, "a list of JSON schemas, found 'look'"),
    "tools of names": (PAIR | {"tools": ["look"]}, "tools must be a list of JSON schemas"),
    "an image": (PAIR | {"prompt": [HI | {"content": [IMAGE]}]}, "part of type 'image_url'; only"),
    "calls of text": (PAIR | {"prompt": [YES | {"tool_calls": "look"}]}, "expected a list of obj"),
    "arguments of text": (PAIR | {"chosen": [YES | {"tool_calls": [
        {"function": {"name": "look", "arguments": "{it"}}]}], "rejected": [NO]},
        "arguments are no JSON"),
    "half a character": (PAIR | {"prompt": [YES | {"thinking": "\ud800"}]}, "lone surrogate"),
    "several turns": ({"prompt": [HI], "chosen": [CALLING, FOUND, YES], "rejected": [NO]},
                      "differ before their last message: .* a record of each turn"),
    "ends with a tool": ({"prompt": [HI], "chosen": [CALLING, FOUND], "rejected": [NO]},
                         "chosen ends with a message of 'tool'"),
    "two answers": ({"prompt": "Hi", "responses": ["a", [YES, YES]], "scores": [1, 2]},
                    "exactly one message with role 'assistant'; found 2 messages"),
    "JSON of a user": (PAIR | {"chosen": json.dumps([HI])},
                       "the chosen must be text or exactly .*; found role 'user'"),
    "a message without a prompt": ({"chosen": YES, "rejected": NO},
                                   "'prompt' is missing: .* found dict and dict"),
    "JSON of one side": ({"chosen": json.dumps([HI, YES]), "rejected": "no"},
                         "'prompt' is missing: .* found list and str"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_be_read_is_an_error_with_file_and_line(name):
    record, message = BAD[name]
    with pytest.raises(RunError, match=rf"a\.jsonl:1: .*{message}"):
        parsed(record)


def test_turns_that_both_replies_share_belong_to_the_prompt():
    record = {"prompt": [HI], "chosen": [CALLING, FOUND, YES], "rejected": [CALLING, FOUND, NO]}
    found = parsed(record)
    assert found.prompt == [HI, CALLING, FOUND] and found.responses == ("yes", "no")


def test_a_page_shows_what_a_message_has_beside_its_content():
    assert prompt_text("Hi", "\n") == "Hi"
    shown = f'user: Hi|assistant:  {{"tool_calls": {json.dumps([CALL])}}}'
    assert prompt_text([HI, CALLING], "|") == shown


def test_prompts_of_an_evaluation_have_their_system_prompt_and_tools(tmp_path):
    """An answer to the same text beside other tools is an answer to another prompt."""
    context = {"system": "Be brief.", "tools": TOOLS}
    records = [{"prompt": text} | context for text in ("Hi", json.dumps([HI]))]
    for found in read_prompts([write(tmp_path / "a.jsonl", *records, PAIR | context)]):
        assert (found.prompt, found.tools, found.responses) == ([BE, HI], TOOLS, ())
    answers = [
        {"prompt": "Hi", "answer": "x"} | each for each in ({}, context, {"system": "Be brief."})
    ]
    prompts, by_key = read_answers(write(tmp_path / "b.jsonl", *answers))
    found = [(each.prompt, each.tools) for each in prompts]
    assert found == [("Hi", None), ([BE, HI], TOOLS), ([BE, HI], None)]
    assert list(by_key) == [prompt_key(each.prompt, each.tools) for each in prompts]
    assert len(by_key) == 3


HI_THERE = HI | {"content": "Hi\n"}


@pytest.mark.parametrize(
    ("prompt", "before", "expected"),
    [
        ("Hi ", [HI], [HI]),
        ([HI_THERE], [HI], [HI]),
        ([BE, HI], [HI], [BE, HI]),
        ([BE, HI_THERE], [HI], [BE, HI]),
        ([BE, HI], [BE, HI], [BE, HI]),
        ([HI], [YES, HI], [YES, HI]),  # the last turn of the messages
        ([BE], [HI], [BE, HI]),
        ([NO], [HI], [NO, HI]),
    ],
)
def test_a_prompt_beside_messages_is_there_once(prompt, before, expected):
    """Whatever white space is around it, and with its system message."""
    found = parsed({"prompt": prompt, "chosen": [*before, YES], "rejected": [*before, NO]})
    assert found.prompt == expected and found.responses == ("yes", "no")


def test_null_keys_of_a_table_are_left_out():
    """As in parquet: Dataset.to_json gives all tools and calls the keys of all others."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = {"function": {"name": "look", "arguments": {"at": "it", "left": None}}}
    nulls = {"name": "look", "parameters": {"type": "object", "properties": None}}
    record = PAIR | {
        "tools": [{"type": "function", "function": nulls}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call], "name": None}],
        "rejected": [{"role": "assistant", "content": "", "tool_calls": None, "thinking": "a"}],
    }
    found = parsed(record)
    assert found.tools == [tool]
    assert found.answers[0]["tool_calls"] == [
        {"function": {"name": "look", "arguments": {"at": "it"}}}
    ]
    assert found.answers[1] == {"role": "assistant", "content": "", "thinking": "a"}


def test_null_is_left_out_as_by_trl_and_stays_in_json_text():
    """The first value is what trl.trainer.utils.remove_none_values returns, of TRL 1.16."""
    values = {"a": None, "b": [1, None, {"c": None, "d": [{}]}], "e": {"f": None}, "g": 0}
    assert without_null(values) == {"b": [1, None, {"d": [{}]}], "e": {}, "g": 0}
    call = {"function": {"name": "look", "arguments": '{"at": null}'}}
    side = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    (answer, _) = parsed(PAIR | {"chosen": side}).answers
    assert answer["tool_calls"][0]["function"]["arguments"] == {"at": None}


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_error_of_an_answer_names_its_key(side):
    with pytest.raises(RunError, match=f"{side} has .*'x': 1"):
        parsed(PAIR | {side: {"x": 1}})
