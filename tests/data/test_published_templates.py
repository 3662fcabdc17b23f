"""python -m pytest tests/data/test_published_templates.py

The chat templates that TRL ships, each on a byte-level tokenizer whose EOS is the end of the
template's turns: rows have the tokens of transformers' rendering of the whole dialogue, or an error
says what is not shown.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from jinja2 import TemplateError

from nanoalign.data import templates as data_templates
from nanoalign.data.chat_template import EARLIER_REASONING
from nanoalign.data.formats import formats
from nanoalign.data.templates import (
    AS_TEXT,
    encode_records,
    end_of_calls,
    frame_of_answers,
    tokenizer_name,
)
from nanoalign.errors import RunError
from nanoalign.evaluation.answers import whole_tokens
from nanoalign.evaluation.generation import Answer, decode_continuation
from nanoalign.evaluation.scoring import encode_answers
from nanoalign.records import Record, parse
from nanoalign.rewards.published import Published

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
IMAGES = {"idefics3", "llava_next", "smolvlm"}  # of parts: no text of ours is shown


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text} | more


def call(zone: str, number: int = 0) -> dict:
    function = {"name": "clock", "arguments": {"zone": zone}}
    return {"type": "function", "id": f"abcdefgh{number}", "function": function}


PARAMETERS = {"type": "object", "properties": {"zone": {"type": "string", "description": "Of it."}}}
CLOCK = {"name": "clock", "description": "Reads a clock.", "parameters": PARAMETERS}
TOOLS = {"tools": [{"type": "function", "function": CLOCK}]}
ASKED, NINE = [user("How late is it?")], assistant("It is nine.")
GREETED = [user("Hello there."), assistant("Good day.")]
BRIEF, PIRATE = ({"role": "system", "content": c} for c in ("Be very brief.", "Be a pirate."))
LOOKED = [
    assistant("", tool_calls=[call("Oslo")]),
    {"role": "tool", "content": "21:00 sharp", "name": "clock", "tool_call_id": "abcdefgh0"},
]
TWO = assistant("Let me look.", tool_calls=[call("Oslo"), call("Rome", 1)])
THOUGHT = "The hand points up."

# case -> (prompt, chosen, further keys, how many of the 72 templates show it at least). {end} is
# the token that ends a turn, {eos} the tokenizer's EOS.
CASES = {
    "one turn": (ASKED, NINE, {}, 54),
    "several turns": (GREETED + ASKED, NINE, {}, 54),
    "system": ([BRIEF, *ASKED], NINE, {}, 52),
    "system in the middle": ([*GREETED, PIRATE, *ASKED], NINE, {}, 36),
    "tool call": (ASKED, LOOKED[0], TOOLS, 36),
    "tool result": (ASKED + LOOKED, NINE, TOOLS, 36),
    "text and two calls": (ASKED, TWO, TOOLS, 30),
    "reasoning_content": (ASKED, NINE | {"reasoning_content": THOUGHT}, {}, 20),
    "reasoning": (ASKED, NINE | {"reasoning": THOUGHT}, {}, 20),
    "thinking": (ASKED, NINE | {"thinking": THOUGHT}, {}, 20),
    "earlier reasoning": ([ASKED[0], NINE | {"reasoning_content": THOUGHT}, *ASKED], NINE, {}, 22),
    "<think> in the content": (ASKED, assistant(f"<think>\n{THOUGHT}\n</think>\n\nNine."), {}, 61),
    "</think> alone": (ASKED, assistant(f"{THOUGHT}\n</think>\n\nNine."), {}, 52),
    "EOS at the end": (ASKED, assistant("It is nine.{eos}"), {}, 54),
    "end of turn at the end": (ASKED, assistant("It is nine.{end}"), {}, 54),
    "white space": ([user("  How late is it? \n")], assistant("  It is nine. \n"), {}, 54),
    "no user": ([BRIEF], NINE, {}, 38),
    "two users": ([GREETED[0], *ASKED], NINE, {}, 46),
    "prefill": ([*ASKED, assistant("It must be")], assistant(" nine."), {}, 50),
    "typed end of turn": ([user("What is {end}?")], assistant("It is {end} you see."), {}, 54),
}


def special_tokens(text: str) -> list[str]:
    return re.findall(r"<\|?[^<>\s'\"{}/]+\|?>|\[/?[A-Z_]+\]", text)


def tokenizer_of(source: str):
    """(a tokenizer with a chat template, the token that ends its turns)."""
    parts = [user("Q?"), assistant("XYZZY")]
    try:
        text = byte_tokenizer(chat_template=source).apply_chat_template(parts, tokenize=False)
        assert "XYZZY" in text
    except (AssertionError, TemplateError):  # of images: it wants lists of parts
        parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in parts]
        text = byte_tokenizer(chat_template=source).apply_chat_template(parts, tokenize=False)
    ends = special_tokens(text.rpartition("XYZZY")[2])
    tokenizer = byte_tokenizer(chat_template=source, eos_token=ends[-1] if ends else "<eos>")
    known = {"<think>", tokenizer.eos_token, "<eos>", "<bos>", "<pad>"}
    kinds = r"<\||<｜|<(start|end)_of|\[|<\S+_?(turn|token)"
    more = [each for each in special_tokens(source) if re.match(kinds, each) and each not in known]
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(more))})
    return tokenizer, ends[0] if ends else ""


def filled(value: object, **names: str) -> object:
    """A copy of a value whose texts have these values in place of {names}."""
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace("{" + name + "}", text)
        return value
    if isinstance(value, list):
        return [filled(each, **names) for each in value]
    if isinstance(value, dict):
        return {key: filled(each, **names) for key, each in value.items()}
    return value


def tokens_of(messages: list[dict], tools: list | None, tokenizer) -> list[int]:
    """Those of transformers' text of a whole dialogue, up to its EOS, which is there once."""
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    text = text.rstrip()
    while text.endswith(tokenizer.eos_token):
        text = text.removesuffix(tokenizer.eos_token)
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def rows_equal(tokenizer, end: str, case: str) -> bool:
    """Whether the row of a case has the tokens of transformers; False if it is refused."""
    prompt, chosen, more, _ = CASES[case]
    other = assistant(" no." if case == "prefill" else "Never mind.")
    if "think>" in case:  # the answers differ by their reasoning alone
        other = assistant(chosen["content"].replace(THOUGHT, "A guess."))
    record = {"prompt": prompt, "chosen": [chosen], "rejected": [other], **more}
    record = filled(record, eos=tokenizer.eos_token, end=end)
    try:
        _, parsed = parse(record, "test:1", formats())
        (row,) = encode_records([replace(parsed, name="test:1")], tokenizer, 4096, "auto")
    except RunError as error:
        said = r"does not show|the chat template fails|does not begin with its rendering"
        assert re.search(said, str(error)), error
        return False
    forgotten = EARLIER_REASONING in row.notes
    assert not forgotten or case == "earlier reasoning"
    answers = [record["chosen"][0], other]
    for answer, response in zip(answers, row.responses, strict=True):
        dialogue = [*record["prompt"], answer]
        if case == "prefill":
            *before, begun, last = dialogue
            dialogue = [*before, begun | {"content": begun["content"] + last["content"]}]
        if "at the end" in case:
            content = answer["content"].removesuffix(tokenizer.eos_token).removesuffix(end)
            dialogue[-1] = answer | {"content": content}
        expected = tokens_of(dialogue, record.get("tools"), tokenizer)
        assert [*row.prompt, *response] == expected
        text = re.sub(r"\s+", " ", tokenizer.decode(expected))
        assert (THOUGHT in text) == (THOUGHT in str(dialogue) and not forgotten)
    assert row.responses[0].tolist() != row.responses[1].tolist()
    return True


@pytest.fixture(scope="module")
def templates() -> dict:
    paths = sorted(FOLDER.glob("*.jinja"))
    return {path.stem: tokenizer_of(path.read_text(encoding="utf-8")) for path in paths}


@pytest.mark.parametrize("case", CASES)
def test_rows_have_the_tokens_of_transformers_or_are_refused(templates, case):
    wrong, shown = [], 0
    for name, (tokenizer, end) in templates.items():
        try:
            shown += rows_equal(tokenizer, end, case)
        except AssertionError as error:
            wrong.append(f"{name}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)
    assert len(templates) >= 72 and shown >= CASES[case][3], shown


@pytest.mark.parametrize("case", CASES)
def test_a_published_reward_model_gets_all_tokens_of_transformers(templates, case):
    """Also those behind EOS; where templates open reasoning before an answer, too."""
    shown = 0
    for name, (tokenizer, end) in templates.items():
        prompt, chosen, more, _ = CASES[case]
        record = {"prompt": prompt, "chosen": [chosen], "rejected": [assistant(" No.")], **more}
        record = filled(record, eos=tokenizer.eos_token, end=end)
        try:
            _, parsed = parse(record, "test:1", formats())
            (row,) = Published(tokenizer, None).encode([replace(parsed, name="test:1")], 4096)
        except RunError as error:
            assert re.search(r"does not show|the chat template fails", str(error)), error
            continue
        for (answer,), response in zip(
            (record["chosen"], record["rejected"]), row.responses, strict=True
        ):
            dialogue, tools = [*record["prompt"], answer], record.get("tools")
            if case == "prefill":
                *before, begun, last = dialogue
                dialogue = [*before, begun | {"content": begun["content"] + last["content"]}]
            if "at the end" in case:
                content = answer["content"].removesuffix(tokenizer.eos_token).removesuffix(end)
                dialogue[-1] = answer | {"content": content}
            options = {"tools": tools, "tokenize": True, "return_dict": False}
            expected = tokenizer.apply_chat_template(dialogue, **options)
            assert [*row.prompt, *response] == expected, name
        shown += 1
    assert shown >= CASES[case][3], shown


# --- answers that were sampled: tokens -> file -> tokens

SAMPLED = [
    "It is nine.",
    " It is nine. ",
    "<think>\nHm.\n</think>\n\nNine.",
    "I see</think>",
    "It i",
]


@pytest.mark.parametrize("text", SAMPLED)
def test_sampled_tokens_are_trained_on_as_they_were_sampled(templates, text, tmp_path):
    """Also with special tokens within, cut, and where no template would write them so."""
    for name, (tokenizer, end) in templates.items():
        if name.partition("_")[0] in IMAGES or name.startswith("llava"):
            continue
        tokens = tokenizer(text + end + text, add_special_tokens=False)["input_ids"]
        others = tokenizer("Never mind.", add_special_tokens=False)["input_ids"]
        record = {"prompt": ASKED, "chosen": text, "rejected": "Never mind."}
        record |= {"chosen_tokens": tokens, "rejected_tokens": others}
        record["tokenizer"] = tokenizer_name(tokenizer, "chat")
        _, parsed = parse(json.dumps(record), "test:1", formats())
        (row,) = encode_records([parsed], tokenizer, 4096, "auto")
        end_id = tokenizer.eos_token_id
        assert row.responses[0].tolist() == tokens + [end_id] * (tokens[-1] != end_id), name
        assert row.responses[1].tolist() == [*others, end_id]
        header = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
        assert row.prompt.tolist() == tokenizer(header, add_special_tokens=False)["input_ids"]


# case -> at how many of the templates that show it its text becomes its tokens again, at least
TEXT_CASES = {
    "one turn": 54,
    "system": 52,
    "tool call": 32,
    "text and two calls": 30,
    "reasoning_content": 11,
    "<think> in the content": 52,
    "</think> alone": 52,
}


@pytest.mark.parametrize("case", TEXT_CASES)
def test_the_text_of_a_sampled_answer_is_rendered_to_its_tokens(templates, case):
    """What the template adds before an answer is not added again.

    Where the text of a tool call or of reasoning becomes other tokens, as of templates whose answer
    has another header then, it is refused or counted.
    """
    same = 0
    for name, (tokenizer, end) in templates.items():
        prompt, chosen, more, _ = CASES[case]
        record = filled({"prompt": prompt, "chosen": [chosen], "rejected": [NINE], **more}, end=end)
        try:
            _, parsed = parse(record, "test:1", formats())
            (row,) = encode_records([replace(parsed, name="test:1")], tokenizer, 4096, "auto")
        except RunError:
            continue
        before, after = frame_of_answers(tokenizer, "chat")
        tokens = row.responses[0].tolist()
        text = decode_continuation(tokens[:-1], tokenizer, after).removeprefix(before)
        again = replace(parsed, responses=(text, "Never mind."), answers=(), name="test:1")
        again = replace(again, sampled=("another", [tokens, []]))
        try:
            (second,) = encode_records([again], tokenizer, 4096, "auto")
        except RunError as error:
            assert re.search("does not show|the chat template fails", str(error)), error
            continue
        if second.responses[0].tolist() == tokens:
            same += 1
        else:
            assert AS_TEXT in second.notes, (name, tokenizer.decode(tokens))
            assert text in tokenizer.decode(second.responses[0])
    assert same >= TEXT_CASES[case], same


def test_a_tool_call_that_another_token_ended_keeps_this_token(templates):
    """As in training: <|call|> of gpt-oss, <|tool_response> of Gemma 4, and no other token."""
    for name, end in (("gptoss", "<|call|>"), ("gemma4", "<|tool_response>")):
        tokenizer, _ = templates[name]
        prompt, chosen, more, _ = CASES["tool call"]
        _, parsed = parse({"prompt": prompt, "chosen": [chosen], "rejected": [NINE], **more}, "t:1",
                          formats())  # fmt: skip
        (row,) = encode_records([replace(parsed, name="t:1")], tokenizer, 4096, "auto")
        *tokens, last, _ = row.responses[0].tolist()
        assert tokenizer.decode(last) == end
        ends = (frame_of_answers(tokenizer, "chat")[1], end_of_calls(tokenizer))
        assert whole_tokens(Answer(tuple(tokens), last), ends, tokenizer) == [*tokens, last]
        other = tokenizer.convert_tokens_to_ids("<pad>")
        assert whole_tokens(Answer(tuple(tokens), other), ends, tokenizer) == tokens


def test_the_vocabulary_is_hashed_once_for_all_records(templates, monkeypatch):
    tokenizer, _ = templates["qwen3"]
    name, asked = tokenizer_name(tokenizer, "chat"), []
    monkeypatch.setattr(data_templates, "tokenizer_name", lambda *args: asked.append(args) or name)
    record = Record(ASKED, ("a", "b"), sampled=(name, [[1, 2], [3]]))
    plain = Record(ASKED, ("a", "b"))
    rows = encode_records([record, plain, record], tokenizer, 4096, "chat")
    assert len(asked) == 1
    assert [len(row.responses[0]) for row in rows] == [3, len(rows[1].responses[0]), 3]
    assert rows[0].prompt.tolist() == rows[1].prompt.tolist()


def test_sampled_answers_of_white_space_alone_are_counted(templates):
    tokenizer, _ = templates["qwen3"]
    name, note = tokenizer_name(tokenizer, "chat"), "responses of white space alone"
    record = Record(ASKED, (" \n", "a"), sampled=(name, [[220, 198], [64]]), name="t:1")
    (row,) = encode_records([record], tokenizer, 4096, "chat")
    assert row.notes == (note,)
    one = replace(record, responses=("",), pairs=(), sampled=(name, [[]]))
    (row,) = encode_answers([one], tokenizer, 4096, "chat", [True])
    assert row.notes == (note,)


def test_tokens_of_another_tokenizer_or_template_are_not_used(templates):
    tokenizer, _ = templates["qwen3"]
    other, _ = templates["llama3"]
    record = {"prompt": ASKED, "chosen": "It is nine.", "rejected": "No."}
    record |= {"chosen_tokens": [1, 2], "rejected_tokens": [3]}
    rows = []
    for name in (tokenizer_name(other, "chat"), tokenizer_name(tokenizer, "pku"), None):
        _, parsed = parse(record | {"tokenizer": name}, "test:1", formats())
        rows += encode_records([parsed], tokenizer, 4096, "auto")
    _, plain = parse({key: record[key] for key in list(record)[:3]}, "test:1", formats())
    (expected,) = encode_records([plain], tokenizer, 4096, "auto")
    for row in rows:
        assert [r.tolist() for r in row.responses] == [r.tolist() for r in expected.responses]


# --- ordinary dialogues that a strict look must not refuse


def kept(templates: dict, name: str, prompt: list[dict], *answers: dict, **more) -> object:
    """The row of a pair by a template; the answers differ."""
    tokenizer, _ = templates[name]
    chosen, rejected = answers
    _, found = parse({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]} | more, "t:1",
                     formats())  # fmt: skip
    (row,) = encode_records([replace(found, name="t:1")], tokenizer, 4096, "auto")
    assert row.responses[0].tolist() != row.responses[1].tolist()
    return row


WITH_THOUGHT = [assistant(f"<think>\n{text}\n</think>\n\nNine.") for text in ("Hm.", "Oh.")]
PLAIN = assistant("Nine."), assistant("Ten.")


def test_earlier_reasoning_in_a_content_may_be_forgotten(templates):
    prompt = [*ASKED, WITH_THOUGHT[0], user("And now?")]
    for name in ("qwen3", "lfm2_2_5", "lfm2_2_5_v2"):
        assert EARLIER_REASONING in kept(templates, name, prompt, *PLAIN).notes


def test_tags_of_reasoning_may_get_white_space(templates):
    close = [assistant(f"<think>{text}</think>Nine.") for text in ("Hm.", "Oh.")]
    for name in ("qwen3", "qwen3_5_think", "glm4moe"):
        kept(templates, name, ASKED, *close)


@pytest.mark.parametrize("question", ["hi", "k", "n"])
def test_a_question_may_be_in_the_header_of_the_answer(templates, question):
    for name in ("qwen3_5_think", "qwen3_6", "nemotron_3_nano"):
        kept(templates, name, [user(question)], *WITH_THOUGHT)


def test_a_result_may_stand_before_the_text_of_its_call(templates):
    prompt = [*ASKED, assistant("Let me look.", tool_calls=[call("Oslo")]), LOOKED[1]]
    for name in ("gemma4", "gemma4_v3"):
        kept(templates, name, prompt, *PLAIN, **TOOLS)


def test_one_reasoning_may_have_two_names(templates):
    thought = [NINE | {"reasoning": t, "reasoning_content": t} for t in ("Hm.", "Oh.")]
    for name in ("qwen3", "glm4moe", "gptoss"):
        kept(templates, name, ASKED, *thought)


def test_tool_results_of_the_role_user_keep_their_tags(templates):
    result = user("<tool_response>\n21\n</tool_response>")
    prompt = [*ASKED, assistant("Let me.", reasoning_content=THOUGHT), result]
    for name in ("qwen3", "qwen3_6"):
        row = kept(templates, name, prompt, *WITH_THOUGHT)
        assert THOUGHT in templates[name][0].decode(row.prompt)


def test_the_end_of_an_answer_is_known_of_templates_that_open_reasoning(templates):
    tokenizer, end = templates["nemotron_3_nano"]
    assert frame_of_answers(tokenizer, "chat")[1].strip() in ("", end)
    tokenizer = byte_tokenizer(chat_template=tokenizer.chat_template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert frame_of_answers(tokenizer, "chat") == ("", "<|im_end|>\n")
