"""Reward and preference losses: tensors in, one value a pair out. Imports torch alone.

A map of the field, by what a loss is a function of. For a pair of a chosen response y_w and a rejected
one y_l to a prompt x

    w = log pi(y_w | x) - log pi_ref(y_w | x)       chosen_logratios: of the policy over the reference
    l = log pi(y_l | x) - log pi_ref(y_l | x)       rejected_logratios
    h = w - l                                       the margin, without beta

    rewards of a reward model           pairwise_reward_loss
    the margin h                        sigmoid (DPO), cdpo, robust, hinge, ipo_sum, exo_pair, discopop
    the margin of means a token         ipo, sigmoid_norm
    w and l, each for itself            apo_zero, apo_down, sppo_hard, nca_pair, bco_pair
    one of them, as a single example    kto
    the policy alone, no reference      simpo, orpo, cpo, sft
    all pairs of a step, sorted         aot

Log-probabilities and log-ratios are sums over a response's tokens, EOS included, in nats; lengths are the
numbers of these tokens. Where a loss wants means it divides by itself. The rewards that are reported
are beta * w and beta * l. All defaults are those of the paper where it names one.

Shapes: B pairs.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# --- rewards of a reward model -----------------------------------------------------------------------


def pairwise_reward_loss(
    chosen_rewards: Tensor,  # (B,) r(x, y_w)
    rejected_rewards: Tensor,  # (B,) r(x, y_l)
    margin: Tensor | float | None = None,  # (B,) or one for all; in units of the reward
    label_smoothing: float = 0.0,
) -> Tensor:
    """Bradley-Terry: the chosen response wins with the probability sigmoid(difference of rewards).

        d    = r(x, y_w) - r(x, y_l)
        loss = -(1 - eps) * log sigmoid(d - m) - eps * log sigmoid(-d - m)

    With m = `margin` = 0 and eps = `label_smoothing` = 0 this is Ouyang et al. 2022 (InstructGPT, arXiv
    2203.02155, equation 1), of one pair. m > 0 asks that the winner leads by m: Touvron et al. 2023
    (Llama 2, arXiv 2307.09288, equation 2). With 0 < eps < 0.5 the label is taken to be wrong with the
    probability eps, and then it is the rejected response that has to lead.

    >>> import torch                                # by hand: a lead of 2, of which 1 is asked
    >>> pairwise_reward_loss(torch.tensor([3.0]), torch.tensor([1.0]), margin=1.0).item()
    0.3132616877555847

    Returns losses (B,). The example's is -log sigmoid(2 - 1) = log(1 + 1/e).
    """
    difference = chosen_rewards - rejected_rewards
    asked = 0.0 if margin is None else margin
    losses = -(1 - label_smoothing) * F.logsigmoid(difference - asked)
    return losses - label_smoothing * F.logsigmoid(-difference - asked)


# --- functions of the margin ----------------------------------------------------------------------


def dpo_loss(
    policy_chosen_logps: Tensor,  # (B,) log pi(y_w | x)
    policy_rejected_logps: Tensor,  # (B,) log pi(y_l | x)
    reference_chosen_logps: Tensor,  # (B,) log pi_ref(y_w | x)
    reference_rejected_logps: Tensor,  # (B,) log pi_ref(y_l | x)
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimization: a logistic regression on the difference of implicit rewards.

        r(x, y) = beta * (log pi(y | x) - log pi_ref(y | x))
        loss    = -(1 - eps) * log sigmoid(r(x, y_w) - r(x, y_l)) - eps * log sigmoid(r(x, y_l) - r(x, y_w))

    With eps = `label_smoothing` = 0 this is Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    With 0 < eps < 0.5 it is conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf,
    equation 3): the label is taken to be wrong with probability eps, and the loss is least where
    the model says the same.

    >>> import torch                                # by hand: policy raised chosen by 2 nats, kept rejected
    >>> w, l, ref_w, ref_l = (torch.tensor([x]) for x in (-10.0, -12.0, -12.0, -12.0))
    >>> losses, chosen, rejected = dpo_loss(w, l, ref_w, ref_l, beta=0.5)
    >>> losses.item(), chosen.item(), rejected.item()       # -log sigmoid(0.5 * (2 - 0)) = log(1 + 1/e)
    (0.3132616877555847, 1.0, 0.0)

    Returns (losses, chosen_rewards, rejected_rewards), each (B,); the rewards are detached, for
    reports.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps  # (B,)
    rejected_logratios = policy_rejected_logps - reference_rejected_logps  # (B,)
    losses = cdpo(chosen_logratios, rejected_logratios, beta, label_smoothing)
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


def sigmoid(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """DPO: -log sigmoid(beta h). Rafailov et al. 2023, arXiv 2305.18290, equation 7."""
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


def cdpo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Conservative DPO: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, equation 3: the label is wrong with probability
    e. Least at beta h = log((1 - e) / e), so margins stay finite. TRL has no such loss since 2026.
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    losses = -(1 - label_smoothing) * F.logsigmoid(margins)
    return losses - label_smoothing * F.logsigmoid(-margins)


def robust(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Robust DPO: [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e), e < 1/2.

    Chowdhury et al. 2024, arXiv 2403.00409, section 3: with labels flipped with probability e its
    expectation is DPO's loss on the true ones. It may be negative, and has no least value. (LLaMA-Factory
    calls cdpo by this name.)
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    losses = -(1 - label_smoothing) * F.logsigmoid(margins)
    return (losses + label_smoothing * F.logsigmoid(-margins)) / (1 - 2 * label_smoothing)


def hinge(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta h): Liu et al. 2023 (RSO, arXiv 2309.06657), their hinge on normalised likelihoods.

    Not the hinge of SLiC (Zhao et al. 2023, arXiv 2305.10425), which has no reference.
    """
    return torch.relu(1 - beta * (chosen_logratios - rejected_logratios))


def ipo_sum(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """IPO as it is written: (h - 1 / (2 beta))^2. Azar et al. 2023, arXiv 2310.12036, equation 17.

    beta is the paper's tau: the margin is to be 1 / (2 beta) nats for the whole response, here 5.
    """
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)).square()


def exo_pair(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """EXO of a pair: KL(p || q) of p = (s, 1 - s), s = sigmoid(beta h), from the labels q = (1 - e, e).

    s (log s - log(1 - e)) + (1 - s) (log(1 - s) - log e): Ji et al. 2024, arXiv 2402.00856, equation
    16. e must be above 0, or a wrong order would cost infinitely much.
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    to_chosen = F.logsigmoid(margins) - math.log1p(-label_smoothing)
    to_rejected = F.logsigmoid(-margins) - math.log(label_smoothing)
    return torch.sigmoid(margins) * to_chosen + torch.sigmoid(-margins) * to_rejected


def discopop(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1, tau: float = 0.05
) -> Tensor:
    """DiscoPOP: (1 - m) * -log sigmoid(beta h) + m * exp(-beta h), m = sigmoid(beta h / tau).

    Lu et al. 2024, arXiv 2406.08414, equation 5: found by a language model's search; not convex. With their
    tau of 0.05 the slope at a margin of 0 is +0.78 beta: a policy that equals its reference is pushed
    the wrong way, into a local minimum below 0. From a tau of 0.1023 on the slope is negative.
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    logistic = torch.sigmoid(-margins / tau) * -F.logsigmoid(margins)
    # m * exp(-margin) in one exponent: exp(1e4) alone would be infinite, and 0 * inf nan.
    return logistic + torch.exp(F.logsigmoid(margins / tau) - margins)


# --- functions of the margin of means a token -----------------------------------------------------


def ipo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """IPO on means: (w / |y_w| - l / |y_l| - 1 / (2 beta))^2. Azar et al. 2023, equation 17.

    As TRL, LLaMA-Factory and HALOs have it, who asked the authors; ipo_sum is the paper as written.
    The margin is to be 1 / (2 beta) nats a token.
    """
    margins = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
    return (margins - 1 / (2 * beta)).square()


def sigmoid_norm(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 5.0,
) -> Tensor:
    """DPO on means: -log sigmoid(beta (w / |y_w| - l / |y_l|)).

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124. A mean wants a larger beta than a sum: theirs is 5.
    """
    margins = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
    return -F.logsigmoid(beta * margins)


# --- functions of both log-ratios, each for itself ------------------------------------------------


def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """1 - sigmoid(beta w) + sigmoid(beta l): chosen up, rejected down.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7: for data better than the model.
    """
    return torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """sigmoid(beta w) + 1 - sigmoid(beta h): both down, rejected more. For data worse than the model.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8. Chosen goes up only where the
    margin's slope outweighs its own.
    """
    margins = chosen_logratios - rejected_logratios
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-beta * margins)


def sppo_hard(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 1e-3) -> Tensor:
    """(w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2, beta = 1 / eta.

    Wu et al. 2024, arXiv 2405.00675, equation 4.7, with winning probabilities of 1 and 0. Its eta of
    1000 asks for +-500 nats.
    """
    target = 1 / (2 * beta)
    return (chosen_logratios - target).square() + (rejected_logratios + target).square()


def nca_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta w) - 1/2 log sigmoid(-beta w) - 1/2 log sigmoid(-beta l).

    Chen et al. 2024, arXiv 2402.05369, their NCA for two responses: chosen goes up to a likelihood
    that is bounded (beta w = ln 2), and rejected down.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def bco_pair(
    chosen_logratios: Tensor, rejected_logratios: Tensor, shift: float | Tensor, beta: float = 0.1
) -> Tensor:
    """BCO of a pair: -log sigmoid(beta w - D) - log sigmoid(-(beta l - D)).

    Jung et al. 2024, arXiv 2404.04656: a classifier of chosen against rejected whose logit is the reward,
    less its running mean D = `shift`, of both kinds and without gradient. (TRL's bco_pair has D = 0.)
    """
    chosen, rejected = beta * chosen_logratios - shift, beta * rejected_logratios - shift
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def kto(
    logratios: Tensor,  # (B,) of examples, of which each is one response to one prompt
    desirable: Tensor,  # (B,) bool
    kl: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: D (1 - sigmoid(beta (w - z))) for a desirable example, U (1 - sigmoid(beta (z - l))) for another.

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 8, less the constants that make it a value. z =
    `kl` >= 0 stands for KL(pi || pi_ref) and carries no gradient. A pair is two examples, and its loss the
    mean of theirs. (align-anything has a wrong sign in the second line, which raises what is undesirable.)
    """
    sign = torch.where(desirable, 1.0, -1.0).to(logratios)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(logratios)
    return weight * torch.sigmoid(sign * beta * (kl - logratios))


# --- functions of the policy alone ----------------------------------------------------------------


def simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
) -> Tensor:
    """SimPO: -log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma), gamma = ratio * beta.

    Meng et al. 2024, arXiv 2405.14734, equation 6. The ratio as in the authors' code: TRL and
    LLaMA-Factory take gamma itself, beside a beta of 0.1, and TRL adds an NLL term.
    """
    margins = chosen_logps / chosen_lengths - rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * (margins - gamma_beta_ratio))


def orpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    odds_weight: float = 0.1,
) -> Tensor:
    """ORPO: NLL of the chosen + odds_weight * -log sigmoid(log odds(y_w) - log odds(y_l)).

    Hong et al. 2024, arXiv 2403.07691, equations 3, 6 and 7: odds = P / (1 - P), log P the mean over
    tokens. The NLL is over the response alone (TRL: prompt too), a mean for every sequence.
    """
    chosen, rejected = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    return -chosen - odds_weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(P / (1 - P)) of log P; where P rounds to 1, that of the nearest P whose odds are finite."""
    mean_logps = mean_logps.clamp(max=-1e-6)
    return mean_logps - torch.log(-torch.expm1(mean_logps))  # log1p(-exp) would be -inf near 0


def cpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
) -> Tensor:
    """CPO: -log sigmoid(beta (log pi(y_w) - log pi(y_l))) + cpo_alpha * NLL of the chosen.

    Xu et al. 2024, arXiv 2401.08417, section 3. The paper sums the NLL over tokens, its code and TRL
    take the mean of a batch's; here it is the mean of each sequence.
    """
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps)) + cpo_alpha * sft(
        chosen_logps, chosen_lengths
    )


def sft(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """The chosen response's negative log-likelihood, a mean over its tokens: what alignment is to beat."""
    return -chosen_logps / chosen_lengths


# --- functions of all pairs -----------------------------------------------------------------------


def aot(
    chosen_logps: Tensor, rejected_logps: Tensor, matched_gaps: Tensor, beta: float = 0.1
) -> Tensor:
    """AOT: -log sigmoid(beta (g - g')), g = log pi(y_w) - log pi(y_l), g' the reference's gap of equal rank.

    Melnyk et al. 2024, arXiv 2406.05882, for paired data: the distribution of the policy's gaps is to
    dominate the reference's, quantile by quantile. `matched_gaps` are those of match_by_rank over all
    pairs of a step (TRL sorts those of one GPU).
    """
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps - matched_gaps))


def match_by_rank(gaps: Tensor, reference_gaps: Tensor) -> Tensor:
    """For each of `gaps` (B,) the one of `reference_gaps` (B,) that has its rank; ties by their order."""
    matched = torch.empty_like(reference_gaps)
    matched[gaps.argsort(stable=True)] = reference_gaps.sort().values
    return matched


# --- what combines with them ----------------------------------------------------------------------

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
LARGEST_EXPONENT = 40.0  # of exp(-log-ratio): beyond it float32's squares overflow


def divergence_scores(logratios: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """What takes a log-ratio's place where another divergence than the reverse KL binds the policy: (B,).

    f'(u) at u = pi / pi_ref, less its value at u = 1: Wang et al. 2023 (f-DPO), arXiv 2309.16240, table 1.

        reverse_kl  log u           js      log(2 u / (1 + u))
        forward_kl  1 - 1 / u       alpha   (1 - u^-alpha) / alpha,  0 < alpha < 1

    (TRL's alpha is 1 - alpha.) exp(-log u) is held at exp(40), from where on the gradient is 0.
    """
    if divergence == "reverse_kl":
        return logratios
    if divergence == "js":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "forward_kl":
        return -torch.expm1((-logratios).clamp(max=LARGEST_EXPONENT))
    return -torch.expm1((-alpha * logratios).clamp(max=LARGEST_EXPONENT)) / alpha


def wpo_weights(mean_token_scores: Tensor) -> Tensor:
    """WPO's weight of a response, how far it is one of the policy's own: exp of the mean over its tokens of

        log pi(y_t) - log sum_v pi(v)^2

    Zhou et al. 2024, arXiv 2406.11827, equation 2 with their alignment of the weights. A pair's loss is
    multiplied by the weights of both responses, which carry no gradient.
    """
    return mean_token_scores.exp()


# --- by name --------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid, cdpo, robust, hinge, ipo_sum, exo_pair, discopop, ipo, sigmoid_norm, apo_zero,
        apo_down, sppo_hard, nca_pair, bco_pair, kto, simpo, orpo, cpo, sft, aot,
    )
}  # fmt: skip
