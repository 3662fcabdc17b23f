"""Exercise 21: log-softmax without all logits."""

from torch import Tensor


def chunked_logps(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """log softmax(hidden @ weight.T) at the targets: (M, D), (V, D), (M,) -> (M,).

    No tensor may be as large as all logits, M * V. Take `chunk` ids of the vocabulary at a time.
    """
    raise NotImplementedError
