"""python -m pytest tests/core/test_encode.py"""

import numpy as np
import pytest
from conftest import byte_tokenizer, sentencepiece_like
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from nanoalign.encode import BLANK_RESPONSE, CUT_PROMPT, CUT_RESPONSE, encode, encode_all
from nanoalign.errors import RunError
from nanoalign.records import Record

BOS, EOS = 257, 258


def raw(prompt: str, *responses: str, tokenizer, **options):
    return encode(prompt, responses, tokenizer, name="test:1", **options)


def texts(row, tokenizer) -> list[str]:
    return [tokenizer.decode(part) for part in (row.prompt, *row.responses)]


def test_a_row_is_prompt_then_response_then_one_eos(tokenizer):
    row = raw("ab", "c", "de", tokenizer=tokenizer)
    assert row.prompt.tolist() == tokenizer("ab")["input_ids"]
    assert texts(row, tokenizer) == ["ab", "c<eos>", "de<eos>"]
    assert [list(part).count(EOS) for part in (row.prompt, *row.responses)] == [0, 1, 1]
    assert {part.dtype for part in (row.prompt, *row.responses)} == {np.dtype(np.int32)}
    assert (row.name, row.pairs, row.extra, row.notes) == ("test:1", ((0, 1),), {}, ())
    assert raw("a", "b", "c", "d", tokenizer=tokenizer).pairs == ()
    assert raw("a" * 2000, "b", tokenizer=tokenizer).longest == 1024


def test_prompts_without_responses_are_rows(tokenizer):
    """All tokens are those of the prompt."""
    (row,) = encode_all([Record("0123456789ab", (), ())], tokenizer, 10)
    assert texts(row, tokenizer) == ["23456789ab"] and row.responses == () and row.pairs == ()
    assert encode_all([], tokenizer) == []


def test_values_of_pairs_keep_their_types(tokenizer):
    """Numbers become float32, as losses are; whole numbers are indices, and truth values masks."""
    extra = {"margins": [0.1, 2.0], "dimensions": [0, 1], "desirable": [True, False]}
    (row,) = encode_all([Record("p", ("a", "b"), ((0, 1), (1, 0)), extra)], tokenizer)
    assert row.pairs == ((0, 1), (1, 0))
    assert {name: values.dtype for name, values in row.extra.items()} == {
        "margins": np.float32,
        "dimensions": np.int64,
        "desirable": np.bool_,
    }
    assert row.extra["margins"].tolist() == [np.float32(0.1), 2.0]
    assert row.extra["dimensions"].tolist() == [0, 1]


def test_what_reading_left_out_is_noted_first(tokenizer):
    (row,) = encode_all([Record("Hi", ("a", " "), notes=("columns",))], tokenizer)
    assert row.notes == ("columns", BLANK_RESPONSE)


# --- tokens


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


def test_no_space_is_put_before_a_response():
    """ "Q:" ++ "yes" has the tokens of "Q:yes", though "yes" alone would begin with a space."""
    tokenizer = sentencepiece_like()
    row = raw("Q:", "yes", " no", tokenizer=tokenizer)
    words = tokenizer.convert_ids_to_tokens
    assert words(tokenizer("yes")["input_ids"]) == ["▁yes"]
    assert [words(part.tolist()) for part in row.responses] == [["yes", "<eos>"], ["▁no", "<eos>"]]


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
        "c",
        "d",
        "e",
    ]


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
