"""The score of every response: the reward of a reward model, or the log-probability of a policy."""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from nanoalign.batch import Batch, Row
from nanoalign.data.columns import joined
from nanoalign.data.formats import conditioned
from nanoalign.data.prompts import prompt_key
from nanoalign.data.templates import encode_records, render, resolve_template
from nanoalign.distributed import compute_dtype, progress_bar, sum_over_ranks
from nanoalign.encode import CUT_PROMPT, tokenize_continuations, truncate, without_end
from nanoalign.errors import RunError
from nanoalign.loop import Batcher
from nanoalign.model import RewardModel
from nanoalign.packing.self_check import check_fits, check_layout
from nanoalign.records import Record
from nanoalign.rewards import published_heads
from nanoalign.rewards.prompt_kinds import AS_DIALOGUE, as_trained
from nanoalign.rewards.published import Published, reading_of
from nanoalign.rewards.rule import rule_of
from nanoalign.rewards.several import Mixed, SeveralRewards, is_conditioned, preferences_of
from nanoalign.weights.adapters import model_folder
from nanoalign.weights.folders import load_tokenizer

Ended = bool | None  # whether an answer ended by itself; None: not known
Score = Callable[[Batch], Tensor]  # a score per response, (S,)
OF_PROMPTS = (CUT_PROMPT, AS_DIALOGUE)  # notes of rows that are about their prompt


def load_reward_model(
    name: str, precision: str, batcher: Batcher, token: int | None = None
) -> tuple[SeveralRewards, "transformers.PreTrainedTokenizerBase"]:
    """Loads (a frozen reward model with one output or several, its tokenizer).

    name: a folder or OWNER/NAME. precision: of --precision. batcher: whose batches the model can
    read afterwards. token: of --head. Raises RunError if it can't be loaded.
    """
    folder, world = model_folder(name), batcher.world
    dtype = compute_dtype(precision, world.device)
    model = published_heads.load(folder, world, dtype, token)
    batcher.prepare(model)
    return model, load_tokenizer(folder)


@torch.no_grad()
def values_of_rows(
    compute: Score, rows: Sequence[Row], sizes: Sequence[int], batcher: Batcher
) -> list[np.ndarray]:
    """The values of each row in float64, `sizes` of them, the same on all ranks. A collective.

    compute: the values of the rows of a batch, one row behind another, such as a score of each
        response or of each of their tokens.
    """
    world, bounds = batcher.world, np.cumsum([0, *sizes]).tolist()
    values = torch.zeros(bounds[-1], dtype=torch.float64, device=world.device)
    with progress_bar(len(rows), "row", world.is_main) as progress:
        for batch in batcher.all(rows):
            computed = compute(batch).double()
            if batch.rows:
                values[[j for i in batch.rows for j in range(*bounds[i : i + 2])]] = computed
            progress.update(min(len(batch.rows) * world.size, len(rows) - progress.n))
    values = sum_over_ranks(values).cpu().numpy()  # one rank has written each place, others have 0
    return [values[start:end] for start, end in pairwise(bounds)]


def score_rows(score: Score, rows: Sequence[Row], batcher: Batcher, name: str) -> list[list[float]]:
    """The score of every response of each row, [row][response], the same on all ranks.

    A collective. Equal responses of a row get the score of the first, because rounding differs
    between places of a row. name: of the model, for errors. Raises RunError if a score is not
    finite.
    """
    sizes = [len(row.responses) for row in rows]
    result = []
    for row, values in zip(rows, values_of_rows(score, rows, sizes, batcher), strict=True):
        check_finite(row, values, name)
        first_of = {}
        for response, value in zip(row.responses, values.tolist(), strict=True):
            first_of.setdefault(response.tobytes(), value)
        result.append([first_of[response.tobytes()] for response in row.responses])
    return result


def check_finite(row: Row, values: np.ndarray, name: str) -> None:
    """Raises RunError if a value that a model gives for a row is not finite. name: of the model."""
    if not np.isfinite(values).all():
        raise RunError(f"{row.name}: {name} gives {values.tolist()}; are its weights complete?")


# --- reward models of several preferences ---------------------------------------------------------


class View(NamedTuple):
    """One reward of a model, and the labels that it is compared with."""

    name: str  # appended to names of subsets; "" if there is one view
    preference: str  # whose labels
    shares: dict[str, float]  # what the reward of each preference is multiplied by


def views(
    model: RewardModel, preference: str | None, combine: list[tuple[str, float]] | None
) -> list[View]:
    """The rewards of a model that are evaluated: one per preference; or their sum, by `combine`.

    preference: this one alone is evaluated; with `combine`, or by a model of one preference, it
        names the labels. combine: the weights of the sum, or None.
    The outputs of a model of another program are no labels of data: they need `combine` where the
    model does not say which one is the reward, and are compared with the labels "better".
    Raises RunError if that is missing, if the model lacks `preference`, or if a sum of several has
    no `preference`, whose labels it is compared with.
    """
    names, reward = preferences_of(model), getattr(model.model, "reward", None)
    is_ours = "preferences" in rule_of(model)
    if reward and not combine:
        combine = [(reward, 1.0)]
    if combine:
        labels = preference or (None if is_ours else "better")
        if labels is None and len(combine) > 1:
            raise RunError(
                "--combine of several preferences needs --preference, whose labels are compared "
                "with the sum; add --preference better"
            )
        return [View("", labels or combine[0][0], dict(combine))]
    if len(names) == 1:
        return [View("", preference or names[0], {names[0]: 1.0})]
    if not is_ours:
        raise RunError(
            f"the reward model has {len(names)} outputs ({', '.join(names)}), and does not say "
            f"which one is the reward; give it as --combine {names[0]}=1"
        )
    chosen = [name for name in names if preference in (None, name)]
    if not chosen:
        raise RunError(
            f"--preference {preference}: the reward model has no such preference; it has "
            f"{', '.join(names)}"
        )
    return [View(name, name, {name: 1.0}) for name in chosen]


def check_one(views: Sequence[View]) -> None:
    """Raises RunError for several rewards, where answers can be compared by one alone."""
    if len(views) > 1:
        names = [view.name for view in views]
        raise RunError(
            f"the reward model has the preferences {', '.join(names)}; give the weight of each "
            f"that counts, as --combine {' '.join(f'{name}=1' for name in names)}"
        )


class Encoded(NamedTuple):
    """Records as the rows that a reward model scores, and what their scores are multiplied by."""

    rows: list[Row]
    factor: float

    def counts(self, records: Sequence[Record]) -> Counter:
        """Counts the notes of the rows: what was cut, and which columns were ignored.

        records: those of the rows. A note about the prompt counts once for all rows of a prompt.
        """
        rows = zip(prompt_keys(records), self.rows, strict=True)
        notes = [(key, note) for key, row in rows for note in row.notes]
        once = dict.fromkeys((key, note) for key, note in notes if note in OF_PROMPTS)
        rest = [(key, note) for key, note in notes if note not in OF_PROMPTS]
        return joined(Counter(note for _, note in (*once, *rest)))


def prompt_keys(records: Sequence[Record]) -> list[str]:
    return [prompt_key(record.prompt, record.tools) for record in records]


@dataclass(frozen=True, slots=True)
class Judge:
    """One reward of a reward model: encodes records, and scores their responses."""

    name: str  # of the model
    model: Mixed
    tokenizer: object
    view: View
    rule: tuple[str, int]  # template, max_length
    batcher: Batcher
    published: Published | None = None  # how a model of another program reads a chat

    def encode(
        self, records: Sequence[Record], ended: Sequence[Ended] | None = None
    ) -> list[Encoded]:
        """Encodes all records, each as a row. Returns one Encoded, which has these rows.

        For a conditioned model it is one Encoded for each preference of the view, whose name is
        added to the prompts. Prompts get the form in which the model was trained. ended: of the
        answers, if each record has one: see encode_answers. A model of another program reads an
        answer that was stopped as one that ended, as other programs let it: it is trained to give a
        reward at the end of the chat template alone.
        Raises RunError as rewards.prompt_kinds.as_trained and encode_records do.
        """
        template, max_length = self.rule
        kinds = rule_of(self.model).get("prompts", ())
        # Responses are scored one by one, so pairs and their margins are left out.
        alone = [replace(record, pairs=(), extra={}) for record in records]
        formed = [as_trained(record, template, kinds) for record in alone]
        formed = [
            new if new is old else replace(new, sampled=None)  # behind another prompt
            for new, old in zip(formed, alone, strict=True)
        ]
        notes = [(AS_DIALOGUE,) * (new is not old) for new, old in zip(formed, alone, strict=True)]
        parts = [(formed, 1.0)]
        if is_conditioned(self.model):
            shares = self.view.shares.items()
            parts = [([conditioned(record, name) for record in formed], x) for name, x in shares]
        encoded = []
        for part, factor in parts:
            if self.published:
                rows = self.published.encode(part, max_length)
            elif ended is None:
                rows = encode_records(part, self.tokenizer, max_length, template)
            else:
                rows = encode_answers(part, self.tokenizer, max_length, template, ended)
            both = zip(rows, notes, strict=True)
            encoded.append(Encoded([replace(x, notes=x.notes + note) for x, note in both], factor))
        return encoded

    def lengths(
        self,
        records: Sequence[Record],
        encoded: list[Encoded],  # of the records
        ended: Sequence[Ended] | None = None,
    ) -> list[list[tuple[int, float]]]:
        """Every response's (tokens with the EOS, share of them that is read): [record][response].

        The share is below 1 if the rule's max_length cut the response, in any of `encoded`.
        """
        whole = replace(self, rule=(self.rule[0], sys.maxsize)).encode(records, ended)[0].rows
        lengths = []
        for n, row in enumerate(whole):
            read = [map(len, part.rows[n].responses) for part in encoded]
            tokens = map(len, row.responses)
            both = zip(tokens, *read, strict=True)
            lengths.append([(t, min(t, *own) / t) for t, *own in both])
        return lengths

    def check(self, encoded: list[Encoded]) -> None:
        """Raises RunError for rows that the model can't score, or scores wrongly in a batch."""
        name = f"reward model '{self.name}'"
        for part in encoded:
            check_fits(self.model, part.rows, name)
            check_layout(self.model, part.rows, self.batcher, name)

    def score(self, encoded: list[Encoded]) -> list[list[float]]:
        """The reward of every response, [record][response], the same on all ranks. A collective.

        It is the sum over `encoded` of the scores of the rows, multiplied by the factor.
        """
        name = f"reward model '{self.name}'"
        parts = [score_rows(self.model, part.rows, self.batcher, name) for part in encoded]
        return [
            [
                sum(part.factor * x for part, x in zip(encoded, values, strict=True))
                for values in zip(*row, strict=True)
            ]
            for row in zip(*parts, strict=True)
        ]


def encode_answers(
    records: Sequence[Record], tokenizer, max_length: int, template: str, ended: Sequence[Ended]
) -> list[Row]:
    """As data.templates.encode_records, but an answer that sampling stopped gets no end.

    Such an answer (False in `ended`) has neither EOS nor what a chat template writes behind an
    answer. Without other tokens it has the EOS alone, because a reward is read at the last token of
    a response. records: of one answer each.
    """
    rows = encode_records(records, tokenizer, sys.maxsize, template)
    cut_rows = []
    for record, row, has_ended in zip(records, rows, ended, strict=True):
        tokens = row.responses[0].tolist()
        if has_ended is False:
            tokens = tokens[:-1]
            name = resolve_template(template, record.prompt, tokenizer)
            as_sampled = record.sampled and tokens == list(record.sampled[1][0])
            if name == "chat" and not as_sampled:
                (text,) = render(record, tokenizer, name).responses
                answer = without_end(record.responses[0], tokenizer.eos_token)
                tokens = tokenize_continuations([without_tail(text, answer)], tokenizer)[0]
        prompt, responses = row.prompt.tolist(), [tokens or [tokenizer.eos_token_id]]
        noted = replace(record, responses=(), notes=row.notes)  # which are of the responses, too
        cut_rows.append(truncate(noted, prompt, responses, max_length, tokenizer.bos_token_id))
    return cut_rows


def without_tail(text: str, answer: str) -> str:
    """The text that a chat template rendered for an answer, up to the end of the answer itself."""
    answer = answer.strip()
    if not answer:
        return ""
    place = text.rfind(answer)
    return text if place < 0 else text[: place + len(answer)]


def load_judges(args: Namespace, preference: str | None, batcher: Batcher) -> list[Judge]:
    """Loads the reward model --model of rm, bench and score: a Judge for each reward of `views`.

    Raises RunError as load_reward_model, reading_of and views.
    """
    model, tokenizer = load_reward_model(args.model, args.precision, batcher, args.head)
    flags = args.template, args.max_length
    rule, published = reading_of(model, tokenizer, args.model, *flags)
    return [
        Judge(args.model, Mixed(model, view.shares), tokenizer, view, rule, batcher, published)
        for view in views(model, preference, args.combine)
    ]
