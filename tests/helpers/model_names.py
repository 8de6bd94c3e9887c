"""The models as parameters of a test: which of them run when."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# As deep again, of the blocks of another one: resnet26, vgg16, vit and reference_vgg16.
DEEPER = ("resnet50", "vgg19", "vit_scratch", "reference_vgg19")


def marked(names: Iterable[str], quick: Collection[str] = ()) -> list[Any]:
    """The quick ones without a mark, the others slow, those that add only depth nightly."""
    marks = {name: [] if name in quick else [pytest.mark.nightly if name in DEEPER else pytest.mark.slow] for name in names}
    return [pytest.param(name, marks=marks[name]) for name in marks]
