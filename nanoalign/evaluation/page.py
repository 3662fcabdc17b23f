"""report.html: one HTML file with its pictures inside, which loads nothing from elsewhere.

All text of models and data is escaped, so that it is shown as text, with controls as visible
marks. Beyond that, a browser that follows the page's policy runs its own script alone.
"""

import base64
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from html import escape as escape_html
from pathlib import Path

from nanoalign.data.prompts import shown
from nanoalign.evaluation.answers import ROLES
from nanoalign.evaluation.comparison import Compared, Judged
from nanoalign.evaluation.diagnosis import caution, conclusion, figure_rows
from nanoalign.evaluation.ranking import Figures
from nanoalign.evaluation.statistics import win_shares
from nanoalign.files.text import visible

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1.5rem;
  color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.conclusion { font-size: 1.15rem; background: #eef4fb; border-left: 5px solid #1f77b4;
  padding: .8rem 1rem }
.caution { background: #fdf3d7; border-left: 5px solid #d39e00; padding: .8rem 1rem }
.figures { columns: 3 18rem; column-gap: 3rem } .both { columns: 1; max-width: 44rem }
.figures div { display: flex; gap: .8rem; break-inside: avoid; font-variant-numeric: tabular-nums }
.figures span { text-align: right; min-width: 5.5rem }
.figures span:first-child { text-align: left; flex: 1; min-width: 0 }
.both div:first-child { font-weight: 600; border-bottom: 1px solid #ddd }
img { max-width: 100% }
.tools { position: sticky; top: 0; background: #fff; padding: .6rem 0;
  border-bottom: 1px solid #ddd }
.tools label { white-space: nowrap } .tools > * { margin-right: 1rem }
.tools input[type=search] { width: 18rem }
.case { border: 1px solid #ddd; border-radius: 6px; margin: .8rem 0; padding: .7rem 1rem;
  content-visibility: auto; contain-intrinsic-size: auto 12rem }
.case header { color: #666 } .prompt { font-weight: 600 }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .5rem }
.answers > div { display: flex; flex-direction: column; gap: .5rem; min-width: 0 }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.better { background: #eaf6ea } .worse { background: #fbf1e8 } .tie { background: #f3f3f3 }
.answer { border-radius: 4px; padding: .5rem .7rem }
.mark { background: #fdf3d7; border: 1px solid #d39e00; border-radius: 4px; padding: 0 .3rem;
  font-size: .85em; display: inline-block }
@media (max-width: 700px) {
  body { padding: .8rem } .answers { grid-template-columns: 1fr }
  .tools > * { margin: 0 .6rem .3rem 0 }
}
"""
SCRIPT = """
const cases = document.getElementById('cases');
const all = [...cases.children].map(c => ({
  element: c, kinds: ['all', ...c.dataset.kind.split(' ')],
  text: [...c.querySelectorAll('.text')].map(e => e.textContent.toLowerCase()).join('\\n'),
  place: +c.dataset.place, difference: +c.dataset.difference,
}));
const search = document.getElementById('search'), sort = document.getElementById('sort');
const shown = document.getElementById('shown');
const order = {
  data: (a, b) => a.place - b.place,
  best: (a, b) => b.difference - a.difference || a.place - b.place,
  worst: (a, b) => a.difference - b.difference || a.place - b.place,
  closest: (a, b) => Math.abs(a.difference) - Math.abs(b.difference) || a.place - b.place,
};
function arrange() {
  cases.append(...all.sort(order[sort.value]).map(c => c.element));
}
function filter() {
  const wanted = search.value.toLowerCase();
  const kind = document.querySelector('[name=kind]:checked').value;
  let count = 0;
  for (const c of all) {
    c.element.hidden = !(c.kinds.includes(kind) && c.text.includes(wanted));
    count += !c.element.hidden;
  }
  shown.textContent = count + ' of ' + all.length + ' shown';
}
sort.addEventListener('input', arrange);
document.querySelectorAll('.tools input').forEach(e => e.addEventListener('input', filter));
arrange();
filter();
"""


def source_of(text: str) -> str:
    """The source expression of an inline script or style: Content Security Policy Level 3."""
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


# Nothing from elsewhere, nothing inline but these two, no forms, no other base of addresses.
POLICY = (
    f"default-src 'none'; img-src data:; style-src {source_of(STYLE)}; "
    f"script-src {source_of(SCRIPT)}; base-uri 'none'; form-action 'none'"
)


def escape(text: str) -> str:
    return escape_html(visible(text))


def comparison_page(
    title: str,
    compared: Sequence[Compared],
    figures: Figures,
    notes: Sequence[str],
    picture: Path,
) -> str:
    """The page as text. notes: what the figures mean and what to try, a paragraph each."""
    image = base64.b64encode(picture.read_bytes()).decode()
    names = {"all": "all", "win": "wins", "loss": "losses", "tie": "ties"}
    if "without_cut" in figures:
        names["cut"] = "with a cut answer"
    kinds = "".join(
        f'<label><input type="radio" name="kind" value="{kind}"'
        f"{' checked' * (kind == 'all')}> {name}</label>"
        for kind, name in names.items()
    )
    rows = "".join(map(_row, figure_rows(figures)))
    look = "figures both" if "without_cut" in figures else "figures"
    orders = "".join(
        f'<option value="{value}">{name}</option>'
        for value, name in (
            ("worst", "worst for the policy first"),
            ("best", "best for the policy first"),
            ("closest", "closest first"),
            ("data", "as in the data"),
        )
    )
    cases = "".join(_case(place, each) for place, each in enumerate(compared))
    note = caution(figures)
    rests_on = f'<p class="caution">{escape(note)}</p>' if note else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>
<style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="conclusion">{escape(conclusion(figures))}</p>{rests_on}
<h2>What the figures mean, and what to try</h2>
<ul>{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>
<h2>Figures</h2>
<div class="{look}">{rows}</div>
<h2>Pictures</h2>
<img alt="scores in order, their difference, and length" src="data:image/png;base64,{image}">
<h2>Answers</h2>
<div class="tools"><input type="search" id="search" placeholder="search prompts and answers">
<select id="sort">{orders}</select>{kinds}<span id="shown"></span></div>
<div id="cases">{cases}</div>
<script>{SCRIPT}</script>
</body></html>
"""


def _row(cells: Sequence[str]) -> str:
    texts = (escape(cell).replace("_", "_<wbr>") for cell in cells)
    return f"<div>{''.join(f'<span>{text}</span>' for text in texts)}</div>"


def _case(place: int, each: Compared) -> str:
    difference, rate = float(each.margins().mean()), each.win_rate()
    kind = "win" if rate > 0.5 else "loss" if rate < 0.5 else "tie"
    won = win_shares(each.margins())  # (policy's, baseline's)
    result = kind
    if won.size > 1:
        result += f", the policy wins {rate:.0%} of {won.size} comparisons; mean difference"
    cut = any(x.cut for role in ROLES for x in getattr(each, role))
    prompt = shown(each.prompt, "\n")
    columns = {
        role: "".join(map(partial(_answer, role), getattr(each, role), shares.tolist()))
        for role, shares in (("baseline", 1 - won.mean(0)), ("policy", won.mean(1)))
    }
    data = f'data-place="{place}" data-difference="{difference!r}" data-kind="{kind}'
    return (
        f'<article class="case" {data}{" cut" * cut}">'
        f"<header>{escape(each.id)}: {result} {difference:+.3f}</header>"
        f'<div class="text prompt">{escape(prompt)}</div><div class="answers">'
        f"<div>{columns['baseline']}</div><div>{columns['policy']}</div></div></article>\n"
    )


def _answer(role: str, x: Judged, win_share: float) -> str:
    """One answer. win_share: of its comparisons."""
    look = "better" if win_share > 0.5 else "worse" if win_share < 0.5 else "tie"
    marks = []
    if x.cut:
        marks.append(f"cut: the reward model read only the first {x.read_share:.0%}")
    if x.ended is False:
        marks.append("sampling stopped at --max_new_tokens")
    badges = "".join(f' <span class="mark">{mark}</span>' for mark in marks)
    return (
        f'<div class="answer {look}"><b>{role}</b>: {x.score:+.3f} ({x.tokens:,} tokens){badges}'
        f'<div class="text">{escape(x.answer)}</div></div>'
    )
