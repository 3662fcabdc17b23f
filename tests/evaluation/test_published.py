"""python -m pytest tests/evaluation/test_published.py

Reward models of other programs. The oracle is transformers: its own model, at the token that it
picks itself, on the tokens of apply_chat_template(..., tokenize=True), one dialogue at a time.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import byte_tokenizer, write_pairs
from evaluations import write_jsonl, write_reward_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import evaluate
import train_rm
from nanoalign.data.templates import AS_TEXT, tokenizer_name
from nanoalign.distributed import setup
from nanoalign.encode import CUT_PROMPT, CUT_RESPONSE
from nanoalign.errors import RunError
from nanoalign.evaluation import plots
from nanoalign.evaluation.scoring import Judge, load_judges
from nanoalign.packing.packed import PackedBatcher
from nanoalign.records import Record
from nanoalign.rewards.published import Published, without_pad
from nanoalign.rewards.rule import EOS_RULE

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
# As the model card of Mistral-7B-Instruct describes it; v0.1 writes a space behind its EOS.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}SPACE{% else %}"
    "{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
CHATML = "<|im_start|>", "<|im_end|>"
LLAMA = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 272}  # fmt: skip
# name -> (class of the config, template, its special tokens, EOS, what it writes last)
FAMILIES = {
    "Llama-3": ("LlamaConfig", "llama3", LLAMA, "<|eot_id|>", "<|eot_id|>"),
    "Qwen2.5": ("Qwen2Config", "qwen2_5", CHATML, "<|im_end|>", "\n"),
    "Qwen3": ("Qwen3Config", "qwen3", (*CHATML, "<think>", "</think>"), "<|im_end|>", "\n"),
    "Gemma-2": ("Gemma2Config", "gemma", ("<start_of_turn>", "<end_of_turn>"), "<eos>", "\n"),
    "Mistral": ("MistralConfig", MISTRAL.replace("SPACE", ""), (), "<eos>", "<eos>"),
    "Mistral v0.1": ("MistralConfig", MISTRAL.replace("SPACE", " "), (), "<eos>", " "),
}
PADS = ("none", "<pad>", "eos")  # of the config


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# case -> (prompt, two responses)
CASES = {
    "one turn": ([user("How late is it?")], ("It is nine.", "It is late, go to bed.")),
    "newlines": ([user("Why?\n")], ("Because.\n\n", "Because.")),
    "spaces": ([user(" Who? ")], ("  I am. ", "I am not.  ")),
    "newlines before": ([user("Sing.")], ("\n\nLa la.", "\nLa la.")),
    "one begins with the other": ([user("Count.")], ("One", "One, two.")),
    "turns": ([user("Hi."), assistant("Good day. "), user("And now?")], ("Go.", "Stay.")),
    "empty system": ([{"role": "system", "content": ""}, user("Hi!")], ("Hi!", "Who is it?")),
}


def merging_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A token per byte, but one for two newlines, also where a template ends and an answer begins.

    It has the template and the special tokens of a family.
    """
    _, template, tokens, eos, _ = FAMILIES[name]
    if template != MISTRAL and "{" not in template:
        template = (FOLDER / f"{template}.jinja").read_text(encoding="utf-8")
    core = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    core["pre_tokenizer"]["use_regex"] = False
    core["model"]["vocab"]["ĊĊ"], core["model"]["merges"] = 259, [["Ċ", "Ċ"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(byte_tokenizer().backend_tokenizer).from_str(json.dumps(core)),
        bos_token="<bos>", pad_token="<pad>", chat_template=template,
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens], "eos_token": eos})
    return tokenizer


def write_published(folder: Path, name: str, pad: str = "none", **more: object) -> Path:
    """A random reward model of a family, as another program writes it."""
    tokenizer = merging_tokenizer(name)
    pads = {"none": None, "<pad>": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id}
    settings = SIZES | {"num_labels": 1, "pad_token_id": pads[pad]} | more
    settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = getattr(transformers, FAMILIES[name][0])(**settings)
    model = AutoModelForSequenceClassification.from_config(config)
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("published")
    return {(n, pad): write_published(root / f"{n}{pad}", n, pad) for n in FAMILIES for pad in PADS}


def by_transformers(folder: Path, dialogues: list[list[dict]], **options: object) -> list[float]:
    """The reward of each dialogue. options: further ones of apply_chat_template."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewards = []
    for dialogue in dialogues:
        options |= {"tokenize": True, "return_dict": False, "add_generation_prompt": False}
        tokens = tokenizer.apply_chat_template(dialogue, **options)
        with torch.no_grad():
            rewards.append(model(torch.tensor([tokens])).logits.item())
    return rewards


def cases_of(name: str) -> dict[str, tuple[list[dict], tuple[str, str]]]:
    """The cases that a family renders: Gemma-2 and Mistral have no system message."""
    without = () if name.startswith(("Llama", "Qwen")) else ("empty system",)
    return {case: CASES[case] for case in CASES if case not in without}


def scored(folder: Path, path: Path, name: str, *flags: str) -> list[float]:
    """The rewards of all responses of the cases of a family, by evaluate.py score."""
    records = [{"prompt": p, "chosen": c, "rejected": r} for p, (c, r) in cases_of(name).values()]
    data = write_jsonl(path / "pairs.jsonl", records)
    out = path / "out.jsonl"
    evaluate.main(["score", "--model", str(folder), "--data", str(data), "--out", str(out), *flags])
    return [json.loads(line)["reward"] for line in out.read_text().splitlines()]


def dialogues_of(name: str) -> list[list[dict]]:
    cases = cases_of(name).values()
    return [[*prompt, assistant(text)] for prompt, responses in cases for text in responses]


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("name", FAMILIES)
def test_rewards_are_those_of_transformers(folders, name, pad, tmp_path, capsys):
    """Also where pad = EOS: then transformers reads before the EOS that ends a dialogue."""
    folder = folders[name, pad]
    rewards = scored(folder, tmp_path, name)
    expected = by_transformers(folder, dialogues_of(name))
    assert rewards == pytest.approx(expected, abs=2e-5)
    assert len({*expected}) > len(expected) // 2
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("reads")]
    *_, eos, last = FAMILIES[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {text: tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in (last, eos)}
    place = f"at its last token, {last!r} ({ids[last][0]})"
    if pad == "eos" and last == eos:
        place = f"before {eos!r} ({ids[eos][0]}), the pad token of its config"
    assert f"and the reward {place}: another program" in line


def test_every_command_and_the_pipeline_of_transformers_have_one_number(
    folders, tmp_path, monkeypatch
):
    """rm, score and policy; the pipeline with its own padding, in a batch."""
    folder, name = folders["Qwen3", "<pad>"], "Qwen3"
    expected = scored(folder, tmp_path, name)
    monkeypatch.setattr(plots, "reward_picture", lambda path, *rest: path.write_bytes(b""))
    monkeypatch.setattr(plots, "policy_picture", lambda path, *rest: path.write_bytes(b""))
    base = ["--out", str(tmp_path / "rm"), "--micro_batch_tokens", "200"]
    evaluate.main(["rm", "--model", str(folder), "--data", str(tmp_path / "pairs.jsonl"), *base])
    lines = (tmp_path / "rm" / "scores.jsonl").read_text().splitlines()
    by_rm = [json.loads(line)["score"] for line in lines]

    cases = cases_of(name).values()
    for n, role in enumerate(("policy", "baseline")):
        given = [{"prompt": prompt, "answer": responses[n]} for prompt, responses in cases]
        write_jsonl(tmp_path / f"{role}.jsonl", given)
    files = [f"--{x}_answers={tmp_path / f'{x}.jsonl'}" for x in ("policy", "baseline")]
    evaluate.main(["policy", "--reward", str(folder), *files, "--out", str(tmp_path / "policy")])
    lines = (tmp_path / "policy" / "answers.jsonl").read_text().splitlines()
    by_policy = [json.loads(line)["score"] for line in lines]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(x, tokenize=False) for x in dialogues_of(name)]
    pipe = transformers.pipeline("text-classification", str(folder), function_to_apply="none")
    by_pipeline = [each["score"] for each in pipe(texts, batch_size=4, padding=True)]
    for rewards in (by_rm, by_policy, by_pipeline):
        assert rewards == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("layout", ["--share_prefix", "--no-share_prefix"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [3, 40, 70])
def test_a_dialogue_is_cut_as_transformers_cuts_it(tmp_path, side, max_length, layout):
    """On the left the dialogues of a record have no common beginning; 3 tokens are of no answer."""
    name = "Qwen2.5"
    folder = write_published(tmp_path / "rm", name, "<pad>")
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side=side)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).truncation_side == side
    flags = ["--max_length", str(max_length), layout, "--micro_batch_tokens", "300"]
    rewards = scored(folder, tmp_path, name, *flags)
    options = {"truncation": True, "max_length": max_length}
    expected = by_transformers(folder, dialogues_of(name), **options)
    assert rewards == pytest.approx(expected, abs=2e-5)
    assert rewards != pytest.approx(by_transformers(folder, dialogues_of(name)), abs=1e-3)


@pytest.fixture(scope="module")
def published() -> Published:
    tokenizer = merging_tokenizer("Qwen2.5")
    return Published(tokenizer, tokenizer.pad_token_id)


def whole(published: Published, *messages: dict) -> list[int]:
    return published.tokenizer.apply_chat_template([*messages], return_dict=False)


def parts(published: Published, record: Record, max_length: int = 10_000) -> list[list[int]]:
    (row,) = published.encode([record], max_length)
    return [part.tolist() for part in (row.prompt, *row.responses)]


def test_responses_share_the_prompt_up_to_a_token_that_is_of_both(published):
    """Token by token: the header ends with a newline, which the answer's merges with."""
    prompt, first, second = parts(published, Record("Sing.", ("La la.", "Lo lo.")))
    header = published.tokenizer.apply_chat_template(
        [user("Sing.")], add_generation_prompt=True, return_dict=False
    )
    assert prompt == header and prompt + second == whole(
        published, user("Sing."), assistant("Lo lo.")
    )
    assert [len(first), len(second)] == [8, 8]  # six letters, the end of the turn, a newline
    prompt, first, _ = parts(published, Record("Sing.", ("\nLa la.", "Lo lo.")))
    assert prompt == header[:-1] and first[0] == 259  # two newlines are one token
    assert prompt + first == whole(published, user("Sing."), assistant("\nLa la."))
    twins = parts(published, Record("Sing.", ("La la.", "La la.")))
    assert twins == [
        header,
        *[whole(published, user("Sing."), assistant("La la."))[len(header) :]] * 2,
    ]


def test_what_is_cut_is_noted(published):
    texts = ["a" * 60, "b"]
    uncut = parts(published, Record("Sing.", texts))
    longest = len(uncut[0]) + len(uncut[1])
    (row,) = published.encode([Record("Sing.", texts)], longest - 1)
    assert row.notes == (CUT_RESPONSE,) and len(row.responses[0]) == len(uncut[1]) - 1
    (row,) = published.encode([Record("Sing.", texts)], longest)
    assert row.notes == ()
    left = merging_tokenizer("Qwen2.5")
    left.truncation_side = "left"
    (row,) = Published(left, None).encode([Record("Sing.", texts)], longest - 1)
    assert row.notes == (CUT_PROMPT,)
    assert row.responses[0].tolist() == (uncut[0] + uncut[1])[1:][len(row.prompt) :]


def test_sampled_tokens_are_not_taken(published):
    """The text is, as by other programs, also one that begins as a turn does; a note counts it."""
    name = tokenizer_name(published.tokenizer, "chat")
    texts = "La la.", "<|im_start|>La"
    sampled = Record("Sing.", texts, sampled=(name, [[1, 2], [3]]))
    prompt, *responses = parts(published, sampled)
    for text, response in zip(texts, responses, strict=True):
        assert prompt + response == whole(published, user("Sing."), assistant(text))
    assert published.encode([sampled], 1000)[0].notes == (AS_TEXT,)
    with pytest.raises(RunError, match="begins with '<.im_start.>', as the turns that the chat"):
        parts(published, Record("Sing.", texts))


def test_a_response_keeps_a_token_before_the_pad_tokens():
    assert without_pad([5, 7, 7], 7) == [5] and without_pad([7, 7], 7) == [7]
    assert without_pad([5, 7, 7], None) == [5, 7, 7] and without_pad([7, 5], 7) == [7, 5]
    tokenizer = merging_tokenizer("Mistral")
    prompt, *responses = parts(
        Published(tokenizer, tokenizer.eos_token_id), Record("Hi", ("", "a"))
    )
    text = tokenizer.decode([*prompt, *responses[0]])
    assert text == "<bos>[INST] Hi [/INST]" and tokenizer.decode(responses[1]) == "]a"


def judge_of(folder: Path) -> Judge:
    flags = ["--model", str(folder), "--prompt", "q", "--response", "a"]
    (args,) = evaluate.parse_args(["score", *flags])
    (judge,) = load_judges(args, None, PackedBatcher(setup(), 300))
    return judge


def test_a_stopped_answer_is_read_as_other_programs_read_it(folders):
    """With the end of its turn, where the model was trained to give rewards."""
    judge = judge_of(folders["Qwen2.5", "<pad>"])
    records = [Record("Sing.", ("La la",), ())]
    rows = [judge.encode(records, ended)[0].rows[0] for ended in (None, [False], [True])]
    assert {judge.tokenizer.decode(x.responses[0]) for x in rows} == {"La la<|im_end|>\n"}
    assert judge.lengths(records, judge.encode(records, [False]), [False]) == [[(7, 1.0)]]


def test_a_template_that_opens_reasoning_before_an_answer_is_read(tmp_path):
    """Its prompt is written in another way before an answer; for training that is an error."""
    tokenizer = merging_tokenizer("Qwen3")
    tokenizer.chat_template = (FOLDER / "nemotron_3_nano.jinja").read_text(encoding="utf-8")
    published, dialogue = Published(tokenizer, None), (user("Why?"), assistant("Because."))
    prompt, response = parts(published, Record("Why?", ("Because.",)))
    assert prompt + response == whole(published, *dialogue) and len(response) > 8


def test_a_text_that_the_template_loses_is_refused():
    tokenizer = merging_tokenizer("Mistral")
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content[:3]")
    with pytest.raises(RunError, match="it:1: the chat template .* does not show"):
        Published(tokenizer, None).encode([Record("A question", ("an answer",), name="it:1")], 100)


# --- without a chat template, and with a rule of ours


def score(folder: Path, *flags: str) -> None:
    evaluate.main(["score", "--model", str(folder), "--prompt", "Hi", "--response", "Yes.", *flags])


def test_without_a_chat_template_the_rule_is_an_assumption(llama_folder, tmp_path, capsys):
    folder = write_reward_model(tmp_path / "rm", llama_folder, byte_tokenizer(), rule=None)
    score(folder)
    assert "reads       template auto with an EOS behind it" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": 258}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="pads with EOS, so transformers reads its rewards at"):
        score(folder)


def test_another_template_may_be_given(folders, capsys):
    score(folders["Qwen2.5", "<pad>"], "--template", "pku")
    assert "reads       template pku with an EOS behind it" in capsys.readouterr().out


@pytest.mark.parametrize(("positions", "limit"), [(64, 64), (4096, 2048)])
def test_a_dialogue_has_the_tokens_of_rewardbench_or_of_the_positions(tmp_path, positions, limit):
    folder = write_published(tmp_path, "Qwen2.5", max_position_embeddings=positions)
    assert judge_of(folder).rule == ("chat", limit)


def test_a_model_that_is_trained_further_gets_our_rule(folders, tmp_path, capsys):
    """Also one that pads with EOS: the result has another pad token."""
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    flags = f"--data {data} --eval_share 0 --steps 1 --batch_size 4 --out".split()
    folder = folders["Llama-3", "eos"]
    train_rm.main(["--model", str(folder), *flags, str(tmp_path / "rm")])
    printed = capsys.readouterr().out
    assert "rule        another program trained --model" in printed and "template chat" in printed
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert config["nanoalign"]["template"] == "chat" and config["nanoalign"]["eos"] == EOS_RULE
    assert config["pad_token_id"] != AutoTokenizer.from_pretrained(folder).eos_token_id
    score(tmp_path / "rm")
    assert "reads  " not in capsys.readouterr().out
