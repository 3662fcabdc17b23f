"""python -m pytest tests/test_rows.py"""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nanoalign.errors import RunError
from nanoalign.plan import plan_micro_batches, step_indices
from nanoalign.records import Example, Pair
from nanoalign.rows import (
    PADDING,
    Row,
    _tokenize_continuations,
    check_fits,
    collate,
    decode_continuation,
    drop_equal,
    encode,
    encode_all,
    row_digest,
)

BOS, EOS = 257, 258


def row(prompt: list[int], *responses: list[int], pair_id: str = "row") -> Row:
    return Row(pair_id, np.array(prompt, np.int32), tuple(np.array(r, np.int32) for r in responses))


def text(prompt: str, chosen: str, rejected: str, kind: str = "text") -> Example:
    return Example("test:1", kind, prompt, (chosen, rejected))


# --- text -> tokens


def test_encode_is_prompt_then_response_then_one_eos(tokenizer):
    r = encode(text("ab", "c", "de"), tokenizer, "raw")
    assert tokenizer.decode(r.prompt) == "ab"
    assert [tokenizer.decode(response[:-1]) for response in r.responses] == ["c", "de"]
    assert [response[-1] for response in r.responses] == [EOS, EOS]


def test_pku_template(tokenizer):
    r = encode(text("Hi", "yes", "no"), tokenizer, "pku")
    assert tokenizer.decode(r.prompt) == "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:"
    assert tokenizer.decode(r.responses[0]) == "yes<eos>"


def test_pku_text_can_not_smuggle_special_tokens(tokenizer):
    r = encode(text("a <eos>", "b <bos>", "c"), tokenizer, "pku")
    assert EOS not in r.prompt and BOS not in r.responses[0]
    assert list(r.responses[0]).count(EOS) == 1


def test_an_eos_that_the_text_wrote_is_not_doubled(tokenizer):
    r = encode(text("a", "b<eos>", "c<eos>\n"), tokenizer, "raw")
    assert [tokenizer.decode(response) for response in r.responses] == ["b<eos>", "c<eos>"]


def sentencepiece_like():
    """Words with a leading "▁", which the tokenizer also puts before the start of any text."""
    words = ["<unk>", "<bos>", "<eos>", "▁yes", "yes", "▁Q", ":", "▁no", "\n", "▁", "▁x", "x"]
    core = Tokenizer(models.Unigram([(w, -1.0 * (len(w) < 3)) for w in words], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens(["<bos>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")


def test_no_space_is_put_before_a_response():
    """ "Q:" ++ "yes" has the tokens of "Q:yes", though "yes" alone would begin with a space."""
    tokenizer = sentencepiece_like()
    r = encode(text("Q:", "yes", " no"), tokenizer, "raw")
    words = tokenizer.convert_ids_to_tokens
    assert words(tokenizer("yes")["input_ids"]) == ["▁yes"]
    assert [words(part.tolist()) for part in r.responses] == [["yes", "<eos>"], ["▁no", "<eos>"]]


def test_a_prompt_without_tokens_is_an_error():
    silent = byte_tokenizer()
    silent.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(RunError, match="test:1: the prompt has no tokens"):
        encode(text("  ", "a", "b"), silent, "raw")


def test_ids_and_positions_that_the_model_lacks_are_errors():
    rows = [row([1, 2], [3], [4, 5])]
    check_fits(rows, vocabulary=6, positions=4)
    with pytest.raises(RunError, match="token id 5, but the model knows 5"):
        check_fits(rows, vocabulary=5, positions=4)
    with pytest.raises(RunError, match="has 4 tokens, but the model knows 3 positions; give --max"):
        check_fits(rows, vocabulary=6, positions=3)


def test_one_bos_where_the_tokenizer_adds_one(tokenizer):
    adding = byte_tokenizer()
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    r = encode(text("ab", "c", "d"), adding, "raw")
    assert tokenizer.decode(r.prompt) == "<bos>ab"  # its EOS would end the prompt: dropped
    again = encode(text("<bos>ab", "c", "d"), adding, "raw")
    assert list(again.prompt) == list(r.prompt)  # where the text has a BOS, it is the only one
    assert tokenizer.decode(r.responses[0]) == "c<eos>"


CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat_template_renders_prompt_once_and_ends_with_one_eos():
    chat = byte_tokenizer(chat_template=CHAT)
    r = encode(text("Hi", "yes", "no"), chat)  # auto: the tokenizer has one
    assert chat.decode(r.prompt) == "<bos><user>Hi<eos>\n<assistant>"
    assert [chat.decode(response) for response in r.responses] == ["yes<eos>", "no<eos>"]


def test_chat_template_of_a_dialogue_has_its_turns():
    chat = byte_tokenizer(chat_template=CHAT)
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    r = encode(text(prompt, " d", " e", kind="dialogue"), chat)
    expected = "<bos><user>a<eos>\n<assistant>b<eos>\n<user>c<eos>\n<assistant>"
    assert chat.decode(r.prompt) == expected and chat.decode(r.responses[0]) == "d<eos>"


def test_chat_template_that_changes_the_prompt_is_an_error():
    strange = byte_tokenizer(chat_template="{{ messages|length }}" + CHAT)
    with pytest.raises(
        RunError, match=r"test:1: .* does not begin with its rendering of the prompt"
    ):
        encode(text("Hi", "yes", "no"), strange)


def test_auto_takes_raw_for_dialogues_and_pku_for_plain_prompts(tokenizer):
    dialogue = text("\n\nHuman: a\n\nAssistant:", " b", " c", kind="dialogue")
    assert tokenizer.decode(encode(dialogue, tokenizer).prompt) == dialogue.prompt
    assert tokenizer.decode(encode(text("a", "b", "c"), tokenizer).prompt).startswith("BEGINNING")


def test_too_long_prompt_loses_its_beginning_once_for_both(tokenizer):
    """Room for 10: the longer response has 3 + EOS = 4, so the prompt keeps its last 6."""
    rows, counts = encode_all([text("0123456789", "abc", "d")], tokenizer, "raw", max_length=10)
    assert tokenizer.decode(rows[0].prompt) == "456789"
    assert [tokenizer.decode(r) for r in rows[0].responses] == ["abc<eos>", "d<eos>"]
    assert counts["prompts cut at their beginning"] == 1


def test_a_cut_prompt_keeps_its_bos(tokenizer):
    r = encode(text("<bos>0123456789", "abc", "d"), tokenizer, "raw", max_length=10)
    assert tokenizer.decode(r.prompt) == "<bos>56789"


def test_too_long_response_loses_its_end_and_its_eos(tokenizer):
    """Room for 10: the prompt keeps half, 5; the responses get the other 5."""
    rows, counts = encode_all(
        [text("0123456789", "abcdefg", "hijk")], tokenizer, "raw", max_length=10
    )
    assert tokenizer.decode(rows[0].prompt) == "56789"
    assert [tokenizer.decode(r) for r in rows[0].responses] == ["abcde", "hijk<eos>"]
    assert counts["responses cut at their end (no EOS)"] == 1


def test_pairs_equal_after_cutting_are_dropped_and_counted(tokenizer):
    rows, counts = encode_all(
        [text("01234", "abcdeX", "abcdeY"), text("01234", "abc", "abd")],
        tokenizer,
        "raw",
        max_length=10,
    )
    assert [r.pair_id for r in drop_equal(rows, counts)] == ["test:1"]
    assert counts["pairs dropped: both responses equal"] == 1


def test_tokenizer_without_eos_is_an_error():
    with pytest.raises(RunError, match="no EOS token"):
        encode(text("a", "b", "c"), byte_tokenizer(eos_token=None), "raw")


def test_a_rows_digest_tells_every_change_but_that_of_its_name():
    base = row([1, 2], [3], [4])
    changed = [
        row([1, 2], [4], [3]),
        row([1], [2, 3], [4]),
        row([1, 2], [3], [5]),
        row([1, 2], [3]),
    ]
    assert row_digest(base) == row_digest(replace(base, pair_id="other"))
    assert len({row_digest(r) for r in [base, *changed]}) == 5


# --- rows -> tensors


def test_collate_by_hand():
    """The row of the module's docstring, p0 p1 p2 | c0 c1 c2 | r0 r1, before a shorter one."""
    batch = collate([row([10, 11, 12], [20, 21, 22], [30, 31]), row([40], [50], [60])])
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, 22, 30, 31, 40, 50, 60]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 1]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 0, 1, 2]]
    # c0 is read at p2, c1 at c0, c2 at c1; r0 at p2 too, r1 at r0; the second row starts at 8.
    assert batch.reads.tolist() == [2, 3, 4, 2, 6, 8, 8]
    assert batch.targets.tolist() == [20, 21, 22, 30, 31, 50, 60]
    assert batch.lengths.tolist() == [3, 2, 1, 1]
    assert batch.tree.rows == [(3, 3, 2), (1, 1, 1)]


def test_collate_names_pairs_and_last_tokens_by_hand():
    """A pair, and a ranked row of three responses with two pairs of margin 2 and 0.5.

    Responses 0, 1 | 2, 3, 4; their last tokens stand at 2, 4 of the first row, 1, 2, 5 of the second,
    which begins at 5.
    """
    ranked = Row("b", np.array([7]), tuple(map(np.array, ([1], [2], [3, 4, 5]))),
                 (Pair(0, 2, 2.0), Pair(1, 2, 0.5)))  # fmt: skip
    for weight in (1.0, 0.0):
        batch = collate([row([8], [1, 2], [3, 4]), ranked], weight=weight)
        assert batch.ends.tolist() == [2, 4, 6, 7, 10]
        assert batch.chosen.tolist() == [0, 2, 3] and batch.rejected.tolist() == [1, 4, 4]
        assert batch.margins.tolist() == [1.0, 2.0, 0.5]
        assert batch.weights.tolist() == [weight, weight / 2, weight / 2]
    apart = collate([row([8], [1, 2], [3, 4]), ranked], share_prefix=False)
    assert apart.ends.tolist() == [2, 6, 9, 13, 19]  # five rows of width 4
    assert apart.chosen.tolist() == [0, 2, 3] and apart.rejected.tolist() == [1, 4, 4]


def test_a_ranked_record_loses_its_equal_pairs_alone(tokenizer):
    ranked = Example("r", "text", "01234", ("abcdeX", "abcdeY", "z"),
                     pairs=(Pair(0, 1, 1.0), Pair(0, 2, 3.0), Pair(1, 2, 2.0)))  # fmt: skip
    tied = Example("t", "text", "01234", ("a", "b"), pairs=())
    rows, counts = encode_all([ranked, tied], tokenizer, "raw", max_length=10)
    (kept,) = drop_equal(rows, counts)
    assert kept.pairs == (Pair(0, 2, 3.0), Pair(1, 2, 2.0))
    assert counts["pairs dropped: both responses equal"] == 1
    assert counts["ranked records dropped: all scores equal"] == 1


def test_collate_without_sharing_is_a_row_a_response():
    batch = collate([row([10, 11], [20, 21], [30])], share_prefix=False)
    assert batch.tokens.tolist() == [[10, 11, 20, 21], [10, 11, 30, 0]]
    assert batch.reads.tolist() == [1, 2, 5]
    assert batch.segments.tolist() == [[0, 0, 1, 1], [0, 0, 1, PADDING]]
    assert batch.weights.tolist() == [1.0] and batch.tree is None


# --- the plan


def random_rows(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    lengths = [[draw.randint(1, 60) for _ in range(3)] for _ in range(count)]
    return [row([1] * a, [2] * b, [3] * c, pair_id=str(i)) for i, (a, b, c) in enumerate(lengths)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 200, 1000, 10**6])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_plan_places_every_pair_once_within_the_limit(count, tokens, ranks, share):
    rows = random_rows(count, seed=count)
    plan = plan_micro_batches(rows, ranks, tokens, share)
    assert all(len(part) == ranks for part in plan)
    assert sorted(i for part in plan for group in part for i in group) == list(range(count))
    for group in (group for part in plan for group in part if group):
        padded = collate([rows[i] for i in group], share).tokens.numel()
        assert padded <= tokens or len(group) == 1


def test_plan_gives_ranks_even_work():
    """64 pairs of 3 to 180 tokens on 8 ranks: no rank has more than 1.05 times the mean."""
    rows = random_rows(64, seed=0)
    plan = plan_micro_batches(rows, 8, 10**6)
    work = [sum(len(rows[i]) for part in plan for i in part[rank]) for rank in range(8)]
    assert len(plan) == 1 and max(work) < 1.05 * sum(work) / 8


def test_plan_packs_without_padding_into_the_fewest_micro_batches():
    rows = random_rows(512, seed=1)
    plan = plan_micro_batches(rows, 2, 2000)
    tokens = [collate([rows[i] for i in group]).tokens.numel() for part in plan for group in part]
    assert sum(tokens) == sum(map(len, rows))
    assert len(plan) == math.ceil(sum(tokens) / 4000)


def test_a_round_is_filled_to_its_longest_row_by_hand():
    """Rows of 6, 2, 2, 2, 2, 2 on two ranks, 6 at a time: 6 | 2 2 2, then 2 | 2: 8 tokens of time, not 10."""
    rows = [row([1] * (n - 1), [2], []) for n in (2, 2, 6, 2, 2, 2)]
    plan = plan_micro_batches(rows, 2, 6)
    lengths = [[sorted(len(rows[i]) for i in group) for group in part] for part in plan]
    assert lengths == [[[6], [2, 2, 2]], [[2], [2]]]


def test_plan_of_separate_responses_pads_little():
    """Rows of similar length stand together: 1.25 padded tokens a real one, where random groups have 1.5."""
    rows = random_rows(512, seed=1)
    plan = plan_micro_batches(rows, 1, 2000, share_prefix=False)
    padded = sum(collate([rows[i] for i in part[0]], False).tokens.numel() for part in plan)
    assert padded < 1.25 * sum(len(part) for row in rows for part in row.separate())


def test_steps_of_an_epoch_are_a_permutation_with_nothing_dropped():
    steps = [step_indices(step, pairs=10, batch_size=4, seed=0) for step in range(6)]
    assert [len(s) for s in steps] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert list(step_indices(0, 10, 10, seed=1)) != list(first)


def test_an_answer_that_was_cut_has_no_end(tokenizer):
    """Neither EOS, nor under a chat template what it writes behind an answer; one of no text keeps it."""
    chat = byte_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    example = Example("a", "text", "q", ("cut he", "whole", "", "unknown"), pairs=())
    for template, its, tail in (("raw", tokenizer, ""), ("chat", chat, "[end]\n")):
        ((row,), _) = encode_all([example], its, template, ended=[(False, True, False, None)])
        texts = [its.decode(response) for response in row.responses]
        assert texts == ["cut he", f"whole{tail}<eos>", "<eos>", f"unknown{tail}<eos>"]


def test_a_sampled_answer_keeps_the_space_that_begins_it(tokenizer):
    """Byte-level, and SentencePiece's way, whose decoder drops a text's first space."""
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("▁abc\n")}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    metaspace = PreTrainedTokenizerFast(tokenizer_object=core)
    for its in (tokenizer, metaspace):
        for text in (" ab c", "ab c"):
            ids = _tokenize_continuations([text], its, plain=False)[0]
            assert decode_continuation(ids, its) == text
