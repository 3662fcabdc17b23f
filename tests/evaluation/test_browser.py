"""python -m pytest tests/evaluation/test_browser.py

report.html in a browser: what its search, its filter and its orders show, and how fast. Skipped
where no Chromium is installed.
"""

import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nanoalign.evaluation.comparison import Compared, Judged, comparison_metrics
from nanoalign.evaluation.page import comparison_page
from nanoalign.evaluation.ranking import TrueRule
from nanoalign.evaluation.render import source_of

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"
)

# Uses the page as a reader would, and writes what is shown and the time that each change took.
DRIVER = """
const seen = {opened: performance.now(), steps: []};
function look(what) {
  const start = performance.now();
  what();
  document.body.getBoundingClientRect();  // the layout belongs to the time
  seen.steps.push({
    ms: performance.now() - start,
    count: document.getElementById('shown').textContent,
    places: [...document.querySelectorAll('.case')]
      .filter(c => !c.hidden).map(c => +c.dataset.place),
  });
}
function set(id, value) {
  const element = document.getElementById(id);
  element.value = value;
  element.dispatchEvent(new Event('input', {bubbles: true}));
}
const kind = value => document.querySelector(`[name=kind][value=${value}]`).click();
look(() => {});
STEPS
document.body.innerHTML = '';
const result = document.createElement('pre');
result.id = 'seen';
result.textContent = JSON.stringify(seen);
document.body.append(result);
"""


def case(
    n: int, policy: float, baseline: float, answer: str = "an answer", read: float = 1.0
) -> Compared:
    both = Judged(answer, policy, 3, True, read), Judged("another", baseline, 4, True, 1.0)
    return Compared(f"p:{n}", f"Question {n}?", *((x,) for x in both))


def drive(
    folder: Path, compared: list[Compared], steps: list[str], allowed: bool = True
) -> dict | None:
    """What the driver saw. allowed: whether the policy of the page names it, too."""
    (folder / "p.png").write_bytes(b"\x89PNG")
    figures = comparison_metrics(compared, 320)
    truth = TrueRule(lambda prompt: False, {})
    page = comparison_page("A report", compared, figures, ["a note"], folder / "p.png", truth)
    looks = "\n".join(f"look(() => {step});" for step in steps)
    driver = DRIVER.replace("STEPS", looks)
    page = page.replace("</body>", f"<script>{driver}</script></body>")
    if allowed:
        page = page.replace("script-src ", f"script-src {source_of(driver)} ")
    (folder / "report.html").write_text(page, encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        (folder / "report.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    if not allowed and not found:
        assert "5 of 5 shown" in done.stdout  # by the page's own script
        return None
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_search_filter_and_order(tmp_path):
    """Differences +2, 0, -3, -1 and +0.5; the first and the fourth answer have "tea".

    The fourth was cut."""
    compared = [
        case(0, 2.0, 0.0, "Green TEA."),
        case(1, 1.0, 1.0),
        case(2, 0.0, 3.0),
        case(3, 0.0, 1.0, "tea & <script>", read=0.5),
        case(4, 0.5, 0.0),
    ]
    steps = {
        "set('sort', 'best')": [0, 4, 1, 3, 2],
        "set('sort', 'closest')": [1, 4, 3, 0, 2],
        "set('sort', 'data')": [0, 1, 2, 3, 4],
        "kind('win')": [0, 4],
        "kind('loss')": [2, 3],
        "kind('tie')": [1],
        "kind('cut')": [3],
        "kind('all')": [0, 1, 2, 3, 4],
        "set('search', 'Tea')": [0, 3],
        "set('sort', 'worst')": [3, 0],
        "kind('win') ": [0],
        "set('search', '<SCRIPT>')": [],
        "kind('all') ": [3],
        "set('search', 'question 4')": [4],
    }
    seen = drive(tmp_path, compared, list(steps))["steps"]
    assert seen[0]["places"] == [2, 3, 1, 4, 0]  # as it opens: the worst for the policy first
    for step, expected, found in zip(steps, steps.values(), seen[1:], strict=True):
        assert found["places"] == expected, step
        assert found["count"] == f"{len(expected)} of 5 shown", step


def test_no_other_script_runs_in_the_page(tmp_path):
    """Also if one came past the escaping."""
    compared = [case(n, 0.0, 1.0) for n in range(5)]
    assert drive(tmp_path, compared, ["kind('all')"], allowed=False) is None


def test_two_thousand_cases_open_within_two_seconds_and_change_within_one(tmp_path):
    """Answers of 100 to 2,000 letters."""
    draw = random.Random(0)
    compared = []
    for n in range(2000):
        words = [f"word{draw.randrange(500)}" for _ in range(draw.randint(15, 300))]
        compared.append(case(n, draw.gauss(0, 1), draw.gauss(0, 1), " ".join(words)))
    words = "set('search', 'word77 word1')"
    steps = ["set('sort', 'best')", words, "set('search', '')", "kind('loss')"]
    seen = drive(tmp_path, compared, steps)
    assert seen["opened"] < 2000
    assert max(step["ms"] for step in seen["steps"]) < 1000, [step["ms"] for step in seen["steps"]]
    found = [len(step["places"]) for step in seen["steps"]]
    assert 0 < found[2] < len(compared) == found[3] and 0 < found[4] < len(compared)
