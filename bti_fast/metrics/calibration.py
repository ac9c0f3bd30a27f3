"""Temperature scaling: one number that brings a head's confidence in line with how often it is right."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

LOWEST, HIGHEST_TEMPERATURE = 0.05, 20.0


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T in [0.05, 20] with the least negative log-likelihood of softmax(logits / T).

    logits (N, L), labels (N,) integers (Guo et al. 2017). A yes-or-no head with logit z is the case [0, z].
    The likelihood is concave in 1 / T, so the minimum found is the only one. ValueError without cases, for
    logits that are not finite and for labels that are no class.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 2 or not len(logits) or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits: got {logits.shape} for labels {labels.shape}, needs (N, L) and (N,), N > 0"
        )
    if not np.isfinite(logits).all():
        count = int((~np.isfinite(logits)).any(1).sum())
        raise ValueError(f"logits: got NaN or Inf in {count} of {len(logits)} cases, needs finite numbers")
    if not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        raise ValueError(
            f"labels: got {labels.min()} to {labels.max()}, needs classes 0..{logits.shape[1] - 1}"
        )
    labels = labels.astype(np.int64)
    found = minimize_scalar(
        lambda inverse: negative_log_likelihood(logits * inverse, labels),
        bounds=(1 / HIGHEST_TEMPERATURE, 1 / LOWEST),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(1 / found.x)


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p of the true class."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def scaled_probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature), (N, L)."""
    return softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)
