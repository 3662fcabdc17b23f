"""Exercise 2: which tokens are scored."""


def labels(prompt: list[int], response: list[int], width: int) -> list[int]:
    """The labels of a line of `width` places: -100 where a token is not scored."""
    return prompt + response  # wrong: it scores the prompt, and has no padding
