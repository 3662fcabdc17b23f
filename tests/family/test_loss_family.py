"""python -m pytest tests/family/test_loss_family.py

Every loss of the family: by hand, against its equation in plain Python, its signs, its limits.
"""

import dataclasses
import inspect
import math

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


# --- the entries


@pytest.mark.parametrize("name", LOSSES)
def test_an_entry_lists_the_arguments_of_its_function(name):
    """In order: first fields of Pairs (kto: of responses), then hyperparameters with defaults."""
    parameters = inspect.signature(LOSSES[name]).parameters
    assert list(parameters) == [*FIELDS[name], *DEFAULTS[name]]
    assert {p: parameters[p].default for p in DEFAULTS[name]} == DEFAULTS[name]
    if name != "kto":
        assert {*FIELDS[name]} <= {field.name for field in dataclasses.fields(Pairs)}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_value_by_hand_and_an_equation(name):
    """A new loss needs all three; what is missing is in the message."""
    needed = {
        f"def test_{name}_by_hand": f"test_{name}_by_hand" in globals(),
        f"EQUATIONS[{name!r}]": name in EQUATIONS or name == "kto",
        f"PAPERS[{name!r}]": name in PAPERS,
    }
    missing = [what for what, is_there in needed.items() if not is_there]
    assert not missing, f"--loss {name} has no {', no '.join(missing)}"
    assert {*INCOMPATIBLE[KIND[name]]} <= {*ADD_ONS}


# The defaults that the papers name, or the libraries of their authors.
PAPERS = {
    "sigmoid": (0.1,), "cdpo": (0.1, 0.1), "robust": (0.1, 0.1), "hinge": (0.1,),
    "ipo_sum": (0.1,), "exo_pair": (0.1, 1e-3), "discopop": (0.1, 0.05),
    "ipo": (0.1,), "sigmoid_norm": (5.0,),
    "apo_zero": (0.1,), "apo_down": (0.1,), "sppo_hard": (1e-3,), "nca_pair": (0.1,),
    "bco_pair": (0.1,), "dpop": (0.3, 50.0),
    "kto": (0.1, 1.0, 1.0),
    "simpo": (2.0, 0.5), "orpo": (0.1,), "cpo": (0.1, 1.0), "sft": (),
    "aot": (0.1,),
}  # fmt: skip


def test_losses_without_a_reference():
    assert [name for name in LOSSES if not has_reference(name)] == ["simpo", "orpo", "cpo", "sft"]


def test_defaults_are_those_of_the_papers():
    assert {name: tuple(takes.values()) for name, takes in DEFAULTS.items()} == PAPERS


# --- (a) by hand. Pairs have w = 2, l = -1, so h = 3, if not said otherwise; ln 3 = 1.098612


def test_sigmoid_by_hand():
    """beta = ln 3 / 3: beta h = ln 3, sigmoid = 3/4, loss = ln(4/3) = 0.287682."""
    assert losses.sigmoid(t(2), t(-1), math.log(3) / 3).item() == pytest.approx(0.287682, abs=5e-7)


def test_cdpo_by_hand():
    """The same with e = 1/4: 3/4 ln(4/3) + 1/4 ln 4 = 0.215762 + 0.346574 = 0.562335."""
    found = losses.cdpo(t(2), t(-1), math.log(3) / 3, 0.25).item()
    assert found == pytest.approx(0.562335, abs=5e-7)


def test_robust_by_hand():
    """The same with e = 1/4: (3/4 ln(4/3) - 1/4 ln 4) / (1/2) = (0.215762 - 0.346574) * 2 =
    -0.261624."""
    found = losses.robust(t(2), t(-1), math.log(3) / 3, 0.25).item()
    assert found == pytest.approx(-0.261624, abs=5e-7)


def test_hinge_by_hand():
    """beta 0.1: 1 - 0.3 = 0.7. beta 0.5: 1 - 1.5 < 0, so 0."""
    assert losses.hinge(t(2), t(-1), 0.1).item() == pytest.approx(0.7)
    assert losses.hinge(t(2), t(-1), 0.5).item() == 0


def test_ipo_sum_by_hand():
    """beta 0.1: the target is 5 nats; (3 - 5)^2 = 4."""
    assert losses.ipo_sum(t(2), t(-1), 0.1).item() == pytest.approx(4)


def test_ipo_by_hand():
    """Means 2/4 and -1/2, margin 1; beta 0.25: the target is 2 nats a token; (1 - 2)^2 = 1."""
    assert losses.ipo(t(2), t(-1), t(4), t(2), 0.25).item() == pytest.approx(1)


def test_sigmoid_norm_by_hand():
    """Means 2/4 and -1/2, margin 1; beta ln 3: ln(4/3) = 0.287682."""
    found = losses.sigmoid_norm(t(2), t(-1), t(4), t(2), math.log(3)).item()
    assert found == pytest.approx(0.287682, abs=5e-7)


def test_exo_pair_by_hand():
    """beta h = ln 3, p = (3/4, 1/4); e = 1/2: 3/4 ln(3/2) + 1/4 ln(1/2) = 0.304099 - 0.173287 =
    0.130812.

    With e = 1/4 p is the distribution of the labels: 0.
    """
    beta = math.log(3) / 3
    assert losses.exo_pair(t(2), t(-1), beta, 0.5).item() == pytest.approx(0.130812, abs=5e-7)
    assert losses.exo_pair(t(2), t(-1), beta, 0.25).item() == pytest.approx(0, abs=1e-15)


def test_discopop_by_hand():
    """h = 0: m = 1/2, loss (ln 2 + 1) / 2 = 0.846574.

    beta h = ln 3, tau = 1: m = 3/4, loss ln(4/3) / 4 + 3/4 * 1/3 = 0.071921 + 0.25 = 0.321921.
    """
    assert losses.discopop(t(1), t(1)).item() == pytest.approx(0.846574, abs=5e-7)
    found = losses.discopop(t(2), t(-1), math.log(3) / 3, 1.0).item()
    assert found == pytest.approx(0.321921, abs=5e-7)


def test_discopop_starts_the_wrong_way_with_its_papers_tau():
    """Slope at h = 0 over beta: (1 - ln 2) / (4 tau) - 3/4, so 0.784 at tau 0.05, and 0 at tau
    0.102284."""
    for tau, slope in ((0.05, 0.784264), (0.102284, 0.0), (1.0, -0.673287)):
        w = t(0).requires_grad_()
        losses.discopop(w, t(0), 0.5, tau).backward()
        assert w.grad.item() == pytest.approx(0.5 * slope, abs=5e-6)


def test_apo_zero_by_hand():
    """beta w = ln 3, beta l = -ln 3: 1 - 3/4 + 1/4 = 1/2."""
    assert losses.apo_zero(t(1), t(-1), math.log(3)).item() == pytest.approx(0.5)


def test_apo_down_by_hand():
    """beta w = -ln 3, beta l = -2 ln 3, beta h = ln 3: 1/4 + 1 - 3/4 = 1/2."""
    assert losses.apo_down(t(-1), t(-2), math.log(3)).item() == pytest.approx(0.5)


def test_sppo_hard_by_hand():
    """beta 1/4: targets +2 and -2; (2 - 2)^2 + (-1 + 2)^2 = 1."""
    assert losses.sppo_hard(t(2), t(-1), 0.25).item() == pytest.approx(1)


def test_nca_pair_by_hand():
    """beta w = ln 3, beta l = -ln 3: ln(4/3) + 1/2 ln 4 + 1/2 ln(4/3) = 0.287682 + 0.693147 +
    0.143841."""
    found = losses.nca_pair(t(1), t(-1), math.log(3)).item()
    assert found == pytest.approx(1.124670, abs=5e-7)


def test_bco_pair_by_hand():
    """beta ln 3, D = ln 3: beta w - D = ln 3 and beta l - D = -2 ln 3: ln(4/3) + ln(10/9) =
    0.393043."""
    found = losses.bco_pair(t(2), t(-1), math.log(3), math.log(3)).item()
    assert found == pytest.approx(0.393043, abs=5e-7)


def test_dpop_by_hand():
    """beta ln 3 / 3, lambda 2. w 2, h 3: no penalty. w -1, h 5: 5 - 2 * 1 = 3 too. ln(4/3)
    twice."""
    found = losses.dpop(t(2, -1), t(-1, -6), math.log(3) / 3, 2.0)
    assert found.tolist() == pytest.approx([math.log(4 / 3)] * 2)


def test_kto_by_hand():
    """beta ln 3, z = 1: w - z = 1: 2 (1 - 3/4) = 1/2; z - l = 2: 1 - 9/10 = 1/10, times 3 =
    3/10."""
    found = losses.kto(t(2, -1), torch.tensor([True, False]), 1.0, math.log(3), 2.0, 3.0)
    assert found.tolist() == pytest.approx([0.5, 0.3])


def test_simpo_by_hand():
    """Means -4/4 and -6/2: margin 2; ratio 1, beta ln 3: ln 3 * (2 - 1): ln(4/3) = 0.287682."""
    found = losses.simpo(t(-4), t(-6), t(4), t(2), math.log(3), 1.0).item()
    assert found == pytest.approx(0.287682, abs=5e-7)


def test_orpo_by_hand():
    """Mean probabilities 3/4 and 1/2: odds 3 and 1, odds ratio 3: -ln(3/4) + 0.5 ln(4/3) = 1.5 *
    0.287682."""
    chosen, rejected = 2 * math.log(3 / 4), 3 * math.log(1 / 2)
    found = losses.orpo(t(chosen), t(rejected), t(2), t(3), 0.5).item()
    assert found == pytest.approx(0.431523, abs=5e-7)


def test_cpo_by_hand():
    """log pi -4 and -7, beta ln 3 / 3: ln(4/3) + 0.5 * 4/8 = 0.537682."""
    found = losses.cpo(t(-4), t(-7), t(8), math.log(3) / 3, 0.5).item()
    assert found == pytest.approx(0.537682, abs=5e-7)


def test_sft_by_hand():
    """-4 nats over 8 tokens: 1/2."""
    assert losses.sft(t(-4), t(8)).item() == 0.5


def test_aot_by_hand():
    """Gaps 3, 1, 2 of the policy, 10, 30, 20 of the reference: the ranks 3, 1, 2 take 30, 10, 20.

    g - g' = -27, -9, -18; beta ln 3 / 9: -log sigmoid(-3 ln 3) = ln(1 + 27) = 3.332205, ln(1 + 3)
    = 1.386294,
    ln(1 + 9) = 2.302585.
    """
    matched = match_by_rank(t(3, 1, 2), t(10, 30, 20))
    assert matched.tolist() == [30, 10, 20]
    found = losses.aot(t(3, 1, 2), t(0, 0, 0), matched, math.log(3) / 9).tolist()
    assert found == pytest.approx([math.log(28), math.log(4), math.log(10)])


# --- (b) against the equations, written out for one pair

EQUATIONS = {
    "sigmoid": lambda p, beta: -ls(beta * p.h),
    "cdpo": lambda p, beta, e: -(1 - e) * ls(beta * p.h) - e * ls(-beta * p.h),
    "robust": lambda p, beta, e: (-(1 - e) * ls(beta * p.h) + e * ls(-beta * p.h)) / (1 - 2 * e),
    "hinge": lambda p, beta: max(0, 1 - beta * p.h),
    "ipo_sum": lambda p, tau: (p.h - 1 / (2 * tau)) ** 2,
    "ipo": lambda p, tau: (p.w / p.nw - p.l / p.nl - 1 / (2 * tau)) ** 2,
    "sigmoid_norm": lambda p, beta: -ls(beta * (p.w / p.nw - p.l / p.nl)),
    "exo_pair": lambda p, beta, e: sum(
        q * (math.log(q) - math.log(label))
        for q, label in ((s(beta * p.h), 1 - e), (1 - s(beta * p.h), e))
    ),
    "discopop": lambda p, beta, tau: (
        (1 - s(beta * p.h / tau)) * -ls(beta * p.h) + s(beta * p.h / tau) * math.exp(-beta * p.h)
    ),
    "apo_zero": lambda p, beta: (1 - s(beta * p.w)) + s(beta * p.l),
    "apo_down": lambda p, beta: s(beta * p.w) + (1 - s(beta * p.w - beta * p.l)),
    "sppo_hard": lambda p, beta: (p.w - (1 - 0.5) / beta) ** 2 + (p.l - (0 - 0.5) / beta) ** 2,
    "nca_pair": lambda p, beta: -ls(beta * p.w) - sum(ls(-beta * r) for r in (p.w, p.l)) / 2,
    "bco_pair": lambda p, beta: -ls(beta * p.w - p.shift) - ls(-(beta * p.l - p.shift)),
    "dpop": lambda p, beta, penalty: -ls(beta * (p.h - penalty * max(0, -p.w))),
    "simpo": lambda p, beta, ratio: -ls(
        beta / p.nw * p.logp_w - beta / p.nl * p.logp_l - ratio * beta
    ),
    "orpo": lambda p, weight: (
        -p.logp_w / p.nw
        - weight * ls(math.log(odds(p.logp_w / p.nw) / odds(p.logp_l / p.nl)))
    ),
    "cpo": lambda p, beta, alpha: -ls(beta * p.logp_w - beta * p.logp_l) - alpha * p.logp_w / p.nw,
    "sft": lambda p: -p.logp_w / p.nw,
    "aot": lambda p, beta: -ls(beta * (p.logp_w - p.logp_l - p.gap)),
}  # fmt: skip


def odds(mean_logp: float) -> float:
    return math.exp(mean_logp) / (1 - math.exp(mean_logp))


class OnePair:
    """The numbers of one pair as floats, by the names of the equations."""

    NAMES = {"w": "chosen_logratios", "l": "rejected_logratios", "nw": "chosen_lengths",
             "nl": "rejected_lengths", "logp_w": "chosen_logps", "logp_l": "rejected_logps",
             "shift": "shift", "gap": "matched_gaps"}  # fmt: skip

    def __init__(self, inputs: dict[str, torch.Tensor], i: int):
        for short, name in self.NAMES.items():
            setattr(self, short, inputs[name][i].item())
        self.h = self.w - self.l


def random_inputs(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(scale: float, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(count, generator=draw, dtype=torch.float64) * scale + shift

    lengths = [torch.randint(1, 60, (count,), generator=draw).double() for _ in range(2)]
    return {
        "chosen_logratios": normal(4), "rejected_logratios": normal(4),
        "chosen_logps": -normal(1).exp() * lengths[0],
        "rejected_logps": -normal(1).exp() * lengths[1],
        "chosen_lengths": lengths[0], "rejected_lengths": lengths[1],
        "matched_gaps": normal(10), "shift": normal(1),
    }  # fmt: skip


PAIRWISE = [name for name in LOSSES if name != "kto"]


def call(name: str, inputs: dict[str, torch.Tensor], **hyperparameters: float) -> torch.Tensor:
    return LOSSES[name](*(inputs[each] for each in FIELDS[name]), **hyperparameters)


@pytest.mark.parametrize("name", PAIRWISE)
def test_every_loss_is_its_equation(name):
    """200 random pairs in float64; the hyperparameters are other ones than the defaults."""
    inputs = random_inputs(200)
    values = {"beta": 0.3, "label_smoothing": 0.2, "tau": 0.7, "gamma_beta_ratio": 0.4,
              "odds_weight": 0.25, "cpo_alpha": 0.6}  # fmt: skip
    values = {key: values.get(key, value / 2) for key, value in DEFAULTS[name].items()}
    found = call(name, inputs, **values)
    expected = [EQUATIONS[name](OnePair(inputs, i), *values.values()) for i in range(200)]
    assert found.shape == (200,)
    assert found.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_kto_is_its_equation():
    """v(x, y) = D sigmoid(beta (r - z)) or U sigmoid(beta (z - r)); the loss is D - v or U - v.

    D and U are no float32 values: what is float64 is computed in float64.
    """
    ratios = random_inputs(200)["chosen_logratios"]
    desirable = torch.arange(200) % 3 == 0
    found = losses.kto(ratios, desirable, 0.8, 0.3, 1.3, 0.7)
    expected = [
        1.3 - 1.3 * s(0.3 * (r - 0.8)) if good else 0.7 - 0.7 * s(0.3 * (0.8 - r))
        for r, good in zip(ratios.tolist(), desirable.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-11)
    assert losses.kto(ratios.half(), desirable, 0.8, 0.3, 1.3, 0.7).dtype == torch.half


def test_robust_is_dpo_on_the_true_labels_in_expectation():
    """With a quarter of the labels flipped: 3/4 loss(w, l) + 1/4 loss(l, w) = DPO(w, l)."""
    inputs = random_inputs(50)
    pair = inputs["chosen_logratios"], inputs["rejected_logratios"]
    flipped = losses.robust(*reversed(pair), 0.2, 0.25)
    expected = 0.75 * losses.robust(*pair, 0.2, 0.25) + 0.25 * flipped
    assert torch.allclose(expected, losses.sigmoid(*pair, 0.2), rtol=1e-12)


def test_aot_of_equal_distributions_is_ln_2():
    """A policy whose gaps are the reference's, only of other pairs, is not worse than it."""
    gaps = random_inputs(50)["matched_gaps"]
    shuffled = gaps[torch.randperm(50, generator=torch.Generator().manual_seed(1))]
    found = losses.aot(gaps, torch.zeros_like(gaps), match_by_rank(gaps, shuffled))
    assert torch.allclose(found, torch.full_like(found, math.log(2)))


# --- (c) which way it moves

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


# --- (d) at the limits

EXTREMES = (-1e4, -50.0, -1e-3, -1e-8, 0.0)


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_extreme_log_probabilities_and_margins(name, dtype):
    """Log-ratios to +-1e4, log-probabilities from -1e4 to 0, of one token and of 50."""
    ratios = torch.tensor([x * sign for x in EXTREMES for sign in (1, -1)], dtype=dtype)
    first, second = (x.flatten() for x in torch.meshgrid(ratios, ratios, indexing="ij"))
    for length in (1, 50):
        lengths = torch.full_like(first, length)
        inputs = {
            "chosen_logratios": first, "rejected_logratios": second, "chosen_logps": -first.abs(),
            "rejected_logps": -second.abs(), "chosen_lengths": lengths, "rejected_lengths": lengths,
            "matched_gaps": second, "shift": torch.zeros((), dtype=dtype),
        }  # fmt: skip
        leaves = [inputs[key].clone().requires_grad_() for key in FIELDS[name]]
        values = LOSSES[name](*leaves)
        values.sum().backward()
        assert values.isfinite().all()
        assert all(leaf.grad.isfinite().all() for leaf in leaves if leaf.grad is not None)


def test_kto_is_finite_at_extremes():
    ratios = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    values = losses.kto(ratios, torch.tensor([True, True, False, False]), 0.0)
    values.sum().backward()
    assert values.tolist() == [1, 0, 0, 1] and ratios.grad.isfinite().all()


# --- (e) derivatives


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_are_derivatives(name):
    inputs = random_inputs(6, seed=1)
    leaves = [
        inputs[key].requires_grad_(
            key not in ("chosen_lengths", "rejected_lengths", "shift", "matched_gaps")
        )
        for key in FIELDS[name]
    ]
    assert torch.autograd.gradcheck(LOSSES[name], leaves)


def test_gradients_of_kto_are_derivatives():
    ratios = random_inputs(6, seed=1)["chosen_logratios"].requires_grad_()
    desirable = torch.tensor([True, False] * 3)
    assert torch.autograd.gradcheck(lambda x: losses.kto(x, desirable, 0.5, 0.3, 2.0, 3.0), ratios)
