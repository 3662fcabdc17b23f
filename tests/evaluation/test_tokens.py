"""python -m pytest tests/evaluation/test_tokens.py

The values of tokens: those of Policy.tokens and of transformers, and sums that are those of
training; and the page that shows them.
"""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_llama, write_pairs
from processes import run_ranks
from tokenizers import Tokenizer, decoders, models, normalizers
from trainings import rm_without_picture, train
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import evaluate
from nanoalign.batch import Row
from nanoalign.data.formats import formats
from nanoalign.data.templates import encode_records
from nanoalign.errors import RunError
from nanoalign.evaluation import token_page, token_values
from nanoalign.evaluation.token_values import KINDS, Pair, Response
from nanoalign.model import Policy
from nanoalign.packing.packed import PackedBatcher
from nanoalign.records import Record, read

NASTY = "<script>alert('x')</script> & \"quotes\"\n\x1b[31m字"
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A policy, trained in 3 steps, its reference, a reward model, and 7 pairs."""
    folder = tmp_path_factory.mktemp("tokens")
    tiny_llama(1).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    pairs = write_pairs(folder / "pairs.jsonl", 7)
    flags = ["--beta", 0.3, "--max_length", 40, "--eval_data", pairs]
    train(folder / "base", pairs, folder / "policy", *flags, steps=3)
    train(folder / "base", pairs, folder / "rm", steps=3, main=rm_without_picture)
    return folder


def tokens_of(folder: Path, out: str, *flags: object, ranks: int = 1) -> tuple[list, dict, str]:
    """(lines of tokens.jsonl, metrics.json, what was printed) of evaluate.py tokens."""
    argv = ["tokens", "--data", folder / "pairs.jsonl", "--out", folder / out, *flags]
    outcome = run_ranks(ranks, evaluate.main, [str(word) for word in argv])
    assert outcome.codes == [0] * ranks, outcome.stderr
    lines = (folder / out / "tokens.jsonl").read_text().splitlines()
    figures = json.loads((folder / out / "metrics.json").read_text())
    return [json.loads(line) for line in lines], figures, outcome.stdout


@pytest.fixture(scope="module")
def of_policy(folder) -> tuple[list, dict, str]:
    models = "--policy", folder / "policy", "--reference", folder / "base"
    return tokens_of(folder, "of_policy", *models)


@pytest.fixture(scope="module")
def of_rewards(folder) -> tuple[list, dict, str]:
    return tokens_of(folder, "of_rewards", "--model", folder / "rm", ranks=2)


# --- values


@pytest.fixture(scope="module")
def rows(folder, tokenizer) -> list[Row]:
    """As the policy was trained: of at most 40 tokens."""
    records = list(read([str(folder / "pairs.jsonl")], formats()))
    return encode_records(records, tokenizer, 40, "raw")


def test_values_are_those_of_policy_tokens(folder, of_policy, rows, world):
    """Bit for bit, with the batches of the same layout."""
    lines, _, _ = of_policy
    batcher = PackedBatcher(world, 2048)
    for role, name in (("policy", "policy"), ("reference", "base")):
        model = Policy.load(folder / name, trainable=False)
        batcher.prepare(model)
        (batch,) = batcher.all(rows)
        expected = model.tokens(batch).split(batch.lengths.tolist())
        by_row = dict(zip(batch.rows, zip(expected[::2], expected[1::2], strict=True), strict=True))
        for n in range(len(rows)):
            for line, values in zip(lines[2 * n : 2 * n + 2], by_row[n], strict=True):
                assert line[role] == values.tolist()
    added = [np.subtract(line["policy"], line["reference"]).tolist() for line in lines]
    assert [line["added"] for line in lines] == added


def test_values_are_those_of_the_logits_of_transformers(folder, of_policy, rows):
    model = AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    prompt = rows[0].prompt.tolist()
    for line in of_policy[0][:2]:
        ids = torch.tensor([prompt + line["token_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert line["policy"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_sums_are_those_of_training(folder, of_policy):
    """beta, template and max_length are those of the run, which evaluated the same pairs."""
    _, figures, printed = of_policy
    lines = map(json.loads, (folder / "policy" / "metrics.jsonl").read_text().splitlines())
    measured = [line for line in lines if "eval/loss" in line][-1]
    for side in SIDES:
        logps, reward = measured[f"eval/logps/{side}"], measured[f"eval/rewards/{side}"]
        assert figures[f"{side}_policy"] == pytest.approx(logps, rel=1e-5)
        assert figures[f"{side}_reward"] == pytest.approx(reward, rel=1e-4, abs=1e-5)
        assert figures[f"{side}_added"] == pytest.approx(reward / 0.3, rel=1e-4, abs=1e-5)
    assert "template raw, max_length 40" in printed and "From the reference to the" in printed
    assert re.search(r"pairs.jsonl: 7 pairs; \d+ prompts? ", printed)


def test_two_ranks_give_the_same(folder, of_policy):
    models = "--policy", folder / "policy", "--reference", folder / "base"
    lines, _, _ = tokens_of(folder, "two", *models, "--no-share_prefix", ranks=2)
    for line, other in zip(lines, of_policy[0], strict=True):
        assert line["token_ids"] == other["token_ids"]
        assert line["added"] == pytest.approx(other["added"], abs=1e-4)


def test_rewards_are_those_of_responses_that_end_there(folder, of_rewards, tokenizer):
    """By transformers' own forward on each beginning of a response."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "rm").eval()
    prompt = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])["prompt"]
    prompt = tokenizer(prompt)["input_ids"]
    for line in of_rewards[0][:2]:
        ids, expected = prompt + line["token_ids"], []
        for end in range(len(prompt), len(ids) + 1):
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids[:end]])).last_hidden_state[0, -1]
            expected.append(model.score(hidden).item())
        assert line["reward"] == pytest.approx(expected[1:], abs=1e-4)
        assert line["added"] == pytest.approx(np.diff(expected).tolist(), abs=1e-4)


def test_the_last_rewards_are_those_of_evaluate_rm(folder, of_rewards):
    argv = ["rm", "--model", folder / "rm", "--data", folder / "pairs.jsonl"]
    evaluate.main([str(word) for word in (*argv, "--out", folder / "as_rm")])
    scores = (folder / "as_rm" / "scores.jsonl").read_text().splitlines()
    assert [line["reward"][-1] for line in of_rewards[0]] == pytest.approx(
        [json.loads(line)["score"] for line in scores], abs=1e-5
    )


# --- kinds of tokens


EOS = 9


@pytest.mark.parametrize(
    ("ids", "others", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, EOS], [1, 2, 3, 7, EOS], "shared shared shared own beyond beyond eos"),
        ([1, 2, 3, 7, EOS], [1, 2, 3, 4, 5, 6, EOS], "shared shared shared own eos"),
        ([1, EOS, 2], [3, EOS, 2, 4], "own shared shared"),  # both were cut
        ([EOS], [1, EOS], "eos"),
        ([1, 2], [1, EOS], "shared beyond"),
    ],
)
def test_kinds_by_hand(ids, others, expected):
    kinds = token_values.kinds_of(np.array(ids), np.array(others), EOS)
    assert [KINDS[kind] for kind in kinds] == expected.split()


def pair_of(chosen: list[float], rejected: list[float], name: str = "p:1") -> Pair:
    """A pair of a prompt called `name`: a shared, an own and, where there are three, an EOS."""
    sides = []
    for added in (chosen, rejected):
        kinds = [KINDS.index(kind) for kind in ("shared", "own", "eos")[: len(added)]]
        own, reference = np.array(added), np.full(len(added), -1.0)
        values = {"policy": own + reference, "reference": reference}
        sides.append(Response(np.arange(len(added)), own, values, np.array(kinds)))
    return Pair(Record(name, ("a", "b"), name=name), tuple(sides))


def test_figures_by_hand():
    """Two pairs of one prompt and one of another: their interval is that of two means."""
    pairs = [
        pair_of([1, 2, 4], [0, -1]),
        pair_of([3, 0, 0], [0, -3]),
        pair_of([2, 2, 4], [1, -2], "p:2"),
    ]
    figures = token_values.figures_of(pairs, beta=0.5)
    assert (figures["pairs"], figures["prompts"]) == (3, 2)
    expected = {
        "chosen_added": 6, "chosen_shared_added": 2, "chosen_own_added": 4 / 3,
        "chosen_eos_added": 8 / 3, "chosen_beyond_added": 0, "rejected_added": -5 / 3,
        "margin_added": 23 / 3, "margin_own_added": 10 / 3, "chosen_eos_tokens": 1,
        "rejected_eos_tokens": 0, "chosen_policy": 3, "chosen_reference": -3,
        "chosen_reward": 3, "rejected_reward": -5 / 6,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    for side in (*SIDES, "margin"):
        parts = sum(figures[f"{side}_{kind}_added"] for kind in KINDS)
        assert parts == pytest.approx(figures[f"{side}_added"])
    assert figures["chosen_added_low"] < 6 < figures["chosen_added_high"]


# --- sentences


def figures_with(**changed: tuple[float, float]) -> dict:
    """Figures of which none is beyond chance, but for those given as (value, half an interval)."""
    values = {f"{side}_added": (0.1, 1.0) for side in (*SIDES, "margin")}
    values |= {f"{s}_{k}_added": (0.0, 1.0) for s in (*SIDES, "margin") for k in KINDS}
    figures = {"pairs": 9, "prompts": 9, "chosen_policy": -3.0}
    figures |= {f"chosen_{kind}_tokens": 2.0 for kind in KINDS}
    for name, (value, half) in (values | changed).items():
        figures |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
    return figures


FELL = {"chosen_added": (-2, 0.5), "rejected_added": (-5, 0.5), "margin_added": (3, 0.5)}
SENTENCES = {
    "is no fault by itself": FELL,
    "The margin did not grow": {"chosen_added": (-2, 0.5)},
    "fall of chosen responses, 1.50 [1.40, 1.60] nats, is on tokens that both": FELL
    | {"chosen_shared_added": (-1.5, 0.1)},
    "is on tokens where the other response has another one (2.0": FELL
    | {"chosen_own_added": (-1.5, 0.1)},
    "is on tokens beyond the end of the other": FELL | {"chosen_beyond_added": (-1, 0.1)},
    "Most of the rise of chosen responses, 1.00": {"chosen_added": (2, 0.5)}
    | {"chosen_eos_added": (1, 0.1), "margin_added": (1, 0.5)},
    "became less probable, by 0.50 [0.40, 0.60] nats: sampled answers may get longer": FELL
    | {"chosen_eos_added": (-0.5, 0.1)},
    "so length may be a part of what the policy learns": FELL | {"margin_beyond_added": (1, 0.5)},
}


@pytest.mark.parametrize("text", SENTENCES)
def test_a_sentence_is_said_where_its_figures_are_beyond_chance(text):
    changed = SENTENCES[text]
    assert text in " ".join(token_page.notes_of(figures_with(**changed)))
    by_chance = figures_with(**{name: (value, 9) for name, (value, _) in changed.items()})
    notes = token_page.notes_of(by_chance)
    assert len(notes) == 1 and "The margin did not grow" in notes[0]


def test_the_conclusion_says_what_moved():
    text = token_page.conclusion(figures_with(**FELL))
    assert (
        "of a chosen response fell by 2.00 [1.50, 2.50] nats, that of a rejected one fell" in text
    )
    assert "the margin between them grew by 3.00 [2.50, 3.50] nats: means over 9 pairs" in text
    text = token_page.conclusion(figures_with())
    assert "a chosen response did not change beyond chance (0.10 [-0.90, 1.10] nats)" in text
    rewards = {
        k: v for k, v in figures_with(margin_added=(-1, 0.5)).items() if k != "chosen_policy"
    }
    assert "is on average 1.00 [0.50, 1.50] below that of a" in token_page.conclusion(rewards)


def test_figures_of_one_prompt_have_a_sign_and_no_interval():
    one = figures_with(margin_added=(3, 9)) | {"pairs": 1, "prompts": 1}
    one |= dict.fromkeys(name for name in one if name.endswith(("_low", "_high")))
    text = token_page.conclusion(one)
    assert "a chosen response rose by 0.10 nats" in text and "over 1 pair, of one prompt." in text
    assert "grew by 3.00 nats" in text and "chance" not in text
    assert not any("did not grow" in note for note in token_page.notes_of(one))


# --- the page


@pytest.fixture
def page(folder, of_policy) -> str:
    return (folder / "of_policy" / "report.html").read_text()


def test_the_page_shows_text_and_numbers_of_every_token(of_policy, page, tokenizer):
    lines, _, _ = of_policy
    shown = re.findall(r'<div class="text">(<span.*?)</div>', page, re.DOTALL)
    texts = [html.unescape(re.sub(r"<[^>]*>", "", text)) for text in shown]
    expected = {tokenizer.decode(line["token_ids"]): line for line in lines}
    assert sorted(texts) == sorted(expected)
    for text, spans in zip(texts, shown, strict=True):
        titles = re.findall(r'title="([^"]*)"', spans)
        assert titles == [f"{value:+.3f}" for value in expected[text]["added"]]
    rows = len(re.findall(r"<tr><td>\d+</td>", page))
    assert rows == sum(len(line["token_ids"]) for line in lines)  # for those who see no colours
    sums = [f"log-ratio {sum(line['added']):+.3f}" for line in lines]
    assert all(page.count(text) >= 1 for text in sums)
    falls = [sum(line["added"]) for line in lines if line["side"] == "chosen"]
    order = [float(x) for x in re.findall(r"<h4>chosen: log-ratio (\S+);", page)]
    assert order == pytest.approx(sorted(falls), abs=1e-3)


def test_the_page_loads_and_runs_nothing(page):
    assert "<script" not in page and " style=" not in page and "default-src 'none'" in page
    assert not re.search(r"(src|href)=|@import|url\(|https?://", page)


def test_text_of_data_and_of_tokens_is_escaped(tokenizer):
    """Title, name of the record, prompt, and tokens whose text is markup."""
    ids = np.array(tokenizer(NASTY)["input_ids"])
    added = np.linspace(-1, 1, len(ids))
    values = {"policy": added, "reference": np.zeros(len(ids))}
    response = Response(ids, added, values, np.zeros(len(ids), int))
    pair = Pair(Record(NASTY, (NASTY, NASTY), name=NASTY), (response, response))
    figures = token_values.figures_of([pair], 0.1)
    text = token_page.page(NASTY, [pair], figures, tokenizer, 20)
    assert "<script" not in text and "\x1b" not in text
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)") == 4  # <title>, <h1>, record, prompt
    flow = re.search(r'<div class="text">(<span.*?)</div>', text, re.DOTALL)[1]
    shown = html.unescape(re.sub(r"<[^>]*>", "", flow))
    assert shown == NASTY.replace("\n", "↵\n").replace("\x1b", "\\x1b")
    assert 'class="down5"' in flow or 'class="down4"' in flow
    assert 'class="up4"' in flow or 'class="up5"' in flow


def byte_fallback(tokenizer) -> PreTrainedTokenizerFast:
    """Letters, and bytes of what is no letter, as Llama 2, Mistral and Gemma have them.

    The decoder makes no text of a run of bytes that begins or ends within a character.
    """
    words = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghij"]
    core = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.mark.parametrize("kind", [lambda tokenizer: tokenizer, byte_fallback])
@pytest.mark.parametrize(
    "text", ["a dog", "日本語のテキスト", "😀😀😀👩‍👧 a", "é\n\nü", "a\ufffdb"]
)
def test_texts_of_tokens_are_that_of_all(tokenizer, kind, text):
    """Each character is at its last byte, and once; one that stands for no text is a token late."""
    of_kind = kind(tokenizer)
    ids = np.array([*of_kind(text)["input_ids"], of_kind.eos_token_id])
    found = token_page.pieces(ids, of_kind)
    assert "".join(found) == text + "<eos>" and len(found) == len(ids)
    assert max(map(len, found[:-1])) == 1 + ("\ufffd" in text)


def test_a_character_that_was_cut_is_shown_and_takes_no_time(tokenizer):
    ids = np.array([*tokenizer("ab")["input_ids"], *tokenizer("😀")["input_ids"][:2]])
    assert token_page.pieces(ids, tokenizer) == ["a", "b", "", "\ufffd"]
    ids = np.array(tokenizer("\ufffd" * 3000)["input_ids"])  # of which no beginning is whole
    assert "".join(token_page.pieces(ids, tokenizer)).strip("\ufffd") == ""


def test_colours_have_five_shades_of_each_direction():
    looks = [token_page.look(value) for value in (-9, -1, -0.1, -0.09, 0, 0.09, 0.1, 1.99, 2)]
    assert looks == ["down5", "down4", "down1", "", "", "", "up1", "up4", "up5"]


def test_pairs_are_spread_evenly(tokenizer):
    pairs = [pair_of([n, 0], [0, 0], f"p:{n}") for n in (4, 1, 0, 3, 2)]
    figures = token_values.figures_of(pairs, 0.1)
    for count, names in ((3, "024"), (9, "01234"), (1, "0"), (0, "")):
        text = token_page.page("a", pairs, figures, tokenizer, count)
        assert re.findall(r"<h3>p:(\d):", text) == list(names)
        assert f"{len(names)} of 5 pairs" in text


# --- what is refused


REFUSED = {
    "no reference": ("--policy P", "tokens compares --policy with a --reference; give the model"),
    "none": ("--policy P --reference none", "compares --policy with a --reference; give the model"),
    "two": ("--policy P --reference R --model M", "--policy and --model: a policy takes the place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_do_not_go_together_are_refused(name):
    flags, message = REFUSED[name]
    with pytest.raises(RunError, match=message):
        evaluate.parse_args(["tokens", *flags.split()])


def test_defaults():
    (args,) = evaluate.parse_args(["tokens"])
    assert (args.policy, args.reference, args.model) == ("runs/dpo", "tiny", None)
    (args,) = evaluate.parse_args(["tokens", "--model", "M"])
    assert (args.policy, args.model) == (None, "M")


EQUAL = '{"prompt": "a", "chosen": "b", "rejected": "b"}'
EQUAL_SCORES = '{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}'


@pytest.mark.parametrize("line", [EQUAL, EQUAL_SCORES])
def test_data_without_pairs_of_different_responses_are_refused(folder, tmp_path, line):
    path = tmp_path / "equal.jsonl"
    path.write_text(f"{line}\n")
    argv = ["tokens", "--model", folder / "rm", "--data", path, "--out", tmp_path / "out"]
    with pytest.raises(RunError, match="there are no pairs of two different responses"):
        evaluate.main([str(word) for word in argv])
