"""Reward models of architectures for which transformers has no ...ForSequenceClassification."""

from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from nanoalign.distributed import print0
from nanoalign.errors import RunError


class OwnHead:
    """The body of a causal language model and a linear layer: `score`, as transformers' own have.

    Comes before the PreTrainedModel of an architecture among the bases of a class.
    """

    def __init__(self, config: "transformers.PretrainedConfig"):
        super().__init__(config)
        self.num_labels, width = config.num_labels, config.get_text_config().hidden_size
        setattr(self, self.base_model_prefix, transformers.AutoModel.from_config(config))
        self.score = nn.Linear(width, config.num_labels, bias=False)
        self.post_init()

    @classmethod
    def from_config(cls, config: "transformers.PretrainedConfig", dtype: torch.dtype, **_: object):
        """As of transformers' auto classes."""
        return cls._from_config(config, dtype=dtype)

    def forward(self, input_ids: Tensor, **options: object) -> SequenceClassifierOutput:
        """The outputs at the last token: (N, T) -> logits (N, K). Lines have no padding."""
        hidden = self.base_model(input_ids=input_ids, **options)[0]
        return SequenceClassifierOutput(logits=self.score(hidden[:, -1]))


@cache
def class_of(kind: type) -> type | None:
    """The class of reward models with configs of this class; None if transformers has one.

    It is named as transformers would name it. Raises RunError for an architecture without a causal
    language model.
    """
    if kind in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    body = transformers.MODEL_MAPPING.get(kind, None)
    if causal is None or body is None:
        what = "of causal language models" if causal is None else "with a body apart from its head"
        raise RunError(f"'{kind.model_type}' is no architecture {what}")
    base = next(each for each in causal.__mro__ if each.__name__.endswith("PreTrainedModel"))
    name = causal.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    fields = {"__module__": causal.__module__, "base_model_prefix": body.base_model_prefix}
    return type(f"{name}ForSequenceClassification", (OwnHead, base), fields)


def announce(folder: Path) -> None:
    """Prints that a reward model from a folder gets a head of ours, if it does."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if found := class_of(type(config)):
        print0(
            f"{'head':<11} ours: transformers has no {found.__name__}; docs/models.md shows how "
            "other programs read the result"
        )
