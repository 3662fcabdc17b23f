"""Preference losses: tensors in, one value a pair out. Imports torch alone.

Shapes: B pairs. `logps` are log-probabilities of whole responses, summed over their tokens (nats).
"""

import torch.nn.functional as F
from torch import Tensor


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
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)  # (B,)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)  # (B,)
    margins = chosen_rewards - rejected_rewards
    # logsigmoid, never log(sigmoid): at a margin of -200 the sigmoid is 0 and its log is -inf.
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(
        -margins
    )
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
