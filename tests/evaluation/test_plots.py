"""python -m pytest tests/evaluation/test_plots.py

Nothing that is written in a picture is cut, or lies over something else.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import losses
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text

from nanoalign.evaluation import plots
from nanoalign.evaluation.ranking import Scored, reward_metrics
from nanoalign.runs import result


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Calls a function with a path, and returns the figure that it saves."""

    def draw(function, *args) -> Figure:
        saved = []

        def save(figure: Figure, path: Path, **options: object) -> None:
            path.touch()
            saved.append(figure)

        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", save)
            patch.setattr(plt, "close", lambda figure: None)
            function(tmp_path / "p.png", *args)
        (figure,) = saved
        figure.canvas.draw()
        return figure

    yield draw
    plt.close("all")


def faults(figure: Figure) -> list[str]:
    """What is written outside of the figure, or over another text; legends over a panel."""
    shown = [axis for axis in figure.axes if axis.get_visible()]
    for axis in shown:  # ticks that are outside of the limits are not drawn
        for line, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            for tick in line.get_major_ticks():
                if not min(limits) - 1e-9 <= tick.get_loc() <= max(limits) + 1e-9:
                    tick.set_visible(False)
    hidden = {t for axis in figure.axes if axis not in shown for t in axis.findobj(Text)}
    hidden |= {
        t
        for a in shown
        for line in (a.xaxis, a.yaxis)
        for tick in line.get_major_ticks()
        if not tick.get_visible()
        for t in tick.findobj(Text)
    }
    texts = [
        t for t in figure.findobj(Text) if t.get_visible() and t.get_text() and t not in hidden
    ]
    boxes = {text: text.get_window_extent() for text in texts}
    canvas, found = figure.bbox.padded(2), []
    for text, box in boxes.items():
        if not (canvas.contains(*box.min) and canvas.contains(*box.max)):
            found.append(f"cut: {text.get_text()}")
    for (a, x), (b, y) in itertools.combinations(boxes.items(), 2):
        if x.padded(-1).overlaps(y.padded(-1)) and a.get_text() != b.get_text():
            found.append(f"over each other: {a.get_text()} and {b.get_text()}")
    legends = [axis.get_legend() for axis in shown if axis.get_legend()] + figure.legends
    for legend, axis in itertools.product(legends, shown):
        if legend.get_window_extent().padded(-1).overlaps(axis.bbox):
            found.append(f"a legend over {axis.get_title()}")
    return found


def test_faults_are_found():
    figure, axis = plt.subplots()
    axis.plot([0, 1], label="a line")
    axis.legend()
    axis.text(0.5, 0.5, "one text")
    axis.text(0.5, 0.5, "another text")
    figure.text(0.9, 0.5, "a text that does not fit there")
    figure.canvas.draw()
    assert faults(figure) == [
        "cut: a text that does not fit there",
        "over each other: one text and another text",
        "a legend over ",
    ]
    plt.close("all")


def curve(scale: float = 1.0, metric_names=(), start: float = 0.0) -> list[dict]:
    lines = []
    for step in range(31):
        values = {name: start + scale * (n + step) for n, name in enumerate(metric_names)}
        lines.append({"step": step, "lr": 1e-6 * (31 - step), "grad_norm": scale} | values)
        if step % 3 == 0:
            lines.append({"step": step} | {f"eval/{name}": v for name, v in values.items()})
    return lines


BOTH = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
POLICY = (*BOTH, "rewards/accuracies", "logps/chosen", "logps/rejected")
REWARD = (*BOTH, "accuracy", "reward_mean", "reward_std")


@pytest.mark.parametrize(
    "lines",
    [curve(1e4, POLICY, -1e6), curve(1e-7, REWARD), curve(0, REWARD, 0.5), [{"step": 0}]],
    ids=["large", "tiny", "flat", "nothing"],
)
def test_curves(drawn, lines):
    figure = drawn(lambda path: result.draw(lines, "a long title " * 30, path))
    assert faults(figure) == []


def test_log_probabilities_are_drawn_as_changes(drawn):
    """A gap of 1,000 nats between chosen and rejected responses would make lines of both flat."""
    lines = [
        {"step": 0, "eval/logps/chosen": -100.0, "eval/logps/rejected": -1100.0},
        {"step": 1, "logps/chosen": -103.0, "logps/rejected": -1110.0},
        {"step": 1, "eval/logps/chosen": -101.0, "eval/logps/rejected": -1104.0},
    ]
    (axis,) = [a for a in drawn(lambda path: result.draw(lines, "", path)).axes if a.lines]
    points = [list(map(float, line.get_ydata())) for line in axis.lines]
    assert [own for own in points if own] == [[0.0, -1.0], [-3.0], [0.0, -4.0], [-10.0]]


def scored(pairs: int, scale: float, cut: bool) -> list[Scored]:
    draw = np.random.default_rng(0)
    sides = [(n, side) for n in range(pairs) for side in ("chosen", "rejected")]
    scores = [scale * draw.normal(side == "chosen") for _, side in sides]
    return [
        Scored(f"p:{n}", "a", f"prompt {n}", "text", side, score, 5 + n, cut)
        for (n, side), score in zip(sides, scores, strict=True)
    ]


@pytest.mark.parametrize(
    ("pairs", "scale", "cut"), [(600, 1.0, False), (1, 1.0, True), (60, 1e4, True)]
)
def test_rewards(drawn, pairs, scale, cut):
    lines = scored(pairs, scale, cut)
    figure = drawn(plots.reward_picture, "a subset", lines, reward_metrics(lines))
    assert faults(figure) == []


def test_label_errors_are_marked(drawn):
    """The true rewards of 40 pairs of 60 are those of their labels, of 20 the other way round."""
    lines = [
        replace(line, true_reward=float((line.side == "chosen") == (n // 2 % 3 > 0)))
        for n, line in enumerate(scored(60, 1.0, False))
    ]
    figure = drawn(plots.reward_picture, "a subset", lines, reward_metrics(lines))
    assert faults(figure) == []
    assert "20 labels are errors by the ground truth" in figure.get_suptitle()
    points = {c.get_label(): c.get_offsets() for c in figure.axes[0].collections}
    marked = {round(score, 9) for _, score in points["label error, by the ground truth"]}
    assert marked == {round(x.score, 9) for x in lines if x.side == "rejected" and x.true_reward}


@pytest.mark.parametrize("policies", [1, 12])
def test_the_frontier(drawn, policies):
    kinds = ("mean", "true_mean", "tokens_mean")
    keys = [f"{role}_{kind}" for role in ("policy", "baseline") for kind in kinds]
    results = {}
    for n in range(policies):
        rates = {
            f"{judge}win_rate{end}": 0.5 + shift
            for judge in ("", "true_")
            for end, shift in (("", 0.0), ("_low", -0.1), ("_high", 0.1))
        }
        values = {key: float(n + len(key)) for key in keys} | rates
        results[f"runs/policy_with_a_name_{n}_eval"] = values | {"kl_per_answer": 1.7**n}
    figure = drawn(plots.frontier_picture, results)
    assert faults(figure) == []
    gain, wins, length = figure.axes
    names = [text.get_text() for text in length.get_legend().get_texts()]
    assert names == [f"policy_with_a_name_{n}" for n in range(policies)] + ["baseline"]
    assert [line.get_linestyle() for line in gain.lines] == ["None", "None"]  # nothing in between


def test_the_losses(drawn):
    assert faults(drawn(losses.draw)) == []
