"""Files of AlpacaEval and Arena-Hard: our answers for their judges, and the verdicts of a judge.

AlpacaEval (tatsu-lab/alpaca_eval) has a list of {"instruction", "output", "generator"}; its
annotations.json has {"instruction", "output_1", "output_2", "preference"}, a preference from 1 (for
output_1) to 2. Arena-Hard (lmarena/arena-hard-auto) has a line {"uid", "model", "messages"} an
answer, and a line {"uid", "games"} a judgment, of two games in which the answers change places.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from nanoalign.data.foreign import instruction
from nanoalign.data.prompts import prompt_text
from nanoalign.data.sources import check_sources, open_source
from nanoalign.distributed import print0
from nanoalign.errors import RunError
from nanoalign.evaluation.answers import ROLES
from nanoalign.evaluation.comparison import Compared
from nanoalign.evaluation.statistics import Figures, share_figures, win_shares
from nanoalign.evaluation.style import agreement
from nanoalign.files.text import named
from nanoalign.records import decode

# What Arena-Hard's judge reads (config/arena-hard-v2.0.yaml).
ARENA_HARD = re.compile(
    r"<\|User Prompt\|>\n(.*)\n\n"
    r"<\|The Start of Assistant A's Answer\|>\n(.*)\n<\|The End of Assistant A's Answer\|>\n\n"
    r"<\|The Start of Assistant B's Answer\|>\n(.*)\n<\|The End of Assistant B's Answer\|>",
    re.DOTALL,
)
LABEL = re.compile(r"([AB])(>>|>|=|<|<<)(?!\1)[AB]")  # of a game
STRONG = 3  # votes of "A>>B", as show_result.py counts it


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of two answers to a prompt."""

    prompt: str
    first: str
    second: str
    share: float  # how much it prefers the second one, from 0 to 1
    votes: int = 1


# --- our answers for their judges -----------------------------------------------------------------


def text_of(prompt: str | list[dict]) -> str:
    """Returns a prompt as these files have it: a question by itself, else all of its messages."""
    if not isinstance(prompt, str) and [message["role"] for message in prompt] == ["user"]:
        return prompt[0]["content"]
    return prompt_text(prompt, "\n\n")


def read_uids(sources: Iterable[str]) -> dict[str, str]:
    """Returns the uid of each prompt of Arena-Hard's questions, or of answers in its format."""
    found = {}
    for source in sources:
        for where, _, _, raw in open_source(source):
            record = decode(raw, where)
            if not isinstance(record, dict) or "uid" not in record:
                continue
            prompt, messages = record.get("prompt"), record.get("messages")
            if isinstance(messages, list) and len(messages) > 1 and isinstance(messages[-2], dict):
                prompt = messages[-2].get("content")
            if isinstance(prompt, str):
                found[prompt] = str(record["uid"])
    return found


def write_answers(
    folder: Path, compared: Sequence[Compared], names: dict[str, str], uids: dict[str, str]
) -> None:
    """Writes alpaca_eval/ROLE.json and, if all prompts have a uid, arena_hard/ROLE.jsonl.

    names: of the models, by role. Arena-Hard judges one answer a prompt: it gets the first.
    """
    (folder / "alpaca_eval").mkdir()
    for role in ROLES:
        outputs = [
            {"instruction": text_of(case.prompt), "output": x.answer, "generator": names[role]}
            for case in compared
            for x in case.answers(role)
        ]
        text = json.dumps(outputs, indent=2, ensure_ascii=False) + "\n"
        (folder / "alpaca_eval" / f"{role}.json").write_text(text, encoding="utf-8")
    prompts = [text_of(case.prompt) for case in compared]
    if not all(prompt in uids for prompt in prompts):
        return
    (folder / "arena_hard").mkdir()
    for role in ROLES:
        lines = ""
        for prompt, case in zip(prompts, compared, strict=True):
            answer = {"role": "assistant", "content": {"answer": case.answers(role)[0].answer}}
            messages = [{"role": "user", "content": prompt}, answer]
            line = {"uid": uids[prompt], "model": names[role], "messages": messages}
            lines += json.dumps(line, ensure_ascii=False) + "\n"
        (folder / "arena_hard" / f"{role}.jsonl").write_text(lines, encoding="utf-8")


# --- their judges' verdicts -----------------------------------------------------------------------


def read_verdicts(source: str) -> list[Verdict]:
    """Returns the verdicts of a source, and prints how many, and how many records have none.

    Raises RunError, with file and line, for a record of neither format.
    """
    check_sources([source])
    verdicts, missing = [], 0
    for where, _, _, raw in open_source(source):
        record = decode(raw, where)
        record = record if isinstance(record, dict) else {}
        try:
            if record.keys() >= {"instruction", "output_1", "output_2", "preference"}:
                found = of_alpaca_eval(record)
            elif "games" in record:
                found = of_arena_hard(record["games"])
            else:
                raise ValueError(
                    "expected instruction, output_1, output_2 and preference (AlpacaEval), or "
                    f"games (Arena-Hard), found {sorted(record)}"
                )
        except ValueError as error:
            raise RunError(f"{where}: {error}") from error
        verdicts += found
        missing += not found
    if not verdicts:
        raise RunError(f"--verdicts {source}: has no verdicts")
    without = f"; {missing:,} records without one" if missing else ""
    print0(f"{'verdicts':<11} {named([source])}: {len(verdicts):,}{without}")
    return verdicts


def of_alpaca_eval(record: dict) -> list[Verdict]:
    """The verdict of a record of annotations.json; none if its preference is null."""
    prompt, outputs = instruction(dict(record)), [record["output_1"], record["output_2"]]
    preference = record["preference"]
    if not isinstance(prompt, str) or not all(isinstance(text, str) for text in outputs):
        raise ValueError("instruction, output_1 and output_2 must be text")
    if preference is None or preference != preference:  # nan, as pandas writes null
        return []
    if preference == 0 and not isinstance(preference, bool):
        preference = 1.5  # a tie in files of before 2023-12
    is_number = isinstance(preference, int | float) and not isinstance(preference, bool)
    if not is_number or not isfinite(preference) or not 1 <= preference <= 2:
        raise ValueError(f"preference is {preference!r}; expected a number from 1 to 2")
    return [Verdict(prompt, *outputs, preference - 1)]


def of_arena_hard(games: object) -> list[Verdict]:
    """The verdicts of the two games of a judgment; none if one of them has no score."""
    known = isinstance(games, list) and all(isinstance(game, dict | None) for game in games)
    if not known or len(games) != 2:
        raise ValueError("games must be a list of two")
    if any(game is None or game.get("score") is None for game in games):
        return []
    verdicts = []
    for game in games:
        label = LABEL.fullmatch(str(game["score"]))
        if label is None:
            raise ValueError(
                f"the score is {game['score']!r}; expected A>>B, A>B, A=B, B>A or B>>A"
            )
        try:
            text = ARENA_HARD.search(game["prompt"][-1]["content"])
        except (KeyError, IndexError, TypeError):
            text = None
        if text is None:
            raise ValueError(
                "a game without the prompt of its judge, which has question and answers"
            )
        left, sign = label.groups()
        for_left = 0.5 if sign == "=" else float(">" in sign)
        share = for_left if left == "B" else 1 - for_left  # of the second answer, B
        verdicts.append(Verdict(*text.groups(), share, STRONG if len(sign) == 2 else 1))
    return verdicts


def verdict_figures(compared: Sequence[Compared], verdicts: Sequence[Verdict]) -> Figures:
    """The figures of the verdicts on the pairs of a comparison.

    verdicts_pairs: how many pairs have one. verdicts_elsewhere: how many verdicts are on other
    answers. verdicts_win_rate: the policy's share of the votes, and
    verdicts_reward_win_rate its win rate on these pairs by the reward model, both as means of pairs
    weighted by their votes. verdicts_agreement: the share of pairs in which the reward model
    prefers what the verdicts do, of those in which they are no tie; a tie of the reward model is
    half. With 95 % intervals by statistics.prompt_interval (_low, _high).
    Raises RunError if no verdict is on a pair of these answers.
    """
    by_prompt: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_prompt.setdefault(verdict.prompt, []).append(verdict)
    shares, votes, won, prompts, used = [], [], [], [], 0
    for n, case in enumerate(compared):
        outcomes = win_shares(case.margins())
        for (i, j), outcome in np.ndenumerate(outcomes):
            pair = (case.policy[i].answer, case.baseline[j].answer)
            own = [
                (x.share if (x.second, x.first) == pair else 1 - x.share, x.votes)
                for x in by_prompt.get(text_of(case.prompt), ())
                if pair in ((x.first, x.second), (x.second, x.first))
            ]
            if own:
                total = sum(count for _, count in own)
                shares.append(sum(share * count for share, count in own) / total)
                votes.append(total)
                won.append(outcome)
                prompts.append(n)
                used += len(own)
    if not shares:
        raise RunError(
            f"none of the {len(verdicts):,} verdicts of --verdicts is on these answers; give the "
            "judged answers as --policy_answers and --baseline_answers"
        )
    shares, votes, won = map(np.array, (shares, votes, won))  # (P,) each
    decided = shares != 0.5
    figures = {"verdicts_pairs": len(shares), "verdicts_elsewhere": len(verdicts) - used}
    for name, values in (("verdicts_win_rate", shares), ("verdicts_reward_win_rate", won)):
        figures |= share_figures(name, values, prompts, votes)
    if decided.any():
        labels = win_shares(shares - 0.5)
        agrees = agreement(won, labels)[decided]
        of_prompts = np.array(prompts)[decided].tolist()
        figures |= share_figures("verdicts_agreement", agrees, of_prompts)
    return figures
