"""Exercise 15: the policy never stops."""

from torch import Tensor


def batch_labels(tokens: Tensor, prompts: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """Labels of padded lines (N, T). prompts, lengths (N,): tokens of the prompt, of the whole."""
    labels = tokens.clone()
    for line, prompt in zip(labels, prompts, strict=True):
        line[:prompt] = -100
    labels[tokens == pad] = -100
    return labels
