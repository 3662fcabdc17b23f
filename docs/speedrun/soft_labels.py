"""DPO against the share of labels that Bradley-Terry expects to be wrong, written as a loss."""

import torch.nn.functional as F

import nanoalign.metrics

FLAGS = "--beta 0.3 --eval_every 1000"
WRONG = 0.1


def loss_of_batch(policy, reference, beta, label_smoothing, batch):
    log_ratios = policy(batch) - reference(batch)
    chosen, rejected = beta * log_ratios[batch.chosen], beta * log_ratios[batch.rejected]
    margins = chosen - rejected
    losses = -(1 - WRONG) * F.logsigmoid(margins) - WRONG * F.logsigmoid(-margins)
    return losses, nanoalign.metrics.pair_metrics(losses, chosen, rejected)
