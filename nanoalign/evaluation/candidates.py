"""evaluate.py score: the reward of every response, to filter them and to make preference pairs.

Records of any format are read, and answers of other programs; the responses to one prompt are one
row, so the prompt is computed once for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nanoalign.data.formats import formats
from nanoalign.data.prompts import ANSWER_KEYS, prompt_key, read_answers
from nanoalign.data.sources import open_source
from nanoalign.errors import RunError
from nanoalign.evaluation.render import table
from nanoalign.records import Record, decode, read

QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent


@dataclass
class Candidates:
    """The different responses to one prompt, in their order in the data."""

    prompt: str | list[dict]
    tools: list[dict] | None
    name: str
    labels: dict[str, list[str]] = field(default_factory=dict)  # response -> what the data call it

    def record(self) -> Record:
        return Record(self.prompt, tuple(self.labels), (), name=self.name, tools=self.tools)


def read_candidates(sources: Sequence[str], keys: Sequence[str] = ()) -> list[Candidates]:
    """The candidates of all prompts of the sources. keys: of --keys."""
    by_prompt: dict[str, Candidates] = {}
    for source in sources:
        for record in records_of(source, keys):
            key = prompt_key(record.prompt, record.tools)
            empty = Candidates(record.prompt, record.tools, record.name)
            candidates = by_prompt.setdefault(key, empty)
            for n, response in enumerate(record.responses):
                labels = candidates.labels.setdefault(response, [])
                label = label_of(record, n)
                labels += [label] * (label is not None and label not in labels)
    return list(by_prompt.values())


def records_of(source: str, renaming: Sequence[str]) -> list[Record]:
    """The records of a source: answers beside their prompts, or records of any other format."""
    first = next(open_source(source), None)
    raw = {} if first is None else decode(first[3], first[0])
    keys = raw.keys() if isinstance(raw, dict) else set()
    if "prompt" in keys and not keys & {"chosen", "responses", "label"} and keys & {*ANSWER_KEYS}:
        prompts, answers = read_answers(source)
        texts = [answers[prompt_key(prompt.prompt, prompt.tools)] for prompt in prompts]
        return [replace(p, responses=tuple(t)) for p, t in zip(prompts, texts, strict=True)]
    return list(read([source], formats(unpaired="prompts", keys=renaming), open_source))


def label_of(record: Record, n: int) -> str | None:
    """chosen or rejected, where response n is one of a single pair; of others None."""
    if len(record.responses) != 2 or len(record.pairs) != 1:
        return None
    return "chosen" if record.pairs[0][0] == n else "rejected"


def parse_keep(words: Sequence[str] | None) -> float | str | None:
    """--keep best, or --keep above X: "best", X, or None for all. Raises RunError for others."""
    if words in (None, ["best"]):
        return words and "best"
    try:
        if words[0] == "above" and len(words) == 2:
            return float(words[1])
    except ValueError:
        pass
    raise RunError(f"--keep {' '.join(words)}: expected best, or above NUMBER")


def scored_lines(
    candidates: Sequence[Candidates], rewards: dict[str, list[list[float]]]
) -> list[list[dict]]:
    """A line for each response, by prompt: prompt, completion, reward, and what the data call it.

    rewards: by preference of the model, of each prompt's responses. `reward` is the first one's;
        where there are several, `rewards` has all.
    """
    names = list(rewards)
    return [
        [
            {"prompt": prompt.prompt, **({"tools": prompt.tools} if prompt.tools else {})}
            | {"completion": response, "reward": rewards[names[0]][n][k]}
            | ({"rewards": {name: rewards[name][n][k] for name in names}} if names[1:] else {})
            | ({"labels": labels} if labels else {})
            for k, (response, labels) in enumerate(prompt.labels.items())
        ]
        for n, prompt in enumerate(candidates)
    ]


def kept(lines: Sequence[Sequence[dict]], keep: float | str | None) -> list[dict]:
    """The lines that --keep selects: the best one of each prompt, or all whose reward is larger.

    Of equal rewards the first is the best. keep: see parse_keep.
    """
    if keep == "best":
        return [max(of_prompt, key=_reward) for of_prompt in lines]
    return [
        line for of_prompt in lines for line in of_prompt if keep is None or _reward(line) > keep
    ]


def _reward(line: dict) -> float:
    return line["reward"]


def pairs_of(lines: Sequence[Sequence[dict]]) -> list[dict]:
    """The best response to each prompt beside its worst, with the difference of rewards as margin.

    Prompts whose responses all have one reward have none.
    """
    pairs = []
    for of_prompt in lines:
        best, worst = (pick(of_prompt, key=_reward) for pick in (max, min))
        if best["reward"] > worst["reward"]:
            pair = {"chosen": best["completion"], "rejected": worst["completion"]}
            shared = {key: best[key] for key in ("prompt", "tools") if key in best}
            pairs.append(shared | pair | {"margin": best["reward"] - worst["reward"]})
    return pairs


def quantiles(lines: Sequence[Sequence[dict]], chosen: Sequence[dict]) -> str:
    """Number, mean and quantiles of the rewards of all responses, and of those that are kept."""
    rows = [("", "responses", "mean", *(f"{q} %" for q in QUANTILES))]
    everything = [line for of_prompt in lines for line in of_prompt]
    for name, selected in (("all", everything), ("kept", chosen)):
        values = np.array(list(map(_reward, selected)))
        figures = [values.mean(), *np.percentile(values, QUANTILES)] if len(values) else []
        rows.append((name, f"{len(selected):,}", *(f"{figure:.4f}" for figure in figures)))
    return table(rows, left=0, width=9)
