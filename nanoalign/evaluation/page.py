"""report.html: one HTML file with its pictures inside, which loads nothing from elsewhere.

Its template is report.html beside this file. A browser that follows the page's Content Security
Policy runs the page's own script alone, even if text of a model came past the escaping.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from nanoalign.data.prompts import prompt_text
from nanoalign.evaluation.answers import ROLES
from nanoalign.evaluation.comparison import Compared, Judged
from nanoalign.evaluation.diagnosis import bin_rows, conclusion, figure_groups, warnings_of
from nanoalign.evaluation.ranking import TrueRule
from nanoalign.evaluation.render import escape, render
from nanoalign.evaluation.statistics import Figures, win_shares

TEMPLATE = Path(__file__).with_name("report.html")


def comparison_page(
    title: str,
    compared: Sequence[Compared],
    figures: Figures,
    notes: Sequence[str],
    picture: Path,
    truth: TrueRule,
) -> str:
    """The text of report.html.

    notes: what the figures mean and what to try, a paragraph each. picture: the path of a PNG file.
    truth: its rewards stand beside those of the reward model, for prompts that it knows.
    """
    cases = [_case(case, truth) for case in compared]
    kinds = {"all": "all", "win": "wins", "loss": "losses", "tie": "ties"}
    if "without_cut" in figures:
        kinds["cut"] = "with a cut answer"
    if any(case["misjudged"] for case in cases):
        kinds["misjudged"] = "where the ground truth says otherwise"
    return render(
        TEMPLATE,
        title=title,
        conclusion=conclusion(figures),
        cautions=warnings_of(figures),
        notes=notes,
        figures=figure_groups(figures),
        bins=bin_rows(figures),
        has_cut="without_cut" in figures,
        breakable=_breakable,
        image=picture,
        kinds=kinds,
        cases=cases,
    )


def _breakable(text: str) -> Markup:
    """Returns the text escaped for HTML, with a place for a line break behind each underscore."""
    return escape(text).replace("_", Markup("_<wbr>"))


def _case(case: Compared, truth: TrueRule) -> dict[str, object]:
    """What the page has about one prompt."""
    rule = truth.rule("better")
    true = {role: [rule(case.prompt, x.answer) for x in case.answers(role)] for role in ROLES}
    won = win_shares(case.margins())  # (policy's, baseline's)
    difference, rate = float(case.margins().mean()), float(won.mean())
    kind = "win" if rate > 0.5 else "loss" if rate < 0.5 else "tie"
    result = kind
    if won.size > 1:
        result += f", the policy wins {rate:.0%} of {won.size} comparisons; mean difference"
    shares = {"baseline": 1 - won.mean(0), "policy": won.mean(1)}
    true_rate = rate
    if truth.knows([case.prompt]):
        true_rate = win_shares(np.subtract.outer(true["policy"], true["baseline"])).mean()
    return {
        "kind": kind,
        "misjudged": np.sign(true_rate - 0.5) != np.sign(rate - 0.5),
        "difference": difference,
        "head": f"{case.id}: {result} {difference:+.3f}",
        "cut": any(x.cut for role in ROLES for x in case.answers(role)),
        "prompt": prompt_text(case.prompt, "\n"),
        "answers": {
            role: list(map(_answer, case.answers(role), won_shares.tolist(), true[role]))
            for role, won_shares in shares.items()
        },
    }


def _answer(x: Judged, win_share: float, true: float | None) -> dict[str, object]:
    """What the page has about one answer. win_share: the share of its comparisons that it wins."""
    return {
        "true": None if true is None else f"{true:+.3f}",
        "look": "better" if win_share > 0.5 else "worse" if win_share < 0.5 else "tie",
        "score": f"{x.score:+.3f}",
        "tokens": f"{x.tokens:,}",
        "read_share": x.read_share,
        "stopped": x.ended is False,
        "answer": x.answer,
    }
