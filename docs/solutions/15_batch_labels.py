"""Exercise 15: the policy never stops."""

from torch import Tensor


def batch_labels(tokens: Tensor, prompts: Tensor, lengths: Tensor, pad: int) -> Tensor:
    """Labels of padded lines (N, T). prompts, lengths (N,): tokens of the prompt, of the whole."""
    labels = tokens.clone()
    for line, prompt, length in zip(labels, prompts, lengths, strict=True):
        line[:prompt] = -100
        line[length:] = -100  # not where the id is that of the padding: EOS may have the same
    return labels
