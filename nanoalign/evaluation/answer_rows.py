"""Sampled answers: text -> token ids, and token ids -> text."""

import sys
from collections.abc import Sequence

from nanoalign.batch import Row
from nanoalign.data.dialogues import resolve_template
from nanoalign.data.templates import encode_records, render
from nanoalign.encode import tokenize, tokenize_continuations, truncate, without_end
from nanoalign.records import Record

Ended = Sequence[bool | None]  # of each response: whether it ended by itself; None: not known


def encode_answers(
    records: Sequence[Record], tokenizer, max_length: int, template: str, ended: Sequence[Ended]
) -> list[Row]:
    """As formats.templates.encode_records, but a response that was cut where it was sampled has no
    end.

    It gets neither EOS nor what a chat template writes behind an answer. A cut response without
    tokens keeps its EOS, because a reward is read at the last token of a response.
    """
    rows = encode_records(records, tokenizer, sys.maxsize, template)
    cut_rows = []
    for record, row, flags in zip(records, rows, ended, strict=True):
        responses = [response.tolist() for response in row.responses]
        if False in flags:
            name = resolve_template(template, record.prompt, tokenizer)
            texts = render(record, tokenizer, name).responses
            for k in [k for k, flag in enumerate(flags) if flag is False]:
                tokens = responses[k][:-1]
                if name == "chat":
                    own = without_end(record.responses[k], tokenizer.eos_token)
                    text = without_tail(texts[k], own)
                    tokens = tokenize_continuations([text], tokenizer)[0]
                responses[k] = tokens or [tokenizer.eos_token_id]
        prompt = row.prompt.tolist()
        cut_rows.append(truncate(record, prompt, responses, max_length, tokenizer.bos_token_id))
    return cut_rows


def without_tail(text: str, answer: str) -> str:
    """What a chat template rendered for an answer, up to the end of the answer's own text."""
    own = answer.strip()
    if not own:
        return ""
    place = text.rfind(own)
    return text if place < 0 else text[: place + len(own)]


def decode_continuation(tokens: Sequence[int], tokenizer) -> str:
    """The text of a sampled response, with a space that it begins with.

    White space behind a special token is of the chat template, which ends a turn with both. A
    SentencePiece tokenizer removes the first space of a text, so the tokens are decoded behind a
    newline.
    """
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = max((n for n, token in enumerate(tokens) if token in special), default=len(tokens))
    if not tokenizer.decode(tokens[last + 1 :]).strip():
        tokens = tokens[:last]
    newline = tokenize(["\n"], tokenizer)[0]
    before, both = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (newline, [*newline, *tokens])
    )
    if before and both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(tokens, skip_special_tokens=True)
