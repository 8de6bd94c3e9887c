"""The data sets of a survey: all of its galaxies, or as many of each class as the rarest has."""

from typing import Literal, get_args

Variant = Literal["original", "balanced"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
