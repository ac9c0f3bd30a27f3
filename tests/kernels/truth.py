"""Independent truth for kernels: textbook formulas in float64."""

import math

import torch


def entropy64(logits):
    """Normalised entropy and its gradient for u's gradient 1."""
    a = logits.double()
    if a.shape[1] == 1:
        z = a[:, 0].abs()
        h = torch.nn.functional.softplus(-z) + z * torch.sigmoid(-z)
        return h / math.log(2), -a * torch.sigmoid(a) * torch.sigmoid(-a) / math.log(2)
    log_p = torch.log_softmax(a, 1)
    h = -(log_p.exp() * log_p).sum(1)
    norm = math.log(a.shape[1])
    grad = -log_p.exp() * (log_p + h.unsqueeze(1)) / norm
    return h / norm, grad
