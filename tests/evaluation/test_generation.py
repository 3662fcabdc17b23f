"""python -m pytest tests/evaluation/test_generation.py"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from processes import run_ranks
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from nanoalign.batch import Row
from nanoalign.data.templates import encode_records
from nanoalign.distributed import setup
from nanoalign.encode import encode_all, tokenize_continuations
from nanoalign.evaluation.generation import (
    Sampling,
    decode_continuation,
    eos_ids,
    generate,
    next_tokens,
)
from nanoalign.model import Policy
from nanoalign.records import Record

EOS = {258}
SMALL = {"vocab_size": 259, "num_hidden_layers": 2, "num_attention_heads": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
WIDTHS = {"hidden_size": 32, "num_key_value_heads": 1, "intermediate_size": 48, "head_dim": 16}
ARCHITECTURES = {
    "gemma3_text": SMALL | WIDTHS | SLIDING,
    "gpt2": SMALL | {"n_embd": 32, "eos_token_id": 258},
}


def prompts_of(*lengths: int) -> list[Row]:
    draw = np.random.default_rng(0)
    return [Row(str(n), draw.integers(0, 256, n).astype(np.int32), (), ()) for n in lengths]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny_llama())


@pytest.fixture(scope="module")
def prompts() -> list[Row]:
    return prompts_of(3, 17, 1, 8, 8, 30, 2)


# --- one token


def test_a_token_is_drawn_with_its_probability():
    """Over an even grid of random numbers each token is drawn as often as its probability."""
    logits = torch.tensor([0.1, 2.0, -1.0, 0.5]).expand(10_000, 4)
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    for temperature in (1.0, 0.5, 2.0):
        tokens = next_tokens(logits, uniform.double(), temperature, top_p=1.0)
        shares = torch.bincount(tokens, minlength=4) / 10_000
        expected = (logits[0] / temperature).softmax(-1)
        assert torch.allclose(shares, expected, atol=2e-4)


def test_top_p_by_hand():
    """Probabilities 0.5, 0.3, 0.15, 0.05: top_p of 0.7 keeps two, 0.5 the first, 0.81 three."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(10_000, 4)
    uniform = ((torch.arange(10_000) + 0.5) / 10_000).double()
    for top_p, shares in {
        0.7: [0, 0.625, 0, 0.375],
        0.5 - 1e-6: [0, 1, 0, 0],
        0.81: [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95],
    }.items():
        counts = torch.bincount(next_tokens(logits, uniform, 1.0, top_p), minlength=4) / 10_000
        assert counts.tolist() == pytest.approx(shares, abs=2e-4)


def test_the_largest_random_number_draws_a_token_that_is_kept():
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(0)) * 5
    uniform = torch.full((500,), np.nextafter(1.0, 0.0), dtype=torch.float64)
    tokens = next_tokens(logits, uniform, 1.0, 0.9)
    probabilities = logits.double().softmax(-1)
    drawn = probabilities.gather(1, tokens[:, None])
    before = torch.where(probabilities > drawn, probabilities, 0).sum(-1)
    assert (before < 0.9).all()


# --- whole answers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_are_those_of_a_loop_without_cache_or_padding(architecture, prompts):
    """The slow oracle: a forward of the whole text for every token; also beyond a window of 8."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.2)
    sampling = Sampling(temperature=0.0, max_new_tokens=12, batch_size=4)
    answers = generate(Policy(model), prompts, EOS, sampling, setup())
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = prompt.prompt.tolist()
        while len(ids) < len(prompt.prompt) + 12 and 258 not in ids[len(prompt.prompt) :]:
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits
            ids.append(logits[0, -1].argmax().item())
        expected = ids[len(prompt.prompt) :]
        assert answer.ended == (258 in expected)
        assert list(answer.tokens) == [token for token in expected if token != 258]


def test_an_answer_depends_on_neither_batch_nor_order(policy, prompts):
    settings = {"max_new_tokens": 10, "samples": 2, "seed": 3}
    together = generate(policy, prompts, EOS, Sampling(**settings), setup())
    alone = generate(policy, prompts[::-1], EOS, Sampling(**settings, batch_size=1), setup())
    assert together == alone[::-1]
    assert len({sample for answers in together for sample in answers}) == 14  # all differ
    other = generate(policy, prompts, EOS, Sampling(**settings | {"seed": 4}), setup())
    assert all(a != b for a, b in zip(together, other, strict=True))


def _answers(folder: Path, prompts: list[Row]) -> list:
    sampling = Sampling(max_new_tokens=10, samples=2, seed=3, batch_size=3)
    return generate(Policy.load(folder, trainable=False), prompts, EOS, sampling, setup())


def test_an_answer_does_not_depend_on_ranks(llama_folder, policy, prompts):
    """14 answers in batches of 3: 5 batches on 3 ranks. Every rank has all answers."""
    outcome = run_ranks(3, _answers, llama_folder, prompts)
    assert outcome.codes == [0] * 3, outcome.stderr
    sampling = Sampling(max_new_tokens=10, samples=2, seed=3)
    assert outcome.results == [generate(policy, prompts, EOS, sampling, setup())] * 3


def test_answers_keep_their_random_numbers_when_others_leave_the_batch(policy, prompts):
    """Every sixth token ends an answer, so the batch shrinks at different steps."""
    ends, settings = set(range(0, 259, 6)), {"max_new_tokens": 20, "seed": 1}
    together = generate(policy, prompts, ends, Sampling(**settings), setup())
    alone = generate(policy, prompts, ends, Sampling(**settings, batch_size=1), setup())
    assert together == alone
    assert len({len(answer.tokens) for (answer,) in together}) > 3


def test_an_answer_stops_at_its_eos(policy, prompts):
    """Any of half of the vocabulary ends an answer, each at its own place."""
    ends = set(range(0, 259, 2))
    answers = [a for (a,) in generate(policy, prompts, ends, Sampling(max_new_tokens=4), setup())]
    assert all(not ends & set(answer.tokens) for answer in answers)
    assert all(answer.ended == (len(answer.tokens) < 4) for answer in answers)
    assert len({len(answer.tokens) for answer in answers}) > 1


def test_prompts_alone_are_encoded_as_with_responses(tokenizer):
    """Cut at their beginning too, but to the whole of max_length."""
    records = [Record("0123456789", (), ()), Record("0123456789", ("x", "y"))]
    alone, with_responses = encode_records(records, tokenizer, 1024, "pku")
    assert np.array_equal(alone.prompt, with_responses.prompt) and alone.responses == ()
    (cut,) = encode_all(records[:1], tokenizer, 4)
    assert tokenizer.decode(cut.prompt) == "6789"


def test_the_generation_config_adds_ids_that_end_an_answer(tokenizer):
    policy = Policy(tiny_llama())
    for configured, expected in ((None, {258}), (7, {7, 258}), ([7, 9], {7, 9, 258})):
        policy.model.generation_config.eos_token_id = configured
        assert eos_ids(policy, tokenizer) == expected


def test_a_sampled_answer_ends_before_the_end_of_its_turn():
    """Of a model whose EOS is another token, so that it writes a newline between the two."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=True)])
    expected = {
        "Fine.<end>\n": "Fine.",
        "Fine.<end>": "Fine.",
        "Fine.\n": "Fine.\n",
        "a\n<end>\n": "a\n",
        "a<end>b\n": "a<end>b\n",  # a part of the answer
        "<end>": "",
        "": "",
    }
    for text, answer in expected.items():
        tokens = tokenizer(text)["input_ids"]
        assert decode_continuation(tokens, tokenizer, "<end>\n") == answer
        assert decode_continuation(tokens, tokenizer) == text  # "<end>" ends a tool call, say


def test_a_sampled_answer_keeps_the_space_that_begins_it(tokenizer):
    """Byte-level, and as SentencePiece, whose decoder drops the first space of a text."""
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("▁abc\n")}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    metaspace = PreTrainedTokenizerFast(tokenizer_object=core)
    for its in (tokenizer, metaspace):
        for text in (" ab c", "ab c"):
            assert decode_continuation(tokenize_continuations([text], its)[0], its) == text
