"""Policy: a Batch in, the log-probability of every response out; and what RewardModel shares.

Shapes: N lines, T tokens, S responses, M scored tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanoalign.batch import Batch
from nanoalign.distributed import World, autocast
from nanoalign.errors import RunError
from nanoalign.logps import IGNORE, Head, chunked_token_logps, sequence_logps, sums_of_responses
from nanoalign.sharding import cast, shard

TINY = Path(__file__).parent / "tiny" / "model"  # the embedded language model
# Logits in memory at one time: 1 GiB of float32; 16 MiB on a CPU, about what its caches have.
CHUNK_LOGITS = {"cuda": 2**28, "cpu": 2**22}
# Options of torch's checkpoint: a second forward draws no random numbers, whose state is not kept.
RERUN = {"use_reentrant": False, "preserve_rng_state": False}

Fill = Callable[[nn.Module, torch.device], None]  # gives a sharded module its weights on a device
# (class of transformers, folder, config, dtype) -> (a model, what fills it with its weights)
Read = Callable[[type, Path, object, torch.dtype], tuple[nn.Module, Fill]]


class Scorer(nn.Module):
    """A causal transformer that scores the responses of a Batch; subclasses add the head."""

    SCORES: str  # the name of the scores, for errors
    METHODS = ("textbook",)  # methods beside forward that use parameters, which are sharded

    def __init__(self, model: "transformers.PreTrainedModel", dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.dtype = model, dtype

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states of all places: (N * T, D)."""
        output = self.model.base_model(**batch.inputs, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)

    def blocks(self) -> list[nn.Module]:
        """The outermost transformer blocks, in order; the architecture names their classes."""
        names = set(self.model._no_split_modules or ())
        # Sharding makes a subclass of each.
        blocks = [m for m in self.model.modules() if names & {c.__name__ for c in type(m).__mro__}]
        inner = {id(part) for block in blocks for part in block.modules() if part is not block}
        return [block for block in blocks if id(block) not in inner]

    def exact(self) -> tuple[nn.Module, ...]:
        """Parts that are float32 in every precision."""
        return ()

    def materialize(
        self, world: World | None, fill: Fill, trainable: bool, checkpointing: bool
    ) -> None:
        """Prepares the model in place, and fills its parameters.

        Without `trainable` all parameters are frozen. On several ranks they are sharded; on one
        they are cast to the dtype where they run. checkpointing: blocks run again in the backward
        pass.
        """
        for part in self.exact():
            part.float()
        if not trainable:  # else adapters, if there are any, have frozen the rest
            self.requires_grad_(False)
        self.eval()  # no dropout in training either: policy and reference must be one function
        blocks = self.blocks()
        if world is not None and world.size > 1:
            shard(self, blocks, world, self.dtype, trainable, self.exact(), self.METHODS)
        elif trainable and self.dtype != torch.float32:
            cast(self, ("forward", *self.METHODS), self.dtype, (*blocks, *self.exact()))
            for block in blocks:  # in the backward pass too, where it runs again
                cast(block, ("forward",), self.dtype)
        for block in blocks if checkpointing else ():  # the forward only: hooks must run once
            block.forward = partial(checkpoint, block.forward, **RERUN)
        fill(self, world.device if world else torch.device("cpu"))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Trained parameters, in groups for an optimizer. Vectors (biases, norms) do not decay."""
        trained = [p for p in self.parameters() if p.requires_grad]
        matrices, vectors = ([p for p in trained if (p.ndim >= 2) == m] for m in (True, False))
        groups = ((matrices, weight_decay), (vectors, 0.0))
        return [{"params": group, "weight_decay": decay} for group, decay in groups if group]

    def count_parameters(self, trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)


def read_whole(auto: type, folder: Path, config, dtype: torch.dtype) -> tuple:
    """The `read` of notebooks: every rank reads all weights, by transformers' from_pretrained.

    Returns the model and a function that moves it to a device. Raises RunError if weights are
    missing. The scripts read slices of the files (nanoalign/weights/slices.py).
    """
    # Nothing is unpickled, and no code of the folder is run.
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    model, info = auto.from_pretrained(folder, config=config, dtype=dtype, **options)
    known = type(model).__name__ in (config.architectures or ())  # else its head is new
    if lost := [n for n in info["missing_keys"] if n.startswith(model.base_model_prefix) or known]:
        raise RunError(f"model folder '{folder}' has no weights for {', '.join(sorted(lost)[:3])}")
    return model, lambda module, device: module.to(device)


class Policy(Scorer):
    """A causal language model; policy and reference are both one.

    >>> policy = Policy.load("tiny")
    >>> policy(collate([row]))                  # log pi(chosen | x), log pi(rejected | x): (2,)
    """

    SCORES, METHODS, HEAD = "log-probabilities", ("textbook", "tokens"), Head

    @classmethod
    def load(
        cls, path: str | Path, world: World | None = None, dtype: torch.dtype = torch.float32,
        trainable: bool = True, checkpointing: bool = False, read: Read = read_whole,
    ) -> "Policy":  # fmt: skip
        """A policy from a Hugging Face folder, or "tiny"; local_folder finds models of the Hub.

        world: shards the parameters over its ranks; None leaves them whole, for notebooks.
        dtype: of matrix products. The parameters of a trainable policy are float32 (bfloat16 would
            swallow steps of lr 1e-6); a frozen one is held in dtype.
        checkpointing: keeps only the input of each block, and runs it again in the backward pass.
        Raises RunError if files are missing or do not fit the architecture.
        """
        folder = Path(TINY if path == "tiny" else path).resolve(strict=True)  # not a Hub name
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        auto = transformers.AutoModelForCausalLM
        model, fill = read(auto, folder, config, torch.float32 if trainable else dtype)
        policy = cls(model, dtype)
        policy.materialize(world, fill, trainable, checkpointing)
        return policy

    def forward(self, batch: Batch) -> Tensor:
        """log pi(y | x) of every response, EOS included: (S,) float32, in nats."""
        # Not self.tokens, which sharding has replaced: parameters would be gathered twice.
        return sums_of_responses(Policy.tokens(self, batch), batch.lengths)

    def tokens(self, batch: Batch, head: Callable = chunked_token_logps) -> Tensor:
        """The log-probability of every scored token, (M,), or what another head computes.

        head: takes what logps.chunked_token_logps takes.
        """
        with autocast(batch.predicted_at.device, self.dtype):
            scored = self.hidden(batch)[batch.predicted_at]  # (M, D)
            chunk = CHUNK_LOGITS[scored.device.type] // len(scored)
            return head(scored, self.head, batch.targets, max(64, chunk // 64 * 64))

    @property
    def head(self) -> Head:
        """Final hidden states -> logits, as in the model's own forward."""
        config, last = self.model.config.get_text_config(), self.model.get_output_embeddings()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale = scale / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        return self.HEAD(last.weight, getattr(last, "bias", None), scale, cap)

    def textbook(self, batch: Batch) -> Tensor:
        """The same as forward, by the model's own forward and full logits: (S,).

        batch: in the padded layout.
        """
        tokens = batch.inputs["input_ids"]  # (N, T), a line per response
        labels = torch.full_like(tokens.flatten(), IGNORE)
        labels[batch.predicted_at + 1] = batch.targets
        with autocast(tokens.device, self.dtype):
            logits = self.model(input_ids=tokens, use_cache=False).logits  # (N, T, V)
        return sequence_logps(logits, labels.view_as(tokens))


class RewardModel(Scorer):
    """A transformer with one linear head, read at the last token of a response: its reward.

    In Hugging Face format it is a ...ForSequenceClassification, with one label unless a subclass
    has more. Its config has under "nanoalign" how text becomes tokens: template, max_length, the
    EOS rule.
    """

    SCORES = "rewards"

    @classmethod
    def load(
        cls, path: str | Path, world: World | None = None, dtype: torch.dtype = torch.float32,
        trainable: bool = True, checkpointing: bool = False, read: Read = read_whole,
        head_seed: int | None = None, outputs: int | None = None,
    ) -> "RewardModel":  # fmt: skip
        """A reward model from a folder that has one, or with the body of a causal language model.

        head_seed: draws a head for a causal language model; without it such a folder is an error. A
            head that the folder has is loaded, never drawn.
        outputs: K of a head that is drawn, and required of one that is loaded; None takes any.
        The other arguments are those of Policy.load.
        Raises RunError for a folder without a head if head_seed is None, for another number of
            outputs, and for a model without a single linear head.
        """
        folder = Path(TINY if path == "tiny" else path).resolve(strict=True)  # not a Hub name
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        names = config.architectures or []
        has_head = any(name.endswith("ForSequenceClassification") for name in names)
        if not has_head and head_seed is None:
            raise RunError(f"model '{path}' is {names} without a reward head; train_rm.py adds one")
        if has_head and outputs not in (None, config.num_labels):
            raise RunError(f"model '{path}' has {config.num_labels} outputs; expected {outputs}")
        config.num_labels = config.num_labels if has_head else outputs or 1
        config.get_text_config().pad_token_id = None  # transformers would not train its embedding
        auto = transformers.AutoModelForSequenceClassification
        model, fill = read(auto, folder, config, torch.float32 if trainable else dtype)
        reward_model = cls(model, dtype)
        head = reward_model.head
        if not has_head:  # rewards begin near 0, with a standard deviation of about 1
            draw = torch.Generator().manual_seed(head_seed)
            weight = torch.randn(head.weight.shape, generator=draw) / (head.in_features + 1) ** 0.5
            head.weight = nn.Parameter(weight)
        reward_model.materialize(world, fill, trainable, checkpointing)
        return reward_model

    def forward(self, batch: Batch) -> Tensor:
        """r(x, y) of every response: (S,) float32."""
        return self.reward_of(self.outputs(batch))

    def reward_of(self, outputs: Tensor) -> Tensor:
        """The outputs of the head as rewards: (S, K) -> (S,). A hook for other heads."""
        return outputs.sum(-1)

    def outputs(self, batch: Batch) -> Tensor:
        """The outputs of the head at the last token of every response: (S, K) float32."""
        with autocast(batch.predicted_at.device, self.dtype):
            last = self.hidden(batch)[batch.ends_at]  # (S, D)
        return self.head(last.float())  # a reward in bfloat16 has 8 bits: good answers would tie

    def textbook(self, batch: Batch) -> Tensor:
        """The same as forward, by the model's own forward, one response at a time: (S,).

        batch: in the padded layout.
        """
        tokens = batch.inputs["input_ids"]  # (N, T)
        lines = zip(tokens, (batch.ends_at % tokens.shape[1] + 1).tolist(), strict=True)
        with autocast(tokens.device, self.dtype):
            outputs = [self.model(input_ids=line[None, :n], use_cache=False) for line, n in lines]
        return self.reward_of(torch.cat([output.logits.float() for output in outputs]))

    @property
    def head(self) -> nn.Linear:
        """The one linear layer beside the body: weight (outputs, D), no bias; `score` in most.

        Raises RunError if there is no such layer.
        """
        heads = [part for part in self.model.children() if part is not self.model.base_model]
        if len(heads) != 1 or not isinstance(heads[0], nn.Linear) or heads[0].bias is not None:
            raise RunError(f"{type(self.model).__name__} has no single linear head without bias")
        return heads[0]

    def exact(self) -> tuple[nn.Module, ...]:
        return (self.head,)
