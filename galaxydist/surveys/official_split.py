"""The frozen split of the official Galaxy10 DECaLS file, shipped as a small table (``tests/helpers/split_table.py`` makes it)."""

import gzip
import hashlib
import io
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.galaxy import SPLITS
from galaxydist.surveys.split import NONE, Codes, Sky

NAME = "galaxy10_decals"
TABLE = "galaxy10_split.csv.gz"
# SHA-256 of the table's text. The split never changes, because models are compared on it.
TABLE_SHA256 = "933b45709aa9176f90e231558c0101871ed8b8bcabb1e6133389baf3349f2290"
# The first seed for which ties in the two stratified cuts give the class counts of the published test set
# (108/185/264/203/34/205/183/263/142/187). It also decides which galaxies are in the test set.
SPLIT_SEED = 95

CODE_NAMES = {NONE: "", **dict(enumerate(SPLITS))}


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
    by_name = {name: code for code, name in CODE_NAMES.items()}
    original, balanced = (np.array([by_name[name] for name in column], np.int8) for column in columns[2:4])
    groups = np.array([int(group) if group else -1 for group in columns[6]], np.int64)
    return OfficialSplit(columns[1].astype(np.uint8), original, balanced, Sky(groups, columns[4] == "1"))
