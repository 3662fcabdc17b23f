"""python -m pytest tests/family/test_loss_family.py

Every loss of the family: by hand, against its equation in plain Python, its signs, its limits.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from nanoalign.family import losses
from nanoalign.family.losses import (
    DEFAULTS,
    FIELDS,
    INCOMPATIBLE,
    KIND,
    LOSSES,
    has_reference,
    match_by_rank,
)
from nanoalign.family.objectives import ADD_ONS
from nanoalign.family.pairs import Pairs


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ls(x: float) -> float:
    """log sigmoid(x), of an x that is not too far below 0."""
    return -math.log1p(math.exp(-x))


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(mean_logp: float) -> float:
    return math.log(math.exp(mean_logp) / (1 - math.exp(mean_logp)))


def relative_entropy(p: float, q: float) -> float:
    """KL((p, 1 - p) || (q, 1 - q))."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


log = math.log
LN3 = log(3)  # sigmoid(ln 3) = 3/4, sigmoid(2 ln 3) = 9/10


class Expected(NamedTuple):
    """What is known of a loss without its code."""

    # The loss of one pair p, with hyperparameters in the order of the function.
    equation: Callable[..., float]
    paper: tuple[float, ...]  # its default hyperparameters, or those of the authors' library
    by_hand: list[tuple[tuple, list[float]]]  # (arguments, losses); the comments derive them


# A new loss needs one entry. p.w and p.l are log-ratios, p.h their difference, p.nw and p.nl
# lengths, p.logp_w and p.logp_l log-probabilities. By hand pairs have w = 2, l = -1, so h = 3,
# unless the comment says otherwise.
EXPECTED = {
    # beta h = ln 3: -log(3/4); with e = 1/4: 3/4 ln(4/3) + 1/4 ln 4
    "dpo": Expected(
        lambda p, beta, e: -(1 - e) * ls(beta * p.h) - e * ls(-beta * p.h),
        (0.1, 0.0),
        [
            ((t(2), t(-1), LN3 / 3), [log(4 / 3)]),
            ((t(2), t(-1), LN3 / 3, 0.25), [0.75 * log(4 / 3) + log(4) / 4]),
        ],
    ),
    # beta h = ln 3: -log(3/4)
    "sigmoid": Expected(
        lambda p, beta: -ls(beta * p.h), (0.1,), [((t(2), t(-1), LN3 / 3), [log(4 / 3)])]
    ),
    # beta h = ln 3, e = 1/4: 3/4 ln(4/3) + 1/4 ln 4
    "cdpo": Expected(
        lambda p, beta, e: -(1 - e) * ls(beta * p.h) - e * ls(-beta * p.h),
        (0.1, 0.1),
        [((t(2), t(-1), LN3 / 3, 0.25), [0.75 * log(4 / 3) + log(4) / 4])],
    ),
    # beta h = ln 3, e = 1/4: (3/4 ln(4/3) - 1/4 ln 4) / (1/2)
    "robust": Expected(
        lambda p, beta, e: (-(1 - e) * ls(beta * p.h) + e * ls(-beta * p.h)) / (1 - 2 * e),
        (0.1, 0.1),
        [((t(2), t(-1), LN3 / 3, 0.25), [1.5 * log(4 / 3) - log(4) / 2])],
    ),
    # beta 0.1: 1 - 0.3; beta 0.5: 1 - 1.5 < 0, so 0
    "hinge": Expected(
        lambda p, beta: max(0, 1 - beta * p.h),
        (0.1,),
        [((t(2), t(-1), 0.1), [0.7]), ((t(2), t(-1), 0.5), [0.0])],
    ),
    # beta 0.1: the target is 5 nats; (3 - 5)^2
    "ipo_sum": Expected(
        lambda p, tau: (p.h - 1 / (2 * tau)) ** 2, (0.1,), [((t(2), t(-1), 0.1), [4.0])]
    ),
    # beta h = ln 3, s = 3/4; e = 1/2: 3/4 ln(3/2) + 1/4 ln(1/2); with e = 1/4 (s, 1 - s) is the
    # distribution of the labels: 0
    "exo_pair": Expected(
        lambda p, beta, e: relative_entropy(s(beta * p.h), 1 - e),
        (0.1, 1e-3),
        [
            ((t(2), t(-1), LN3 / 3, 0.5), [0.75 * log(3 / 2) + log(1 / 2) / 4]),
            ((t(2), t(-1), LN3 / 3, 0.25), [0.0]),
        ],
    ),
    # h = 0: m = 1/2, (ln 2 + 1) / 2; beta h = ln 3, tau = 1: m = 3/4, ln(4/3) / 4 + 3/4 * 1/3
    "discopop": Expected(
        lambda p, beta, tau: (
            (1 - s(beta * p.h / tau)) * -ls(beta * p.h)
            + s(beta * p.h / tau) * math.exp(-beta * p.h)
        ),
        (0.1, 0.05),
        [
            ((t(1), t(1)), [(log(2) + 1) / 2]),
            ((t(2), t(-1), LN3 / 3, 1.0), [log(4 / 3) / 4 + 1 / 4]),
        ],
    ),
    # means 2/4 and -1/2, margin 1; beta 0.25: the target is 2 nats a token; (1 - 2)^2
    "ipo": Expected(
        lambda p, tau: (p.w / p.nw - p.l / p.nl - 1 / (2 * tau)) ** 2,
        (0.1,),
        [((t(2), t(-1), t(4), t(2), 0.25), [1.0])],
    ),
    # means 2/4 and -1/2, margin 1; beta ln 3: ln(4/3)
    "sigmoid_norm": Expected(
        lambda p, beta: -ls(beta * (p.w / p.nw - p.l / p.nl)),
        (5.0,),
        [((t(2), t(-1), t(4), t(2), LN3), [log(4 / 3)])],
    ),
    # beta w = ln 3, beta l = -ln 3: 1 - 3/4 + 1/4
    "apo_zero": Expected(
        lambda p, beta: (1 - s(beta * p.w)) + s(beta * p.l), (0.1,), [((t(1), t(-1), LN3), [0.5])]
    ),
    # beta w = -ln 3, beta l = -2 ln 3, beta h = ln 3: 1/4 + 1 - 3/4
    "apo_down": Expected(
        lambda p, beta: s(beta * p.w) + (1 - s(beta * p.w - beta * p.l)),
        (0.1,),
        [((t(-1), t(-2), LN3), [0.5])],
    ),
    # beta 1/4: targets +2 and -2; (2 - 2)^2 + (-1 + 2)^2
    "sppo_hard": Expected(
        lambda p, beta: (p.w - (1 - 0.5) / beta) ** 2 + (p.l - (0 - 0.5) / beta) ** 2,
        (1e-3,),
        [((t(2), t(-1), 0.25), [1.0])],
    ),
    # beta w = ln 3, beta l = -ln 3: ln(4/3) + 1/2 ln 4 + 1/2 ln(4/3)
    "nca_pair": Expected(
        lambda p, beta: -ls(beta * p.w) - (ls(-beta * p.w) + ls(-beta * p.l)) / 2,
        (0.1,),
        [((t(1), t(-1), LN3), [1.5 * log(4 / 3) + log(4) / 2])],
    ),
    # beta ln 3, D = ln 3: beta w - D = ln 3 and beta l - D = -2 ln 3: ln(4/3) + ln(10/9)
    "bco_pair": Expected(
        lambda p, beta: -ls(beta * p.w - p.shift) - ls(-(beta * p.l - p.shift)),
        (0.1,),
        [((t(2), t(-1), LN3, LN3), [log(4 / 3) + log(10 / 9)])],
    ),
    # lambda 2. w 2, h 3: no penalty. w -1, h 5: 5 - 2 * 1 = 3 too. ln(4/3) twice
    "dpop": Expected(
        lambda p, beta, penalty: -ls(beta * (p.h - penalty * max(0, -p.w))),
        (0.3, 50.0),
        [((t(2, -1), t(-1, -6), LN3 / 3, 2.0), [log(4 / 3)] * 2)],
    ),
    # D - v or U - v, v(x, y) = D sigmoid(beta (r - z)) or U sigmoid(beta (z - r)); r = p.w
    # beta ln 3, z = 1: w - z = 1: 2 (1 - 3/4); z - l = 2: 1 - 9/10, times 3
    "kto": Expected(
        lambda p, beta, D, U: (
            D - D * s(beta * (p.ratio - p.kl)) if p.good else U - U * s(beta * (p.kl - p.ratio))
        ),
        (0.1, 1.0, 1.0),
        [((t(2, -1), torch.tensor([True, False]), 1.0, LN3, 2.0, 3.0), [0.5, 0.3])],
    ),
    # means -4/4 and -6/2: margin 2; ratio 1, beta ln 3: ln 3 * (2 - 1): ln(4/3)
    "simpo": Expected(
        lambda p, beta, ratio: -ls(beta / p.nw * p.logp_w - beta / p.nl * p.logp_l - ratio * beta),
        (2.0, 0.5),
        [((t(-4), t(-6), t(4), t(2), LN3, 1.0), [log(4 / 3)])],
    ),
    # mean probabilities 3/4 and 1/2: odds 3 and 1, odds ratio 3: -ln(3/4) + 0.5 ln(4/3)
    "orpo": Expected(
        lambda p, weight: (
            -p.logp_w / p.nw - weight * ls(log_odds(p.logp_w / p.nw) - log_odds(p.logp_l / p.nl))
        ),
        (0.1,),
        [((t(2 * log(3 / 4)), t(3 * log(1 / 2)), t(2), t(3), 0.5), [1.5 * log(4 / 3)])],
    ),
    # log pi -4 and -7: ln(4/3) + 0.5 * 4/8
    "cpo": Expected(
        lambda p, beta, alpha: -ls(beta * p.logp_w - beta * p.logp_l) - alpha * p.logp_w / p.nw,
        (0.1, 1.0),
        [((t(-4), t(-7), t(8), LN3 / 3, 0.5), [log(4 / 3) + 1 / 4])],
    ),
    # -4 nats over 8 tokens
    "sft": Expected(lambda p: -p.logp_w / p.nw, (), [((t(-4), t(8)), [0.5])]),
    # gaps 3, 1, 2 beside 30, 10, 20; beta ln 3 / 9: ln(1 + 27), ln(1 + 3), ln(1 + 9)
    "aot": Expected(
        lambda p, beta: -ls(beta * (p.logp_w - p.logp_l - p.gap)),
        (0.1,),
        [((t(3, 1, 2), t(0, 0, 0), t(30, 10, 20), LN3 / 9), [log(28), log(4), log(10)])],
    ),
}


# --- the entries


@pytest.mark.parametrize("name", LOSSES)
def test_an_entry_lists_the_arguments_of_its_function(name):
    """In order: first fields of Pairs (kto: of responses), then hyperparameters with defaults."""
    parameters = inspect.signature(LOSSES[name]).parameters
    assert list(parameters) == [*FIELDS[name], *DEFAULTS[name]]
    assert {p: parameters[p].default for p in DEFAULTS[name]} == DEFAULTS[name]
    if name != "kto":
        assert {*FIELDS[name]} <= {field.name for field in dataclasses.fields(Pairs)}
    assert {*INCOMPATIBLE[KIND[name]]} <= {*ADD_ONS}
    assert has_reference(name) == (name not in ("simpo", "orpo", "cpo", "sft"))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_its_value_by_hand_with_the_defaults_of_its_paper(name):
    assert name in EXPECTED, f"EXPECTED of {__file__} has no entry for --loss {name}"
    for arguments, values in EXPECTED[name].by_hand:
        assert LOSSES[name](*arguments).tolist() == pytest.approx(values, rel=1e-12, abs=1e-15)
    assert tuple(DEFAULTS[name].values()) == EXPECTED[name].paper


# --- against the equations, written out for one pair

# Names of the equations -> fields.
SHORT = {
    "w": "chosen_logratios",
    "l": "rejected_logratios",
    "nw": "chosen_lengths",
    "nl": "rejected_lengths",
    "logp_w": "chosen_logps",
    "logp_l": "rejected_logps",
    "shift": "shift",
    "gap": "matched_gaps",
    "ratio": "logratios",
    "good": "desirable",
    "kl": "kl",
}


def random_inputs(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> torch.Tensor:
        return torch.randn(count, generator=draw, dtype=torch.float64) * scale

    lengths = [torch.randint(1, 60, (count,), generator=draw).double() for _ in range(2)]
    return {
        "chosen_logratios": normal(4),
        "rejected_logratios": normal(4),
        "chosen_logps": -normal(1).exp() * lengths[0],
        "rejected_logps": -normal(1).exp() * lengths[1],
        "chosen_lengths": lengths[0],
        "rejected_lengths": lengths[1],
        "matched_gaps": normal(10),
        "shift": normal(1),
        "logratios": normal(4),
        "desirable": torch.arange(count) % 3 == 0,
        "kl": normal(1).abs(),
    }


def one_pair(inputs: dict[str, torch.Tensor], i: int) -> SimpleNamespace:
    """The numbers of one pair as floats, by the names of the equations."""
    pair = SimpleNamespace(**{short: inputs[name][i].item() for short, name in SHORT.items()})
    pair.h = pair.w - pair.l
    return pair


def call(name: str, inputs: dict[str, torch.Tensor], **hyperparameters: float) -> torch.Tensor:
    return LOSSES[name](*(inputs[field] for field in FIELDS[name]), **hyperparameters)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_its_equation(name):
    """200 random pairs; hyperparameters other than the defaults, of which few are float32 values:
    what is float64 is computed in float64."""
    inputs = random_inputs(200)
    values = {
        "beta": 0.3,
        "label_smoothing": 0.2,
        "tau": 0.7,
        "gamma_beta_ratio": 0.4,
        "odds_weight": 0.25,
        "cpo_alpha": 0.6,
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
    }
    values = {key: values.get(key, value / 2) for key, value in DEFAULTS[name].items()}
    result = call(name, inputs, **values)
    equation = EXPECTED[name].equation
    expected = [equation(one_pair(inputs, i), *values.values()) for i in range(200)]
    assert result.shape == (200,)
    assert result.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_gaps_are_matched_by_their_rank():
    assert match_by_rank(t(3, 1, 2), t(10, 30, 20)).tolist() == [30, 10, 20]


# --- which way it moves

PAIRWISE = [name for name in LOSSES if name != "kto"]
# Where policy and reference nearly agree: 0 where the loss does not see the response.
SIGNS = dict.fromkeys(PAIRWISE, (-1, 1)) | {"sft": (-1, 0), "apo_down": (1, 1)}


@pytest.mark.parametrize("name", PAIRWISE)
def test_moves_chosen_up_and_rejected_down(name):
    """Signs of the gradient; apo_down lowers both responses, the rejected more."""
    inputs = random_inputs(20) | {"shift": torch.zeros(20, dtype=torch.float64)}
    inputs["chosen_logratios"] = torch.linspace(-0.2, 0.2, 20, dtype=torch.float64)
    inputs["rejected_logratios"] = inputs["chosen_logratios"] - 1.0
    grads = {}
    for key in FIELDS[name]:
        inputs[key] = inputs[key].clone().requires_grad_()
    call(name, inputs).sum().backward()
    for side, sign in zip(("chosen", "rejected"), SIGNS[name], strict=True):
        for kind in ("logratios", "logps"):
            value = inputs[f"{side}_{kind}"]
            if f"{side}_{kind}" in FIELDS[name]:
                grads[side] = value.grad
                assert (value.grad.sign() == sign).all(), side
    assert set(grads) == {"chosen", "rejected"} if SIGNS[name][1] else {"chosen"}
    if name == "apo_down":
        assert (grads["rejected"] > grads["chosen"]).all()


def test_kto_raises_what_is_desirable_and_lowers_the_other():
    ratios = t(1, 1, -1, -1).requires_grad_()
    losses.kto(ratios, torch.tensor([True, False, True, False]), 0.5).sum().backward()
    assert ratios.grad.sign().tolist() == [-1, 1, -1, 1]


def test_discopop_starts_the_wrong_way_with_its_papers_tau():
    """Slope at h = 0 over beta: (1 - ln 2) / (4 tau) - 3/4, so 0.784 at tau 0.05, and 0 at tau
    0.102284."""
    for tau, slope in ((0.05, 0.784264), (0.102284, 0.0), (1.0, -0.673287)):
        w = t(0).requires_grad_()
        losses.discopop(w, t(0), 0.5, tau).backward()
        assert w.grad.item() == pytest.approx(0.5 * slope, abs=5e-6)


# --- at the limits

EXTREMES = (-1e4, -50.0, -1e-3, -1e-8, 0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_finite_at_extreme_log_probabilities_and_margins(name):
    """Log-ratios to +-1e4, log-probabilities from -1e4 to 0, of one token and of 50."""
    ratios = torch.tensor([x * sign for x in EXTREMES for sign in (1, -1)])
    first, second = (x.flatten() for x in torch.meshgrid(ratios, ratios, indexing="ij"))
    for length in (1, 50):
        lengths = torch.full_like(first, length)
        inputs = {
            "chosen_logratios": first,
            "rejected_logratios": second,
            "chosen_logps": -first.abs(),
            "rejected_logps": -second.abs(),
            "chosen_lengths": lengths,
            "rejected_lengths": lengths,
            "matched_gaps": second,
            "shift": torch.zeros(()),
            "logratios": first,
            "desirable": second > 0,
            "kl": torch.zeros(()),
        }
        leaves = [inputs[key].clone() for key in FIELDS[name]]
        leaves = [x.requires_grad_(x.is_floating_point()) for x in leaves]
        values = LOSSES[name](*leaves)
        values.sum().backward()
        assert values.isfinite().all()
        assert all(leaf.grad.isfinite().all() for leaf in leaves if leaf.grad is not None)


# --- derivatives

CONSTANT = ("chosen_lengths", "rejected_lengths", "shift", "matched_gaps", "desirable", "kl")


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_derivatives(name):
    inputs = random_inputs(6, seed=1)
    leaves = [inputs[key].requires_grad_(key not in CONSTANT) for key in FIELDS[name]]
    assert torch.autograd.gradcheck(LOSSES[name], leaves)
