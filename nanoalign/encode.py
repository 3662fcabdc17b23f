"""Record -> Row: text -> token ids.

    tokens = tokenize(prompt) ++ tokenize(response) ++ EOS

The prompt is tokenized by itself, as generation will see it, so it is the same for every response.
At most one BOS, before the prompt; exactly one EOS, after a response that was not cut. Templates:

    chat    the tokenizer's own chat template
    pku     BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}      (PKU-SafeRLHF)
    raw     the text of the record, unchanged
    auto    chat if the tokenizer has a template, raw for HH-RLHF dialogues, else pku
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jinja2 import TemplateError  # comes with torch; chat templates are written in it

from nanoalign.batch import Row
from nanoalign.errors import RunError, in_a_line

TEMPLATES = ("auto", "chat", "raw", "pku")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the headers of HH-RLHF
PKU_HEADERS = {"user": " USER: ", "assistant": " ASSISTANT:"}
CUT_PROMPT = "prompts cut at their beginning"
CUT_RESPONSE = "responses cut at their end (no EOS)"
BLANK_RESPONSE = "responses of white space alone"


@dataclass(frozen=True, slots=True)
class Record:
    """A prompt and its responses as text: one record of a file."""

    prompt: str | list[dict]  # text, or messages {"role", "content", ...} before the response
    responses: Sequence[str]
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)  # (chosen, rejected): indices of responses
    extra: dict[str, Sequence[float]] = field(default_factory=dict)  # a value per pair
    name: str = ""  # file and line: unique in a run
    subset: str = ""  # the source's name
    tools: list[dict] | None = None  # for the chat template
    answers: Sequence[dict] = ()  # the responses as messages, if they have more than text
    notes: tuple[str, ...] = ()  # what reading left out, to be counted


def encode(
    prompt: str | list[dict], responses: Sequence[str], tokenizer, max_length: int = 1024,
    template: str = "auto", name: str = "",
) -> Row:  # fmt: skip
    """The Row of a prompt and its responses; of two responses the first is the chosen one.

    max_length: tokens of the prompt and one response. Where they are more, the prompt loses its
        beginning, once for all responses, but keeps at least half of max_length; then a response
        loses its end, and with it its EOS.
    Raises RunError if the template cannot render the prompt or the tokenizer has no EOS.
    """
    record = Record(prompt, responses, ((0, 1),) if len(responses) == 2 else (), name=name)
    return encode_all([record], tokenizer, max_length, template)[0]


def encode_all(
    records: Sequence[Record], tokenizer, max_length: int = 1024, template: str = "auto"
) -> list[Row]:
    """The rows of many records, which are tokenized together: see `encode`."""
    if (eos := tokenizer.eos_token_id) is None:
        raise RunError("the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    if max_length < 2:
        raise RunError(f"--max_length {max_length}: a prompt and a response need at least 2 tokens")
    templates = [resolve_template(template, record.prompt, tokenizer) for record in records]
    rows: dict[int, Row] = {}
    for name in dict.fromkeys(templates):
        chosen = [i for i, each in enumerate(templates) if each == name]
        texts = [render(records[i], tokenizer, name) for i in chosen]
        # A chat template writes its own BOS. With `pku`, "<eos>" in the data is plain text.
        options = {"add_special_tokens": name != "chat", "split_special_tokens": name == "pku"}
        prompts = tokenize([prompt for prompt, _ in texts], tokenizer, **options)
        answers = [text for _, answers in texts for text in answers]
        tokens = iter(tokenize_continuations(answers, tokenizer, name == "pku"))
        for i, prompt in zip(chosen, prompts, strict=True):
            responses = [next(tokens) for _ in records[i].responses]
            for ids in responses:
                while ids[-1:] == [eos]:  # "<eos>" is a word of some models, also as plain text
                    ids.pop()
                ids.append(eos)
            rows[i] = fit(records[i], prompt, responses, max_length, tokenizer.bos_token_id)
    return [rows[i] for i in range(len(records))]


def fit(
    record: Record, prompt: list[int], responses: list[list[int]], limit: int, bos: int | None
) -> Row:
    """The Row of a record, cut to `limit` tokens of a prompt and one response."""
    if not prompt:
        raise RunError(f"{record.name}: the prompt has no tokens in this tokenizer; remove it")
    notes = [*record.notes, *(BLANK_RESPONSE for each in record.responses if not each.strip())]
    # What the prompt may keep: all that the longest response leaves, and at least half.
    room = max(limit - max(map(len, responses), default=0), limit // 2)
    if len(prompt) > room:
        notes.append(CUT_PROMPT)
        head = prompt[:1] if prompt[0] == bos and room > 1 else []
        prompt = head + prompt[len(prompt) - room + len(head) :]
    room = limit - len(prompt)
    notes += [CUT_RESPONSE for response in responses if len(response) > room]
    ids = [np.array(part, dtype=np.int32) for part in (prompt, *(r[:room] for r in responses))]
    extra = {name: np.array(values) for name, values in record.extra.items()}
    extra = {name: v.astype(np.float32) if v.dtype.kind == "f" else v for name, v in extra.items()}
    return Row(record.name, ids[0], tuple(ids[1:]), record.pairs, extra, tuple(notes))


def is_dialogue(prompt: str | list[dict]) -> bool:
    """Whether a prompt is an HH-RLHF dialogue, from "\\n\\nHuman:" to "\\n\\nAssistant:"."""
    return isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT)


def messages_of(prompt: str | list[dict]) -> list[dict]:
    """The prompt as messages: the turns of a dialogue; other text is one message of the user."""
    if isinstance(prompt, list):
        return prompt
    if not is_dialogue(prompt):
        return [{"role": "user", "content": prompt}]
    # "", who, text, who, text, ..., "Assistant", "": without the last turn, which is empty
    turns = re.split(r"\n\n(Human|Assistant):", prompt)[1:-2]
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": roles[who], "content": text.strip()} for who, text in pairs]


def resolve_template(template: str, prompt: str | list[dict], tokenizer) -> str:
    """The template that `auto` selects for this prompt and tokenizer; other names unchanged."""
    auto = "chat" if tokenizer.chat_template else "raw" if is_dialogue(prompt) else "pku"
    return auto if template == "auto" else template


def render(record: Record, tokenizer, template: str) -> tuple[str, list[str]]:
    """(prompt with the assistant's header, responses without EOS) as text, by chat, pku or raw."""
    prompt, responses = record.prompt, list(record.responses)
    is_text, eos = not (record.tools or record.answers), tokenizer.eos_token
    if template != "pku":  # where "<eos>" is plain text
        responses = [without_end(response, eos) for response in responses]
    if template == "raw" and isinstance(prompt, str) and is_text:
        return prompt, responses
    if is_dialogue(prompt):  # "Assistant: answer": the space belongs to the format of HH-RLHF
        responses = [response.removeprefix(" ") for response in responses]
    messages = messages_of(prompt)
    if template == "pku" and is_text and all(each["role"] in PKU_HEADERS for each in messages):
        turns = [PKU_HEADERS[message["role"]] + message["content"] for message in messages]
        return f"BEGINNING OF CONVERSATION:{''.join(turns)} ASSISTANT:", responses
    if template != "chat" or not tokenizer.chat_template:
        raise RunError(
            f"{record.name}: --template {template} can't be used; raw needs text, pku messages of "
            "user and assistant alone, both without tools; chat a tokenizer with a chat template"
        )
    apply = partial(tokenizer.apply_chat_template, tokenize=False, tools=record.tools)
    answers = record.answers or [{"role": "assistant", "content": each} for each in responses]
    try:
        text = apply(messages, add_generation_prompt=True)
        texts = [apply([*messages, answer]) for answer in answers]
    except (TemplateError, TypeError) as error:
        raise RunError(f"{record.name}: the chat template fails: {in_a_line(error)}") from error
    for whole in texts:
        if not whole.startswith(text):
            raise RunError(
                f"{record.name}: a dialogue that the chat template renders, ...{whole[-80:]!r}, "
                f"does not begin with its rendering of the prompt, ...{text[-80:]!r}; correct it, "
                "or use --template raw or pku"
            )
    return text, [without_end(whole[len(text) :], eos) for whole in texts]


def tokenize(texts: Sequence[str], tokenizer, **options) -> list[list[int]]:
    """Token ids of each text: at most one BOS before it, and no EOS that the tokenizer appends."""
    if not texts:
        return []
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    tokens = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    if options.get("add_special_tokens"):
        tokens = [ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids for ids in tokens]
        tokens = [ids[1:] if len(ids) > 1 and ids[0] == ids[1] == bos else ids for ids in tokens]
    return tokens


def tokenize_continuations(texts: Sequence[str], tokenizer, plain: bool = False) -> list[list[int]]:
    """Token ids of texts that follow a prompt. plain: special tokens in a text are plain text.

    SentencePiece puts a space before a text, which a response does not begin with: with such a
    tokenizer each text is tokenized behind a newline, whose tokens are then removed.
    """
    options = {"add_special_tokens": False, "split_special_tokens": plain}
    ids_of = partial(tokenize, tokenizer=tokenizer, **options)
    alone, (newline, x, both) = ids_of(texts), ids_of(["\n", "x", "\nx"])
    if both == newline + x:
        return alone
    behind, n = ids_of(["\n" + text for text in texts]), len(newline)
    return [b[n:] if b[:n] == newline else a for a, b in zip(alone, behind, strict=True)]


def without_end(text: str, end: str) -> str:
    """The text without any `end` at its end, and without white space behind these."""
    return re.sub(rf"(?:{re.escape(end)}\s*)+\Z", "", text)
