"""Exercise 14: the model reads two beginnings of a text."""


def join(tokenizer, prompt: str, response: str) -> list[int]:
    """BOS, prompt, response, EOS. The prompt may be written by a template that begins with BOS."""
    return tokenizer.encode(prompt) + tokenizer.encode(response) + [tokenizer.eos_token_id]
