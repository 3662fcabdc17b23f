"""Policy: an nn.Module whose forward takes a Batch and returns log-probabilities of its responses.

How weights come in and go out stands in nanoalign/weights.py.

Shapes: N rows, T tokens, S responses, M scored tokens, V vocabulary, D hidden size.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from nanoalign import weights
from nanoalign.distributed import World, autocast, shard
from nanoalign.errors import RunError, in_a_line
from nanoalign.logps import IGNORE, chunked_token_logps, sequence_logps
from nanoalign.rows import Batch, Row, check_fits, tree_mask

CHUNK_LOGITS = 2**25  # logits held at one time, in elements: 128 MiB of float32


class Policy(nn.Module):
    """A causal language model that scores responses; policy and reference are both one.

    >>> policy = Policy.load("tiny")
    >>> policy(collate([row]))                      # chosen and rejected of one pair: (2,)
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype

    def forward(self, batch: Batch) -> Tensor:
        """Log-probability of every response given its prompt, EOS included: (S,) float32, in nats."""
        with autocast(batch.tokens.device, self.compute_dtype):
            hidden = self.model.base_model(
                input_ids=batch.tokens, use_cache=False, **self._attention(batch)
            ).last_hidden_state  # (N, T, D)
            scored = hidden.flatten(0, 1)[batch.reads]  # (M, D)
            chunk = max(1, CHUNK_LOGITS // self.model.config.get_text_config().vocab_size)
            token_logps = chunked_token_logps(scored, self._logits, batch.targets, chunk)  # (M,)
        # unsafe: skips the check that lengths sum to M, which would wait for the GPU.
        return torch.segment_reduce(token_logps, "sum", lengths=batch.lengths, unsafe=True)

    def textbook_logps(self, batch: Batch) -> Tensor:
        """What forward computes, the plain way: the model's own forward, mask and full logits -> (S,).

        For rows of one response. It is the oracle that the fast path is checked against.
        """
        assert not batch.shared, "the textbook way takes one response a row"
        with autocast(batch.tokens.device, self.compute_dtype):
            logits = self.model(input_ids=batch.tokens, use_cache=False).logits  # (N, T, V)
        return sequence_logps(logits, batch.tokens.masked_fill(batch.segments != 1, IGNORE))

    def _logits(self, hidden: Tensor) -> Tensor:
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

    def _attention(self, batch: Batch) -> dict[str, object]:
        """Mask and positions of the tree; nothing for plain rows, which never see their padding."""
        if not batch.shared:
            return {}
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds:  # one kind of layer; where the config has a window, all layers use it
            kinds = {"sliding_attention" if window else "full_attention"}
        masks = {}
        for kind in sorted(kinds):
            if kind not in ("full_attention", "sliding_attention"):
                raise RunError(
                    f"layers of the type '{kind}' can't keep a prompt's responses apart; use "
                    "--no-share_prefix"
                )
            span = window if kind == "sliding_attention" else None
            mask = tree_mask(batch.segments, batch.positions, span).unsqueeze(1)  # (N, 1, T, T)
            if config._attn_implementation == "eager":  # adds its mask to the scores
                lowest = torch.finfo(self.compute_dtype).min
                mask = torch.zeros_like(mask, dtype=self.compute_dtype).masked_fill(~mask, lowest)
            masks[kind] = mask
        return {
            "attention_mask": masks if len(masks) > 1 else masks.popitem()[1],
            "position_ids": batch.positions,
        }

    @classmethod
    def load(
        cls,
        path: str | Path,
        world: World | None = None,
        compute_dtype: torch.dtype = torch.float32,
        trainable: bool = True,
        activation_checkpointing: bool = False,
    ) -> "Policy":
        """A policy from a Hugging Face folder, from OWNER/NAME on the Hub, or "tiny", the embedded one.

        world: shards the parameters over its ranks, each of which reads its own slices of the
            files alone; None gives plain parameters on the CPU, for tests and notebooks.
        compute_dtype: of matrix products. A trainable policy's parameters are float32 in any case
            (bfloat16 would swallow steps of lr 1e-6); a frozen one is held in compute_dtype.
        trainable: False for a reference: no gradient, no optimizer.
        activation_checkpointing: keeps each block's input alone, and runs the block again in the
            backward pass.

        Raises RunError where files are missing, or names or shapes do not match the architecture.
        """
        folder = weights.resolve_model(path)
        config = weights.read_config(folder)
        with weights.parameters_on_meta():
            dtype = torch.float32 if trainable else compute_dtype
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            except weights.FOREIGN_ERRORS as error:  # no causal language model, odd settings
                raise RunError(f"model '{path}' can't be built: {in_a_line(error)}") from error
        if model.base_model is model:
            raise RunError(
                f"model '{path}': {type(model).__name__} has no body apart from its head"
            )
        if (folder / "generation_config.json").is_file():  # it may name further EOS tokens
            model.generation_config = GenerationConfig.from_pretrained(folder)
        policy = cls(model, compute_dtype).requires_grad_(trainable)
        policy.eval()  # dropout off, in training too: policy and reference must be the same function
        blocks = policy.blocks()
        if activation_checkpointing:
            for block in blocks:
                # The forward and not the module: sharding's hooks stay outside and run once.
                block.forward = partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
        if world is not None:
            shard(policy, blocks, world, compute_dtype, trainable)
            register_fsdp_forward_method(policy, "textbook_logps")
        weights.materialise(policy, world.device if world else torch.device("cpu"))
        model.tie_weights()
        weights.load(model, folder, world)
        return policy

    def save(self, folder: Path, tokenizer, world: World | None = None) -> None:
        """Writes model and tokenizer in Hugging Face format, float32. Every rank must call it."""
        if world is not None:
            self.reshard()  # a forward without a backward pass leaves the head gathered
        weights.save(self.model, tokenizer, folder, world)

    def check_fits(self, rows: list[Row]) -> None:
        """Raises RunError for rows with token ids or positions that the model does not have."""
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        check_fits(rows, self.model.get_input_embeddings().num_embeddings, positions)

    def count_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, by the class names that the architecture gives for them."""
        names = set(self.model._no_split_modules or ())
        blocks = [module for module in self.model.modules() if type(module).__name__ in names]
        inner = {id(part) for block in blocks for part in block.modules() if part is not block}
        return [block for block in blocks if id(block) not in inner]
