"""Policy and RewardModel: nn.Modules whose forward takes a Batch and says a number of each response.

How weights come in and go out stands in nanoalign/weights.py.

Shapes: N rows, T tokens, S responses, M scored tokens, V vocabulary, D hidden size.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from nanoalign import attention, lora, weights
from nanoalign.distributed import World, autocast, shard
from nanoalign.errors import RunError
from nanoalign.logps import (
    IGNORE,
    chunked_token_collisions,
    chunked_token_logps,
    sequence_logps,
    sums_of_responses,
)
from nanoalign.rows import Batch, Row, check_fits

CHUNK_LOGITS = 2**25  # logits held at one time, in elements: 128 MiB of float32
SCORING = "nanoalign"  # the key of a reward model's config that says how its rewards are read


class RowModel(nn.Module):
    """A causal transformer that runs on rows; Policy and RewardModel are what stands on top of it.

    Both have a `forward`, a `textbook` that computes the same by transformers' own forward, and for
    the comparison of the two (nanoalign/checks.py) a scale of their `rounding`.
    """

    SCORES: str  # what it says of responses, and the unit of a difference
    UNIT: str

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states: (N, T, D)."""
        if batch.tree is None:  # padding is on the right, where no token sees it
            return self.model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        self._check_packing()
        with attention.use(attention.NAME, self.model.config):
            return self.model.base_model(
                input_ids=batch.tokens,
                position_ids=batch.positions,
                tree=batch.tree,
                use_cache=False,
            ).last_hidden_state

    def _check_packing(self) -> None:
        """Stops where something besides attention joins tokens, or attention is not transformers' own."""
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        if others := sorted(kinds - {"full_attention", "sliding_attention"}):
            raise RunError(
                f"layers of the type '{others[0]}' can't keep a prompt's responses apart; use "
                "--no-share_prefix"
            )
        if not self.model._supports_attention_backend:
            raise RunError(
                f"{type(self.model).__name__} has an attention of its own, which can't keep a prompt's "
                "responses apart; use --no-share_prefix"
            )

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, by the class names that the architecture gives for them."""
        names = set(self.model._no_split_modules or ())
        blocks = [module for module in self.model.modules() if type(module).__name__ in names]
        inner = {id(part) for block in blocks for part in block.modules() if part is not block}
        return [block for block in blocks if id(block) not in inner]

    def count_parameters(self, trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def check_fits(self, rows: list[Row]) -> None:
        """Raises RunError for rows with token ids or positions that the model does not have."""
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        check_fits(rows, self.model.get_input_embeddings().num_embeddings, positions)

    def save(self, folder: Path, tokenizer, world: World | None = None) -> None:
        """Writes model and tokenizer in Hugging Face format, float32. Every rank must call it."""
        if world is not None:
            self.reshard()  # a forward without a backward pass leaves the head gathered
        weights.save(self.model, tokenizer, folder, world)

    def _place(
        self,
        world: World | None,
        trainable: bool,
        activation_checkpointing: bool,
        exact: tuple[nn.Module, ...] = (),
    ) -> None:
        """Shards the module, which is still on the meta device, and gives the shards memory.

        exact: parts that stay float32 in any case.
        """
        for part in exact:
            part.float()
        if not trainable:  # else adapters, if there are any, have frozen the rest
            self.requires_grad_(False)
        self.eval()  # dropout off, in training too: policy and reference must be the same function
        blocks = self.blocks()
        if activation_checkpointing:
            for block in blocks:
                # The forward and not the module: sharding's hooks stay outside and run once.
                block.forward = partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
                    context_fn=partial(attention.used_again, self.model.config),
                )  # fmt: skip
        if world is not None:
            shard(self, blocks, world, self.compute_dtype, trainable, exact)
            register_fsdp_forward_method(self, "textbook")
        weights.materialise(self, world.device if world else torch.device("cpu"))


class TokenLogps(NamedTuple):
    """What a policy says of every scored token."""

    logps: Tensor  # (M,)
    collisions: Tensor | None  # (M,) log sum_v pi(v)^2, without gradient


class Policy(RowModel):
    """A causal language model that scores responses; policy and reference are both one.

    >>> policy = Policy.load("tiny")
    >>> policy(collate([row]))                      # chosen and rejected of one pair: (2,)
    """

    SCORES, UNIT = "log-probabilities", "nats a token"

    def forward(
        self, batch: Batch, per_token: bool = False, collisions: bool = False
    ) -> Tensor | TokenLogps:
        """Log-probability of every response given its prompt, EOS included: (S,) float32, in nats.

        per_token: instead those of every scored token, and if asked for the collisions there.
        """
        with autocast(batch.tokens.device, self.compute_dtype):
            scored = self.hidden(batch).flatten(0, 1)[batch.reads]  # (M, D)
            chunk = max(1, CHUNK_LOGITS // self.model.config.get_text_config().vocab_size)
            token_logps = chunked_token_logps(scored, self.logits, batch.targets, chunk)  # (M,)
            there = chunked_token_collisions(scored, self.logits, chunk) if collisions else None
        if per_token:
            return TokenLogps(token_logps, there)
        return sums_of_responses(token_logps, batch.lengths)

    def textbook(self, batch: Batch) -> Tensor:
        """What forward computes, the plain way: the model's own forward, mask and full logits -> (S,).

        For rows of one response. It is the oracle that the fast path is checked against.
        """
        assert batch.tree is None, "the textbook way takes one response a line"
        with autocast(batch.tokens.device, self.compute_dtype):
            logits = self.model(input_ids=batch.tokens, use_cache=False).logits  # (N, T, V)
        return sequence_logps(logits, batch.tokens.masked_fill(batch.segments != 1, IGNORE))

    def rounding(self, logps: Tensor, batch: Batch) -> Tensor:
        """(S,) what rounding adds up over: a response's tokens, and 5, since few do not average out."""
        return batch.lengths + 5

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own way from a final hidden state to logits: (C, D) -> (C, V)."""
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(hidden)
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * factor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    def eos_ids(self, tokenizer) -> set[int]:
        """What ends an answer: the tokenizer's EOS, and those that the generation config names."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        named = named if isinstance(named, list) else [named]
        return {i for i in (tokenizer.eos_token_id, *named) if i is not None}

    @classmethod
    def load(
        cls,
        path: str | Path,
        world: World | None = None,
        compute_dtype: torch.dtype = torch.float32,
        trainable: bool = True,
        activation_checkpointing: bool = False,
        adapters: lora.Adapters | None = None,
    ) -> "Policy":
        """A policy from a Hugging Face folder, from OWNER/NAME on the Hub, or "tiny", the embedded one.

        world: shards the parameters over its ranks, each of which reads its own slices of the
            files alone; None gives plain parameters on the CPU, for tests and notebooks.
        compute_dtype: of matrix products. A trainable policy's parameters are float32 in any case
            (bfloat16 would swallow steps of lr 1e-6); a frozen one is held in compute_dtype.
        trainable: False for a reference: no gradient, no optimizer.
        activation_checkpointing: keeps each block's input alone, and runs the block again in the
            backward pass.
        adapters: what is trained in place of the weights, which are frozen; and held in
            compute_dtype where config.json says that they are stored so, as nothing is lost by it.

        Raises RunError where files are missing, or names or shapes do not match the architecture.
        """
        folder = weights.resolve_model(path)
        config = weights.read_config(folder)
        with weights.parameters_on_meta():
            stored_so = adapters is not None and config.dtype == compute_dtype
            dtype = torch.float32 if trainable and not stored_so else compute_dtype
            model = weights.build(AutoModelForCausalLM, config, dtype, path)
            if adapters is not None:
                adapters.put_into(model)
        if (folder / "generation_config.json").is_file():  # it may name further EOS tokens
            model.generation_config = GenerationConfig.from_pretrained(folder)
        policy = cls(model, compute_dtype)
        policy._place(world, trainable, activation_checkpointing)
        model.tie_weights()
        weights.load(model, folder, world)
        for parameter, values in adapters.initial(model) if adapters is not None else ():
            weights.fill(parameter, values)
        return policy


class RewardModel(RowModel):
    """A transformer with one linear head, read at a response's last token: its reward.

    In Hugging Face format it is a ...ForSequenceClassification of one label, or of K for K preferences,
    whose config also says under "nanoalign" how it reads text: template, max_length, the EOS rule, the
    preferences, and whether a prompt names the one that is meant.

    >>> RewardModel.load("runs/rm")(collate([row]))         # chosen and rejected of one pair: (2,)
    """

    SCORES, UNIT = "rewards", "times 1 + the largest"

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype = torch.float32):
        super().__init__(model, compute_dtype)
        self.mix: Tensor | None = None  # (K,) weights of the outputs; else they are given apart
        self.length: nn.Linear | None = None  # the worth of length_unit tokens, in training alone
        self.length_unit = 1.0

    def forward(self, batch: Batch, by_length: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The reward of every response: (S,) float32, or (S, K) of several preferences.

        by_length: with them what its length alone would be worth, (S,). Only rewards of the same
            prompt can be compared.
        """
        with autocast(batch.tokens.device, self.compute_dtype):
            last = self.hidden(batch).flatten(0, 1)[batch.ends]  # (S, D)
        # In float32, since a reward in bfloat16 has 8 bits, and two good answers would often tie.
        rewards = self._mixed(self.head(last.float()))
        if by_length:
            units = batch.lengths.float()[:, None] / self.length_unit
            return rewards, self.length(units).sum(-1)
        return rewards

    def _mixed(self, rewards: Tensor) -> Tensor:
        """(S, K) -> (S,) where there is one output, or weights for them."""
        if self.mix is not None:
            rewards = rewards * self.mix.to(rewards)
        elif rewards.shape[1] > 1:
            return rewards
        return rewards.sum(-1)  # a view would trouble FSDP's hooks

    def combine(self, shares: dict[str, float]) -> None:
        """Makes the reward the sum of those by these preferences, each with its weight."""
        if unknown := sorted(shares.keys() - set(self.preferences)):
            raise RunError(
                f"the reward model has no preference {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(self.preferences)}"
            )
        if not self.is_conditioned:
            self.mix = torch.tensor([shares.get(name, 0.0) for name in self.preferences])

    @property
    def preferences(self) -> list[str]:
        """By what it judges: a name an output; of one output those that a prompt may name."""
        if isinstance(self.scoring, dict) and "preferences" in self.scoring:
            return self.scoring["preferences"]
        return (
            list(self.model.config.id2label.values()) if self.head.out_features > 1 else ["better"]
        )

    @property
    def is_conditioned(self) -> bool:
        """Whether a prompt names the preference that it is to judge by."""
        return bool((self.scoring or {}).get("condition"))

    def textbook(self, batch: Batch) -> Tensor:
        """What forward computes, the plain way: transformers' own forward, a response at a time."""
        assert batch.tree is None, "the textbook way takes one response a line"
        with autocast(batch.tokens.device, self.compute_dtype):
            rewards = [
                self.model(input_ids=tokens[segments >= 0][None], use_cache=False).logits.float()
                for tokens, segments in zip(batch.tokens, batch.segments, strict=True)
            ]
        return self._mixed(torch.cat(rewards))

    def rounding(self, rewards: Tensor, batch: Batch) -> Tensor:
        """() the size of rewards, to which rounding is in proportion."""
        return 1 + rewards.abs().max()

    @property
    def head(self) -> nn.Linear:
        """From D to K, its weight (K, D), without bias; `score` in most architectures."""
        others = [part for part in self.model.children() if part is not self.model.base_model]
        (head,) = [part for part in others if any(True for _ in part.parameters())]
        return head

    @property
    def scoring(self) -> dict[str, object] | None:
        """How its rewards are read, as it was trained: template, max_length, eos. None: not known."""
        rule = getattr(self.model.config, SCORING, None)
        return rule if isinstance(rule, dict) else None

    @scoring.setter
    def scoring(self, rule: dict[str, object]) -> None:
        setattr(self.model.config, SCORING, rule)

    @classmethod
    def load(
        cls,
        path: str | Path,
        world: World | None = None,
        compute_dtype: torch.dtype = torch.float32,
        trainable: bool = True,
        activation_checkpointing: bool = False,
        head_seed: int | None = None,
        outputs: int | None = None,
        length_debias: bool = False,
    ) -> "RewardModel":
        """A reward model from a folder that holds one, or begun on the body of a causal language model.

        head_seed: draws a head for a causal language model, with a standard deviation of
            1 / sqrt(D + 1); None makes such a folder an error. A head that the folder holds is
            loaded, never drawn.
        outputs: how many a head must have that is drawn or loaded; None takes one as it is.
        length_debias: puts a coefficient of length beside the head, for training; it is not saved.
        The other arguments, and the errors, are those of Policy.load.
        """
        folder = weights.resolve_model(path)
        config = weights.read_config(folder)
        has_head = is_reward_model(config)
        if has_head and outputs is not None and config.num_labels != outputs:
            raise RunError(
                f"model '{path}' has a head of {config.num_labels} outputs, and {outputs} are wanted, one "
                "for each preference"
            )
        if not has_head and head_seed is None:
            names = ", ".join(config.architectures or ["no architecture"])
            raise RunError(
                f"model '{path}' has no reward head: its config.json names {names}; train one: train_rm.py"
            )
        text_config = config.get_text_config()
        pad, eos = text_config.pad_token_id, text_config.eos_token_id
        if has_head and pad is not None and pad in (eos if isinstance(eos, list) else [eos]):
            raise RunError(
                f"model '{path}' pads with its EOS, so its rewards were read before the EOS, and not at "
                "it as here; if they were read at the EOS, give config.json another pad_token_id"
            )
        if not has_head:
            config.num_labels = outputs or 1
        # transformers reads a reward at the last token that is not for padding, of which we have no
        # need: so a language model's EOS that serves as padding is read, and its embedding trained.
        text_config.pad_token_id = None
        with weights.parameters_on_meta():
            dtype = torch.float32 if trainable else compute_dtype
            model = weights.build(AutoModelForSequenceClassification, config, dtype, path)
            language_model = (
                None if has_head else weights.build(AutoModelForCausalLM, config, dtype, path)
            )
        reward_model = cls(model, compute_dtype)
        reward_model._check_head(path)
        exact = (reward_model.head,)
        if length_debias:
            with weights.parameters_on_meta():
                reward_model.length = nn.Linear(1, 1, bias=False)
            exact = (reward_model.head, reward_model.length)
        reward_model._place(world, trainable, activation_checkpointing, exact=exact)
        if length_debias:
            weights.fill(reward_model.length.weight, torch.zeros(1, 1))
        if has_head:
            weights.load(model, folder, world)
            reward_model.head_origin = "loaded"
        else:
            # The files are those of a language model: it reads them, with our body for its own.
            setattr(language_model, language_model.base_model_prefix, model.base_model)
            language_model.tie_weights()
            weights.load(language_model, folder, world)
            weights.fill(reward_model.head.weight, _draw_head(reward_model.head, head_seed))
            reward_model.head_origin = f"drawn with seed {head_seed}"
        return reward_model

    def save(self, folder: Path, tokenizer, world: World | None = None) -> None:
        """Writes model and tokenizer in Hugging Face format, float32. Every rank must call it.

        transformers reads a reward at the last token that is not the config's pad id, so that must
        never be the EOS that ends a response. Where the tokenizer has no other token for padding,
        the config gets none, and transformers scores one sequence at a time.
        """
        known = self.model.get_input_embeddings().num_embeddings
        others = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
        unfit = (None, tokenizer.eos_token_id)
        pad = next((i for i in others if i not in unfit and i < known), None)
        self.model.config.get_text_config().pad_token_id = pad
        if pad is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        super().save(folder, tokenizer, world)

    def _check_head(self, path: str | Path) -> None:
        kind = type(self.model).__name__
        try:
            head = self.head
        except ValueError as error:
            raise RunError(f"model '{path}': {kind} has no single head of its own") from error
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise RunError(f"model '{path}': the head of {kind} is not linear without bias")


def is_reward_model(config: PretrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _draw_head(head: nn.Linear, seed: int) -> Tensor:
    """(K, D), normal with the standard deviation 1 / sqrt(D + 1): rewards begin near 0, of size 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
