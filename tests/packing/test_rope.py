"""python -m pytest tests/packing/test_rope.py

LongRoPE: a response has the frequencies of its own sequence, whatever shares its forward.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from transformers import AutoModelForCausalLM, Phi3Config

from nanoalign.batch import Row
from nanoalign.errors import RunError
from nanoalign.evaluation.answers import Answers, Sampler, log_ratios, sampler_of
from nanoalign.evaluation.generation import Answer, Sampling, generate
from nanoalign.files import lock
from nanoalign.model import Policy
from nanoalign.packing.packed import PackedBatcher, PaddedBatcher
from nanoalign.packing.rope import LONG, border_of, embed, read_marks
from nanoalign.packing.self_check import check_layout
from nanoalign.records import Record
from train_dpo import find_folders, parse_args

BORDER, VOCAB = 40, 64
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 7.0, 10.0]}


def phi3(kind: str = "longrope", border: int = BORDER) -> torch.nn.Module:
    torch.manual_seed(0)
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    parameters |= FACTORS | {"original_max_position_embeddings": border, "attention_factor": 1.2}
    config = Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        original_max_position_embeddings=border, rope_parameters=parameters,
        initializer_range=0.2, **IDS,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def rows() -> list[Row]:
    """Of tokens of prompt and responses: short, long, at the border, and on both of its sides."""
    draw = np.random.default_rng(0)

    def tokens(n: int) -> np.ndarray:
        return draw.integers(3, VOCAB, n, dtype=np.int32)

    lengths = [(5, 4, 9), (50, 20, 12), (30, 10, 10), (30, 10, 11), (20, 60, 7), (38, 1, 3)]
    return [
        Row(f"test:{n}", tokens(prompt), (tokens(a), tokens(b)))
        for n, (prompt, a, b) in enumerate(lengths)
    ]


def alone(model: torch.nn.Module, row: Row) -> list[float]:
    """The log-probability of each response, by transformers' forward of its sequence alone."""
    found = []
    for response in row.responses:
        ids = torch.from_numpy(np.concatenate((row.prompt, response)).astype(np.int64))[None]
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scored = logps.gather(-1, ids[0, 1:, None])[len(row.prompt) - 1 :]
        found.append(scored.sum().item())
    return found


@pytest.mark.parametrize("layout", [PackedBatcher, PaddedBatcher])
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_scores_are_those_of_separate_sequences(layout, tokens, world):
    model, found = phi3(), {}
    assert border_of(model.config) == BORDER
    expected = [alone(model, row) for row in rows()]
    policy, batcher = Policy(model), layout(world, tokens)
    batcher.prepare(policy)
    for batch in batcher.step(rows()):
        with torch.no_grad():
            scores = policy(batch).view(-1, 2)
        found |= dict(zip(batch.rows, scores.tolist(), strict=True))
    torch.testing.assert_close(
        [found[n] for n in range(len(expected))], expected, rtol=0, atol=1e-4
    )
    again = [alone(model, row) for row in rows()]  # the model's own forward is as it was
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [100, 130, 200])
def test_a_micro_batch_has_as_many_tokens_as_are_computed(world, tokens):
    """Of rows 3 and 4 the prompt is computed twice: 30 + 10 + 30 + 11 and 20 + 60 + 20 + 7."""
    batcher = PackedBatcher(world, tokens)
    batcher.prepare(Policy(phi3()))
    computed = []
    for group in (group for groups in batcher.plan(rows()) for group in groups):
        count = batcher.collate([rows()[n] for n in group]).inputs["input_ids"].numel()
        assert count <= tokens or len(group) == 1
        computed.append(count)
    assert sum(computed) == 18 + 82 + 50 + 81 + 107 + (38 + 1 + 38 + 3)


def test_policy_and_reference_need_one_border(world, tmp_path, tokenizer):
    """They read the same batches, unless the reference is computed before."""
    for name, model in (
        ("a", phi3()),
        ("b", phi3(border=80)),
        ("c", phi3()),
        ("d", phi3("default")),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    flags = ["--model", str(tmp_path / "a"), "--out", str(tmp_path / "run"), "--reference"]

    def found(name: str, *more: str) -> dict:
        return find_folders(parse_args([*flags, str(tmp_path / name), *more]), world)

    for name, where in (("b", "behind token 80"), ("d", "nowhere")):
        message = f"--model changes .* behind token 40, --reference {where}, so they can't read"
        with pytest.raises(RunError, match=message):
            found(name)
        assert not (tmp_path / "run").exists()
    found("c")
    lock.release(tmp_path / "run" / lock.NAME)
    found("b", "--precompute_reference")
    lock.release(tmp_path / "run" / lock.NAME)


def test_the_two_sets_of_frequencies_differ_in_these_scores(world):
    """So that the test above could fail."""
    short, long = phi3(border=4 * BORDER), phi3()
    off = np.abs(np.array([alone(short, r) for r in rows()]) - [alone(long, r) for r in rows()])
    assert (off[0] < 1e-5).all() and (off[1] > 0.1).all()
    assert off[4, 0] > 0.1 and off[4, 1] < 1e-5  # one response on each side


def test_sampled_answers_are_those_of_each_prompt_alone(world):
    """Greedy, of a batch of short and long prompts; the oracle is transformers' generate."""
    model = phi3()
    policy = Policy(model)
    read_marks(model)
    prompts = [Row(row.name, row.prompt, (), ()) for row in rows() if len(row.prompt) != 38]
    sampling = Sampling(temperature=0, max_new_tokens=8)
    assert {len(row.prompt) > BORDER for row in prompts} == {True, False}
    found = generate(policy, prompts, [], sampling, world)
    for row, (answer,) in zip(prompts, found, strict=True):
        ids = torch.from_numpy(row.prompt.astype(np.int64))[None]
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert list(answer.tokens) == expected[0, len(row.prompt) :].tolist()


def test_a_batcher_that_another_model_has_prepared_is_prepared_again(world, tokenizer):
    """The KL of a comparison is of the policies, also where the judge was prepared after them."""
    phi, llama = Policy(phi3()), Policy(tiny_llama(vocab_size=VOCAB, **IDS))
    batcher, prompts = PackedBatcher(world, 10_000), [r for r in rows() if len(r.prompt) != 38]
    found = []
    for order in ((llama, phi), (phi, llama)):  # the second one is prepared last
        for policy in order:
            batcher.prepare(policy)
        samplers = [
            Sampler(name, policy, tokenizer, "raw", prompts)
            for name, policy in (("llama", llama), ("phi", phi))
        ]
        own = [[Answer(tuple(row.responses[0].tolist()), 2)] for row in prompts]
        found.append(np.mean(log_ratios(*samplers, Answers([], own), batcher)))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    alone_by = [np.mean([alone(p.model, r)[0] for r in with_end(prompts)]) for p in (llama, phi)]
    assert found[0] == pytest.approx(alone_by[0] - alone_by[1], abs=1e-3)


def with_end(prompts: list[Row]) -> list[Row]:
    end = np.array([2], dtype=np.int32)
    return [replace(row, responses=(np.concatenate((row.responses[0], end)),)) for row in prompts]


def test_an_answer_that_might_cross_the_border_is_refused(tokenizer):
    record = Record("x" * 38, (), (), name="data:7")
    with pytest.raises(RunError, match="data:7: has 38 tokens, .* might cross token 40, where"):
        sampler_of("phi", Policy(phi3()), tokenizer, [record], "raw", 100, 8)


def test_the_self_check_looks_at_both_sides(world):
    """A reader of rows that ignores the marks is found, also where four short rows are first."""
    draw = np.random.default_rng(1)
    tokens = [draw.integers(3, VOCAB, n, dtype=np.int32) for n in (5, 6, 7, 8, 30, 1500)]
    short = [Row(f"s:{n}", tokens[0], (tokens[1], tokens[2])) for n in range(40)]
    many = Row("many:1", tokens[0], tuple(tokens[3] for _ in range(300)))  # of many short ones
    edge = Row("edge:1", tokens[4], (draw.integers(3, VOCAB, 10, dtype=np.int32),) * 2)
    assert edge.longest == BORDER < len(edge)
    long = Row("long:1", tokens[5], (tokens[1], tokens[2]))
    model = phi3()
    policy, batcher = Policy(model), PackedBatcher(world, 10_000)
    batcher.prepare(policy)
    check_layout(policy, [*short, many, long], batcher, "phi")
    batcher.border = None
    with pytest.raises(RunError, match="self-check: phi gives log-probabilities that differ"):
        check_layout(policy, [*short, edge, many, long], batcher, "phi")


def test_each_token_has_the_set_of_its_sequence_by_hand():
    """An embedding that takes a type of layer and a factor, 3; a long sequence has the factor 9."""

    def forward(x, positions, layer_type, factor):
        assert (x, layer_type) == ("x", "sliding")
        frequency = 9 if positions.max() > BORDER else factor
        return positions[..., None] * frequency, positions[..., None] + frequency

    for long, frequencies in ((0, [3, 3, 3]), (LONG, [3, 9, 9])):
        positions = torch.tensor([[5, 1, 50 if long else 2]])
        marked = positions + torch.tensor([0, long, long])
        cos, sin = embed(forward, "x", marked, "sliding", factor=3)
        expected = torch.tensor([frequencies])
        assert torch.equal(cos, (positions * expected)[..., None])
        assert torch.equal(sin, (positions + expected)[..., None])


def test_another_kind_of_rotary_embedding_has_no_border():
    assert border_of(phi3("default").config) is None
