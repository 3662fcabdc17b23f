"""evaluate.py score: the reward of every response, to filter them and to make preference pairs.

Records of any format are read, and answers of other programs; the responses to one prompt are one
row, so the prompt is computed once for all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

import numpy as np

from nanoalign.data.formats import formats
from nanoalign.data.prompts import ANSWER_KEYS, prompt_key, read_answers
from nanoalign.data.sources import open_source, read_records
from nanoalign.errors import RunError
from nanoalign.evaluation.statistics import Figures
from nanoalign.records import Record, decode

QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent
REWARD = itemgetter("reward")  # of a line


def read_candidates(sources: Sequence[str], keys: Sequence[str] = ()) -> list[Record]:
    """Reads the prompts of all sources, each once, with all different responses to it.

    Prompts and responses are in the order of the data. keys: of --keys.
    """
    by_prompt: dict[str, tuple[Record, dict[str, None]]] = {}
    for source in sources:
        for record in records_of(source, keys):
            key = prompt_key(record.prompt, record.tools)
            _, responses = by_prompt.setdefault(key, (record, {}))
            responses.update(dict.fromkeys(record.responses))
    return [
        Record(first.prompt, tuple(responses), (), name=first.name, tools=first.tools)
        for first, responses in by_prompt.values()
    ]


def records_of(source: str, renaming: Sequence[str]) -> list[Record]:
    """Reads the records of a source: answers beside their prompts, or records of any other format.

    renaming: of --keys, which files of answers ignore.
    """
    first = next(open_source(source), None)
    raw = {} if first is None else decode(first[3], first[0])
    keys = raw.keys() if isinstance(raw, dict) else set()
    if "prompt" in keys and not keys & {"chosen", "responses", "label"} and keys & {*ANSWER_KEYS}:
        prompts, answers = read_answers(source)
        of_each = [answers[prompt_key(prompt.prompt, prompt.tools)] for prompt in prompts]
        texts = [tuple(each.answer for each in own) for own in of_each]
        return [replace(p, responses=t) for p, t in zip(prompts, texts, strict=True)]
    return list(read_records(formats(unpaired="prompts"), [source], renaming))


def parse_keep(words: Sequence[str] | None) -> float | str | None:
    """Returns "best" for --keep best, X for --keep above X, and None (all) without the flag.

    Raises RunError for other words.
    """
    if words in (None, ["best"]):
        return words and "best"
    try:
        if words[0] == "above" and len(words) == 2:
            limit = float(words[1])
            if math.isfinite(limit):
                return limit
    except ValueError:
        pass
    raise RunError(f"--keep {' '.join(words)}: expected best, or above NUMBER")


def scored_lines(
    prompts: Sequence[Record], rewards: dict[str, list[list[float]]]
) -> list[list[dict]]:
    """The lines of the output, [prompt][response]: prompt, completion, reward.

    A prompt with tools has them in its lines. With several preferences `reward` is that of the
    first, and `rewards` has all by name.
    rewards: by preference, those of each prompt's responses, [prompt][response].
    """
    names = list(rewards)
    return [
        [
            {"prompt": prompt.prompt, **({"tools": prompt.tools} if prompt.tools else {})}
            | {"completion": response, "reward": rewards[names[0]][n][k]}
            | ({"rewards": {name: rewards[name][n][k] for name in names}} if names[1:] else {})
            for k, response in enumerate(prompt.responses)
        ]
        for n, prompt in enumerate(prompts)
    ]


def kept(lines: Sequence[Sequence[dict]], keep: float | str | None) -> list[dict]:
    """The lines that --keep selects: the best one of each prompt, those above a reward, or all.

    Of equal rewards the first is the best. keep: what parse_keep returns.
    """
    if keep == "best":
        return [max(of_prompt, key=REWARD) for of_prompt in lines]
    return [
        line for of_prompt in lines for line in of_prompt if keep is None or REWARD(line) > keep
    ]


def pairs_of(lines: Sequence[Sequence[dict]]) -> list[dict]:
    """Preference records of the best and the worst response to each prompt.

    The margin of a record is the difference of their rewards. A prompt whose responses all have one
    reward has no record.
    """
    pairs = []
    for of_prompt in lines:
        best, worst = (pick(of_prompt, key=REWARD) for pick in (max, min))
        if best["reward"] > worst["reward"]:
            pair = {"chosen": best["completion"], "rejected": worst["completion"]}
            shared = {key: best[key] for key in ("prompt", "tools") if key in best}
            pairs.append(shared | pair | {"margin": best["reward"] - worst["reward"]})
    return pairs


def quantiles(lines: Sequence[Sequence[dict]], chosen: Sequence[dict]) -> dict[str, Figures]:
    """Number, mean and quantiles of the rewards of "all" responses, and of those that are "kept".

    Without a response the number alone. lines: [prompt][response]. chosen: the lines that are kept.
    """
    everything = [line for of_prompt in lines for line in of_prompt]
    figures: dict[str, Figures] = {}
    for name, selected in (("all", everything), ("kept", chosen)):
        figures[name] = {"responses": len(selected)}
        if selected:
            values = np.array(list(map(REWARD, selected)))
            figures[name]["mean"] = float(values.mean())
            figures[name] |= {f"{q} %": float(np.percentile(values, q)) for q in QUANTILES}
    return figures
