"""Exercise 14: the model reads two beginnings of a text."""


def join(tokenizer, prompt: str, response: str) -> list[int]:
    """BOS, prompt, response, EOS. The prompt may be written by a template that begins with BOS."""
    text = prompt.removeprefix(tokenizer.bos_token) + response
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
