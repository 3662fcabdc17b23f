"""python -m pytest tests/data/test_chat_template.py"""

import datetime
import signal
import threading
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import byte_tokenizer
from jinja2 import TemplateError
from stores import opened, parsed, write
from tokenizers import AddedToken
from transformers import AutoTokenizer

from nanoalign.data import chat_template
from nanoalign.data.chat_template import ChatTemplate, with_arguments
from nanoalign.data.rows import template_date_of
from nanoalign.data.split import record_digests
from nanoalign.data.templates import encode_records
from nanoalign.errors import RunError
from nanoalign.records import Record

SHOW_TOOLS = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
SHOW_CALLS = (
    "{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}={{ c.function.arguments | tojson }}{% endfor %}"
)
SHOW_REASONING = "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
LAST_REASONING = "{% if loop.last and m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"


def template(
    tools=SHOW_TOOLS, calls=SHOW_CALLS, reasoning=SHOW_REASONING, content="{{ m.content }}"
):
    turn = f"<{{{{ m.role }}}}>{reasoning}{content}{calls}{{{{ eos_token }}}}"
    end = "{% if add_generation_prompt %}<assistant>{% endif %}"
    return f"{tools}{{% for m in messages %}}{turn}{{% endfor %}}{end}"


def chat(*more: str, **parts: str):
    tokenizer = byte_tokenizer(chat_template=template(**parts))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in more])
    return tokenizer


def texts(record: Record, tokenizer, name: str = "auto") -> list[str]:
    (row,) = encode_records([record], tokenizer, 1024, name)
    return [tokenizer.decode(part) for part in (row.prompt, *row.responses)]


HI = {"role": "user", "content": "Hi"}
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"at": "it", "n": 2}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FOUND = {"role": "tool", "content": "42"}
THINKING = {"role": "assistant", "content": "no", "reasoning_content": "Hm."}
SHOWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
RECORD = {
    "system": "Be brief.",
    "tools": TOOLS,
    "prompt": [HI, CALLING, FOUND],
    "chosen": [CALLING],
    "rejected": [THINKING],
}
PROMPT = (
    '[look]<system>Be brief.<eos><user>Hi<eos><assistant>look={"at": "it", "n": 2}<eos>'
    "<tool>42<eos><assistant>"
)


def read(record: dict) -> Record:
    return replace(parsed(record), name="a:1")


def test_tools_calls_and_reasoning_are_in_the_text_by_hand(tmp_path):
    expected = [PROMPT, 'look={"at": "it", "n": 2}<eos>', "(Hm.)no<eos>"]
    assert texts(read(RECORD), chat()) == expected
    folder = tmp_path / "model"  # and from a store
    chat().save_pretrained(folder)
    source = write(tmp_path / "a.jsonl", RECORD)
    row = opened(folder, [source], tmp_path / "cache", max_length=1024).row(0)
    assert [chat().decode(part) for part in (row.prompt, *row.responses)] == expected


@pytest.mark.parametrize(
    ("hidden", "name", "lacking"),
    [
        ({"tools": ""}, "auto", "the chat template of this tokenizer does not show tools."),
        ({"calls": ""}, "auto", "does not show tool_calls: "),
        ({"reasoning": ""}, "auto", "does not show reasoning_content: 'Hm.'"),
        ({"tools": "", "calls": "", "reasoning": ""}, "chat",
         "does not show tools and tool_calls and reasoning_content: '"),
        ({}, "pku", "--template pku does not show tools and tool_calls and reasoning_content;"),
        ({}, "raw", "--template raw does not show tools and tool_calls and reasoning_content;"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_an_error(hidden, name, lacking):
    """Whether it stands in the prompt or in a response."""
    record = read(RECORD)
    with pytest.raises(RunError, match=f"a:1: .*{lacking}"):
        texts(record, chat(**hidden), name)
    plain = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    alone = [
        ("tools", plain | {"tools": TOOLS}),
        ("calls", plain | {"prompt": [HI, CALLING, FOUND]}),
        ("calls", plain | {"rejected": [CALLING]}),
        ("reasoning", plain | {"prompt": [HI, THINKING, HI]}),
        ("reasoning", plain | {"chosen": [THINKING]}),
    ]
    for part, each in alone:
        record = read(each)
        if part in hidden or name in ("pku", "raw"):
            with pytest.raises(RunError, match="a:1: .* does not show"):
                texts(record, chat(**hidden), name)
        else:
            assert len(texts(record, chat(**hidden), name)) == 3


def test_reasoning_of_earlier_turns_may_be_left_out_by_a_template_that_shows_it():
    """As Qwen3's does; an answer has it."""
    record = {"prompt": [HI, THINKING, HI], "chosen": [THINKING], "rejected": "b"}
    expected = ["<user>Hi<eos><assistant>no<eos><user>Hi<eos><assistant>", "(Hm.)no<eos>", "b<eos>"]
    found = read(record)
    assert texts(found, chat(reasoning=LAST_REASONING)) == expected
    found = read(record | {"chosen": "a"})
    assert texts(found, chat(reasoning=LAST_REASONING))[1] == "a<eos>"


def test_a_template_that_refuses_empty_answers_shows_tool_calls():
    refuse = (
        "{% if m.role == 'assistant' and not m.content and not m.tool_calls %}"
        "{{ raise_exception('an answer is empty') }}{% endif %}{{ m.content }}"
    )
    record = read(RECORD)
    assert texts(record, chat(content=refuse))[0] == PROMPT


def test_content_beside_a_tool_call_is_not_left_out():
    either = "{% if not m.tool_calls %}{{ m.content }}{% endif %}"
    looking = CALLING | {"content": "I look."}
    record = read({"prompt": "Hi", "chosen": [looking], "rejected": "b"})
    assert texts(record, chat())[1].startswith("I look.look=")
    with pytest.raises(RunError, match="not show the text of a message of 'assistant': 'I' is"):
        texts(record, chat(content=either))


def test_every_message_must_be_shown_with_its_parts():
    """Also where the template shows the same part of another message."""
    only_look = SHOW_CALLS.replace("or [] %}", "or [] if c.function.name == 'look' %}")
    find = {"type": "function", "function": {"name": "find", "arguments": {}}}
    finding = CALLING | {"tool_calls": [find]}
    found = read({"prompt": [HI, CALLING, FOUND], "rejected": "b", "chosen": [finding]})
    assert texts(found, chat())[1] == "find={}<eos>"
    with pytest.raises(RunError, match="a:1: .* does not show tool_calls: 'find' "):
        texts(found, chat(calls=only_look))


ENDS = ("", "<end>", "<end>\n", "<eos>", "<end><eos>", "<eos>\n<end> ", "<end><end>", "<eos> <eos>")


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_turn_is_written_once_though_the_data_have_it(end):
    """A tokenizer whose EOS is <eos>, while its chat template ends turns with <end>, id 259.

    Fine. has the ids 37, 72, 77, 68, 13; a newline has 198.
    """
    turns = template(calls="<end>\n").replace("{{ eos_token }}", "")
    tokenizer = byte_tokenizer(chat_template=turns)
    tokenizer.add_tokens([AddedToken("<end>", special=True)])
    record = Record("Hi", ("Fine." + end, "a<end>b"))
    (row,) = encode_records([record], tokenizer, 1024, "auto")
    assert row.responses[0].tolist() == [37, 72, 77, 68, 13, 259, 198, 258]
    assert row.responses[1].tolist() == [64, 259, 65, 259, 198, 258]  # within an answer it stays


def test_a_template_that_reads_parts_alone_shows_no_text():
    """As those of models of images: the text of a message is in no part, so it would be lost."""
    parts = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    record = Record("Hi", ("a", "b"), name="test:1")
    with pytest.raises(RunError, match="test:1: .* does not show the text of a message of 'u"):
        texts(record, chat(content=parts))


def test_a_template_that_leaves_out_messages_of_a_role_is_refused():
    """As Phi-3's does with those of a tool."""
    users = "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
    record = {"prompt": [HI, CALLING, FOUND], "chosen": "a", "rejected": "b"}
    with pytest.raises(RunError, match="a:1: .* does not show the text of a message of 'tool'"):
        texts(read(record), chat(content=users))
    found = read(record | {"prompt": [HI], "system": "Be brief."})
    assert texts(found, chat(content=users))[0].startswith("<system>Be brief.")


def test_a_message_that_is_lost_is_found_though_its_role_was_shown_before():
    """As a system message that is not the first; also where its short text is there by chance."""
    first = "{% if loop.first or m.role != 'system' %}{{ m.content }}{% endif %}"
    shown = Record([{"role": "system", "content": "Be brief."}, HI], ("a", "b"), name="a:1")
    for text in ("From now on be kind.", "assistant"):
        system = {"role": "system", "content": text}
        lost = Record([HI, {"role": "assistant", "content": "Yes?"}, system, HI], ("a", "b"))
        lost = replace(lost, name="a:2")
        with pytest.raises(RunError, match="a:2: .* does not show the text of a message of 'sys"):
            encode_records([shown, lost], chat(content=first), 1024, "auto")


def test_texts_within_lists_of_arguments_are_looked_for():
    """Of a template that shows the names of arguments alone; one that shows all is no error."""
    names = "{% for c in m.tool_calls or [] %}{{ c.function.arguments | list }}{% endfor %}"
    call = {"function": {"name": "look", "arguments": {"tags": ["red", {"deep": "blue"}], "n": 3}}}
    calling = {"role": "assistant", "content": "look", "tool_calls": [call]}
    record = read({"prompt": [HI], "chosen": [calling], "rejected": "b"})
    assert "red" in texts(record, chat())[1]
    with pytest.raises(RunError, match="a:1: .* does not show tool_calls: '(red|blue)' is not"):
        texts(record, chat(calls=names))


def test_tools_may_be_flat_or_of_another_kind():
    shown = "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}"
    for tool in ({"name": "look"}, {"type": "web_search"}, {"function": "look"}):
        record = read({"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": [tool]})
        assert texts(record, chat(tools=shown))[0].startswith('[{"')


def test_a_text_that_begins_as_a_turn_does_is_refused():
    tokenizer = chat("<user>", "<assistant>")
    for record in (Record("Hi", ("<assistant>yes", "b")), Record("<assistant>Hi", ("a", "b"))):
        with pytest.raises(RunError, match="begins with '<assistant>', as the turns that the chat"):
            encode_records([record], tokenizer, 1024, "auto")
    assert texts(Record("<user>Hi", ("a <assistant>", "b")), tokenizer)[1] == "a <assistant><eos>"


def test_a_template_that_fails_without_a_header_is_one_error():
    """It is rendered so where an answer begins with a token of the tokenizer."""
    fails = "{% if messages|length == 1 and not add_generation_prompt %}{{ 1 / 0 }}{% endif %}"
    tokenizer = byte_tokenizer(chat_template=fails + template())
    tokenizer.add_tokens([AddedToken("<call>", special=True)])
    with pytest.raises(RunError, match="a:1: the chat template fails: .*ZeroDivisionError"):
        encode_records([Record("Hi", ("<call>a", "b"), name="a:1")], tokenizer, 1024, "auto")


def test_responses_that_begin_with_their_prompt_are_counted():
    asked = Record("Is it late?", ("Is it late? It is nine.", "No."))
    (row,) = encode_records([asked], chat(), 1024, "auto")
    assert row.notes == ("responses that begin with their own prompt",)
    (row,) = encode_records([Record("Hi", ("Hi there.", "No."))], chat(), 1024, "auto")
    assert row.notes == ()


def test_an_answer_may_continue_a_turn_of_the_assistant():
    """In pku, too; raw has no turns."""
    record = Record([HI, {"role": "assistant", "content": "I"}], (" see", " do"))
    expected = ["<user>Hi<eos><assistant>I", " see<eos>", " do<eos>"]
    assert texts(record, chat()) == expected
    asked = "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:I"
    assert texts(record, byte_tokenizer(), "pku") == [asked, " see<eos>", " do<eos>"]


def test_an_end_that_is_no_token_is_text():
    """A template that puts a full stop behind answers does not take away that of the data."""
    tokenizer = byte_tokenizer(chat_template=template(calls="."))
    assert texts(Record("Hi", ("Fine.", "b")), tokenizer)[1:] == ["Fine..<eos>", "b.<eos>"]


def test_a_prompt_is_another_one_with_tools_or_a_system_prompt():
    plain = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    other = [{"type": "function", "function": {"name": "find"}}]
    changes = ({}, {"tools": TOOLS}, {"tools": other}, {"system": "Be."}, {"system": "No."},
               {"tools": TOOLS, "chosen": "c"})  # fmt: skip
    records = [plain | change for change in changes]
    digests = record_digests(list(map(read, records)))[:, 0]
    assert len(np.unique(digests)) == 5 and digests[1] == digests[5]


# --- a template that fails, or does not end

MESSAGES = [{"role": "user", "content": "Hi"}]
INNER = "{% for j in range(99999) %}{% set x = i * j %}{% endfor %}"
LOOP = f"{{% for i in range(99999) %}}{INNER}{{% endfor %}}"


def rendering(template: str):
    return byte_tokenizer(chat_template=template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for x in range(10**11) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'x' * 10**14 }}", "MemoryError"),
        ("{{ 'x' * 20000001 }}", "it writes 20,000,001 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{{ messages[9]['content']['x'] }}", "is undefined|has no element"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        (r"{{ '\ud83d' }}", "it writes half a character"),
        (LOOP, "it takes more than 0.2 seconds"),
    ],
)
def test_what_a_template_does_is_one_error(template, message, monkeypatch):
    """Of the record that it is applied to; and the alarm is off again."""
    if template == LOOP:  # the others end by themselves, also on a busy machine
        monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    record = Record("Hi", ("Hello.", "No."), name="data:3")
    with pytest.raises(RunError, match=f"^data:3: the chat template fails: .*({message})"):
        encode_records([record], rendering(template), 64, "chat")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_other_threads_have_no_alarm_and_render_all_the_same():
    found = []
    apply = ChatTemplate(rendering("{{ messages[0].content }}")).render
    thread = threading.Thread(target=lambda: found.append(apply(MESSAGES)))
    thread.start()
    thread.join()
    assert found == ["Hi"]


def test_the_time_limit_is_one_of_a_dialogue(monkeypatch):
    """Not of a data set."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    apply = ChatTemplate(rendering("{{ messages[0].content }}")).render
    for _ in range(4):
        apply(MESSAGES)
        time.sleep(0.1)
    with pytest.raises(TemplateError):
        ChatTemplate(rendering(LOOP)).render(MESSAGES)


# --- --template_args and --template_date

OPENS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{% endif %}"
)


def test_template_args_are_defaults_that_are_saved_with_the_model(tmp_path):
    """A caller's own value is used. Without them a plain answer is refused; the error says so."""
    record = Record("Hi", ("yes", "no"), name="a:1")
    with pytest.raises(RunError, match="opens reasoning .*; give --template_args enable_think"):
        texts(record, byte_tokenizer(chat_template=OPENS))
    tokenizer = with_arguments(byte_tokenizer(chat_template=OPENS), ["enable_thinking=false"])
    assert texts(record, tokenizer) == ["<user>Hi<eos><assistant>", "yes<eos>", "no<eos>"]
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    render = partial(saved.apply_chat_template, MESSAGES, tokenize=False)
    assert render(add_generation_prompt=True) == "<user>Hi<eos><assistant>"
    options = {"add_generation_prompt": True, "enable_thinking": True}
    assert render(**options) == "<user>Hi<eos><assistant><think>"


@pytest.mark.parametrize(
    ("value", "shown"), [("7", "7/"), ("low", "low/"), ('"7"', "7/"), ("null", "None/")]
)
def test_values_of_template_args_are_json_or_text(value, shown):
    tokenizer = byte_tokenizer(chat_template="{{ effort }}/{{ messages[0].content }}")
    tokenizer = with_arguments(tokenizer, [f"effort={value}"])
    assert ChatTemplate(tokenizer).render(MESSAGES) == f"{shown}Hi"


@pytest.mark.parametrize("argument", ["enable_thinkin=false", "enable_thinking", "=1", "a b=1"])
def test_template_args_that_nothing_reads_are_refused(argument):
    with pytest.raises(RunError, match=f"--template_args {argument}: expected NAME=VALUE"):
        with_arguments(byte_tokenizer(chat_template=OPENS), [argument])
    with pytest.raises(RunError, match="it has no chat template"):
        with_arguments(byte_tokenizer(), ["a=1"])


def test_a_run_that_is_resumed_has_the_date_of_its_start(tmp_path):
    args = Namespace(out=str(tmp_path), resume=True)
    today = datetime.date.today().isoformat()
    assert template_date_of(args) == {"template_date": today}  # there is no run
    (tmp_path / "args.json").write_text('{"template_date": "2024-07-26"}')
    assert template_date_of(args) == {"template_date": "2024-07-26"}
    args.resume = False
    assert template_date_of(args) == {"template_date": today}


def test_the_date_of_a_template_is_that_of_the_run():
    tokenizer = byte_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }} " + SHOWN)
    record = Record("Hi", ("yes", "no"), name="a:1")
    day = datetime.date(2024, 7, 26)
    (row,) = encode_records([record], tokenizer, 64, "chat", day)
    assert tokenizer.decode(row.prompt) == "26 Jul 2024 <user>Hi<eos>"
    (row,) = encode_records([record], tokenizer, 64, "chat")
    today = datetime.date.today().strftime("%d %b %Y")
    assert tokenizer.decode(row.prompt) == f"{today} <user>Hi<eos>"
