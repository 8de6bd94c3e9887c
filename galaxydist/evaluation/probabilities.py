"""Probabilities of logits, in float64."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def softmax(logits_NK: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities of logits, N x K float64."""
    return np.exp(log_softmax(logits_NK))


def log_softmax(logits_NK: NDArray[Any]) -> NDArray[np.float64]:
    """Logarithms of the probabilities, N x K float64; nan in a row with a logit that is not finite."""
    with np.errstate(invalid="ignore"):
        shifted_NK = logits_NK.astype(np.float64) - np.max(logits_NK, axis=1, keepdims=True, initial=-np.inf)
        log_NK: NDArray[np.float64] = shifted_NK - np.log(np.exp(shifted_NK).sum(axis=1, keepdims=True))
    return log_NK
