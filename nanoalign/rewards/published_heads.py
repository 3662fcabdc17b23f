"""Reward models of other programs: their heads, found by the names of the tensors in the files.

    score.weight, with or without score.bias              a linear layer, of one output or several
    score.0, score.2 (weights and biases)                 INF-ORM, Qwen2ForRewardModel: two linear
                                                          layers with a ReLU between them
    v_head.summary.0, .2, ...; v_head.summary             GRM: the same; a linear layer
    regression_head                                       UltraRM, Eurus-RM
    score_head, normalizer.mean, .var, .count             PKU-Alignment's beaver-7b reward and cost
    regression_layer, gating, reward_transform_matrix     ArmoRM

These tensors stand beside the body of the model; the code that was published with a model is not
run. Dropout is off. Heads are float32 whatever --precision is, while most of these models were
published in bfloat16, head included.

Shapes: N lines, T tokens, S responses, K outputs, D hidden size.
"""

import re
from collections.abc import Set
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from nanoalign.batch import Batch
from nanoalign.distributed import World, autocast, print0
from nanoalign.errors import RunError
from nanoalign.model import Fill, Policy, Read
from nanoalign.rewards.several import SeveralRewards
from nanoalign.weights import adapters
from nanoalign.weights.folders import load_tokenizer
from nanoalign.weights.heads import Headed, class_of, class_with
from nanoalign.weights.slices import build, filler, parameters_on_meta, places_of, read_slices
from nanoalign.weights.tensor_files import stored_tensors

Shapes = dict[str, tuple[int, ...]]  # of the tensors beside the body, by name


# --- heads ----------------------------------------------------------------------------------------


class PublishedHead(Headed):
    """A head whose modules have the names that its tensors have in the files.

    A subclass has `takes(root, shapes)`, which returns the names of tensors of such a head;
    `parts()`, which returns the modules that have its parameters; and `scores(hidden, batch)`,
    which computes the outputs for each response: final hidden states (N * T, D) -> (S, K) float32.
    """

    root: str  # the name under which HEADS has the head
    shapes: Shapes
    reward: str | None = None  # the output that is the reward, if there are several
    sign, normalises = 1.0, False  # of the scores: reward = sign * score
    note = ""  # for the line that names the head
    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)  # of the language model that it was


class Layers(PublishedHead):
    """Linear layers with ReLUs between them, read at the last token; one layer has no number."""

    @classmethod
    def layers(cls, root: str, shapes: Shapes) -> list[str]:
        if f"{root}.weight" in shapes:
            return [root]
        numbered = (f"{root}.{2 * n}" for n in range(len(shapes)))  # a ReLU has a number, too
        return [name for name in numbered if f"{name}.weight" in shapes]

    @classmethod
    def takes(cls, root: str, shapes: Shapes) -> Set[str]:
        layers = cls.layers(root, shapes)
        return {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")} & shapes.keys()

    def add_head(self, config: "transformers.PretrainedConfig") -> None:
        names = self.layers(self.root, self.shapes)
        layers = chain_of(names, self.shapes, config)
        alternating = [part for layer in layers for part in (layer, nn.ReLU())]
        head = layers[0] if names == [self.root] else nn.Sequential(*alternating[:-1])
        above, _, own = self.root.rpartition(".")
        if above:  # v_head.summary
            self.add_module(above, nn.Module())
        self.get_submodule(above).add_module(own, head)
        config.num_labels = layers[-1].out_features

    def parts(self) -> tuple[nn.Module, ...]:
        return (self.get_submodule(self.root),)

    def scores(self, hidden: Tensor, batch: Batch) -> Tensor:
        (head,) = self.parts()
        return head(hidden[batch.ends_at].float())


class Beaver(Layers):
    """A linear layer, and the mean and variance by which its scores are normalised if config says.

    Dai et al. 2023, arXiv 2310.12773; safe_rlhf/models/score_model of PKU-Alignment/safe-rlhf. A
    cost is larger for a worse response, so the reward is minus the cost.
    """

    @classmethod
    def takes(cls, root: str, shapes: Shapes) -> Set[str]:
        moments = {f"normalizer.{name}" for name in ("mean", "var", "count")}
        return super().takes(root, shapes) | (moments & shapes.keys())

    def add_head(self, config: "transformers.PretrainedConfig") -> None:
        super().add_head(config)
        self.normalizer = nn.Module()
        for name in ("mean", "var", "count"):
            stored = self.shapes.get(f"normalizer.{name}")
            if stored is not None:
                kind = torch.int64 if name == "count" else torch.float32
                self.normalizer.register_buffer(name, torch.zeros(stored, dtype=kind))
        self.sign = -1.0 if getattr(config, "score_type", "reward") == "cost" else 1.0
        self.normalises = bool(getattr(config, "do_normalize", False))
        if self.sign < 0:
            self.note = "; it is a cost, so the reward is minus its score"

    def moment(self, name: str, default: float) -> Tensor:
        """The mean or var, (K,): of the files, else of the config, else the default."""
        stored = getattr(self.normalizer, name, None)
        if stored is not None:
            return stored
        given = getattr(self.config, name, None)
        return torch.tensor([default] if given is None else given)

    def scores(self, hidden: Tensor, batch: Batch) -> Tensor:
        scores = super().scores(hidden, batch)
        if self.normalises:
            mean, var = (self.moment(*m).to(scores) for m in (("mean", 0.0), ("var", 1.0)))
            centred = scores if self.sign < 0 else scores - mean  # a cost keeps its zero
            scores = centred / (var.sqrt() + 1e-8)
        return self.sign * scores


class Gating(nn.Module):
    """Hidden states at the end of prompts -> how much each objective counts: (S, D) -> (S, K)."""

    def __init__(self, shapes: Shapes, config: "transformers.PretrainedConfig"):
        super().__init__()
        names = [f"gating.layers.{n}" for n in range(len(shapes))]
        names = [name for name in names if f"{name}.weight" in shapes]
        self.layers = nn.ModuleList(chain_of(names, shapes, config))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = getattr(config, "gating_temperature", 10.0)

    def forward(self, hidden: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            hidden = F.relu(layer(hidden))
        return F.softmax(last(hidden) / self.temperature, dim=-1) * self.logit_scale


class Gated(PublishedHead):
    """Several objectives, and behind them their sum, weighted by what the prompt is about.

    With the hidden states h at the last token of the response and g at the end of the prompt:

        r = W h       reward = sum_k gating(g)_k (r M)_k

    W is regression_layer, M reward_transform_matrix. g is at the first token of what Llama 3 writes
    between the last message of the prompt and the response. Wang et al. 2024, arXiv 2406.12845;
    armo-rm/stage-2_train.py and stage-2_prepare.py of RLHFlow/RLHF-Reward-Modeling.
    """

    LAYER = r"gating\.layers\.\d+\.(weight|bias)"
    BETWEEN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"

    reward, note = "gated", "; the reward is the sum of its outputs, weighted by the prompt"
    between: list[int]  # the tokens of BETWEEN; set by `load`

    @classmethod
    def takes(cls, root: str, shapes: Shapes) -> Set[str]:
        required = {"regression_layer.weight", "reward_transform_matrix", "gating.logit_scale"}
        layers = {name for name in shapes if re.fullmatch(cls.LAYER, name)}
        return required | {"gating.layers.0.weight"} | layers

    def add_head(self, config: "transformers.PretrainedConfig") -> None:
        (self.regression_layer,) = chain_of(["regression_layer"], self.shapes, config)
        self.gating = Gating(self.shapes, config)
        objectives = self.regression_layer.out_features
        # Not a parameter: sharding would gather it in the dtype of the body.
        transform = torch.zeros(objectives, objectives, dtype=torch.float32)
        self.register_buffer("reward_transform_matrix", transform)
        names = [f"LABEL_{n}" for n in range(objectives)] + [self.reward]
        config.id2label = dict(enumerate(names))

    def parts(self) -> tuple[nn.Module, ...]:
        return self.regression_layer, self.gating

    def scores(self, hidden: Tensor, batch: Batch) -> Tensor:
        objectives = self.regression_layer(hidden[batch.ends_at].float())  # (S, K)
        gates = self.gating(hidden[last_places(batch, self.between)].float())  # (S, K)
        gated = (gates * (objectives @ self.reward_transform_matrix)).sum(-1, keepdim=True)
        return torch.cat([objectives, gated], dim=-1)


def chain_of(
    names: list[str], shapes: Shapes, config: "transformers.PretrainedConfig"
) -> list[nn.Linear]:
    """Linear layers of the shapes in the files; the first reads hidden states, others the last one.

    Raises ValueError, of which `build` makes a RunError, for a weight of another shape.
    """
    layers, inputs = [], config.get_text_config().hidden_size
    for name in names:
        shape = [*shapes[f"{name}.weight"]]
        if shape[1:] != [inputs]:
            raise ValueError(f"{name}.weight has the shape {shape}, not [outputs, {inputs}]")
        layers.append(nn.Linear(inputs, shape[0], bias=f"{name}.bias" in shapes))
        inputs = shape[0]
    return layers


def last_places(batch: Batch, tokens: list[int]) -> Tensor:
    """Where `tokens` begin last in each response's sequence, prompt included: (S,) of N * T.

    batch: without the marks of LongRoPE; a prompt may be empty. Raises RunError for a sequence
        without them.
    """
    ids, positions = batch.inputs["input_ids"], batch.inputs.get("position_ids")
    starts = batch.ends_at - batch.lengths + 1  # of the responses, (S,)
    widths = starts % ids.shape[1] if positions is None else positions.flatten()[starts]
    prompt_ends = batch.predicted_at[batch.lengths.cumsum(0) - batch.lengths] + 1
    bounds = torch.stack([prompt_ends - widths, prompt_ends, starts, batch.ends_at + 1], dim=1)
    ids, count, places = ids.flatten().tolist(), len(tokens), []
    for prompt, prompt_end, start, end in bounds.tolist():
        sequence = [*range(prompt, prompt_end), *range(start, end)]
        own = [ids[place] for place in sequence]
        begins = (n for n in range(len(own) - count, -1, -1) if own[n : n + count] == tokens)
        if (begin := next(begins, None)) is None:
            raise RunError(
                f"the gating of the reward model is read where Llama 3 writes {Gated.BETWEEN!r}, "
                "which a dialogue does not have; give --template chat, and a --max_length that "
                "leaves it uncut"
            )
        places.append(sequence[begin])
    return torch.tensor(places, device=batch.ends_at.device)


HEADS = {  # by the module that has its outputs
    "score": Layers,
    "v_head.summary": Layers,
    "regression_head": Layers,
    "score_head": Beaver,
    "regression_layer": Gated,
}
# Read at the last token of the attention mask by the program that published them, also if it is the
# pad token of the config. The others are read as by transformers, before the pad tokens at the end.
OF_MASK = ("v_head.summary", "regression_head", "score_head")


def head_class(folder: Path) -> type[PublishedHead] | None:
    """The class of the folder's model if its head is one of the table, else None.

    None: a class that transformers or nanoalign has, or a language model.
    Raises RunError for another head.
    """
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind, architectures = type(config), config.architectures or []
    if (
        kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        or kind not in transformers.MODEL_MAPPING
    ):
        return None
    body, stored = transformers.MODEL_MAPPING[kind].base_model_prefix, stored_tensors(folder)
    shapes = {n: t.shape for n, t in stored.items() if not n.startswith((f"{body}.", "lm_head."))}
    is_classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    if not shapes or (is_classifier and shapes.keys() == {"score.weight"}):
        return None
    for root, head in HEADS.items():
        if head.takes(root, shapes) == shapes.keys():
            return class_with(head, kind, root=root, shapes=shapes)
    known = {getattr(class_of(kind), "__name__", None)}
    if all(name in known or hasattr(transformers, name) for name in architectures):
        return None
    found = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())[:8])
    raise RunError(
        f"model '{folder}' is {', '.join(architectures)}, whose head is not known: beside the body "
        f"'{body}' its files have {found}; docs/reward_models.md lists the heads that are; give "
        "another model"
    )


# --- models ---------------------------------------------------------------------------------------


class PublishedRewards(SeveralRewards):
    """A frozen reward model with a head of the table: its rewards are (S, K)."""

    @property
    def skips_pads(self) -> bool:
        return self.model.root not in OF_MASK

    def outputs(self, batch: Batch) -> Tensor:
        with autocast(batch.predicted_at.device, self.dtype):
            hidden = self.hidden(batch)  # (N * T, D)
        return self.model.scores(hidden, batch)

    def textbook(self, batch: Batch) -> Tensor:
        """The same by the body's own forward: (S, K). batch: in the padded layout, one response."""
        return self.outputs(batch)

    def exact(self) -> tuple[nn.Module, ...]:
        return self.model.parts()


class TokenLogit(SeveralRewards):
    """A frozen language model, whose reward is its logit of one token: (S, 1).

    Llama-3.1-Nemotron-70B-Reward-HF has its reward in the logit of token 0 at the last token.
    """

    token: int  # set by `load`
    last_layer, HEAD = Policy.head, Policy.HEAD
    skips_pads = False

    def outputs(self, batch: Batch) -> Tensor:
        with autocast(batch.predicted_at.device, self.dtype):
            last = self.hidden(batch)[batch.ends_at]  # (S, D)
        head, ids = self.last_layer, slice(self.token, self.token + 1)
        bias = None if head.bias is None else head.bias[ids].float()
        return head._replace(weight=head.weight[ids].float(), bias=bias)(last.float())

    def textbook(self, batch: Batch) -> Tensor:
        """The same by the model's own forward: (S, 1). batch: in the padded layout."""
        with autocast(batch.ends_at.device, self.dtype):
            logits = self.model(input_ids=batch.inputs["input_ids"], use_cache=False).logits
        return logits.flatten(0, 1)[batch.ends_at, self.token].float()[:, None]

    def exact(self) -> tuple[nn.Module, ...]:
        return ()


def load(
    folder: Path, world: World | None, dtype: torch.dtype, token: int | None = None
) -> SeveralRewards:
    """Loads a frozen reward model of any program. token: whose logit is the reward (TokenLogit).

    folder: an adapters.model_folder.
    Raises RunError as head_class and RewardModel.load do, and for a token that the model lacks.
    """
    is_adapter = adapters.adapter_of(folder) is not None
    if token is None:
        head, cls = None if is_adapter else head_class(folder), PublishedRewards
    else:
        head, cls = transformers.AutoModelForCausalLM, TokenLogit
    if head is None:
        read = adapters.reading(reader(adapters.base_of(folder)) if is_adapter else read_slices)
        return SeveralRewards.load(folder, world, dtype, trainable=False, read=read)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.num_labels = 1  # a head with several changes it
    model, fill = adapters.reading(read_slices)(head, folder, config, dtype)
    if isinstance(model, Gated):
        tokenizer = load_tokenizer(folder)
        model.between = tokenizer(Gated.BETWEEN, add_special_tokens=False)["input_ids"]
    reward_model = cls(model, dtype)
    if token is not None:
        if token >= (ids := model.get_output_embeddings().weight.shape[0]):
            raise RunError(f"--head token:{token}: model '{folder}' has {ids} tokens")
        reward_model.token = token
    about = f"the logit of token {token}" if token is not None else f"{model.root}{model.note}"
    print0(f"{'head':<11} {about}")
    reward_model.materialize(world, fill, trainable=False, checkpointing=False)
    return reward_model


# --- training -------------------------------------------------------------------------------------


def reader(folder: Path) -> Read:
    """The `read` of RewardModel.load with which training continues from the model of a folder.

    A linear head of the table becomes the head of the model that is trained, and is saved as
    `score`. Its bias is left out: training and figures depend on differences of rewards alone.
    Raises RunError as head_class does. What is returned raises it for a head that is not linear,
    and for scores that are normalised.
    """
    cls = head_class(folder)
    if cls is None:
        return read_slices
    is_linear = issubclass(cls, Layers) and cls.layers(cls.root, cls.shapes) == [cls.root]

    def read(auto: type, folder: Path, config, dtype: torch.dtype) -> tuple[nn.Module, Fill]:
        with parameters_on_meta():
            published = build(cls, config, dtype, folder)
        if not is_linear or published.normalises:
            raise RunError(
                f"model '{folder}' has the head {cls.root}, which is not one linear layer or "
                "normalises its scores, so training can't continue from it; give another model"
            )
        (head,) = published.parts()
        config.num_labels = head.out_features
        with parameters_on_meta():
            model = build(auto, config, dtype, folder)
            setattr(published, published.base_model_prefix, model.base_model)
        if head.bias is not None:  # `published` is no part of the model that gets memory
            head.bias = nn.Parameter(torch.empty_like(head.bias, device="cpu"))
        places = places_of(published) | {f"{cls.root}.weight": (model.score, "weight")}
        fill = filler(published, places, folder)

        @torch.no_grad()
        def fill_head(module: nn.Module, device: torch.device) -> None:
            fill(module, device)
            model.score.weight.mul_(published.sign)
            sign = "minus " if published.sign < 0 else ""
            bias = "" if head.bias is None else f" without its bias, {head.bias.tolist()}"
            print0(f"{'head':<11} {sign}{cls.root}{bias}; the result has it as score")

        return model, fill_head

    return read
