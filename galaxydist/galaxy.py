"""Record of one galaxy, and the protocol of a survey."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from galaxydist.errors import UserError

if TYPE_CHECKING:  # commands that only read class and variant names import no numpy
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

# Class counts of the official file, in the order of the labels.
GALAXY10_COUNTS = (1081, 1853, 2645, 2027, 334, 2043, 1829, 2628, 1423, 1873)

SPLITS = ("train", "val", "test")
# A fourth part of some surveys: galaxies too close to another split's part of the sky. It is stored and counted, and no model is
# trained, chosen or evaluated on it.
MARGIN = "margin"
# All parts that are stored, in the order of their codes.
STORED_SPLITS = (*SPLITS, MARGIN)


def check_not_margin(split: str) -> None:
    """Raise a UserError with the reason if ``split`` is the margin, on which no model is evaluated."""
    if split == MARGIN:
        raise UserError(
            "a model is not evaluated on the split margin: its galaxies are within one cutout width of another split's part of "
            f"the sky, so that training galaxies may be visible in their images. Choose {', '.join(SPLITS)}"
        )


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as the bytes of its file, for copying without re-encoding.

    Args:
        data: the file's bytes.
        format: ``"jpg"`` or ``"png"``.
        file: the file's name, for messages; may be empty.
    """

    data: bytes
    format: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class Galaxy:
    """One galaxy.

    Args:
        id: unique in its survey; letters, digits, ``_``, ``-`` and ``+`` only (WebDataset cuts a name at its first dot).
        image: H x W x 3 uint8 RGB pixels, or the bytes of the image file.
        label: class number, or None if unlabelled.
        ra, dec: position on the sky in degrees (J2000), or None.
        extras: other properties (redshift, pixel scale, the survey's own name): plain JSON values.
    """

    id: str
    image: "NDArray[np.uint8] | EncodedImage"
    label: int | None
    ra: float | None = None
    dec: float | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


class Survey(Protocol):
    """A source of galaxies; rows are numbered 0 ... N-1 in storage order.

    Attributes:
        name: the data set's name in tables and figures (``galaxy10_decals``, ``simulated``, a folder's name).
        variant: ``original`` or ``balanced``.
        class_names: by label.
        labels: N int64, the label of every row; -1 if unlabelled.
        splits: split name -> sorted int64 rows. A row is in one split or in none (the balanced variant leaves most out). The
            names are ``SPLITS``, and ``MARGIN`` where a survey has such galaxies.
        source_hash: SHA-256 (hex) of the source's galaxies, labels and splits.
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
        """Yield the galaxies of rows ``start`` ... ``stop - 1``, in order.

        It opens its own files, so that processes may share a survey.
        """
        ...


@runtime_checkable
class DivisibleSurvey(Survey, Protocol):
    """A survey with data of its own for each row, of which a process gets only those that it reads."""

    def part(self, start: int, stop: int) -> Survey:
        """Return a survey that can only read rows ``start`` ... ``stop - 1``, under the same numbers; its splits are empty."""
        ...


# Variants of a survey: all galaxies, or an equal number of each class.
Variant = Literal["original", "balanced"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
