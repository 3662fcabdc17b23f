"""python -m pytest tests/evaluation/test_scoring.py

Scores of rows on any number of ranks and in both layouts; the views of a reward model.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, records
from evaluations import RULE, write_reward_model
from processes import run_ranks

from nanoalign.batch import Row, collate
from nanoalign.distributed import setup
from nanoalign.encode import CUT_PROMPT, CUT_RESPONSE, encode_all
from nanoalign.errors import RunError
from nanoalign.evaluation.scoring import Judge, View, encode_answers, score_rows
from nanoalign.loop import Batcher
from nanoalign.model import RewardModel
from nanoalign.packing.packed import PackedBatcher
from nanoalign.records import Record
from nanoalign.rewards.prompt_kinds import AS_DIALOGUE


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[Row]:
    return encode_all(records(7), tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama_folder, tokenizer) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("rm") / "model", llama_folder, tokenizer)


def scores_of(folder: Path, rows: list[Row], layout: type[Batcher]) -> list[list[float]]:
    world = setup()
    model = RewardModel.load(folder, world, trainable=False)
    batcher = layout(world, 300)
    batcher.prepare(model)
    return score_rows(model, rows, batcher, "it")


@pytest.mark.parametrize(("ranks", "layout"), [(2, Batcher), (3, PackedBatcher)])
def test_ranks_and_layout_change_no_score(folder, rows, ranks, layout):
    """7 rows do not divide by 2 or 3; every rank has every score, and those of plain lines."""
    outcome = run_ranks(ranks, scores_of, folder, rows, layout)
    assert outcome.codes == [0] * ranks, outcome.stderr
    with torch.no_grad():
        expected = RewardModel.load(folder)(collate(rows)).tolist()
    for scores in outcome.results:
        assert [len(row) for row in scores] == [2] * 7
        assert sum(scores, []) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("layout", [Batcher, PackedBatcher])
def test_equal_responses_have_one_score(folder, tokenizer, layout):
    """Also at different places of one row, where rounding differs."""
    long = [record.responses[0] * 3 for record in records(20)]
    twins = [Record("prompt", (text, text), name=str(i)) for i, text in enumerate(long)]
    scores = scores_of(folder, encode_all(twins, tokenizer), layout)
    assert all(first == second for first, second in scores) and len(set(map(tuple, scores))) == 20


def test_a_score_that_is_not_finite_is_refused_with_its_row(rows):
    def score(batch) -> torch.Tensor:
        return torch.where(batch.ends_at == batch.ends_at.max(), torch.nan, 1.0)

    with pytest.raises(RunError, match=r"test:6: --model m gives \[.*nan.*weights complete"):
        score_rows(score, rows[-1:], Batcher(setup(), 1000), "--model m")


# --- the form of prompts

DIALOGUE = "\n\nHuman: Is it late?\n\nAssistant: No.\n\nHuman: Why not?\n\nAssistant:"
MESSAGES = [
    {"role": "user", "content": "Is it late?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Why not?"},
]
# name: (a prompt, the same written out as an HH-RLHF dialogue by hand)
FORMS = {
    "text": ("Why not?", "\n\nHuman: Why not?\n\nAssistant:"),
    "text with white space": ("Why not?\n", "\n\nHuman: Why not?\n\nAssistant:"),
    "messages": (MESSAGES, DIALOGUE),
    "a dialogue": (DIALOGUE, DIALOGUE),
}


def judge_of(tokenizer, *kinds: str, max_length: int = 256, **more) -> Judge:
    """A judge whose model has nothing but a rule in its config; it was trained on some kinds."""
    rule = RULE | ({"prompts": list(kinds)} if kinds else {}) | more
    model = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(nanoalign=rule)))
    view = View("", "safer", {"safer": 2.0})
    return Judge("it", model, tokenizer, view, ("raw", max_length), Batcher(setup(), 300))


def tokens_of(judge: Judge, record: Record) -> list[list[int]]:
    """The prompt and the responses of the scored row."""
    (row,) = judge.encode([record])[0].rows
    return [part.tolist() for part in (row.prompt, *row.responses)]


@pytest.mark.parametrize("ended", [None, [None, False]])
@pytest.mark.parametrize("name", FORMS)
def test_prompts_are_scored_as_the_dialogues_that_the_model_was_trained_on(tokenizer, name, ended):
    """Token by token what the dialogue has that is written out by hand; "Assistant: answer"."""
    prompt, by_hand = FORMS[name]
    space = "" if name == "a dialogue" else " "  # which the responses of a dialogue begin with
    records = [Record(prompt, (text,), name="it") for text in ("Because.", " Who knows?")]
    (encoded,) = judge_of(tokenizer, "dialogue").encode(records, ended)
    found = [row.responses[0].tolist() for row in encoded.rows]
    ids = [tokenizer(t)["input_ids"] for t in (by_hand, f"{space}Because.", " Who knows?")]
    eos = tokenizer.eos_token_id
    assert [row.prompt.tolist() for row in encoded.rows] == [ids[0]] * 2
    assert found == [[*ids[1], eos], ids[2] if ended else [*ids[2], eos]]


@pytest.mark.parametrize("kinds", [(), ("text",), ("dialogue", "text")])
def test_text_is_scored_as_it_is_by_models_that_were_trained_on_text(tokenizer, kinds):
    """Also by older models, whose config does not tell."""
    found = tokens_of(judge_of(tokenizer, *kinds), Record("Why not?", ("Because.",), name="it"))
    assert found[0] == tokenizer("Why not?")["input_ids"]
    assert found[1] == [*tokenizer("Because.")["input_ids"], tokenizer.eos_token_id]


def test_what_was_written_as_a_dialogue_is_counted_once_a_prompt(tokenizer):
    """Responses that are cut are counted one by one."""
    plain, dialogue = (Record(prompt, ("a", "b")) for prompt in FORMS["text"])
    records = [plain, dialogue, Record("Who?", ("a",)), plain]
    (encoded,) = judge_of(tokenizer, "dialogue").encode(records)
    assert encoded.counts(records) == {AS_DIALOGUE: 2}
    long = [Record("fourteen words", (text, "b")) for text in ("a long" * 4, "c long" * 4)]
    (encoded,) = judge_of(tokenizer, max_length=20).encode(long)
    assert encoded.counts(long) == {CUT_PROMPT: 1, CUT_RESPONSE: 2}


REFUSED = {
    "dialogue": ("text", DIALOGUE, "prompt is an HH-RLHF dialogue.*--template chat or pku"),
    "messages": ("text", MESSAGES, "prompt is messages.*--template chat or pku"),
    "system": ("dialogue", [{"role": "system", "content": "Be kind."}, *MESSAGES],
               "prompt .*'Be kind.'.* is neither a text, nor .*--template chat"),
    "tool calls": ("dialogue", [*MESSAGES[:2], MESSAGES[2] | {"tool_calls": []}], "is neither a"),
    "answer first": ("dialogue", MESSAGES[1:], "of which the first is the user's"),
    "half a dialogue": ("dialogue", "\n\nHuman: Why not?", "that ends with '.n.nAssistant:'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_prompt_without_such_a_form_is_an_error_that_names_a_template(tokenizer, name):
    kind, prompt, message = REFUSED[name]
    with pytest.raises(RunError, match=f"it:7: .*{message}"):
        tokens_of(judge_of(tokenizer, kind), Record(prompt, ("a",), name="it:7"))


def test_a_conditioned_model_names_its_preference_in_the_dialogue(tokenizer):
    judge = judge_of(tokenizer, "dialogue", condition=True)
    (encoded,) = judge.encode([Record("Why not?", ("a",))])
    prompt = tokenizer.decode(encoded.rows[0].prompt)
    assert encoded.factor == 2 and prompt == "\n\nHuman: Why not? [safer]\n\nAssistant:"


def test_lengths_are_those_of_the_dialogue_without_the_cut(tokenizer):
    """The prompt, as "\\n\\nHuman: Hi\\n\\nAssistant:", has 23 of 50 tokens: 27 are left."""
    records = [Record("Hi", ("a" * 25, "b" * 26, "c" * 60)), Record("Hi", ("d",))]
    judge = judge_of(tokenizer, "dialogue", max_length=50)
    assert judge.lengths(records, judge.encode(records)) == [
        [(27, 1.0), (28, 27 / 28), (62, 27 / 62)],
        [(3, 1.0)],
    ]


# --- sampled answers


def test_an_answer_that_was_cut_has_no_end(tokenizer):
    """No EOS, and not what a chat template writes behind an answer; one without text keeps it."""
    chat = byte_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    records = [Record("q", (text,), pairs=()) for text in ("cut he", "whole", "", "unknown")]
    for template, its, tail in (("raw", tokenizer, ""), ("chat", chat, "[end]\n")):
        rows = encode_answers(records, its, 1024, template, [False, True, False, None])
        texts = [its.decode(row.responses[0]) for row in rows]
        assert texts == ["cut he", f"whole{tail}<eos>", "<eos>", f"unknown{tail}<eos>"]


def test_an_answer_that_was_cut_has_no_end_where_the_template_strips_it():
    chat = byte_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    records = [Record("q", (text,), pairs=()) for text in ("\n cut he ", " whole ")]
    rows = encode_answers(records, chat, 1024, "chat", [False, True])
    assert [chat.decode(row.responses[0]) for row in rows] == ["cut he", "whole[end]\n<eos>"]


def test_an_answer_that_a_file_ends_with_eos_has_one_end():
    """Also where it was cut, when it has none."""
    chat = byte_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    records = [Record("q", (text,), pairs=()) for text in ("cut he<eos>", "whole<eos> <eos>\n")]
    for template in ("raw", "chat"):
        rows = encode_answers(records, chat, 1024, template, [False, None])
        assert [chat.decode(row.responses[0]) for row in rows] == ["cut he", "whole<eos>"]
