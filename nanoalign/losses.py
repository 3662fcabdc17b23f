"""The two losses of the core: tensors in, one value per pair out. Imports torch alone.

nanoalign/family/losses.py has the other preference losses.

Shapes: B pairs.
"""

import torch.nn.functional as F
from torch import Tensor


def pairwise_reward_loss(
    chosen_rewards: Tensor,  # (B,) r(x, y_w)
    rejected_rewards: Tensor,  # (B,) r(x, y_l)
    margin: Tensor | float | None = None,  # (B,) or one for all pairs, in units of the reward
    label_smoothing: float = 0.0,
) -> Tensor:
    """Bradley-Terry: the chosen response wins with probability sigmoid(difference of rewards).

        d    = r(x, y_w) - r(x, y_l)
        loss = -(1 - eps) * log sigmoid(d - m) - eps * log sigmoid(-d - m)

    With m = `margin` = 0 and eps = `label_smoothing` = 0 this is Ouyang et al. 2022 (InstructGPT,
    arXiv 2203.02155, equation 1) for one pair. m > 0 requires a lead of m: Touvron et al. 2023
    (Llama 2, arXiv 2307.09288, equation 2). eps is the assumed probability that a label is wrong.

    >>> import torch                                # a lead of 2, of which 1 is required
    >>> pairwise_reward_loss(torch.tensor([3.0]), torch.tensor([1.0]), margin=1.0).item()
    0.3132616877555847

    Returns losses (B,). The value of the example is -log sigmoid(2 - 1) = log(1 + 1/e).
    """
    difference = chosen_rewards - rejected_rewards
    required = 0.0 if margin is None else margin
    losses = -(1 - label_smoothing) * F.logsigmoid(difference - required)
    return losses - label_smoothing * F.logsigmoid(-difference - required)


def dpo_loss(
    policy_chosen_logps: Tensor,  # (B,) log pi(y_w | x)
    policy_rejected_logps: Tensor,  # (B,) log pi(y_l | x)
    reference_chosen_logps: Tensor,  # (B,) log pi_ref(y_w | x)
    reference_rejected_logps: Tensor,  # (B,) log pi_ref(y_l | x)
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimization: logistic regression on the difference of implicit rewards.

        r(x, y) = beta * (log pi(y | x) - log pi_ref(y | x))
        h       = r(x, y_w) - r(x, y_l)
        loss    = -(1 - eps) * log sigmoid(h) - eps * log sigmoid(-h)

    With eps = `label_smoothing` = 0 this is Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    With 0 < eps < 0.5 it is conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf,
    equation 3): eps is the assumed probability that a label is wrong.

    >>> import torch                                # chosen was raised by 2 nats, rejected kept
    >>> w, l, ref_w, ref_l = (torch.tensor([x]) for x in (-10.0, -12.0, -12.0, -12.0))
    >>> losses, chosen, rejected = dpo_loss(w, l, ref_w, ref_l, beta=0.5)
    >>> losses.item(), chosen.item(), rejected.item()   # -log sigmoid(0.5 * 2) = log(1 + 1/e)
    (0.3132616877555847, 1.0, 0.0)

    Returns (losses, chosen_rewards, rejected_rewards), each (B,). The rewards are detached.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps  # (B,)
    rejected_logratios = policy_rejected_logps - reference_rejected_logps  # (B,)
    margins = beta * (chosen_logratios - rejected_logratios)  # (B,)
    losses = -(1 - label_smoothing) * F.logsigmoid(margins)
    losses = losses - label_smoothing * F.logsigmoid(-margins)
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()
