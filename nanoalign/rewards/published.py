"""The tokens that a reward model of another program reads, and the token at which it is read.

Such programs train and score on what tokenizer.apply_chat_template makes of a whole dialogue,
without a generation prompt. transformers reads the reward at its last token that is not the
pad_token_id of the config; programs of some heads read it at the last token whatever it is
(published_heads.OF_MASK). So it is done here, where the model has no rule of ours (rule.py) and its
tokenizer has a chat template. The responses of a record still share a row: its prompt is the tokens
that all of its dialogues begin with.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import transformers

from nanoalign.batch import Row
from nanoalign.data.chat_template import ChatTemplate
from nanoalign.data.templates import (
    as_text,
    marks_of,
    prepared,
    whole_dialogues,
    with_echoes,
)
from nanoalign.distributed import print0
from nanoalign.encode import BLANK_RESPONSE, CUT_PROMPT, CUT_RESPONSE, tokenize
from nanoalign.errors import RunError
from nanoalign.records import Record
from nanoalign.rewards.rule import check_pad_token, rule_of, scoring_rule
from nanoalign.rewards.several import SeveralRewards
from nanoalign.weights.adapters import model_folder

MAX_LENGTH = 2048  # tokens of a dialogue, as in RewardBench, where --max_length is not given


@dataclass(frozen=True, slots=True)
class Published:
    """How a reward model of another program reads a dialogue."""

    tokenizer: object
    pad: int | None  # of the config, if no reward is read at it

    def dialogues(self, records: Sequence[Record]) -> list[tuple[list[int], list[list[int]]]]:
        """The tokens of each record: (of its prompt with a header, of its whole dialogues).

        The dialogue with a response has the tokens of apply_chat_template(..., tokenize=True). An
        EOS or end of a turn that the data wrote behind a response is left out, because the template
        writes it. Raises RunError as data.templates.whole_dialogues, and without an EOS.
        """
        if self.tokenizer.eos_token is None:
            raise RunError("the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
        template = ChatTemplate(self.tokenizer)
        rendered = []
        for record in records:
            record = prepared(record, self.tokenizer, "chat", template)
            rendered.append(whole_dialogues(record, template))
        tokens = iter(
            tokenize([t for prompt, own in rendered for t in (prompt, *own)], self.tokenizer)
        )
        return [(next(tokens), [next(tokens) for _ in whole]) for _, whole in rendered]

    def encode(self, records: Sequence[Record], max_length: int) -> list[Row]:
        """The row of each record: the prompt and each response together are what the model reads.

        A response keeps at least one token, also where a cut leaves none of its own. Sampled tokens
        are not taken: another program would get the text of the answer.
        max_length: tokens of a dialogue, which is cut on the tokenizer's truncation_side, as the
            pipelines of transformers do. On the right the reward is read where the cut is; on the
            left each dialogue loses its own beginning, so a row may have no common prompt.
        Raises RunError as `dialogues`.
        """
        marks = marks_of(self.tokenizer)
        records = [as_text(with_echoes(record), marks) for record in records]
        both = zip(records, self.dialogues(records), strict=True)
        return [self._row(record, *tokens, max_length) for record, tokens in both]

    def _row(
        self, record: Record, prompt: list[int], whole: list[list[int]], max_length: int
    ) -> Row:
        notes = [*record.notes]
        notes += [BLANK_RESPONSE for response in record.responses if not response.strip()]
        of_prompt = len(os.path.commonprefix([prompt, *whole]))
        over = [max(0, len(tokens) - max_length) for tokens in whole]
        if self.tokenizer.truncation_side == "left":
            read = [tokens[n:] for tokens, n in zip(whole, over, strict=True)]
            of_prompt = max(0, of_prompt - max(over))
            notes += [CUT_PROMPT] * any(over)
        else:
            read = [tokens[:max_length] for tokens in whole]
            notes += [CUT_RESPONSE] * sum(map(bool, over))
        read = [without_pad(tokens, self.pad) for tokens in read]
        shared = min(of_prompt, min(map(len, read)) - 1, len(os.path.commonprefix(read)))
        parts = read[0][:shared], *(tokens[shared:] for tokens in read)
        prompt, *responses = (np.array(part, dtype=np.int32) for part in parts)
        return Row(record.name, prompt, tuple(responses), record.pairs, {}, tuple(notes))

    def place(self) -> str:
        """Where the reward is read, in words, with the text and the id of the token."""
        try:
            ((_, (tokens,)),) = self.dialogues([Record("Hello.", ("I see.",), name="a dialogue")])
        except RunError:  # the template refuses such a dialogue
            return "at its last token"
        if without_pad(tokens, self.pad) != tokens:
            return f"before {self._named(self.pad)}, the pad token of its config"
        return f"at its last token, {self._named(tokens[-1])}"

    def _named(self, token: int) -> str:
        return f"{self.tokenizer.decode([token])!r} ({token})"


def without_pad(tokens: list[int], pad: int | None) -> list[int]:
    """The tokens without the pad tokens at their end, but at least one."""
    end = len(tokens)
    while end > 1 and tokens[end - 1] == pad:
        end -= 1
    return tokens[:end]


def reading_of(
    model: SeveralRewards,
    tokenizer,
    name: str,
    template: str | None,
    max_length: int | None,
    flags: str = "",
) -> tuple[tuple[str, int], Published | None]:
    """Returns ((template, max_length), how a model of another program reads a chat).

    The second is None for a model with a rule, for one whose tokenizer has no chat template, and
    where `template` is another one: then rewards are read at an EOS behind the text. A line says so
    of a model without a rule.
    The arguments are those of scoring_rule. Raises RunError as scoring_rule does; and as
    check_pad_token if rewards are read at an EOS, unless the model's program reads them there, too.
    """
    rule = scoring_rule(model, name, template, max_length, flags)
    is_ours, is_chat = bool(rule_of(model)), rule[0] in ("auto", "chat")
    folder = model_folder(name)
    if is_ours or not (is_chat and tokenizer.chat_template):
        if model.skips_pads:
            check_pad_token(folder)
        if not is_ours:
            print0(
                f"{'reads':<11} template {rule[0]} with an EOS behind it, and the reward at this "
                "EOS: an assumption, because another program trained the model"
            )
        return rule, None
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = config.get_text_config()
    published = Published(tokenizer, config.pad_token_id if model.skips_pads else None)
    positions = max(0, getattr(config, "max_position_embeddings", 0) or 0) or sys.maxsize
    print0(
        f"{'reads':<11} the chat template's text of the whole dialogue, and the reward "
        f"{published.place()}: another program trained the model"
    )
    return ("chat", max_length or min(MAX_LENGTH, positions)), published
