"""Exercise 13: the first tokens of each response are never learned."""


def scored(prompt: list[int], response: list[int], tail: list[int]) -> list[int]:
    """The labels of prompt + response + tail, the template's end, whose EOS is learned, too."""
    labels = [-100] * (len(prompt) + len(response) + len(tail))
    labels[-len(response) :] = (prompt + response + tail)[-len(response) :]
    return labels
