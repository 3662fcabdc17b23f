"""Shared by the tests: reward models of other programs, each with its description in plain lines.

The heads have random weights under the names of the published files.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from conftest import byte_tokenizer, tiny_llama
from safetensors.torch import save_file
from torch import Tensor

from nanoalign.batch import Row

D = 32  # hidden size of tiny_llama
Tensors = dict[str, Tensor]
# What a head makes of the hidden states (T, D) of one sequence, and its ids: the outputs (K,).
Plain = Callable[[Tensors, Tensor, list[int]], Tensor]


@dataclass
class Case:
    """A published model: the class in its config, its tensors beside the body, their outputs."""

    architecture: str
    shapes: dict[str, tuple[int, ...]]
    plain: Plain
    config: dict = field(default_factory=dict)
    token: int | None = None

    def tensors(self) -> Tensors:
        draw = torch.Generator().manual_seed(1)
        drawn = {
            name: torch.randn(shape, generator=draw) / 3 for name, shape in self.shapes.items()
        }
        if "gating.logit_scale" in drawn:  # else all prompts have nearly the same weights
            drawn["gating.layers.3.weight"] *= 20
        if "normalizer.var" in drawn:
            drawn["normalizer.var"] = drawn["normalizer.var"] ** 2 + 0.1
            drawn["normalizer.count"] = torch.tensor([7])
        return drawn


# --- the published descriptions in plain lines ----------------------------------------------------


def linear(name: str) -> Plain:
    return lambda t, h, ids: t[f"{name}.weight"] @ h[-1] + t.get(f"{name}.bias", 0)


def two_layers(name: str) -> Plain:
    def scores(t: Tensors, h: Tensor, ids: list[int]) -> Tensor:
        inner = (t[f"{name}.0.weight"] @ h[-1] + t[f"{name}.0.bias"]).clamp(min=0)
        return t[f"{name}.2.weight"] @ inner + t[f"{name}.2.bias"]

    return scores


def normalised(t: Tensors, h: Tensor, ids: list[int]) -> Tensor:
    score = linear("score_head")(t, h, ids)
    return (score - t["normalizer.mean"]) / (t["normalizer.var"] ** 0.5 + 1e-8)


def scaled_cost(t: Tensors, h: Tensor, ids: list[int]) -> Tensor:
    """rewardbench negates costs; safe-rlhf divides them by their deviation alone."""
    return -linear("score_head")(t, h, ids) / (t["normalizer.var"] ** 0.5 + 1e-8)


BETWEEN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def gated(t: Tensors, h: Tensor, ids: list[int]) -> Tensor:
    """The objectives and the score of ArmoRM's model card, with a temperature of 10."""
    pattern = llama3_tokenizer()(BETWEEN, add_special_tokens=False)["input_ids"]
    (*_, gate) = [n for n in range(len(ids)) if ids[n : n + len(pattern)] == pattern]
    x = h[gate]
    for n in range(3):
        x = (t[f"gating.layers.{n}.weight"] @ x + t[f"gating.layers.{n}.bias"]).clamp(min=0)
    x = t["gating.layers.3.weight"] @ x + t["gating.layers.3.bias"]
    weights = torch.softmax(x / 10, 0) * t["gating.logit_scale"][0]
    rewards = t["regression_layer.weight"] @ h[-1]
    return torch.cat([rewards, (weights * (rewards @ t["reward_transform_matrix"])).sum()[None]])


def of_layers(*sizes: int, name: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for n, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        shapes |= {f"{name}.{2 * n}.weight": (outputs, inputs), f"{name}.{2 * n}.bias": (outputs,)}
    return shapes


def with_bias(name: str, outputs: int = 1) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, D), f"{name}.bias": (outputs,)}


MOMENTS = {"normalizer.mean": (1,), "normalizer.var": (1,), "normalizer.count": (1,)}
ARMO = {"regression_layer.weight": (19, D), "reward_transform_matrix": (19, 19)}
ARMO |= {"gating.logit_scale": (1,)}
for n, (inputs, outputs) in enumerate([(D, 24), (24, 24), (24, 24), (24, 19)]):
    ARMO |= {f"gating.layers.{n}.weight": (outputs, inputs), f"gating.layers.{n}.bias": (outputs,)}
BEAVER = {"score_type": "reward", "score_dim": 1, "bias": True, "normalizer_type": None}
COST = BEAVER | {"score_type": "cost"}

CASES = {
    "score": Case("LlamaForSequenceClassification", {"score.weight": (1, D)}, linear("score")),
    "outputs": Case("LlamaForSequenceClassification", {"score.weight": (3, D)}, linear("score")),
    "bias": Case("LlamaForSequenceClassification", with_bias("score"), linear("score")),
    "inf-orm": Case(
        "INFORMForSequenceClassification", of_layers(D, D, 1, name="score"), two_layers("score")
    ),
    "grm": Case(
        "GRewardModel", of_layers(D, 24, 1, name="v_head.summary"), two_layers("v_head.summary")
    ),
    "grm-linear": Case("GRewardModel", with_bias("v_head.summary"), linear("v_head.summary")),
    "ultrarm": Case(
        "LlamaRewardModel", {"regression_head.weight": (1, D)}, linear("regression_head")
    ),
    "beaver": Case(
        "LlamaModelForScore",
        with_bias("score_head") | MOMENTS,
        linear("score_head"),
        BEAVER | {"do_normalize": False, "mean": [9.0], "var": [9.0]},
    ),
    "beaver-normalised": Case(
        "LlamaModelForScore",
        with_bias("score_head") | MOMENTS,
        normalised,
        BEAVER | {"do_normalize": True},
    ),
    "cost": Case(
        "LlamaModelForScore",
        {"score_head.weight": (1, D)} | MOMENTS,
        scaled_cost,
        COST | {"do_normalize": True},
    ),
    "armorm": Case("LlamaForRewardModelWithGating", ARMO, gated, {"num_objectives": 19}),
    "nemotron": Case(
        "LlamaForCausalLM",
        {"lm_head.weight": (264, D)},
        lambda t, h, ids: t["lm_head.weight"][:1] @ h[-1],
        token=0,
    ),
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@cache
def llama3_tokenizer():
    """Bytes, and the special tokens and the form of Llama 3's dialogues."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@cache
def body():
    return tiny_llama(vocab_size=264).model


def write(folder: Path, case: Case, **config: object) -> Path:
    folder.mkdir()
    tensors = {f"model.{name}": tensor for name, tensor in body().state_dict().items()}
    save_file(tensors | case.tensors(), folder / "model.safetensors")
    settings = body().config.to_dict() | {"architectures": [case.architecture]}
    settings |= {"auto_map": {"AutoModel": "own.Model"}, "tie_word_embeddings": False}
    if len(case.shapes) == 1 and "score.weight" in case.shapes:
        settings["id2label"] = {n: f"LABEL_{n}" for n in range(case.shapes["score.weight"][0])}
    (folder / "config.json").write_text(json.dumps(settings | case.config | config))
    llama3_tokenizer().save_pretrained(folder)
    return folder


def by_hand(case: Case, rows: list[Row]) -> list[list[Tensor]]:
    """The outputs for each response of each row, one sequence at a time."""
    found = []
    with torch.no_grad():
        for row in rows:
            sequences = [[*row.prompt.tolist(), *response.tolist()] for response in row.responses]
            hidden = [body()(torch.tensor([ids])).last_hidden_state[0] for ids in sequences]
            found.append(
                [case.plain(case.tensors(), *x) for x in zip(hidden, sequences, strict=True)]
            )
    return found


def root_of(case: Case) -> str:
    """The name of a head of one layer."""
    return next(iter(case.shapes)).rpartition(".")[0]


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
