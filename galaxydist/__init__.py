"""Distributed training for galaxy morphology.

The names below are the public Python API (docs/api.md). Each is imported at its first use, so ``import galaxydist`` is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from galaxydist.version import __version__

if TYPE_CHECKING:
    from galaxydist.api import evaluate, load_predictor, open_shards, simulate_survey, train, write_shards
    from galaxydist.loading.loader import EvalLoader, RankInfo, TrainLoader
    from galaxydist.models.build import build_model
    from galaxydist.recipe.resolve import load_recipe

__all__ = [
    "EvalLoader",
    "RankInfo",
    "TrainLoader",
    "__version__",
    "build_model",
    "evaluate",
    "load_predictor",
    "load_recipe",
    "open_shards",
    "simulate_survey",
    "train",
    "write_shards",
]

_MODULES = {
    "EvalLoader": "galaxydist.loading.loader",
    "RankInfo": "galaxydist.loading.loader",
    "TrainLoader": "galaxydist.loading.loader",
    "build_model": "galaxydist.models.build",
    "evaluate": "galaxydist.api",
    "load_predictor": "galaxydist.api",
    "load_recipe": "galaxydist.recipe.resolve",
    "open_shards": "galaxydist.api",
    "simulate_survey": "galaxydist.api",
    "train": "galaxydist.api",
    "write_shards": "galaxydist.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
