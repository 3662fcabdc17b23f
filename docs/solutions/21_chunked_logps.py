"""Exercise 21: log-softmax without all logits."""

import torch
from torch import Tensor


def chunked_logps(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """log softmax(hidden @ weight.T) at the targets: (M, D), (V, D), (M,) -> (M,).

    No tensor may be as large as all logits, M * V. Take `chunk` ids of the vocabulary at a time.
    """
    target_logits = (hidden * weight[targets]).sum(1)
    normaliser = torch.full_like(target_logits, -torch.inf)
    for part in weight.split(chunk):
        normaliser = torch.logaddexp(normaliser, (hidden @ part.T).logsumexp(1))
    return target_logits - normaliser
