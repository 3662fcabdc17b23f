"""Preference losses: tensors in, one value per pair out. Imports torch alone.

A loss is a function of the log-ratios of a chosen response y_w and a rejected one y_l to a prompt x

    w = log pi(y_w | x) - log pi_ref(y_w | x)       chosen_logratios
    l = log pi(y_l | x) - log pi_ref(y_l | x)       rejected_logratios
    h = w - l                                       the margin, without beta

and its kind says of what exactly:

    MARGIN          the margin h                    dpo (sigmoid, cdpo), robust, hinge, ipo_sum,
                                                    exo_pair, discopop
    MEANS           the margin of means per token   ipo, sigmoid_norm
    SEPARATE        w and l separately              apo_zero, apo_down, sppo_hard, nca_pair,
                                                    bco_pair, dpop
    SINGLE          one of them, for one response   kto
    POLICY          the policy without a reference  cpo
    POLICY_MEANS    the same, by means per token    simpo, orpo, sft
    SORTED          all pairs of a step, sorted     aot

DPO itself and the loss of rewards are in nanoalign/losses.py. Log-probabilities and log-ratios are
sums over the tokens of a response, EOS included, in nats; lengths are numbers of tokens. A loss
of means divides by them itself. Defaults are those of the paper where it names one.

A new loss is a function below an entry `@loss(KIND, FIELDS, HYPERPARAMETERS...)`. Its kind decides
which add-ons do not combine with it (INCOMPATIBLE), its fields are those of pairs.Pairs in the
order of its arguments, and its hyperparameters become flags of train_dpo.py with the defaults of
the function. A hyperparameter of a new name needs a line in MEANINGS.

Shapes: B pairs.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoalign.losses import dpo_loss

LOSSES: dict[str, Callable[..., Tensor]] = {}
KIND: dict[str, str] = {}  # of each loss, by name
FIELDS: dict[str, tuple[str, ...]] = {}  # of pairs.Pairs that it takes, in order
DEFAULTS: dict[str, dict[str, float]] = {}  # of its hyperparameters, which follow the fields
MEANINGS = {  # hyperparameter -> the help of its flag; train_dpo.py has beta and label_smoothing
    "tau": "margin, in rewards, over which the loss turns from logistic into exponential",
    "dpop_lambda": "weight of the nats that the chosen response lost against the reference",
    "desirable_weight": "weight of the losses of desirable responses",
    "undesirable_weight": "weight of the losses of undesirable responses",
    "gamma_beta_ratio": "lead that the chosen response is to have, in nats per token: gamma / beta",
    "odds_weight": "weight of the odds ratio, beside the NLL of the chosen response",
    "cpo_alpha": "weight of the NLL of the chosen response",
}

MARGIN, MEANS, SEPARATE, SINGLE = "margin", "means", "separate", "single"
POLICY, POLICY_MEANS, SORTED = "policy", "policy_means", "sorted"
LOGRATIOS = ("chosen_logratios", "rejected_logratios")
LOGPS = ("chosen_logps", "rejected_logps")
LENGTHS = ("chosen_lengths", "rejected_lengths")

NO_MARGIN = "its loss is not a function of the difference of the two log-ratios alone"
NO_LOGRATIOS = "it does not compare log-ratios of single responses"
NO_SUMS = "it takes means, single responses or an NLL, not sums of a pair"
NO_PAIRS = "it takes single responses, not pairs"
NO_REFERENCE = "it has no reference"
OF_POLICY = {
    "length_alpha": NO_REFERENCE,
    "divergence": NO_REFERENCE,
    "ld_alpha": NO_SUMS,
    "sync_reference_every": NO_REFERENCE,
}
OF_MEANS = {"length_alpha": NO_MARGIN, "divergence": NO_LOGRATIOS, "ld_alpha": NO_SUMS}
# Kind -> the add-ons that do not combine with its losses -> why.
INCOMPATIBLE: dict[str, dict[str, str]] = {
    MARGIN: {},
    MEANS: OF_MEANS,
    SEPARATE: {"length_alpha": NO_MARGIN},
    SINGLE: OF_MEANS | {"wpo": NO_PAIRS},
    POLICY: OF_POLICY,
    POLICY_MEANS: OF_POLICY,
    SORTED: {"length_alpha": NO_MARGIN, "divergence": NO_LOGRATIOS},
}


def loss(kind: str, fields: tuple[str, ...], *hyperparameters: str) -> Callable:
    """Enters the function below it in LOSSES, KIND, FIELDS and DEFAULTS, by its name."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name, values = function.__name__, function.__defaults__ or ()
        LOSSES[name], KIND[name], FIELDS[name] = function, kind, fields
        DEFAULTS[name] = dict(zip(hyperparameters, values, strict=True))
        return function

    return enter


def has_reference(name: str) -> bool:
    """Whether the loss of this name compares the policy with a reference."""
    return KIND[name] not in (POLICY, POLICY_MEANS)


# --- functions of the margin ----------------------------------------------------------------------


@loss(MARGIN, LOGRATIOS, "beta", "label_smoothing")
def dpo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO: losses.dpo_loss as a function of log-ratios. Rafailov et al. 2023, arXiv 2305.18290."""
    zero = torch.zeros_like(chosen_logratios)  # as the reference of log-ratios, changes nothing
    return dpo_loss(chosen_logratios, rejected_logratios, zero, zero, beta, label_smoothing)[0]


@loss(MARGIN, LOGRATIOS, "beta")
def sigmoid(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """TRL's name of dpo without label_smoothing."""
    return dpo(chosen_logratios, rejected_logratios, beta)


@loss(MARGIN, LOGRATIOS, "beta", "label_smoothing")
def cdpo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Conservative DPO: the name of dpo with label_smoothing above 0. Mitchell 2023."""
    return dpo(chosen_logratios, rejected_logratios, beta, label_smoothing)


@loss(MARGIN, LOGRATIOS, "beta", "label_smoothing")
def robust(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Robust DPO: [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e), e < 1/2.

    Chowdhury et al. 2024, arXiv 2403.00409, section 3: where labels are flipped with probability e,
    its expectation is the loss of DPO on the true ones. It may be negative and is not bounded from
    below. (LLaMA-Factory calls cdpo by this name.)
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    losses = -(1 - label_smoothing) * F.logsigmoid(margins)
    return (losses + label_smoothing * F.logsigmoid(-margins)) / (1 - 2 * label_smoothing)


@loss(MARGIN, LOGRATIOS, "beta")
def hinge(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta h): Liu et al. 2023 (RSO), arXiv 2309.06657, hinge on normalised likelihoods.

    Not the hinge of SLiC (Zhao et al. 2023, arXiv 2305.10425), which has no reference.
    """
    return torch.relu(1 - beta * (chosen_logratios - rejected_logratios))


@loss(MARGIN, LOGRATIOS, "beta")
def ipo_sum(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """IPO as written: (h - 1 / (2 beta))^2. Azar et al. 2023, arXiv 2310.12036, equation 17.

    beta is the tau of the paper. The minimum is at a margin of 1 / (2 beta) nats, by default 5, of
    whole responses.
    """
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)).square()


@loss(MARGIN, LOGRATIOS, "beta", "label_smoothing")
def exo_pair(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """EXO of a pair: s (log s - log(1 - e)) + (1 - s) (log(1 - s) - log e), s = sigmoid(beta h).

    Ji et al. 2024, arXiv 2402.00856, equation 16: KL((s, 1 - s) || (1 - e, e)), where (1 - e, e)
    are the smoothed labels. e = `label_smoothing` must be above 0, else the loss is infinite.
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    to_chosen = F.logsigmoid(margins) - math.log1p(-label_smoothing)
    to_rejected = F.logsigmoid(-margins) - math.log(label_smoothing)
    return torch.sigmoid(margins) * to_chosen + torch.sigmoid(-margins) * to_rejected


@loss(MARGIN, LOGRATIOS, "beta", "tau")
def discopop(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1, tau: float = 0.05
) -> Tensor:
    """DiscoPOP: (1 - m) * -log sigmoid(beta h) + m * exp(-beta h), m = sigmoid(beta h / tau).

    Lu et al. 2024, arXiv 2406.08414, equation 5: a language model proposed it; it is not convex.
    With their tau of 0.05 the slope at a margin of 0 is +0.78 beta, so a policy that equals its
    reference moves the wrong way, into a local minimum below 0. The slope is negative for a tau
    above 0.1023.
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    logistic = torch.sigmoid(-margins / tau) * -F.logsigmoid(margins)
    # m * exp(-margin) in one exponent: exp(1e4) alone would be infinite, and 0 * inf nan.
    return logistic + torch.exp(F.logsigmoid(margins / tau) - margins)


# --- functions of the margin of means per token ---------------------------------------------------


@loss(MEANS, LOGRATIOS + LENGTHS, "beta")
def ipo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """IPO on means: (w / |y_w| - l / |y_l| - 1 / (2 beta))^2. Azar et al. 2023, equation 17.

    As in TRL, LLaMA-Factory and HALOs, as the authors advised; ipo_sum is the paper as written.
    The minimum is at a margin of 1 / (2 beta) nats per token.
    """
    margins = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
    return (margins - 1 / (2 * beta)).square()


@loss(MEANS, LOGRATIOS + LENGTHS, "beta")
def sigmoid_norm(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 5.0,
) -> Tensor:
    """DPO on means: -log sigmoid(beta (w / |y_w| - l / |y_l|)).

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124. Means are smaller than sums, so beta is larger.
    """
    margins = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
    return -F.logsigmoid(beta * margins)


# --- functions of both log-ratios, separately -----------------------------------------------------


@loss(SEPARATE, LOGRATIOS, "beta")
def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """1 - sigmoid(beta w) + sigmoid(beta l): chosen up, rejected down.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7: for data better than the model.
    """
    return torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


@loss(SEPARATE, LOGRATIOS, "beta")
def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """sigmoid(beta w) + 1 - sigmoid(beta h): both down, rejected more.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8: for data worse than the model. Chosen
    goes up only where the slope of the second part is larger than that of the first.
    """
    margins = chosen_logratios - rejected_logratios
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-beta * margins)


@loss(SEPARATE, LOGRATIOS, "beta")
def sppo_hard(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 1e-3) -> Tensor:
    """(w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2, beta = 1 / eta.

    Wu et al. 2024, arXiv 2405.00675, equation 4.7, with winning probabilities of 1 and 0. Its eta
    of 1000 has the minimum at +-500 nats.
    """
    target = 1 / (2 * beta)
    return (chosen_logratios - target).square() + (rejected_logratios + target).square()


@loss(SEPARATE, LOGRATIOS, "beta")
def nca_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta w) - 1/2 log sigmoid(-beta w) - 1/2 log sigmoid(-beta l).

    Chen et al. 2024, arXiv 2402.05369, NCA of two responses: chosen goes up to a bounded likelihood
    (beta w = ln 2), and rejected down.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


@loss(SEPARATE, (*LOGRATIOS, "shift"), "beta")
def bco_pair(
    chosen_logratios: Tensor, rejected_logratios: Tensor, shift: float | Tensor, beta: float = 0.1
) -> Tensor:
    """BCO of a pair: -log sigmoid(beta w - D) - log sigmoid(-(beta l - D)).

    Jung et al. 2024, arXiv 2404.04656: a classifier of chosen against rejected, whose logit is the
    reward less D = `shift`, the running mean of rewards, without gradient. (In the bco_pair of TRL
    D is 0.)
    """
    chosen, rejected = beta * chosen_logratios - shift, beta * rejected_logratios - shift
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@loss(SEPARATE, LOGRATIOS, "beta", "dpop_lambda")
def dpop(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float = 0.3,
    dpop_lambda: float = 50.0,
) -> Tensor:
    """DPO-Positive: -log sigmoid(beta (h - lambda max(0, -w))). Pal et al. 2024, arXiv 2402.13228.

    Equation 3: a policy that lowers both responses, the rejected more, does not lower this loss.
    """
    penalties = torch.relu(-chosen_logratios)  # (B,) nats that chosen lost
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - dpop_lambda * penalties))


# --- a function of single responses ---------------------------------------------------------------


@loss(SINGLE, ("logratios", "desirable", "kl"), "beta", "desirable_weight", "undesirable_weight")
def kto(
    logratios: Tensor,  # (B,) of single responses, each to a prompt of its own
    desirable: Tensor,  # (B,) bool
    kl: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: D (1 - sigmoid(beta (r - z))) if desirable, else U (1 - sigmoid(beta (z - r))).

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 8, without its constants. r is the log-ratio,
    z = `kl` >= 0 an estimate of KL(pi || pi_ref) without gradient, D and U are the weights. A pair
    is two responses; its loss is the mean of theirs.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(logratios)
    weight = torch.full_like(logratios, undesirable_weight)  # of their type, which may be float64
    weight = weight.masked_fill(desirable, desirable_weight)
    return weight * torch.sigmoid(sign * beta * (kl - logratios))


# --- functions of the policy alone ----------------------------------------------------------------


@loss(POLICY_MEANS, LOGPS + LENGTHS, "beta", "gamma_beta_ratio")
def simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
) -> Tensor:
    """SimPO: -log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma).

    Meng et al. 2024, arXiv 2405.14734, equation 6. gamma = gamma_beta_ratio * beta, as in the code
    of the authors. TRL and LLaMA-Factory take gamma itself and a beta of 0.1; TRL adds an NLL.
    """
    margins = chosen_logps / chosen_lengths - rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * (margins - gamma_beta_ratio))


@loss(POLICY_MEANS, LOGPS + LENGTHS, "odds_weight")
def orpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    odds_weight: float = 0.1,
) -> Tensor:
    """ORPO: NLL of chosen + odds_weight * -log sigmoid(log odds(y_w) - log odds(y_l)).

    Hong et al. 2024, arXiv 2403.07691, equations 3, 6 and 7: odds = P / (1 - P), log P the mean
    over tokens. The NLL is a mean over the tokens of the response (in TRL of the prompt too).
    """
    chosen, rejected = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    return -chosen - odds_weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(P / (1 - P)) of log P, which is clamped to at most -1e-6: at 0 the odds are infinite."""
    mean_logps = mean_logps.clamp(max=-1e-6)
    return mean_logps - torch.log(-torch.expm1(mean_logps))  # log1p(-exp) would be -inf near 0


@loss(POLICY, (*LOGPS, "chosen_lengths"), "beta", "cpo_alpha")
def cpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
) -> Tensor:
    """CPO: -log sigmoid(beta (log pi(y_w) - log pi(y_l))) + cpo_alpha * NLL of chosen.

    Xu et al. 2024, arXiv 2401.08417, section 3. The NLL of the paper is a sum over tokens, that of
    its code and of TRL a mean over those of a batch; here it is a mean over those of each response.
    """
    nll = sft(chosen_logps, chosen_lengths)
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps)) + cpo_alpha * nll


@loss(POLICY_MEANS, ("chosen_logps", "chosen_lengths"))
def sft(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """NLL of the chosen response, a mean over its tokens: the baseline of alignment."""
    return -chosen_logps / chosen_lengths


# --- a function of all pairs of a step ------------------------------------------------------------


@loss(SORTED, (*LOGPS, "matched_gaps"), "beta")
def aot(
    chosen_logps: Tensor, rejected_logps: Tensor, matched_gaps: Tensor, beta: float = 0.1
) -> Tensor:
    """AOT: -log sigmoid(beta (g - g')), g = log pi(y_w) - log pi(y_l).

    g' is the gap of the reference that has the same rank among all pairs of the step: see
    match_by_rank. (TRL sorts those of one GPU.) Melnyk et al. 2024, arXiv 2406.05882, for paired
    data: the distribution of the policy's gaps is to dominate the reference's in every quantile.
    """
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps - matched_gaps))


def match_by_rank(gaps: Tensor, reference_gaps: Tensor) -> Tensor:
    """For each of `gaps`, (B,), the one of `reference_gaps`, (B,), that has its rank: (B,).

    Equal gaps have the order in which they stand.
    """
    matched = torch.empty_like(reference_gaps)
    matched[gaps.argsort(stable=True)] = reference_gaps.sort().values
    return matched
