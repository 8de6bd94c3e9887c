"""The architectures, and how a recipe becomes a model."""

from galaxydist.models.build import build_model, input_statistics
from galaxydist.models.groups import no_decay_names, parameter_groups
from galaxydist.models.published import fetch_weights
from galaxydist.models.registry import MODEL_NAMES
from galaxydist.models.weights import write_weights

__all__ = [
    "MODEL_NAMES",
    "build_model",
    "fetch_weights",
    "input_statistics",
    "no_decay_names",
    "parameter_groups",
    "write_weights",
]
