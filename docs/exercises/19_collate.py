"""Exercise 19: pairs to tensors."""

from torch import Tensor


def collate(pairs: list, pad: int) -> tuple[Tensor, Tensor]:
    """(input_ids, labels): (2 B, T) each, padded on the right, with a line for each response.

    pairs: (prompt, chosen, rejected), each a list of token ids. The lines are: chosen of pair 0,
    rejected of pair 0, chosen of pair 1, ... Labels are -100 at the prompt and at the padding.
    """
    raise NotImplementedError
