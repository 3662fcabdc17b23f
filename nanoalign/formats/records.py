"""Formats of records, found by their keys: docs/data.md has an example of each.

A format is a function from a record to a Record, and an entry of `formats`. It raises ValueError
for a record that it can't read; nanoalign/pairs.py adds file and line.
"""

import math
import os

from nanoalign.encode import ASSISTANT, HUMAN, Record
from nanoalign.pairs import FORMATS, Format, check_text

PKU = ("prompt", "response_0", "response_1")
UNPAIRED = ("prompt", "completion", "label")


def formats(preference: str = "better", unpaired: bool = False) -> dict[tuple[str, ...], Format]:
    """The formats by their keys; the first whose keys a record has is taken.

    preference: the label of PKU-SafeRLHF that orders the responses.
    unpaired: whether a single response with a label is accepted (--loss kto).
    """
    known = {
        ("prompt", "responses", "scores"): ranked,
        PKU: lambda record: with_margin(record, pku(record, preference)),
        UNPAIRED: refuse_completion,
        ("prompt", "chosen", "rejected"): pair_with_prompt,
        ("chosen", "rejected"): pair_of_dialogues,
    }
    known |= {keys: read for keys, read in FORMATS.items() if keys not in known}
    if unpaired:
        from nanoalign.formats.unpaired import with_unpaired

        return with_unpaired(known)
    return known


def pku(record: dict, preference: str = "better") -> Record:
    """PKU-SafeRLHF: two responses; the label of `preference`, better or safer, orders them."""
    key = f"{preference}_response_id"
    best = record.get(key)
    if isinstance(best, bool) or best not in (0, 1):
        raise ValueError(f"{key} is {best!r}; --preference {preference} needs 0 or 1")
    responses = record["response_0"], record["response_1"]
    return Record(record["prompt"], responses[::-1] if best else responses)


def pair_with_prompt(record: dict) -> Record:
    """A prompt and two responses; each is text, or a list of messages."""
    prompt, chosen, rejected = (record[key] for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return with_margin(record, pair_of_messages(record))
    if isinstance(prompt, list):
        prompt = messages(prompt, "prompt")
    return with_margin(record, Record(prompt, (chosen, rejected)))


def pair_of_dialogues(record: dict) -> Record:
    """Two dialogues that begin with the same prompt: HH-RLHF's text, or lists of messages."""
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return with_margin(record, pair_of_messages(record))
    check_text("chosen dialogue", chosen)
    check_text("rejected dialogue", rejected)
    # The prompt ends with the last header of the assistant that both share. A few records differ
    # before their last turn; then a response has further turns, as the annotators saw it.
    shared = os.path.commonprefix([chosen, rejected])
    if not shared.startswith(HUMAN) or ASSISTANT not in shared:
        raise ValueError(
            "without a prompt, chosen and rejected must be HH-RLHF dialogues that begin with the "
            f"same '\\n\\nHuman: ...\\n\\nAssistant:'; they share only {shared[:60]!r}"
        )
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    return with_margin(record, Record(chosen[:end], (chosen[end:], rejected[end:])))


def pair_of_messages(record: dict) -> Record:
    """All messages but the last are the prompt; a prompt of its own goes before them."""
    prompt = record.get("prompt", [])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = messages(prompt, "prompt") if prompt else []
    contexts, responses = [], []
    for side in ("chosen", "rejected"):
        *before, last = messages(record[side], side)
        if last["role"] != "assistant":
            raise ValueError(f"{side} ends with a message of '{last['role']}', not of 'assistant'")
        repeated = before[: len(prompt)] == prompt or before[-len(prompt) :] == prompt
        contexts.append(before if repeated else prompt + before)
        responses.append(last["content"])
    if contexts[0] != contexts[1]:
        raise ValueError("chosen and rejected differ before their last message: no common prompt")
    if not contexts[0]:
        raise ValueError("the prompt is empty; give 'prompt', or messages before the response")
    return Record(contexts[0], tuple(responses))


def ranked(record: dict) -> Record:
    """K responses with scores, best first, and all their pairs of unequal scores."""
    prompt, responses, scores = (record[key] for key in ("prompt", "responses", "scores"))
    for name, values in (("responses", responses), ("scores", scores)):
        if not isinstance(values, list) or len(values) < 2:
            raise ValueError(f"{name} must be a list of at least two, found {values!r}")
    if len(responses) != len(scores):
        raise ValueError(f"{len(responses)} responses, but {len(scores)} scores")
    scores = [number(score, "score") for score in scores]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    best = [scores[i] for i in order]
    pairs = [(i, j) for i in range(len(best)) for j in range(i + 1, len(best)) if best[i] > best[j]]
    margins = [best[i] - best[j] for i, j in pairs]
    prompt = messages(prompt, "prompt") if isinstance(prompt, list) else prompt
    responses = tuple(responses[i] for i in order)
    return Record(prompt, responses, tuple(pairs), {"margins": margins})


def refuse_completion(record: dict) -> Record:
    raise ValueError(
        "a completion with a label, where pairs are needed; only train_dpo.py --loss kto learns "
        "from such records"
    )


def with_margin(record: dict, pair: Record) -> Record:
    """The Record with the margin of the data: by how much its chosen response is better, else 1."""
    margin = 1.0 if record.get("margin") is None else number(record["margin"], "margin")
    if margin < 0:
        raise ValueError(f"the margin is {margin:g}; it must not be negative")
    return Record(pair.prompt, pair.responses, pair.pairs, pair.extra | {"margins": [margin]})


def number(value: object, name: str) -> float:
    try:
        if not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except (TypeError, OverflowError):  # no number; an integer beyond all floats
        pass
    raise ValueError(f"the {name} must be a finite number, found {str(value)[:40]!r}")


def messages(values: object, name: str) -> list[dict]:
    """The checked messages of a list. They keep role and content alone."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} must be a list of at least one message")
    for value in values:
        texts = [value.get(key) for key in ("role", "content")] if isinstance(value, dict) else [0]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} has {value!r}; expected {{'role': text, 'content': text}}")
    return [{"role": value["role"], "content": value["content"]} for value in values]
