"""Reward models of architectures for which transformers has no ...ForSequenceClassification.

Their classes and tensors have the names that transformers would give them, so that RewardModel and
slices.py treat them as those of transformers.
"""

from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from nanoalign.distributed import print0
from nanoalign.errors import RunError


class Headed:
    """The body of a causal language model, and beside it a head, which a subclass adds.

    A class of reward models has a subclass and the PreTrainedModel of its architecture as bases.
    """

    def __init__(self, config: "transformers.PretrainedConfig"):
        super().__init__(config)
        setattr(self, self.base_model_prefix, transformers.AutoModel.from_config(config))
        self.add_head(config)
        self.post_init()

    @classmethod
    def from_config(cls, config: "transformers.PretrainedConfig", dtype: torch.dtype, **_: object):
        """A model of this config, as the auto classes of transformers build it."""
        return cls._from_config(config, dtype=dtype)


class LinearHead(Headed):
    """The head is a linear layer without bias, `score`."""

    def add_head(self, config: "transformers.PretrainedConfig") -> None:
        self.num_labels, width = config.num_labels, config.get_text_config().hidden_size
        self.score = nn.Linear(width, config.num_labels, bias=False)

    def forward(self, input_ids: Tensor, **options: object) -> SequenceClassifierOutput:
        """Returns the outputs at the last token of each line: (N, T) -> logits (N, K).

        No line has padding.
        """
        hidden = self.base_model(input_ids=input_ids, **options)[0]
        return SequenceClassifierOutput(logits=self.score(hidden[:, -1]))


@cache
def class_of(kind: type) -> type | None:
    """The class of reward models of an architecture; None if transformers has one.

    kind: the class of the architecture's configs.
    Raises RunError for an architecture without a causal language model or its body.
    """
    if kind in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    return class_with(LinearHead, kind)


def class_with(head: type, kind: type, **fields: object) -> type:
    """Returns the class of an architecture's models with a head.

    head: a subclass of Headed. kind: the class of the architecture's configs. fields: further
    attributes of the class.
    Raises RunError as class_of does.
    """
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    body = transformers.MODEL_MAPPING.get(kind, None)
    if causal is None or body is None:
        raise RunError(
            f"'{kind.model_type}' is no architecture of causal language models with a body apart "
            "from its head; give another model"
        )
    base = next(cls for cls in causal.__mro__ if cls.__name__.endswith("PreTrainedModel"))
    name = causal.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    fields |= {"__module__": causal.__module__, "base_model_prefix": body.base_model_prefix}
    return type(f"{name}ForSequenceClassification", (head, base), fields)


def announce(folder: Path) -> None:
    """Prints a line if a reward model of this folder's architecture has a class of this file.

    Raises RunError as class_of does.
    """
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if reward_class := class_of(type(config)):
        print0(
            f"{'head':<11} ours: transformers has no {reward_class.__name__}; docs/models.md shows "
            "how other programs read the result"
        )
