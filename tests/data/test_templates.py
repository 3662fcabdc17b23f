"""python -m pytest tests/data/test_templates.py"""

import re
from dataclasses import replace

import pytest
from conftest import byte_tokenizer, sentencepiece_like
from tokenizers import normalizers, pre_tokenizers

from nanoalign.batch import Row
from nanoalign.data.dialogues import messages_of
from nanoalign.data.templates import encode_records, render
from nanoalign.errors import RunError
from nanoalign.records import Record

BOS, EOS = 257, 258


def encode(prompt, responses, tokenizer, template: str = "auto", name: str = "") -> Row:
    return encode_records([Record(prompt, responses, name=name)], tokenizer, 1024, template)[0]


def texts(row: Row, tokenizer) -> list[str]:
    return [tokenizer.decode(part) for part in (row.prompt, *row.responses)]


def test_rows_have_the_order_of_their_records_whatever_their_templates(tokenizer):
    """auto takes pku for the first and third record, raw for the second."""
    prompts = ["a", "\n\nHuman: b\n\nAssistant:", "c"]
    records = [Record(prompt, ("x", "y"), name=str(n)) for n, prompt in enumerate(prompts)]
    rows = encode_records(records, tokenizer, 1024, "auto")
    assert [row.name for row in rows] == ["0", "1", "2"]
    assert [tokenizer.decode(row.prompt) for row in rows] == [
        "BEGINNING OF CONVERSATION: USER: a ASSISTANT:",
        prompts[1],
        "BEGINNING OF CONVERSATION: USER: c ASSISTANT:",
    ]
    for record, row in zip(records, rows, strict=True):
        (alone,) = encode_records([record], tokenizer, 1024, "auto")
        assert texts(alone, tokenizer) == texts(row, tokenizer)


def test_pku_template(tokenizer):
    row = encode("Hi", ("yes", "no"), tokenizer, template="pku")
    assert tokenizer.decode(row.prompt) == "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:"
    assert tokenizer.decode(row.responses[0]) == "yes<eos>"
    spaced = encode("Hi", (" yes", "no"), tokenizer, template="pku")
    assert tokenizer.decode(spaced.responses[0]) == " yes<eos>"  # HH-RLHF's space is none of theirs


def test_pku_text_can_not_smuggle_special_tokens(tokenizer):
    row = encode("a <eos>", ("b <bos>", "c"), tokenizer, template="pku")
    assert EOS not in row.prompt and BOS not in row.responses[0]
    assert list(row.responses[0]).count(EOS) == 1


def test_messages_of_user_and_assistant_alone_have_a_pku_template(tokenizer):
    messages = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in messages]
    row = encode(messages, ("x", "y"), tokenizer, template="pku")
    assert tokenizer.decode(row.prompt) == (
        "BEGINNING OF CONVERSATION: USER: a ASSISTANT:b USER: c ASSISTANT:"
    )
    system = [{"role": "system", "content": "s"}, *messages]
    for prompt, template in ((system, "pku"), (messages, "raw"), (messages, "chat")):
        with pytest.raises(RunError, match=f"test:1: .*{template}.* can't be used"):
            encode(prompt, ("x", "y"), tokenizer, template=template, name="test:1")


def test_a_template_that_can_not_be_used_names_what_is_in_the_way(tokenizer):
    user = {"role": "user", "content": "Hi"}
    system, tool = ({"role": role, "content": "s"} for role in ("system", "tool"))
    calling = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    answers = (calling, {"role": "assistant", "content": "no"})
    plain = Record("Hi", ("a", "b"), name="test:1")
    for changes, template, message in (
        ({"prompt": [system, user]}, "auto", "auto, which is pku here, can't be used for "
         "messages of 'system' (or the key 'system');"),
        ({"prompt": [system, tool, user]}, "pku", "pku can't be used for messages of 'system' "
         "(or the key 'system') and messages of 'tool';"),
        ({"prompt": [user]}, "raw", "raw can't be used for a list of messages;"),
        ({}, "chat", "chat can't be used for a tokenizer without a chat template;"),
        ({"answers": answers}, "auto", "pku does not show tool_calls;"),
    ):  # fmt: skip
        with pytest.raises(RunError, match=re.escape(f"test:1: --template {message}")):
            encode_records([replace(plain, **changes)], tokenizer, 64, template)


CHAT = (
    "{{ bos_token }}{% if tools %}[{{ tools[0]['name'] }}]{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_template_renders_the_prompt_once_and_ends_with_one_eos():
    chat = byte_tokenizer(chat_template=CHAT)
    row = encode("Hi", ("yes", "no"), chat)  # auto: the tokenizer has a chat template
    assert texts(row, chat) == ["<bos><user>Hi<eos>\n<assistant>", "yes<eos>", "no<eos>"]


def test_a_chat_template_gets_the_turns_of_a_dialogue():
    chat = byte_tokenizer(chat_template=CHAT)
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert messages_of(prompt) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    row = encode(prompt, (" d", " e"), chat)
    expected = "<bos><user>a<eos>\n<assistant>b<eos>\n<user>c<eos>\n<assistant>"
    assert texts(row, chat) == [expected, "d<eos>", "e<eos>"]


def test_a_response_may_be_a_message_with_tool_calls():
    """A chat template renders it; neither raw nor pku can."""
    answers = [{"role": "assistant", "content": "", "call": "f()"},
               {"role": "assistant", "content": "no"}]  # fmt: skip
    record = Record("Hi", ("f()", "no"), answers=answers, name="test:1")
    turn = "{{ m.content }}{% if m.call %}[{{ m.call }}]{% endif %}"
    chat = byte_tokenizer(chat_template=f"{{% for m in messages %}}{turn}{{% endfor %}}")
    (row,) = encode_records([record], chat, 1024, "auto")
    assert texts(row, chat) == ["Hi", "[f()]<eos>", "no<eos>"]
    for template in ("raw", "pku"):
        refused = f"test:1: --template {template} can't .* without tools"
        for other in (record, Record("Hi", ("a", "b"), tools=[{"name": "f"}], name="test:1")):
            with pytest.raises(RunError, match=refused):
                render(other, chat, template)


def test_a_chat_template_that_changes_the_prompt_or_fails_is_an_error():
    changing = byte_tokenizer(chat_template="{{ messages|length }}" + CHAT)
    failing = byte_tokenizer(chat_template="{{ raise_exception('no system') }}")
    for chat, message in (
        (changing, r"test:1: .* does not begin with its rendering of the prompt"),
        (failing, "test:1: the chat template fails: .*no system"),
    ):
        with pytest.raises(RunError, match=message):
            encode("Hi", ("yes", "no"), chat, name="test:1")


def test_auto_takes_raw_for_dialogues_and_pku_for_plain_prompts(tokenizer):
    dialogue = "\n\nHuman: a\n\nAssistant:"
    row = encode(dialogue, (" b", " c"), tokenizer)
    assert texts(row, tokenizer) == [dialogue, " b<eos>", " c<eos>"]
    assert tokenizer.decode(encode("a", ("b", "c"), tokenizer).prompt).startswith("BEGINNING")


ENDS = ("", "<eos>", "<eos>\n", "<eos><eos>", "<eos> <eos>\n", "<eos>\n\n<eos> ", "<eos>" * 3)
FINE = [37, 72, 77, 68, 13]  # byte_tokenizer numbers printable ASCII from "!", which is 33
CHATS = {  # what a chat template writes behind an answer -> ids of that text without its EOS
    "{{ eos_token }}": [],
    "{{ eos_token }}\n": [],
    "": [],
    "\n{{ eos_token }}": [198],
    "[end]\n": [58, 68, 77, 67, 60, 198],
}


def chat_tokenizer(behind: str):
    """With a chat template of turns, which writes `behind` after each message."""
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + behind + "{% endfor %}"
    return byte_tokenizer(
        chat_template=turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_ends_with_one_eos_whatever_the_data_had(tokenizer, end):
    """By hand; also of a single response, which is compared with none."""
    for record in (Record("Hi", ("Fine." + end, "No")), Record("Hi", ("Fine." + end,), ((0, 0),))):
        (row,) = encode_records([record], tokenizer, 1024, "raw")
        assert row.responses[0].tolist() == [*FINE, EOS]
        for behind, ids in CHATS.items():
            (row,) = encode_records([record], chat_tokenizer(behind), 1024, "auto")
            assert row.responses[0].tolist() == [*FINE, *ids, EOS], behind


def test_an_eos_within_an_answer_stays(tokenizer):
    for each, template in ((tokenizer, "raw"), (chat_tokenizer("{{ eos_token }}\n"), "chat")):
        row = encode("Hi", ("a<eos> b<eos>", "<eos>"), each, template=template)
        assert texts(row, each)[1:] == ["a<eos> b<eos>", "<eos>"]
        assert list(row.responses[0]).count(EOS) == 2
    row = encode("Hi", ("a \n", "b <eos>"), tokenizer, template="raw")
    assert texts(row, tokenizer)[1:] == ["a \n<eos>", "b <eos>"]


def test_the_eos_of_pku_is_the_only_one_and_text_that_reads_like_it_stays(tokenizer):
    row = encode("Hi", ("Fine.<eos>", "Fine.<eos>\n<eos>"), tokenizer, template="pku")
    plain = [27, 68, 78, 82, 29]  # < e o s >
    assert row.responses[0].tolist() == [*FINE, *plain, EOS]
    assert row.responses[1].tolist() == [*FINE, *plain, 198, *plain, EOS]


def test_one_eos_of_a_tokenizer_of_words():
    """The words of a Unigram model include "<eos>": even as plain text it has the id 2."""
    tokenizer = sentencepiece_like()
    for template in ("raw", "pku"):
        for end in ("", "<eos>", "<eos><eos>"):
            row = encode("Q:", ("yes" + end, " no" + end), tokenizer, template=template)
            assert [part.tolist() for part in row.responses] == [[4, 2], [7, 2]], (template, end)


@pytest.mark.parametrize("scheme", ["always", "first", "prepend"])
@pytest.mark.parametrize("answer", ["yes", " yes", "x yes"])
def test_an_answer_behind_a_special_token_has_the_tokens_of_the_whole_text(scheme, answer):
    """A SentencePiece tokenizer of the older kind puts a space before it, a newer one does not."""
    tokenizer = sentencepiece_like("<|a|>", "▁▁")
    core = tokenizer.backend_tokenizer
    if scheme == "prepend":  # as Llama's and Mistral's first tokenizers
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        core.normalizer, core.pre_tokenizer = normalizers.Sequence(parts), None
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|a|>' if m.role == 'assistant' }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}<|a|>{% endif %}"
    )
    row = encode("Q:", (answer, "no"), tokenizer)
    dialogue = [{"role": "user", "content": "Q:"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(dialogue, tokenize=False)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [*row.prompt, *row.responses[0]] == expected
