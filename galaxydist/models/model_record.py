"""Record of a run's model: what has to be known to build it again without the files that it came from."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """Facts about a model beyond its recipe; a checkpoint holds them as plain JSON values.

    Args:
        architecture: timm's name without a tag; None for a model of this package or of an own function.
        arguments: timm's arguments for the architecture (``model_args`` of a repository's config.json).
        pretrained_cfg: timm's facts about the weights: input size, mean, standard deviation, classifier.
        source: file or repository with revision of the published weights that the run started from.
        licence: of these weights, as their source names it.
        code: SHA-256 of the source file of an own function.
    """

    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    licence: str | None = None
    code: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any] | None) -> Self:
        """Return the record of a checkpoint; checkpoints of older versions have none."""
        known = {item.name for item in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in (plain or {}).items() if name in known})
