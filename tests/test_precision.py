"""Precision of the forward pass by device."""

import pytest

from galaxydist.distributed import resolve_precision
from galaxydist.errors import UserError


@pytest.mark.parametrize(
    ("precision", "has_gpu", "capability", "expected"),
    [
        ("auto", False, None, "no"),
        ("auto", True, (9, 0), "bf16"),
        ("auto", True, (7, 5), "fp16"),
        ("bf16", False, None, "bf16"),
        ("no", True, (9, 0), "no"),
        ("fp16", True, (7, 0), "fp16"),
    ],
)
def test_precision_follows_the_device(precision: str, has_gpu: bool, capability: tuple[int, int] | None, expected: str) -> None:
    assert resolve_precision(precision, has_gpu, capability) == expected


def test_fp16_without_a_gpu_is_refused_suggesting_precision_auto() -> None:
    with pytest.raises(UserError, match=r"train\.precision=auto"):
        resolve_precision("fp16", has_gpu=False, capability=None)
