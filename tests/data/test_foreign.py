"""python -m pytest tests/data/test_foreign.py

Records of other programs, by hand: prompt, responses (best first), pairs, margins.
"""

import copy
import json
import re
from pathlib import Path

import pytest
from stores import parsed, read, write

import train_dpo
from nanoalign import records
from nanoalign.data.foreign import FOREIGN
from nanoalign.data.formats import formats, names_of
from nanoalign.data.prompts import prompt_of, read_prompts
from nanoalign.errors import RunError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


DOCS = Path(__file__).parents[2] / "docs/data.md"
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CALL = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 3, "b": 4}}'}
CALLED = assistant("") | {
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}]
}
RATINGS = {"helpfulness": {"Rating": "1"}, "truth": {"Rating": 4}, "honesty": {"Rating": "N/A"}}
RATED = {"response": "low", "annotations": RATINGS}
PAIR, FIRST = ((0, 1),), [1.0]
CASES = {
    "sharegpt": (
        {"conversations": [HUMAN, GPT, HUMAN], "chosen": {"from": "gpt", "value": "c"},
         "rejected": {"from": "gpt", "value": "r"}},
        ([user("q"), assistant("a"), user("q")], ("c", "r"), PAIR, FIRST),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4", "margin": 2},
        ("Add.\n1 and 2", ("3", "4"), PAIR, [2.0]),
    ),
    "alpaca with a history": (
        {"instruction": "And?", "input": "", "history": [["q", "a"]], "chosen": "c",
         "rejected": "r"},
        ([user("q"), assistant("a"), user("And?")], ("c", "r"), PAIR, FIRST),
    ),
    "orca": (
        {"system": "Be kind.", "question": "q", "chosen": "c", "rejected": "r"},
        ([{"role": "system", "content": "Be kind."}, user("q")], ("c", "r"), PAIR, FIRST),
    ),
    "orca of argilla": (
        {"input": "q", "chosen": "c", "rejected": "r"}, ("q", ("c", "r"), PAIR, FIRST),
    ),
    "openai": (
        {"messages": [user("q")], "chosen": assistant("c"), "rejected": assistant("r")},
        ([user("q")], ("c", "r"), PAIR, FIRST),
    ),
    "ms-swift": (
        {"messages": [user("q"), assistant("c")], "rejected_response": "r"},
        ([user("q")], ("c", "r"), PAIR, FIRST),
    ),
    "ms-swift, messages": (
        {"messages": [user("q"), assistant("c")], "rejected_messages": [user("q"), assistant("r")]},
        ([user("q")], ("c", "r"), PAIR, FIRST),
    ),
    "torchtune": (
        {"chosen_conversations": [user("q"), assistant("c")],
         "rejected_conversations": [user("q"), assistant("r")]},
        ([user("q")], ("c", "r"), PAIR, FIRST),
    ),
    "nemo-rl": (
        {"context": [user("q")], "completions": [
            {"rank": 2, "completion": [assistant("r")]},
            {"rank": 0, "completion": [assistant("c")]}]},
        ([user("q")], ("c", "r"), PAIR, [2.0]),
    ),
    "openrlhf": (
        {"context_messages": [user("q")], "chosen": "c", "rejected": "r"},
        ([user("q")], ("c", "r"), PAIR, FIRST),
    ),
    "shp, A": (
        {"history": "post", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        ("post", ("a", "b"), PAIR, FIRST),
    ),
    "shp, B": (
        {"history": "post", "human_ref_A": "a", "human_ref_B": "b", "labels": 0},
        ("post", ("b", "a"), PAIR, FIRST),
    ),
    "nectar": (
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [
            {"answer": "third", "model": "x", "rank": 3}, {"answer": "first", "rank": 1}]},
        ("\n\nHuman: q\n\nAssistant:", (" first", " third"), PAIR, [2.0]),
    ),
    "ultrafeedback": (
        {"instruction": "q", "completions": [RATED, {"response": "high", "overall_score": 7.5}]},
        ("q", ("high", "low"), PAIR, [5.0]),
    ),
    "helpsteer2": (
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2},
        ("q", ("a", "b"), PAIR, [2.0]),
    ),
    "helpsteer2, several turns": (
        {"prompt": "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nmore", "response_1": "a",
         "response_2": "b", "preference_strength": 1},
        ([user("q"), assistant("a"), user("more")], ("b", "a"), PAIR, FIRST),
    ),
    "sharegpt with a tool": (
        {"conversations": [HUMAN, CALL, {"from": "observation", "value": "7"}],
         "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}},
        ([user("q"), CALLED, {"role": "tool", "content": "7"}], ("c", "r"), PAIR, FIRST),
    ),
    "helpsteer3": (
        {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 3},
        ([user("q")], ("b", "a"), PAIR, [3.0]),
    ),
    "helpsteer3, equal": (
        {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 0},
        ([user("q")], ("a", "b"), (), []),
    ),
}  # fmt: skip
SINGLES = {
    "messages": ({"messages": [user("q"), assistant("a")]}, [user("q")], None),
    "sharegpt": ({"conversations": [HUMAN, GPT]}, [user("q")], None),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, "q", None),
    "pair of texts": ({"prompt": "q", "completion": "a"}, "q", None),
    "kto_tag": ({"instruction": "q", "output": "a", "kto_tag": False}, "q", False),
    "kto_tag, sharegpt": ({"conversations": [HUMAN, GPT], "kto_tag": True}, [user("q")], True),
    "label of 1": ({"prompt": "q", "completion": "a", "label": 1}, "q", True),
    "label of 0": ({"prompt": "q", "completion": "a", "label": 0}, "q", False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_record_of_another_program_is_one_of_ours(name):
    record, (prompt, responses, wanted, margins) = CASES[name]
    found = parsed(record)
    assert (found.prompt, found.responses, found.pairs) == (prompt, responses, wanted)
    assert found.extra["margins"] == margins
    asked = prompt_of(record, "a.jsonl:1")  # evaluate.py policy takes its prompt
    asked_prompt = asked.prompt.rstrip(" ") if isinstance(asked.prompt, str) else asked.prompt
    assert (asked_prompt, asked.responses) == (prompt, ())


def test_every_format_has_a_case():
    known = formats()
    tried = [record for record, *_ in (*CASES.values(), *SINGLES.values())]
    taken = {next(keys for keys in known if record.keys() >= {*keys}) for record in tried}
    assert {*FOREIGN} - taken == {("prompt", "response", "helpfulness")}


@pytest.mark.parametrize("name", SINGLES)
def test_single_responses(name):
    """--loss sft takes demonstrations, and labels of true; kto takes labels alone."""
    record, prompt, label = SINGLES[name]
    for loss, refused in (("sft", label is False), ("kto", label is None), ("", True)):
        if refused:
            with pytest.raises(RunError, match="a.jsonl:1: .*(good responses|needs a label|pairs)"):
                parsed(record, unpaired=loss)
        else:
            found = parsed(record, unpaired=loss)
            assert (found.prompt, found.responses, found.pairs) == (prompt, ("a",), ((0, 0),))
            assert found.extra == {"desirable": [label is not False]}


def test_columns_that_nothing_reads_are_named():
    found = parsed(CASES["alpaca"][0] | {"source": "x", "id": 3})
    assert found.notes == ("records with ignored columns: id, source",)


def test_keys_gives_other_names():
    """A key of ours that is also there is another column."""
    record = {"question": "q", "good": "c", "bad": "r", "prompt": "no prompt", "margin": 3}
    keys = ["prompt=question", "chosen=good", "rejected=bad"]
    found = parsed(record, keys=keys)
    assert (found.prompt, found.responses, found.extra) == ("q", ("c", "r"), {"margins": [3.0]})
    ranked = {"q": "p", "texts": ["a", "b"], "stars": [1, 5]}
    keys = ["prompt=q", "responses=texts", "scores=stars"]
    found = parsed(ranked, keys=keys)
    assert (found.prompt, found.responses, found.extra["margins"]) == ("p", ("b", "a"), [4.0])


@pytest.mark.parametrize("key", ["prompt", "prompt=", "promt=question", "=x"])
def test_keys_that_are_no_names(key):
    with pytest.raises(RunError, match=f"--keys {key}: expected OURS=THEIRS"):
        names_of([key])


BAD = {
    "a call that is no JSON": (
        CASES["sharegpt"][0] | {"conversations": [HUMAN, CALL | {"value": "add(3, 4)"}]},
        "conversations has a function_call of 'add\\(3, 4\\)'; expected JSON with name and arg",
    ),
    "a turn of somebody else": (
        CASES["helpsteer2"][0] | {"prompt": "q\n<extra_id_1>System\na"},
        "the prompt has a turn of 'System'; expected User or Assistant",
    ),
    "rank missing": ({"prompt": "q", "answers": [{"answer": "a"}]}, "objects with answer and rank"),
    "no ratings": ({"instruction": "q", "completions": [{"response": "a"}]}, "has no ratings"),
    "label": ({"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": "A"}, "labels is"),
    "one message": ({"messages": [user("q")]}, "has one message"),
    "from nobody": ({"conversations": [{"from": "cat", "value": "q"}] * 2}, "from 'cat'"),
    "ratings of one answer": ({"prompt": "q", "response": "a", "helpfulness": 4}, "preference/"),
    "text for a number": (
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "1"},
        "strength must be a finite number",
    ),
    "near a format": (
        {"question": "q", "good": "c", "rejected": "r"},
        r"keys \['good', 'question', 'rejected'\]; the nearest format is question \+ chosen \+ "
        "rejected, without 'chosen' here",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_errors_with_file_and_line(name):
    record, message = BAD[name]
    with pytest.raises(RunError, match=f"a.jsonl:1: .*{message}"):
        parsed(record)


def test_texts_without_a_prompt_are_split_where_a_word_differs():
    """Not within a word: 'gr' of green and grey is no prompt. Such records are counted."""
    record = {"chosen": "The sky is grey.", "rejected": "The sky is green."}
    found = parsed(record)
    assert (found.prompt, found.responses) == ("The sky is", (" grey.", " green."))
    assert found.notes == ("prompts taken from the words that both texts begin with",)
    with pytest.raises(RunError, match="a.jsonl:1: 'prompt' is missing, .* share no words"):
        parsed({"chosen": "green", "rejected": "grey"})


def test_what_a_run_with_keys_held_out_has_our_names(tmp_path):
    """So evaluate.py reads it without --keys; and other data with them."""
    lines = [{"q": f"Say {n}.", "a": f"It is {n}.", "b": "No."} for n in range(12)]
    source, keys = write(tmp_path / "named.jsonl", *lines), ["prompt=q", "chosen=a", "rejected=b"]
    out = tmp_path / "run"
    train_dpo.main(["--data", source, "--keys", *keys, "--eval_share", "0.4", "--steps", "1",
                    "--batch_size", "4", "--out", str(out)])  # fmt: skip
    held_out = read(f"held_out:{out}")
    assert 0 < len(held_out) < 12
    assert all(each.responses == (f"It is {each.prompt[4:-1]}.", "No.") for each in held_out)
    asked = read_prompts([f"held_out:{out}"])
    assert [each.prompt for each in asked] == [each.prompt for each in held_out]
    assert [each.prompt for each in read_prompts([source], keys)] == [line["q"] for line in lines]


ODD = (None, 3, "", "x", [], {}, True, [1], [None], [{}], {"a": 1}, 1e40, [[1, 2]])


def with_odd_values(value: object) -> list[object]:
    """Copies of a record, each with one value in it, at any depth, that is of another kind."""
    found = []
    keys = range(len(value)) if isinstance(value, list) else value
    for key in keys if isinstance(value, list | dict) else ():
        for other in (*ODD, *with_odd_values(value[key])):
            changed = copy.copy(value)
            changed[key] = other
            found.append(changed)
    return found


@pytest.mark.parametrize("name", [*CASES, *SINGLES])
def test_odd_values_are_errors_with_their_line(name):
    """Or they are read: a response may be other text. No other exception ends a run."""
    known, loss = formats(), formats(unpaired="kto")
    refused = 0
    for record in with_odd_values((CASES | SINGLES)[name][0]):
        for each in (known, loss):
            try:
                records.parse(record, "a.jsonl:1", each)
            except RunError as error:
                refused += str(error).startswith("a.jsonl:1: ")
    assert refused > 20


def test_the_examples_of_the_docs_are_what_they_say():
    """In docs/data.md "Nine." is better than "No.", and a single "Nine." is desirable."""
    rows = re.findall(r"^\| `.*?\| `(\{.*?\})` \|", DOCS.read_text(), flags=re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        record = json.loads(row)
        pairs = {"chosen", "responses", "answers", "completions", "chosen_conversations"}
        single = not {*pairs, "rejected_response", "rejected_messages"} & record.keys()
        single &= not any(key.endswith(("1", "2", "_B")) for key in record)
        labelled = {"label", "kto_tag"} & record.keys()
        loss = ("kto" if labelled else "sft") if single else ""
        _, found = records.parse(record, "docs", formats(unpaired=loss))
        texts = [response.strip() for response in found.responses]
        assert texts == (["Nine."] if single else ["Nine.", "No."]), row
        assert found.pairs == (((0, 0),) if single else PAIR)


@pytest.mark.parametrize("keys", [["chosen=gold"], ["prompt=q", "chosen=gold"], ["margin=m"]])
def test_a_record_without_a_column_that_keys_names_is_an_error(tmp_path, keys):
    """It is not read by our own names: that would train on something else than was asked for."""
    record = {"q": "Q", "prompt": "p", "chosen": "c", "rejected": "r"}
    source = write(tmp_path / "a.jsonl", record)
    missing = keys[-1].partition("=")[2]
    for act in (lambda: parsed(record, keys=keys), lambda: read_prompts([source], keys)):
        with pytest.raises(RunError, match=f"a.jsonl:1: --keys names {missing}, .* it has chosen"):
            act()


def test_embedded_data_keep_our_names_beside_keys():
    keys = ["prompt=question", "chosen=good", "rejected=bad"]
    assert read("tiny:test") == read("tiny:test", keys=keys)
