"""The architectures, and how a recipe becomes a model. Names are imported when they are used: a login node needs no torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galaxydist.models.build import build_model, input_statistics
    from galaxydist.models.param_groups import no_decay_names, parameter_groups
    from galaxydist.models.registry import MODEL_NAMES
    from galaxydist.models.weights import fetch_weights, write_weights

__all__ = [
    "MODEL_NAMES",
    "build_model",
    "fetch_weights",
    "input_statistics",
    "no_decay_names",
    "parameter_groups",
    "write_weights",
]

_MODULES = {
    "build": ("build_model", "input_statistics"),
    "groups": ("no_decay_names", "parameter_groups"),
    "published": ("fetch_weights",),
    "registry": ("MODEL_NAMES",),
    "weights": ("write_weights",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
