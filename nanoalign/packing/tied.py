"""A large weight that is embedding and head has one gradient, where autograd makes two.

Of an embedding's gradient, (V, D), only the rows of a batch's tokens are not 0. They are added to
the gradient of the head. V is the vocabulary, D the hidden size.
"""

from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from nanoalign.batch import Batch
from nanoalign.logps import Head
from nanoalign.model import Policy


def join(policy: Policy) -> None:
    """Makes the gradients of embedding and head meet before they are that of their weight.

    For a CPU: on a GPU the host would wait for the number of rows.
    """
    embedding = policy.model.get_input_embeddings()
    if embedding.weight is policy.head.weight:
        embedding.sparse = True
        policy.scored_and_head = partial(scored_and_head, policy)


def scored_and_head(policy: Policy, batch: Batch) -> tuple[Tensor, Head]:
    """As Policy.scored_and_head."""
    head, body = policy.head, policy.model.base_model
    name = next(name for name, weight in body.named_parameters() if weight is head.weight)
    for_embedding, for_head = TiedWeight.apply(head.weight)
    inputs = {**batch.inputs, "use_cache": False}
    output = functional_call(body, {name: for_embedding}, (), inputs, tie_weights=False)
    scored = output.last_hidden_state.flatten(0, 1)[batch.reads]
    return scored, head._replace(weight=for_head)


class TiedWeight(torch.autograd.Function):
    """A weight (V, D) -> the same for an embedding, and for a head."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, of_embedding: Tensor, of_head: Tensor) -> Tensor:
        return of_head.contiguous().add_(of_embedding)  # in place: nothing else has it
