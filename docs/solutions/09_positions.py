"""Exercise 9: positions of a packed row."""


def positions(prompt: int, responses: list[int]) -> list[int]:
    """The position of every token: of a prompt, then of its responses, which have these lengths."""
    found = list(range(prompt))
    for length in responses:
        found += range(prompt, prompt + length)
    return found
