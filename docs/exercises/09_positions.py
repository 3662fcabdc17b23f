"""Exercise 9: positions of a packed row."""


def positions(prompt: int, responses: list[int]) -> list[int]:
    """The position of every token: of a prompt, then of its responses, which have these lengths."""
    return list(range(prompt + sum(responses)))  # wrong: as if the responses were one text
