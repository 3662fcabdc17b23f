"""python -m pytest tests/lab/test_walk.py"""

import contextlib
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from nanoalign.errors import RunError
from nanoalign.lab import __main__
from nanoalign.lab.__main__ import PLACES

ROOT = Path(__file__).parents[2]
PLACE = re.compile(r"^(\d+)\. .*\((?:\w+\.)?(\w+), (\S+):(\d+)\)$", re.MULTILINE)


@pytest.fixture(scope="module")
def printed() -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        __main__.main(["walk"])
    return text.getvalue()


def numbers(pattern: str, text: str) -> list[list[float]]:
    return [[float(each) for each in found] for found in re.findall(pattern, text)]


def test_each_place_names_the_line_of_its_function(printed):
    places = PLACE.findall(printed)
    assert [int(number) for number, *_ in places] == list(range(1, PLACES + 1))
    functions = {function for _, function, *_ in places}
    assert {"parse", "render", "encode_all", "collate", "tokens", "dpo_loss"} <= functions
    roots = (ROOT, Path(torch.__file__).parents[1])
    for _, function, file, line in places:
        path = next(root / file for root in roots if (root / file).exists())
        lines = path.read_text().splitlines()[int(line) - 1 : int(line) + 3]  # below decorators
        assert any(f"def {function}(" in each for each in lines)


def test_figures_are_those_of_hand(printed):
    """Of a policy that is its reference, and after a step: sums of tokens, loss and gradient."""
    first, second = printed.split("One step of AdamW")
    assert "norm      1.5536 before" in first
    # AdamW's first step moves each parameter by about the learning rate
    assert numbers(r"by ([\d.]+) on average, by ([\d.]+) at most", second) == [[0.00042, 0.0005]]
    for text in (first, second):
        ((pi_w, ref_w, w), (pi_l, ref_l, l_ratio)) = numbers(
            r"log-ratio of \w+ +(-[\d.]+) - (-[\d.]+) = ([-+][\d.]+)", text
        )
        assert w == pytest.approx(pi_w - ref_w, abs=2e-4)
        margin = 0.1 * (w - l_ratio)
        ((loss, by_hand),) = numbers(r"loss +\(1,\) float32 (\d\.\d+);.* by hand: (\d\.\d+)", text)
        assert loss == by_hand == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-4)
        of = r"{} +chosen ([-+][\d.]+)  rejected ([-+][\d.]+)"
        ((chosen, rejected),) = numbers(of.format("autograd"), text)
        assert numbers(of.format("by hand"), text) == [[chosen, rejected]]
        assert -chosen == rejected == pytest.approx(0.1 / (1 + math.exp(margin)), abs=2e-5)
        tokens = numbers(r"(?m)^chosen +'.*' +(-[\d.]+) +(-[\d.]+) +[\d.]+$", text)
        last = [sum(column) for column in zip(*tokens, strict=True)]
        assert last[1] == pytest.approx(pi_w if text is second else ref_w, abs=2e-3)
    losses = re.findall(r"loss +\(1,\) float32 (\d\.\d+)", printed)
    assert losses[0] == "0.6931" and float(losses[1]) < 0.65


def test_stop_opens_the_debugger_before_one_place(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: seen.append(capsys.readouterr().out))
    __main__.main(["walk", "--stop", "4", "--record", "2"])
    assert len(seen) == 1 and seen[0].strip().splitlines()[-1].startswith("4. A line per response")


def test_a_place_or_a_beta_that_is_far_off(capsys):
    with pytest.raises(RunError, match="--stop: expected a whole number of at least 1 and below"):
        __main__.main(["walk", "--stop", str(PLACES + 1)])
    __main__.main(["walk", "--beta", "1000"])  # exp(1000) would overflow
    (found,) = re.findall(
        r"again.*h = 1000 \* difference += ([-+\d.]+)", capsys.readouterr().out, re.S
    )
    assert float(found) > 1000


def test_a_record_that_is_not_there_is_an_error():
    with pytest.raises(RunError, match="--record 99999: the embedded data have 3,000 records"):
        __main__.main(["walk", "--record", "99999"])
