"""Exercise 19: pairs to tensors."""

import torch
from torch import Tensor


def collate(pairs: list, pad: int) -> tuple[Tensor, Tensor]:
    """(input_ids, labels): (2 B, T) each, padded on the right, with a line for each response.

    pairs: (prompt, chosen, rejected), each a list of token ids. The lines are: chosen of pair 0,
    rejected of pair 0, chosen of pair 1, ... Labels are -100 at the prompt and at the padding.
    """
    lines = [(prompt, response) for prompt, *responses in pairs for response in responses]
    width = max(len(prompt) + len(response) for prompt, response in lines)
    input_ids, labels = [], []
    for prompt, response in lines:
        padding = width - len(prompt) - len(response)
        input_ids.append(prompt + response + [pad] * padding)
        labels.append([-100] * len(prompt) + response + [-100] * padding)
    return torch.tensor(input_ids), torch.tensor(labels)
