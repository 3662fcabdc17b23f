"""The page of a comparison: one self-contained HTML file, with its pictures inside and no network.

Everything that comes from a model or from data is escaped: it shows as the text that it is.
"""

import base64
import json
from html import escape
from pathlib import Path

from nanoalign.comparison import Compared
from nanoalign.metrics import wilson_interval

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1.5rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.verdict { font-size: 1.15rem; background: #eef4fb; border-left: 5px solid #1f77b4; padding: .8rem 1rem }
dl { columns: 3; column-gap: 3rem } dl div { display: flex; justify-content: space-between } dd { margin: 0 }
img { max-width: 100% }
.tools { position: sticky; top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #ddd }
.tools input[type=search] { width: 18rem } .tools > * { margin-right: 1rem }
.case { border: 1px solid #ddd; border-radius: 6px; margin: .8rem 0; padding: .7rem 1rem;
  content-visibility: auto; contain-intrinsic-size: auto 12rem }
.case header { color: #666 } .prompt { font-weight: 600 }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .5rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.better { background: #eaf6ea } .worse { background: #fbf1e8 } .tie { background: #f3f3f3 }
.sides > div { border-radius: 4px; padding: .5rem .7rem }
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
  const wanted = search.value.toLowerCase(), kind = document.querySelector('[name=kind]:checked').value;
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


def verdict(figures: dict[str, float | int | None]) -> str:
    """The result in one sentence, no surer than the intervals allow; the true rule outdoes the judge."""
    wins = f"by the reward model it wins {_share(figures, '')} of {figures['pairs']:,} comparisons"
    judged, text = _better(figures, ""), None
    if "true_win_rate" in figures:
        wins += f", by the true rule of the embedded world {_share(figures, 'true_')}"
        true = _better(figures, "true_")
        if not judged and true:
            text = "The reward model sees no difference where there is one"
        elif judged != true:
            text = (
                "The reward model is misled" if true else "The reward model sees more than there is"
            )
    says = {
        1: "The policy is better than the baseline",
        -1: "The policy is worse than the baseline",
        0: "No difference to the baseline is shown, what there is may be chance",
    }
    return f"{text or says[judged]}: {wins}."


def _share(figures: dict[str, float | int | None], judge: str) -> str:
    low, high = figures[f"{judge}win_rate_low"], figures[f"{judge}win_rate_high"]
    return f"{figures[f'{judge}win_rate']:.1%} [{low:.1%}, {high:.1%}]"


def _better(figures: dict[str, float | int | None], judge: str) -> int:
    """1 where the policy is better than the baseline beyond chance, -1 where it is worse, else 0.

    Of few prompts a bootstrap may have no width: so Wilson's interval must leave out 1/2 too.
    """
    low, high = wilson_interval(figures[f"{judge}win_rate"], figures["prompts"])
    low, high = (
        min(low, figures[f"{judge}win_rate_low"]),
        max(high, figures[f"{judge}win_rate_high"]),
    )
    return int(low > 0.5) - int(high < 0.5)


def comparison_page(
    title: str,
    compared: list[Compared],
    figures: dict[str, float | int | None],
    notes: list[str],
    picture: Path,
) -> str:
    """The whole page as text.

    notes: the sentences of the section that says what the figures mean and what to try.
    """
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_figure(value)}</dd></div>"
        for name, value in figures.items()
    )
    image = base64.b64encode(picture.read_bytes()).decode()
    kinds = "".join(
        f'<label><input type="radio" name="kind" value="{kind}"{" checked" * (kind == "all")}> {name}'
        "</label>"
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
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="verdict">{escape(verdict(figures))}</p>
<h2>What the figures say, and what to try</h2>
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
    sides = ""
    for side, better in (("baseline", difference < 0), ("policy", difference > 0)):
        look = "tie" if kind == "tie" else "better" if better else "worse"
        cut = "" if getattr(line, f"{side}_ended") in (True, None) else ", cut"
        sides += (
            f'<div class="{look}"><b>{side}</b>: {getattr(line, f"{side}_score"):+.3f} '
            f"({getattr(line, f'{side}_tokens')} tokens{cut})"
            f'<div class="text">{escape(getattr(line, f"{side}_answer"))}</div></div>'
        )
    return (
        f'<article class="case" data-place="{place}" data-difference="{difference!r}" data-kind="{kind}">'
        f"<header>{escape(line.id)}: {kind}, {difference:+.3f}</header>"
        f'<div class="text prompt">{escape(prompt)}</div><div class="sides">{sides}</div></article>\n'
    )


def read_log(path: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that can be read; none where there is no such file."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            metrics = json.loads(line)
        except ValueError:  # torn, when the run was killed
            continue
        if isinstance(metrics, dict):
            lines.append(metrics)
    return lines


def diagnosis(figures: dict[str, float | int | None], log: list[dict]) -> list[str]:
    """What each figure means for the question why the policy is not better, and what to try.

    log: the lines of the metrics.jsonl of the policy's training, where they are at hand.
    """
    difference = figures["policy_tokens_mean"] - figures["baseline_tokens_mean"]
    length = (
        f"The policy's answers are {abs(difference):.1f} tokens {'longer' if difference > 0 else 'shorter'} "
        "than the baseline's"
    )
    controlled = figures["length_controlled_win_rate"]
    if controlled is None:
        length += ", so much that their lengths hardly overlap, and length can't be controlled. "
    else:
        length += (
            f"; with length controlled (a logistic regression of the wins on the difference of lengths, at "
            f"a difference of 0) it wins {controlled:.1%}. "
        )
    notes = [
        f"{length}Where the two win rates are far apart the reward model may pay for length: look at "
        "length_correlation in evaluate.py rm."
    ]
    cut = {
        side: 1 - figures[f"{side}_ended_share"]
        for side in ("policy", "baseline")
        if figures[f"{side}_ended_share"] is not None
    }
    if cut:
        shares = " and ".join(f"{share:.1%} of the {side}'s" for side, share in cut.items())
        notes.append(
            f"Cut at the limit were {shares} answers. A policy that has forgotten how to stop wants chosen "
            "answers that end with EOS, a larger --beta, or here a larger --max_new_tokens."
        )
    if "kl_per_answer" in figures:
        notes.append(
            f"KL(policy || baseline) is {figures['kl_per_answer']:.2f} nats an answer, "
            f"{figures['kl_per_token']:.3f} a token. Near 0 the policy has hardly moved: raise --lr or "
            "--epochs, or lower --beta. At tens of nats an answer it has left what it knew: the other way."
        )
    sides = ("eval/logps/chosen", "eval/logps/rejected")
    evaluations = [line for line in log if all(key in line for key in sides)]
    if evaluations:
        chosen, rejected = (evaluations[-1][key] - evaluations[0][key] for key in sides)
        notes.append(
            f"In training the held-out chosen answers' log-probability moved by {chosen:+.2f} nats, the "
            f"rejected ones' by {rejected:+.2f}. That chosen falls too is usual in DPO, which rewards the "
            "difference alone; where it falls as fast as rejected, lower --lr or raise --beta."
        )
    held_out = [line["eval/rewards/margins"] for line in log if "eval/rewards/margins" in line]
    training = [line["rewards/margins"] for line in log if "rewards/margins" in line][-10:]
    if held_out and training:
        notes.append(
            f"The margin is {held_out[-1]:.3f} on held-out pairs, and "
            f"{sum(training) / len(training):.3f} on the last {len(training)} training steps. Far apart, "
            "the policy learns its pairs by heart: fewer epochs, or more pairs."
        )
    return notes
