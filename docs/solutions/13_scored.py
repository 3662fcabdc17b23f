"""Exercise 13: the first tokens of each response are never learned."""


def scored(prompt: list[int], response: list[int], tail: list[int]) -> list[int]:
    """The labels of prompt + response + tail, the template's end, whose EOS is learned, too."""
    return [-100] * len(prompt) + response + tail  # counted from the end of the prompt
