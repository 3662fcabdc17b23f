"""report.html: one HTML file with its pictures inside, which loads nothing from elsewhere.

All text of models and data is escaped, so that it is shown as text.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from nanoalign.evaluation.comparison import Compared
from nanoalign.evaluation.diagnosis import conclusion
from nanoalign.evaluation.ranking import Figures

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1.5rem;
  color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.conclusion { font-size: 1.15rem; background: #eef4fb; border-left: 5px solid #1f77b4;
  padding: .8rem 1rem }
dl { columns: 3; column-gap: 3rem } dl div { display: flex; justify-content: space-between }
dd { margin: 0 }
img { max-width: 100% }
.tools { position: sticky; top: 0; background: #fff; padding: .6rem 0;
  border-bottom: 1px solid #ddd }
.tools input[type=search] { width: 18rem } .tools > * { margin-right: 1rem }
.case { border: 1px solid #ddd; border-radius: 6px; margin: .8rem 0; padding: .7rem 1rem;
  content-visibility: auto; contain-intrinsic-size: auto 12rem }
.case header { color: #666 } .prompt { font-weight: 600 }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .5rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.better { background: #eaf6ea } .worse { background: #fbf1e8 } .tie { background: #f3f3f3 }
.answers > div { border-radius: 4px; padding: .5rem .7rem }
"""
SCRIPT = """
const cases = document.getElementById('cases');
const all = [...cases.children].map(c => ({
  element: c, kind: c.dataset.kind,
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
    c.element.hidden = !((kind === 'all' || c.kind === kind) && c.text.includes(wanted));
    count += !c.element.hidden;
  }
  shown.textContent = count + ' of ' + all.length + ' shown';
}
sort.addEventListener('input', arrange);
document.querySelectorAll('.tools input').forEach(e => e.addEventListener('input', filter));
arrange();
filter();
"""


def comparison_page(
    title: str,
    compared: Sequence[Compared],
    figures: Figures,
    notes: Sequence[str],
    picture: Path,
) -> str:
    """The page as text. notes: what the figures mean and what to try, a paragraph each."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_figure(value)}</dd></div>"
        for name, value in figures.items()
    )
    image = base64.b64encode(picture.read_bytes()).decode()
    kinds = "".join(
        f'<label><input type="radio" name="kind" value="{kind}"'
        f"{' checked' * (kind == 'all')}> {name}</label>"
        for kind, name in (("all", "all"), ("win", "wins"), ("loss", "losses"), ("tie", "ties"))
    )
    orders = "".join(
        f'<option value="{value}">{name}</option>'
        for value, name in (
            ("worst", "worst for the policy first"),
            ("best", "best for the policy first"),
            ("closest", "closest first"),
            ("data", "as in the data"),
        )
    )
    cases = "".join(_case(place, line) for place, line in enumerate(compared))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="conclusion">{escape(conclusion(figures))}</p>
<h2>What the figures mean, and what to try</h2>
<ul>{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>
<h2>Figures</h2>
<dl>{rows}</dl>
<h2>Pictures</h2>
<img alt="scores in order, their difference, and length" src="data:image/png;base64,{image}">
<h2>Answers</h2>
<div class="tools"><input type="search" id="search" placeholder="search prompts and answers">
<select id="sort">{orders}</select>{kinds}<span id="shown"></span></div>
<div id="cases">{cases}</div>
<script>{SCRIPT}</script>
</body></html>
"""


def _figure(value: float | int | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _case(place: int, line: Compared) -> str:
    difference = line.policy_score - line.baseline_score
    kind = "win" if difference > 0 else "loss" if difference < 0 else "tie"
    prompt = line.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    answers = ""
    for role, better in (("baseline", difference < 0), ("policy", difference > 0)):
        look = "tie" if kind == "tie" else "better" if better else "worse"
        cut = "" if getattr(line, f"{role}_ended") in (True, None) else ", cut"
        answers += (
            f'<div class="{look}"><b>{role}</b>: {getattr(line, f"{role}_score"):+.3f} '
            f"({getattr(line, f'{role}_tokens')} tokens{cut})"
            f'<div class="text">{escape(getattr(line, f"{role}_answer"))}</div></div>'
        )
    data = f'data-place="{place}" data-difference="{difference!r}" data-kind="{kind}"'
    return (
        f'<article class="case" {data}>'
        f"<header>{escape(line.id)}: {kind}, {difference:+.3f}</header>"
        f'<div class="text prompt">{escape(prompt)}</div>'
        f'<div class="answers">{answers}</div></article>\n'
    )
