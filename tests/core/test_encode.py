"""python -m pytest tests/core/test_encode.py"""

import logging
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from conftest import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nanoalign.encode import (
    BLANK_RESPONSE,
    CUT_PROMPT,
    CUT_RESPONSE,
    Record,
    encode,
    encode_all,
    messages_of,
)
from nanoalign.errors import RunError

BOS, EOS = 257, 258


def raw(prompt: str, *responses: str, tokenizer, **options):
    return encode(prompt, responses, tokenizer, template="raw", name="test:1", **options)


def texts(row, tokenizer) -> list[str]:
    return [tokenizer.decode(part) for part in (row.prompt, *row.responses)]


def test_a_row_is_prompt_then_response_then_one_eos(tokenizer):
    row = raw("ab", "c", "de", tokenizer=tokenizer)
    assert row.prompt.tolist() == tokenizer("ab")["input_ids"]
    assert texts(row, tokenizer) == ["ab", "c<eos>", "de<eos>"]
    assert [list(part).count(EOS) for part in (row.prompt, *row.responses)] == [0, 1, 1]
    assert {part.dtype for part in (row.prompt, *row.responses)} == {np.dtype(np.int32)}
    assert (row.name, row.pairs, row.extra, row.notes) == ("test:1", ((0, 1),), {}, ())


def test_two_responses_are_a_pair_and_others_are_not(tokenizer):
    assert raw("a", "b", tokenizer=tokenizer).pairs == ()
    assert raw("a", "b", "c", "d", tokenizer=tokenizer).pairs == ()
    assert len(raw("a", "b", "c", "d", tokenizer=tokenizer).responses) == 3


def test_a_prompt_and_a_response_have_1024_tokens_by_default(tokenizer):
    long = "a" * 2000
    for row in (
        encode(long, ("b", "c" * 2000), tokenizer),
        encode_all([Record(long, ("b", "c" * 2000))], tokenizer)[0],
    ):
        assert row.longest == 1024 and len(row.prompt) == 512


def test_prompts_without_responses_are_rows(tokenizer):
    """All tokens are those of the prompt."""
    (row,) = encode_all([Record("0123456789ab", (), ())], tokenizer, 10, "raw")
    assert texts(row, tokenizer) == ["23456789ab"] and row.responses == () and row.pairs == ()
    assert encode_all([], tokenizer) == []


def test_records_are_immutable():
    record = Record("p", ("a", "b"))
    with pytest.raises(FrozenInstanceError):
        record.prompt = "q"
    assert not hasattr(record, "__dict__") and record.pairs == ((0, 1),)


def test_a_text_longer_than_the_model_reads_is_cut_without_a_warning(caplog):
    """The tokenizer would warn of texts that are longer than its model_max_length."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    raw("0123456789", "a", "b", tokenizer=byte_tokenizer(model_max_length=5), max_length=5)
    logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_rows_have_the_order_of_their_records_whatever_their_templates(tokenizer):
    """auto takes pku for the first and third record, raw for the second."""
    prompts = ["a", "\n\nHuman: b\n\nAssistant:", "c"]
    records = [Record(prompt, ("x", "y"), name=str(n)) for n, prompt in enumerate(prompts)]
    rows = encode_all(records, tokenizer)
    assert [row.name for row in rows] == ["0", "1", "2"]
    assert [tokenizer.decode(row.prompt) for row in rows] == [
        "BEGINNING OF CONVERSATION: USER: a ASSISTANT:",
        prompts[1],
        "BEGINNING OF CONVERSATION: USER: c ASSISTANT:",
    ]
    for record, row in zip(records, rows, strict=True):
        (alone,) = encode_all([record], tokenizer)
        assert texts(alone, tokenizer) == texts(row, tokenizer)


def test_values_of_pairs_keep_their_types(tokenizer):
    """Numbers become float32, as losses are; whole numbers are indices, and truth values masks."""
    extra = {"margins": [0.1, 2.0], "dimensions": [0, 1], "desirable": [True, False]}
    (row,) = encode_all([Record("p", ("a", "b"), ((0, 1), (1, 0)), extra)], tokenizer)
    assert row.pairs == ((0, 1), (1, 0))
    assert {name: values.dtype for name, values in row.extra.items()} == {
        "margins": np.float32, "dimensions": np.int64, "desirable": np.bool_}  # fmt: skip
    assert row.extra["margins"].tolist() == [np.float32(0.1), 2.0]
    assert row.extra["dimensions"].tolist() == [0, 1]


# --- templates


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


CHAT = (
    "{{ bos_token }}{% if tools %}[{{ tools[0]['name'] }}]{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_template_renders_the_prompt_once_and_ends_with_one_eos():
    chat = byte_tokenizer(chat_template=CHAT)
    row = encode("Hi", ("yes", "no"), chat)  # auto: the tokenizer has a chat template
    assert texts(row, chat) == ["<bos><user>Hi<eos>\n<assistant>", "yes<eos>", "no<eos>"]


def test_a_prompt_may_end_with_the_eos_that_a_chat_template_writes():
    turns = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    chat = byte_tokenizer(chat_template=turns)
    row = encode("Hi", ("yes", "no"), chat)
    assert texts(row, chat) == ["Hi<eos>", "yes<eos>", "no<eos>"]


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


def test_a_chat_template_gets_the_tools_of_a_record():
    chat = byte_tokenizer(chat_template=CHAT)
    (row,) = encode_all([Record("Hi", ("yes", "no"), tools=[{"name": "search"}])], chat)
    assert chat.decode(row.prompt).startswith("<bos>[search]<user>Hi")


def test_a_response_may_be_a_message_with_tool_calls():
    """A chat template renders it; neither raw nor pku can."""
    answers = [
        {"role": "assistant", "content": "", "call": "f()"},
        {"role": "assistant", "content": "no"},
    ]
    record = Record("Hi", ("f()", "no"), answers=answers, name="test:1")
    turns = (
        "{% for m in messages %}{{ m.content }}{% if m.call %}[{{ m.call }}]{% endif %}{% endfor %}"
    )
    chat = byte_tokenizer(chat_template=turns)
    (row,) = encode_all([record], chat)
    assert texts(row, chat) == ["Hi", "[f()]<eos>", "no<eos>"]
    for template in ("raw", "pku"):
        for other in (record, Record("Hi", ("a", "b"), tools=[{"name": "f"}], name="test:1")):
            with pytest.raises(
                RunError, match=f"test:1: --template {template} can't .* without tools"
            ):
                encode_all([other], chat, template=template)


def test_what_reading_left_out_is_noted_first(tokenizer):
    (row,) = encode_all([Record("Hi", ("a", " "), notes=("columns",))], tokenizer)
    assert row.notes == ("columns", BLANK_RESPONSE)


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


# --- tokens


ENDS = ("", "<eos>", "<eos>\n", "<eos><eos>", "<eos> <eos>\n", "<eos>\n\n<eos> ", "<eos>" * 3)
FINE = [37, 72, 77, 68, 13]  # byte_tokenizer numbers printable ASCII from "!", which is 33
CHATS = {  # what a chat template writes behind an answer -> ids of that text without its EOS
    "{{ eos_token }}": [],
    "{{ eos_token }}\n": [],
    "": [],
    "\n{{ eos_token }}": [198],
    "[end]\n": [58, 68, 77, 67, 60, 198],
}


def chat_tokenizer(behind: str, *more: str):
    """With a chat template of turns, which writes `behind` after each message."""
    chat = byte_tokenizer(
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        + behind
        + "{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat.add_tokens([AddedToken(token, special=True) for token in more])
    return chat


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_ends_with_one_eos_whatever_the_data_had(tokenizer, end):
    """By hand; also of a single response, which is compared with none."""
    for record in (Record("Hi", ("Fine." + end, "No")), Record("Hi", ("Fine." + end,), ((0, 0),))):
        (row,) = encode_all([record], tokenizer, template="raw")
        assert row.responses[0].tolist() == [*FINE, EOS]
        for behind, ids in CHATS.items():
            (row,) = encode_all([record], chat_tokenizer(behind))
            assert row.responses[0].tolist() == [*FINE, *ids, EOS], behind


def test_an_end_of_turn_that_is_not_the_eos_goes_before_it():
    """<eos> is EOS; the chat template ends turns with <end>, id 259, and a newline, 198."""
    for end in ENDS:
        row = encode("Hi", ("Fine." + end, "a<end>b"), chat_tokenizer("<end>\n", "<end>"))
        assert row.responses[0].tolist() == [*FINE, 259, 198, EOS]
        assert row.responses[1].tolist() == [64, 259, 65, 259, 198, EOS]  # a 64, b 65


def test_an_eos_within_an_answer_stays(tokenizer):
    for each in (tokenizer, chat_tokenizer("{{ eos_token }}\n")):
        row = encode(
            "Hi", ("a<eos> b<eos>", "<eos>"), each, template="chat" if each.chat_template else "raw"
        )
        assert texts(row, each)[1:] == ["a<eos> b<eos>", "<eos>"]
        assert list(row.responses[0]).count(EOS) == 2
    assert texts(raw("Hi", "a \n", "b <eos>", tokenizer=tokenizer), tokenizer)[1:] == [
        "a \n<eos>", "b <eos>"]  # fmt: skip


def test_the_eos_of_pku_is_the_only_one_and_text_that_reads_like_it_stays(tokenizer):
    row = encode("Hi", ("Fine.<eos>", "Fine.<eos>\n<eos>"), tokenizer, template="pku")
    plain = [27, 68, 78, 82, 29]  # < e o s >
    assert row.responses[0].tolist() == [*FINE, *plain, EOS]
    assert row.responses[1].tolist() == [*FINE, *plain, 198, *plain, EOS]


def test_at_most_one_bos_and_no_eos_of_the_tokenizer(tokenizer):
    adding = byte_tokenizer()
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    row = raw("ab", "c", "d", tokenizer=adding)
    assert texts(row, tokenizer) == ["<bos>ab", "c<eos>", "d<eos>"]  # an EOS would end the prompt
    again = raw("<bos>ab", "c", "d", tokenizer=adding)
    assert list(again.prompt) == list(row.prompt)  # the text has a BOS, the only one
    assert list(raw("<bos>", "c", "d", tokenizer=adding).prompt) == [BOS]
    assert list(raw("<bos><eos>", "c", "d", tokenizer=byte_tokenizer()).prompt) == [BOS]
    for prompt, ids in (("<eos>", [EOS]), ("<bos>", [BOS])):  # a prompt keeps its only token
        assert list(raw(prompt, "c", "d", tokenizer=byte_tokenizer()).prompt) == ids


def sentencepiece_like(*more: str):
    """Words with a leading "▁", which the tokenizer also puts before the start of any text."""
    words = [
        "<unk>",
        "<bos>",
        "<eos>",
        "▁yes",
        "yes",
        "▁Q",
        ":",
        "▁no",
        "\n",
        "▁",
        "▁x",
        "x",
        *more,
    ]
    core = Tokenizer(models.Unigram([(w, -1.0 * (len(w) < 3)) for w in words], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens(["<bos>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def test_no_space_is_put_before_a_response():
    """ "Q:" ++ "yes" has the tokens of "Q:yes", though "yes" alone would begin with a space."""
    tokenizer = sentencepiece_like()
    row = raw("Q:", "yes", " no", tokenizer=tokenizer)
    words = tokenizer.convert_ids_to_tokens
    assert words(tokenizer("yes")["input_ids"]) == ["▁yes"]
    assert [words(part.tolist()) for part in row.responses] == [["yes", "<eos>"], ["▁no", "<eos>"]]


def test_one_eos_of_a_tokenizer_of_words():
    """The words of a Unigram model include "<eos>": even as plain text it has the id 2."""
    tokenizer = sentencepiece_like()
    for template in ("raw", "pku"):
        for end in ("", "<eos>", "<eos><eos>"):
            row = encode("Q:", ("yes" + end, " no" + end), tokenizer, template=template)
            assert [part.tolist() for part in row.responses] == [[4, 2], [7, 2]], (template, end)


def test_a_response_that_joins_the_newline_before_it_is_tokenized_alone():
    """ "\\nno" is one token, from which no newline can be removed; "\\nyes" is three."""
    tokenizer = sentencepiece_like("▁\nno")
    row = raw("Q:", "yes", "no", tokenizer=tokenizer)
    words = tokenizer.convert_ids_to_tokens
    assert [words(part.tolist()) for part in row.responses] == [["yes", "<eos>"], ["▁no", "<eos>"]]


def test_a_prompt_without_tokens_is_an_error():
    silent = byte_tokenizer()
    silent.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(RunError, match="test:1: the prompt has no tokens"):
        raw("  ", "a", "b", tokenizer=silent)


def test_a_tokenizer_without_eos_is_an_error():
    with pytest.raises(RunError, match="no EOS token"):
        raw("a", "b", "c", tokenizer=byte_tokenizer(eos_token=None))


def test_a_length_without_room_for_a_response_is_an_error(tokenizer):
    with pytest.raises(RunError, match="--max_length 1: .* at least 2 tokens"):
        raw("a", "b", "c", tokenizer=tokenizer, max_length=1)
    assert texts(raw("abc", "d", "e", tokenizer=tokenizer, max_length=2), tokenizer) == [
        "c", "d", "e"]  # fmt: skip


# --- cutting


@pytest.mark.parametrize(
    ("prompt", "responses", "expected", "notes"),
    [
        # Room for 10: the longer response has 3 + EOS = 4, so the prompt keeps its last 6.
        ("0123456789", ("abc", "d"), ["456789", "abc<eos>", "d<eos>"], [CUT_PROMPT]),
        ("012345", ("abc", "d"), ["012345", "abc<eos>", "d<eos>"], []),  # exactly 10
        # A cut prompt keeps its BOS, one of the 6.
        ("<bos>0123456789", ("abc", "d"), ["<bos>56789", "abc<eos>", "d<eos>"], [CUT_PROMPT]),
        # The prompt keeps half, 5; the responses get the other 5.
        ("0123456789", ("abcdefg", "hijk"), ["56789", "abcde", "hijk<eos>"],
         [CUT_PROMPT, CUT_RESPONSE]),
        ("01234", ("abcde", "fghij"), ["01234", "abcde", "fghij"], [CUT_RESPONSE] * 2),
        ("0", (" ", "\n"), ["0", " <eos>", "\n<eos>"], [BLANK_RESPONSE] * 2),
    ],
)  # fmt: skip
def test_what_is_too_long_is_cut_and_noted_by_hand(tokenizer, prompt, responses, expected, notes):
    row = raw(prompt, *responses, tokenizer=tokenizer, max_length=10)
    assert texts(row, tokenizer) == expected and list(row.notes) == notes
    assert row.longest <= 10


@pytest.mark.parametrize(
    ("prompt", "expected", "limit"),
    [
        ("<bos>012", ["<bos>2", "a<eos>", "b<eos>"], 4),  # of two tokens one is the BOS
        ("<bos>012", ["2", "a", "b"], 2),  # of one token none is
        ("3012", ["12", "a<eos>", "b<eos>"], 4),
        ("01234", ["234", "a<eos>", "b<eos>"], 5),
    ],
)
def test_short_limits_by_hand(tokenizer, prompt, expected, limit):
    row = raw(prompt, "a", "b", tokenizer=tokenizer, max_length=limit)
    assert texts(row, tokenizer) == expected
