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
from nanoalign.lab.execute import main

ROOT = Path(__file__).parents[2]
PLACE = re.compile(r"^(\d+)\. .*\((?:\w+\.)?(\w+), (\S+):(\d+)\)$", re.MULTILINE)


def walked(*flags: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main(["walk", *flags])
    return text.getvalue()


@pytest.fixture(scope="module")
def printed() -> str:
    return walked()


@pytest.fixture(scope="module")
def of_rewards() -> str:
    return walked("--rm", "--record", "1")


def numbers(pattern: str, text: str) -> list[list[float]]:
    return [[float(each) for each in found] for found in re.findall(pattern, text)]


def test_each_place_names_the_line_of_its_function(printed, of_rewards):
    places, others = PLACE.findall(printed), PLACE.findall(of_rewards)
    assert [int(number) for number, *_ in places] == list(range(1, 14))
    assert [int(number) for number, *_ in others] == list(range(1, 13))
    functions = {function for _, function, *_ in places}
    assert {"parse", "render", "encode_all", "collate", "tokens", "dpo_loss"} <= functions
    assert "pairwise_reward_loss" in {function for _, function, *_ in others}
    roots = (ROOT, Path(torch.__file__).parents[1])
    for _, function, file, line in places + others:
        path = next(root / file for root in roots if (root / file).exists())
        lines = path.read_text().splitlines()[int(line) - 1 : int(line) + 3]  # below decorators
        assert any(f"def {function}(" in each for each in lines)


def test_figures_are_those_of_hand(printed):
    """Of a policy that is its reference, and after a step: sums of tokens, loss and gradient."""
    first, second = printed.split("One step of AdamW")
    assert "norm      1.9031 before" in first
    # AdamW's first step moves each parameter by about the learning rate
    assert numbers(r"by ([\d.]+) on average, by ([\d.]+) at most", second) == [[0.00041, 0.0005]]
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
        tokens = numbers(r"(?m)^chosen +'.*' +(-[\d.]+) +(-[\d.]+) +.*$", text)
        last = [sum(column) for column in zip(*tokens, strict=True)]
        assert last[1] == pytest.approx(pi_w if text is second else ref_w, abs=2e-3)
    losses = re.findall(r"loss +\(1,\) float32 (\d\.\d+)", printed)
    assert losses[0] == "0.6931" and float(losses[1]) < 0.65


def test_the_default_pair_is_labelled_by_the_rule_and_record_1_against_it(printed, of_rewards):
    """Record 3: the sum 7, against rudeness and a wrong sum. Record 1: both right, one polite."""
    for text, rewards in ((printed, ["3", "-4"]), (of_rewards, ["3", "4"])):
        assert re.findall(r"(?m)^(?:chosen|rejected) +'.*', true reward (\S+)$", text) == rewards
    assert "is right by the rule; it was drawn with the probability sigmoid(7) = 0.999" in printed
    assert (
        "contradicts the rule; it was drawn with the probability sigmoid(-1) = 0.269" in of_rewards
    )


def test_the_packed_row_shows_positions_and_who_sees_whom(printed):
    """The prompt once; each response begins again behind it, and does not see the other one."""
    parts = re.findall(r"places +(\d+) to +(\d+), positions +(\d+) to +(\d+)", printed)
    prompt, chosen, rejected = [list(map(int, part)) for part in parts]
    assert prompt[2:] == prompt[:2] and chosen[2:] == chosen[:2]
    assert rejected[2] == chosen[2] == prompt[1] + 1 and rejected[0] == chosen[1] + 1
    lines = re.findall(r"(?m)^place +(\d+), position.*?((?: {3}[x.]){8})$", printed)
    places = [int(place) for place, _ in lines]
    for q, line in lines:
        for k, mark in zip(places, line.split(), strict=True):
            apart = int(q) >= rejected[0] and chosen[0] <= k <= chosen[1]
            assert (mark == "x") == (k <= int(q) and not apart)
    same = numbers(r"Policy.textbook\): (-[\d.]+) (-[\d.]+)", printed)
    assert same == numbers(r"policy    \(2,\) float32 (-[\d.]+) (-[\d.]+)", printed)


def test_the_delta_of_each_token_adds_up_to_that_of_its_response(printed):
    rows = numbers(r"(?m)^\w+ +'.*' +(-[\d.]+) +(-[\d.]+) +(-?[\d.]+) +([\d.]+)$", printed)
    assert len(rows) == 15  # a row of the first table has a number less
    for before, after, delta, p in rows:
        assert delta == pytest.approx(after - before, abs=2e-4)
        assert p == pytest.approx(math.exp(after), abs=1e-4)
    (_, _, chosen), (_, _, rejected) = numbers(
        r"log-ratio of \w+ +(-[\d.]+) - (-[\d.]+) = ([-+][\d.]+)", printed.split("13. ")[1]
    )
    total = sum(delta for *_, delta, _ in rows)
    assert total == pytest.approx(chosen + rejected, abs=2e-3) and chosen > 0 > rejected


def test_the_walk_of_a_reward_model_lowers_the_loss_of_its_pair(of_rewards):
    losses = []
    for text in of_rewards.split("One step of AdamW"):
        ((chosen, rejected, margin),) = numbers(r"= (-?[\d.]+) - (-?[\d.]+) = ([-+][\d.]+)", text)
        assert margin == pytest.approx(chosen - rejected, abs=2e-4)
        ((loss, by_hand),) = numbers(r"loss +\(1,\) float32 (\d\.\d+);.* by hand: (\d\.\d+)", text)
        assert loss == by_hand == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-4)
        of = r"{} +chosen ([-+][\d.]+)  rejected ([-+][\d.]+)"
        ((of_chosen, of_rejected),) = numbers(of.format("autograd"), text)
        assert numbers(of.format("by hand"), text) == [[of_chosen, of_rejected]]
        assert of_rejected == pytest.approx(1 / (1 + math.exp(margin)), abs=1e-4)
        losses.append(loss)
    assert losses[1] < losses[0] - 0.1
    read = numbers(r"at place (\d+), '<eos>': reward (-?[\d.]+)", of_rewards)
    textbook = numbers(r"RewardModel.textbook\): (-?[\d.]+) (-?[\d.]+)", of_rewards)
    assert [[reward for _, reward in read]] == textbook


def test_stop_opens_the_debugger_before_one_place(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: seen.append(capsys.readouterr().out))
    main(["walk", "--stop", "4", "--record", "2"])
    assert len(seen) == 1 and seen[0].strip().splitlines()[-1].startswith("4. The prompt once")


def test_a_place_or_a_beta_that_is_far_off(capsys):
    for flags, last in (([], 13), (["--rm"], 12)):
        with pytest.raises(RunError, match=f"--stop {last + 1}: this walk has the places 1 to"):
            main(["walk", *flags, "--stop", str(last + 1)])
    with pytest.raises(RunError, match="--beta: invalid positive value: '0'"):
        main(["walk", "--beta", "0"])
    main(["walk", "--beta", "1000"])  # exp(1000) would overflow
    (found,) = re.findall(
        r"again.*h = 1000 \* difference += ([-+\d.]+)", capsys.readouterr().out, re.S
    )
    assert float(found) > 1000


def test_a_record_that_is_not_there_is_an_error():
    for number in ("99999", "0"):
        with pytest.raises(RunError, match=f"--record {number}: the embedded data have 3,000 rec"):
            main(["walk", "--record", number])
