"""One record of a file -> Example: text in the order of preference, with no tokens yet.

Formats, recognised by a record's keys:

    prompt, chosen, rejected         text, or lists of {"role", "content"} messages
    chosen, rejected                 HH-RLHF dialogues ("\\n\\nHuman: ...\\n\\nAssistant: ..."), or
                                     message lists that both begin with the prompt
    prompt, response_0, response_1   PKU-SafeRLHF, with better_response_id and/or safer_response_id
    prompt, responses, scores        K ranked responses: each makes a pair with every one of a lower score
    prompt, completion, label        unpaired: one response, and whether it is desirable

A pair of texts may have a `margin`: by how much the chosen one is better.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from nanoalign.errors import RunError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

EXPECTED = (
    "prompt + chosen + rejected; chosen + rejected; prompt + response_0 + response_1 with "
    "better_response_id or safer_response_id; prompt + responses + scores; or prompt + completion + label"
)
ASSISTANT = "\n\nAssistant:"  # opens an answer in HH-RLHF


class Pair(NamedTuple):
    """Two of an example's responses, by their index, and by how much the chosen one is better.

    Of an unpaired response there is one side alone: chosen where it is desirable, else rejected.
    """

    chosen: int | None
    rejected: int | None
    margin: float = 1.0  # a difference of scores; 1 where the data only say which is better
    dimension: int = 0  # which of several preferences says so


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its responses, the best one first.

    kind says what `prompt` is: "text" (a plain prompt), "dialogue" (HH-RLHF text that ends with the
    assistant's header) or "messages" (a tuple of messages that ends before the assistant's turn).
    """

    pair_id: str  # file's name and line: unique in a run, and where to look
    kind: str
    prompt: str | tuple[Message, ...]
    responses: tuple[str, ...]
    subset: str = ""
    pairs: tuple[Pair, ...] = (Pair(0, 1),)  # none where all of a ranked record's scores are equal

    def is_paired(self) -> bool:
        return all(None not in pair for pair in self.pairs)

    def messages(self) -> list[Message]:
        """The prompt as messages, whatever its kind."""
        if self.kind == "messages":
            return list(self.prompt)
        if self.kind == "text":
            return [{"role": "user", "content": self.prompt}]
        # "", who, text, who, text, ..., "Assistant", "": without the last, open header
        turns = re.split(r"\n\n(Human|Assistant):", self.prompt)[1:-2]
        roles = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": roles[who], "content": text.strip()}
            for who, text in zip(turns[::2], turns[1::2], strict=True)
        ]

    def prompt_key(self) -> str:
        """The same for two examples exactly when their prompts are the same."""
        return prompt_key(self.prompt)


def conditioned(example: Example, preference: str) -> Example:
    """The example whose prompt says, behind its last question, by which preference it is judged.

    There, since a prompt that is too long loses its beginning.
    """
    mark, prompt = f" [{preference}]", example.prompt
    if example.kind == "text":
        prompt = prompt + mark
    elif example.kind == "dialogue":
        prompt = prompt.removesuffix(ASSISTANT) + mark + ASSISTANT
    else:
        prompt = (*prompt[:-1], prompt[-1] | {"content": prompt[-1]["content"] + mark})
    return replace(example, prompt=prompt)


def by_preference(example: Example, preferences: Sequence[str]) -> list[Example]:
    """An example for each preference, whose prompt names it, with the pairs that it makes."""
    return [
        replace(
            conditioned(example, name),
            pair_id=f"{example.pair_id}/{name}",
            pairs=tuple(
                pair._replace(dimension=0) for pair in example.pairs if pair.dimension == d
            ),
        )
        for d, name in enumerate(preferences)
    ]


def prompt_key(prompt: str | tuple[Message, ...]) -> str:
    """The prompt as one text, the same for two of them exactly when they are the same."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


def parse(
    record: object, preferences: Sequence[str], where: str, pair_id: str, subset: str
) -> tuple[str, Example]:
    """(name of the format, Example) of one record.

    preferences: which labels of a PKU-SafeRLHF record make pairs, the n-th in dimension n.
    """
    if not isinstance(record, dict):
        raise RunError(f"{where}: expected a record with keys, found {type(record).__name__}")
    keys = record.keys()
    pairs = (Pair(0, 1),)
    if {"prompt", "responses", "scores"} <= keys:
        record_format = "prompt + responses + scores"
        kind, prompt = "text", record["prompt"]
        if isinstance(prompt, list):
            kind, prompt = "messages", _checked_messages(prompt, "prompt", where)
        responses, pairs = _ranked(record["responses"], record["scores"], where)
    elif {"prompt", "response_0", "response_1"} <= keys:
        record_format = "prompt + response_0 + response_1"
        kind, prompt = "text", record["prompt"]
        best = [_best_pku(record, preference, where) for preference in preferences]
        # The first preference's order.
        responses = tuple(record[f"response_{i}"] for i in (best[0], 1 - best[0]))
        pairs = tuple(
            Pair(int(i != best[0]), int(i == best[0]), dimension=d) for d, i in enumerate(best)
        )
    elif {"prompt", "completion", "label"} <= keys:
        record_format = "prompt + completion + label"
        kind, prompt, completion = "text", record["prompt"], record["completion"]
        if isinstance(prompt, list):
            kind, prompt = "messages", _checked_messages(prompt, "prompt", where)
        if isinstance(completion, list):  # one message, as TRL's conversational data have it
            (message, *more) = _checked_messages(completion, "completion", where)
            if more or message["role"] != "assistant":
                raise RunError(
                    f"{where}: the completion must be one message of 'assistant', or text"
                )
            completion = message["content"]
        if not isinstance(record["label"], bool):
            raise RunError(f"{where}: the label must be true or false, found {record['label']!r}")
        responses, pairs = (completion,), (Pair(0, None) if record["label"] else Pair(None, 0),)
    elif {"chosen", "rejected"} <= keys:
        chosen, rejected = record["chosen"], record["rejected"]
        record_format = "prompt + chosen + rejected" if "prompt" in keys else "chosen + rejected"
        if isinstance(chosen, list) and isinstance(rejected, list):
            kind, (prompt, responses) = "messages", _split_messages(record, where)
            record_format += " (messages)"
        elif "prompt" in keys:
            kind, prompt, responses = "text", record["prompt"], (chosen, rejected)
            if isinstance(prompt, list):
                kind, prompt = "messages", _checked_messages(prompt, "prompt", where)
        else:
            kind, (prompt, responses) = "dialogue", _split_dialogue(chosen, rejected, where)
    else:
        raise RunError(f"{where}: unknown keys {sorted(map(str, keys))}; expected {EXPECTED}")
    if len(preferences) > 1 and record_format != "prompt + response_0 + response_1":
        raise RunError(
            f"{where}: a record of '{record_format}' has one label; --preference "
            f"{' '.join(preferences)} needs PKU-SafeRLHF's records, which have several"
        )
    if record.get("margin") is not None and not {"responses", "completion"} & keys:
        margin = _number(record["margin"], "margin", where)
        if margin < 0:
            raise RunError(f"{where}: the margin is {margin:g}; it must not be negative")
        pairs = tuple(pair._replace(margin=margin) for pair in pairs)
    text = "\n".join(m["content"] for m in prompt) if kind == "messages" else prompt
    _check_text({"prompt": text}, where)
    names = ("completion",) if "completion" in keys else ("chosen response", "rejected response")
    if "responses" in keys:
        names = [f"response of rank {rank}" for rank in range(1, len(responses) + 1)]
    _check_text(dict(zip(names, responses, strict=True)), where)
    return record_format, Example(pair_id, kind, prompt, tuple(responses), subset, pairs)


def parse_prompt(record: object, where: str, pair_id: str, subset: str) -> Example:
    """The prompt of a record as an Example without responses; of preference records too."""
    if isinstance(record, dict) and "prompt" in record and "chosen" not in record:
        kind, prompt = "text", record["prompt"]
        if isinstance(prompt, list):
            kind, prompt = "messages", _checked_messages(prompt, "prompt", where)
            if prompt[-1]["role"] == "assistant":
                raise RunError(f"{where}: the prompt ends with a message of 'assistant'")
        else:
            _check_text({"prompt": prompt}, where)
        return Example(pair_id, kind, prompt, (), subset, ())
    if isinstance(record, dict) and len({"chosen", "rejected"} & record.keys()) == 1:
        raise RunError(
            f"{where}: of 'chosen' and 'rejected' there must be both, or with a 'prompt' none"
        )
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        raise RunError(
            f"{where}: no prompt in the record; expected the key 'prompt', or {EXPECTED}"
        )
    return replace(parse(record, ("better",), where, pair_id, subset)[1], responses=(), pairs=())


def parse_answer(record: object, where: str) -> tuple[str, str]:
    """(the prompt's key, the answer's text) of a record of an answer that was made elsewhere."""
    keys = record.keys() if isinstance(record, dict) else {}
    name = "answer" if "answer" in keys else "response"
    if "prompt" not in keys or name not in keys:
        raise RunError(f"{where}: expected the keys 'prompt' and 'response' or 'answer'")
    prompt = parse_prompt(record, where, "", "").prompt_key()
    if not isinstance(record[name], str) or not _is_unicode(record[name]):
        raise RunError(f"{where}: the {name} must be text")
    return prompt, record[name]


def _ranked(
    responses: object, scores: object, where: str
) -> tuple[tuple[object, ...], tuple[Pair, ...]]:
    """K responses, best first, and all their pairs of unequal scores."""
    for name, value in (("responses", responses), ("scores", scores)):
        if not isinstance(value, list) or len(value) < 2:
            raise RunError(f"{where}: {name} must be a list of at least two, found {value!r}")
    if len(responses) != len(scores):
        raise RunError(f"{where}: {len(responses)} responses, but {len(scores)} scores")
    scores = [_number(score, "score", where) for score in scores]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranked = [scores[i] for i in order]
    pairs = tuple(
        Pair(i, j, ranked[i] - ranked[j])
        for i in range(len(ranked))
        for j in range(i + 1, len(ranked))
        if ranked[i] > ranked[j]
    )
    return tuple(responses[i] for i in order), pairs


def _number(value: object, name: str, where: str) -> float:
    try:
        if not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except (TypeError, OverflowError):  # not a number; an integer beyond all floats
        pass
    raise RunError(f"{where}: the {name} must be a finite number, found {str(value)[:40]!r}")


def _check_text(texts: dict[str, object], where: str) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise RunError(f"{where}: the {name} must be text, found {type(text).__name__}")
        if not text:
            raise RunError(f"{where}: the {name} is empty; mend or remove the record")
        if not _is_unicode(text):
            raise RunError(f"{where}: the {name} holds half a character (a lone surrogate)")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _best_pku(record: dict, preference: str, where: str) -> int:
    key = f"{preference}_response_id"
    if key not in record:
        raise RunError(
            f"{where}: no {key}, which --preference {preference} asks for; keys: {sorted(record)}"
        )
    label = record[key]
    if isinstance(label, bool) or label not in (0, 1):
        raise RunError(f"{where}: {key} is {label!r}; expected 0 or 1")
    return int(label)


def _split_dialogue(chosen: object, rejected: object, where: str) -> tuple[str, tuple[str, str]]:
    """HH-RLHF: the prompt is all up to the last assistant's header that both dialogues share.

    A few records part before their last turn; then a response holds further turns, as the
    annotators saw it.
    """
    _check_text({"chosen dialogue": chosen, "rejected dialogue": rejected}, where)
    shared = os.path.commonprefix([chosen, rejected])
    if not shared.startswith("\n\nHuman:") or ASSISTANT not in shared:
        raise RunError(
            f"{where}: without a prompt, chosen and rejected must be HH-RLHF dialogues that begin "
            f"with the same '\\n\\nHuman: ...\\n\\nAssistant:'; they share only {shared[:60]!r}"
        )
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    return chosen[:end], (chosen[end:], rejected[end:])


def _split_messages(record: dict, where: str) -> tuple[tuple[Message, ...], tuple[str, str]]:
    """Message lists: all but the last message is prompt; a prompt of its own goes before them."""
    prompt = record.get("prompt", [])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = _checked_messages(prompt, "prompt", where) if prompt else ()
    contexts, responses = [], []
    for side in ("chosen", "rejected"):
        messages = _checked_messages(record[side], side, where)
        if messages[-1]["role"] != "assistant":
            raise RunError(
                f"{where}: {side} ends with a message of '{messages[-1]['role']}'; expected 'assistant'"
            )
        before = messages[:-1]
        repeated = before[: len(prompt)] == prompt or before[-len(prompt) :] == prompt
        contexts.append(before if repeated else prompt + before)
        responses.append(messages[-1]["content"])
    if contexts[0] != contexts[1]:
        raise RunError(
            f"{where}: chosen and rejected differ before their last message; they must share one prompt"
        )
    if not contexts[0]:
        raise RunError(
            f"{where}: the prompt is empty; give 'prompt', or messages before the answer"
        )
    return contexts[0], (responses[0], responses[1])


def _checked_messages(messages: object, name: str, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise RunError(f"{where}: {name} must be a list of messages with at least one in it")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise RunError(
                f"{where}: {name} holds {message!r}; expected {{'role': text, 'content': text}}"
            )
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)
