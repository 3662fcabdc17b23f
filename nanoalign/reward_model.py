"""RewardModel: a Batch in, the reward of every response out. Shapes as in model.py; K outputs."""

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from nanoalign import TINY
from nanoalign.batch import Batch
from nanoalign.distributed import World, autocast
from nanoalign.errors import RunError
from nanoalign.model import Read, Scorer, read_whole


class RewardModel(Scorer):
    """A transformer with one linear head, read at the last token of a response: its reward.

    In Hugging Face format it is a ...ForSequenceClassification with one label. Its config has under
    "nanoalign" how text becomes tokens: template, max_length, the EOS rule.
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
        """
        folder = Path(TINY if path == "tiny" else path).resolve(strict=True)  # not a Hub name
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        names = config.architectures or []
        has_head = any(name.endswith("ForSequenceClassification") for name in names)
        if not has_head and head_seed is None:
            raise RunError(f"model '{path}' is {names} without a reward head; see train_rm.py")
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
        reward_model.place(world, fill, trainable, checkpointing)
        return reward_model

    def forward(self, batch: Batch) -> Tensor:
        """r(x, y) of every response: (S,) float32."""
        return self.reward_of(self.outputs(batch))

    def reward_of(self, outputs: Tensor) -> Tensor:
        """The outputs of the head as rewards: (S, K) -> (S,). A hook for other heads."""
        return outputs.sum(-1)

    def outputs(self, batch: Batch) -> Tensor:
        """The outputs of the head at the last token of every response: (S, K) float32."""
        with autocast(batch.reads.device, self.dtype):
            last = self.hidden(batch)[batch.ends]  # (S, D)
        return self.head(last.float())  # a reward in bfloat16 has 8 bits: good answers would tie

    def textbook(self, batch: Batch) -> Tensor:
        """The same as forward, by the model's own forward, one response at a time: (S,)."""
        tokens = batch.inputs["input_ids"]  # (N, T)
        lines = zip(tokens, (batch.ends % tokens.shape[1] + 1).tolist(), strict=True)
        with autocast(tokens.device, self.dtype):
            outputs = [self.model(input_ids=line[None, :n], use_cache=False) for line, n in lines]
        return self.reward_of(torch.cat([output.logits.float() for output in outputs]))

    @property
    def head(self) -> nn.Linear:
        """The linear layer beside the body: weight (K, D), no bias; `score` in most models."""
        heads = [part for part in self.model.children() if part is not self.model.base_model]
        heads = [part for part in heads if any(True for _ in part.parameters())]
        if len(heads) != 1 or not isinstance(heads[0], nn.Linear) or heads[0].bias is not None:
            raise RunError(f"{type(self.model).__name__} has no single linear head without bias")
        return heads[0]

    def exact(self) -> tuple[nn.Module, ...]:
        return (self.head,)
