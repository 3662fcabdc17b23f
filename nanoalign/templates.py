"""Example -> text: the prompt with the assistant's header, and the responses.

chat    the tokenizer's own chat template
pku     BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}      (PKU-SafeRLHF's models)
raw     as it stands in the record
auto    chat where the tokenizer has a template, raw for HH-RLHF dialogues, else pku
"""

from jinja2 import TemplateError  # comes with torch; chat templates are written in it

from nanoalign.errors import RunError, in_a_line
from nanoalign.records import Example

TEMPLATES = ("auto", "chat", "raw", "pku")


def resolve_template(template: str, example: Example, tokenizer) -> str:
    """The template that `auto` stands for with this example and tokenizer."""
    if template != "auto":
        return template
    if tokenizer.chat_template:
        return "chat"
    return "raw" if example.kind == "dialogue" else "pku"


def common_template(template: str, examples: list[Example], tokenizer) -> str:
    """The one template that `auto` stands for with all of these examples; `auto` if there are several."""
    names = {resolve_template(template, example, tokenizer) for example in examples}
    return names.pop() if len(names) == 1 else template


def render(example: Example, tokenizer, template: str) -> tuple[str, list[str]]:
    """(prompt with the assistant's header, responses) as text, by the template `chat`, `pku` or `raw`."""
    responses = list(example.responses)
    if template == "raw":
        if example.kind == "messages":
            raise RunError(
                f"{example.pair_id}: the template 'raw' takes text, this prompt is a list of messages"
            )
        return example.prompt, responses
    messages = example.messages()
    if example.kind == "dialogue":  # "Assistant: answer": the space belongs to HH-RLHF's format
        responses = [response.removeprefix(" ") for response in responses]
    if template == "pku":
        return _render_pku(messages, example.pair_id), responses
    return _render_chat(messages, responses, tokenizer, example.pair_id)


def _render_pku(messages: list[dict], pair_id: str) -> str:
    text = "BEGINNING OF CONVERSATION:"
    for message in messages:
        if message["role"] not in ("user", "assistant"):
            raise RunError(
                f"{pair_id}: the template 'pku' has no place for a message of '{message['role']}'"
            )
        text += (
            f" USER: {message['content']}"
            if message["role"] == "user"
            else f" ASSISTANT:{message['content']}"
        )
    return text + " ASSISTANT:"


def _render_chat(
    messages: list[dict], responses: list[str], tokenizer, pair_id: str
) -> tuple[str, list[str]]:
    if not tokenizer.chat_template:
        raise RunError("--template chat: the tokenizer has no chat template; use raw or pku")
    rendered = []
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for response in responses:
            turn = {"role": "assistant", "content": response}
            rendered.append(tokenizer.apply_chat_template([*messages, turn], tokenize=False))
    except (TemplateError, TypeError) as error:
        raise RunError(
            f"{pair_id}: the tokenizer's chat template refuses this dialogue: {in_a_line(error)}"
        ) from error
    for text in rendered:
        if not text.startswith(prompt):
            raise RunError(
                f"{pair_id}: the chat template renders the dialogue as ...{text[-80:]!r}, which does "
                f"not begin with its rendering of the prompt, ...{prompt[-80:]!r}; use --template "
                "raw or pku, or mend the template"
            )
    return prompt, [text[len(prompt) :] for text in rendered]
