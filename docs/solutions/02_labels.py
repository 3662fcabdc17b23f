"""Exercise 2: which tokens are scored."""


def labels(prompt: list[int], response: list[int], width: int) -> list[int]:
    """The labels of a line of `width` places: -100 where a token is not scored."""
    padding = width - len(prompt) - len(response)
    return [-100] * len(prompt) + response + [-100] * padding
