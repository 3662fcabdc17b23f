"""python -m pytest tests/evaluation/test_answer_rows.py"""

from conftest import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanoalign.encode import tokenize_continuations
from nanoalign.evaluation.answer_rows import decode_continuation, encode_answers
from nanoalign.records import Record


def test_an_answer_that_was_cut_has_no_end(tokenizer):
    """No EOS, and not what a chat template writes behind an answer; one without text keeps it."""
    chat = byte_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    record = Record("q", ("cut he", "whole", "", "unknown"), pairs=())
    for template, its, tail in (("raw", tokenizer, ""), ("chat", chat, "[end]\n")):
        (row,) = encode_answers([record], its, 1024, template, [(False, True, False, None)])
        texts = [its.decode(response) for response in row.responses]
        assert texts == ["cut he", f"whole{tail}<eos>", "<eos>", f"unknown{tail}<eos>"]


def test_an_answer_that_a_file_ends_with_eos_has_one_end():
    """Also where it was cut, when it has none."""
    chat = byte_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    record = Record("q", ("cut he<eos>", "whole<eos> <eos>\n"), pairs=())
    for template in ("raw", "chat"):
        (row,) = encode_answers([record], chat, 1024, template, [(False, None)])
        assert [chat.decode(response) for response in row.responses] == ["cut he", "whole<eos>"]


def test_a_sampled_answer_ends_before_the_end_of_its_turn():
    """Of a model whose EOS is another token, so that it writes a newline between the two."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=True)])
    expected = {"Fine.<end>\n": "Fine.", "Fine.<end>": "Fine.", "Fine.\n": "Fine.\n",
                "a\n<end>\n": "a\n", "a<end>b\n": "ab\n", "<end>": "", "": ""}  # fmt: skip
    for text, answer in expected.items():
        assert decode_continuation(tokenizer(text)["input_ids"], tokenizer) == answer


def test_a_sampled_answer_keeps_the_space_that_begins_it(tokenizer):
    """Byte-level, and as SentencePiece, whose decoder drops the first space of a text."""
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("▁abc\n")}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    metaspace = PreTrainedTokenizerFast(tokenizer_object=core)
    for its in (tokenizer, metaspace):
        for text in (" ab c", "ab c"):
            assert decode_continuation(tokenize_continuations([text], its)[0], its) == text
