"""The frozen split of the official Galaxy10 DECaLS file, shipped as a small table.

``python -m galaxydist.surveys.official_split POSITIONS.csv`` makes the table again from the official file's ``row,label,ra,dec``.
"""

import gzip
import hashlib
import io
import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES, SPLITS
from galaxydist.surveys.split import NONE, TEST, VAL, Codes, Sky, build_candidates, split_balanced, split_original

NAME = "galaxy10_decals"
TABLE = "galaxy10_split.csv.gz"
# SHA-256 of the table's text. The split never changes, because models are compared on it.
TABLE_SHA256 = "933b45709aa9176f90e231558c0101871ed8b8bcabb1e6133389baf3349f2290"
# The first seed for which ties in the two stratified cuts give the class counts of the published test set
# (108/185/264/203/34/205/183/263/142/187). It also decides which galaxies are in the test set.
SPLIT_SEED = 95

_COLUMNS = "row,label,original,balanced,conflicting,in_original_val,group"
_CODE_NAMES = {NONE: "", **dict(enumerate(SPLITS))}


@dataclass(frozen=True, slots=True)
class OfficialSplit:
    """Labels (N,) uint8, split codes of both variants (N,) int8, and the neighbours of the official file's N rows."""

    labels: NDArray[np.uint8]
    original: Codes
    balanced: Codes
    sky: Sky


@cache
def read_official_split() -> OfficialSplit:
    """Read the shipped table.

    Raises:
        UserError: the installed table is damaged.
    """
    try:
        text = gzip.decompress(files("galaxydist.surveys").joinpath(TABLE).read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"the shipped split {TABLE} cannot be read ({error}); install galaxydist again") from error
    if hashlib.sha256(text).hexdigest() != TABLE_SHA256:
        raise UserError(f"the shipped split {TABLE} is damaged: its SHA-256 is not {TABLE_SHA256}; install galaxydist again")
    columns = np.loadtxt(io.BytesIO(text), delimiter=",", skiprows=1, dtype="U5", unpack=True)
    by_name = {name: code for code, name in _CODE_NAMES.items()}
    original, balanced = (np.array([by_name[name] for name in column], np.int8) for column in columns[2:4])
    groups = np.array([int(group) if group else -1 for group in columns[6]], np.int64)
    return OfficialSplit(columns[1].astype(np.uint8), original, balanced, Sky(groups, columns[4] == "1"))


def format_table(split: OfficialSplit) -> bytes:
    """Return the table's text: one line per row of the official file."""
    lines = [_COLUMNS]
    for row, label in enumerate(split.labels):
        original, balanced, group = split.original[row], split.balanced[row], split.sky.groups[row]
        lines.append(
            f"{row},{label},{_CODE_NAMES[int(original)]},{_CODE_NAMES[int(balanced)]},{int(split.sky.conflicting[row])},"
            f"{int(balanced == TEST and original == VAL)},{group if group >= 0 else ''}"
        )
    return ("\n".join(lines) + "\n").encode()


def write_table(positions_csv: Path, table_path: Path) -> str:
    """Write the table computed from ``row,label,ra,dec`` lines in row order, and return the SHA-256 of its text."""
    columns = np.genfromtxt(positions_csv, delimiter=",", names=True)
    assert np.array_equal(columns["row"], np.arange(len(columns))), "rows must be 0 ... N-1 in order"
    labels = columns["label"].astype(np.uint8)
    galaxies = build_candidates(labels, columns["ra"], columns["dec"], class_names=GALAXY10_CLASSES, seed=SPLIT_SEED)
    original = split_original(galaxies)
    text = format_table(OfficialSplit(labels, original, split_balanced(galaxies, original), galaxies.sky))
    table_path.write_bytes(gzip.compress(text, 9, mtime=0))
    return hashlib.sha256(text).hexdigest()


if __name__ == "__main__":
    sys.stdout.write(f"SHA-256 of the table: {write_table(Path(sys.argv[1]), Path(__file__).with_name(TABLE))}\n")
