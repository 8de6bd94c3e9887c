"""The record of one galaxy, which every stage passes on, and what a survey of galaxies offers to the stages after it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:  # the names of classes and variants are read by commands that need no numpy
    import numpy as np
    from numpy.typing import NDArray

# Folder names of the ten Galaxy10 DECaLS classes, in the official order of the labels.
GALAXY10_CLASSES = (
    "disturbed",
    "merging",
    "round_smooth",
    "in_between_round_smooth",
    "cigar_shaped_smooth",
    "barred_spiral",
    "unbarred_tight_spiral",
    "unbarred_loose_spiral",
    "edge_on_without_bulge",
    "edge_on_with_bulge",
)

# The official file's class counts, in the order of the labels.
GALAXY10_COUNTS = (1081, 1853, 2645, 2027, 334, 2043, 1829, 2628, 1423, 1873)

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture as the bytes of its file, for copying without a second encoding.

    Args:
        data: the file's bytes.
        format: ``"jpg"`` or ``"png"``.
        file: its name, for messages; empty where it has none.
    """

    data: bytes
    format: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class Galaxy:
    """One galaxy.

    Args:
        id: unique in its survey; letters, digits, ``_``, ``-`` and ``+`` only (WebDataset cuts a name at its first dot).
        image: H x W x 3 uint8 RGB pixels, or the bytes of the picture's file.
        label: class number, or None where nobody has labelled it.
        ra, dec: position on the sky in degrees (J2000), or None.
        extras: everything else worth keeping (redshift, pixel scale, the survey's own name): plain JSON values.
    """

    id: str
    image: "NDArray[np.uint8] | EncodedImage"
    label: int | None
    ra: float | None = None
    dec: float | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


class Survey(Protocol):
    """Where galaxies come from. Rows are numbered 0 ... N-1 in storage order.

    Attributes:
        name: the data set's name, which every table and figure carries (``galaxy10_decals``, ``simulated``, a folder's name).
        variant: ``original`` or ``balanced``.
        class_names: by label.
        labels: N int64, the label of every row.
        splits: split name -> sorted int64 rows. A row may stand in no split (the balanced variant leaves most out), never in two.
        source_hash: SHA-256 (hex) that changes whenever the source's galaxies, labels or splits do.
        slab_length: number of consecutive rows that are cheapest to read together.
    """

    @property
    def name(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> "NDArray[np.int64]": ...
    @property
    def splits(self) -> "Mapping[str, NDArray[np.int64]]": ...
    @property
    def source_hash(self) -> str: ...
    @property
    def slab_length(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Galaxy]:
        """The galaxies of rows ``start`` ... ``stop - 1``, in order.

        Opens what it needs itself, so that processes may share a survey.
        """
        ...


# The data sets of a survey: all of its galaxies, or as many of each class as the rarest has.

Variant = Literal["original", "balanced"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
