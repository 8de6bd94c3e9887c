"""Maker of the shipped table of the official Galaxy10's split.

``python -m tests.helpers.split_table POSITIONS.csv`` makes the table again from the official file's ``row,label,ra,dec``.
"""

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.surveys import official_split
from galaxydist.surveys.official_split import CODE_NAMES, SPLIT_SEED, TABLE, OfficialSplit
from galaxydist.surveys.split import TEST, VAL, build_candidates, split_balanced, split_original

COLUMNS = "row,label,original,balanced,conflicting,in_original_val,group"


def format_table(split: OfficialSplit) -> bytes:
    """Return the table's text: one line per row of the official file."""
    lines = [COLUMNS]
    for row, label in enumerate(split.labels):
        original, balanced, group = split.original[row], split.balanced[row], split.sky.groups[row]
        lines.append(
            f"{row},{label},{CODE_NAMES[int(original)]},{CODE_NAMES[int(balanced)]},{int(split.sky.conflicting[row])},"
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
    table = Path(official_split.__file__).with_name(TABLE)
    sys.stdout.write(f"SHA-256 of the table: {write_table(Path(sys.argv[1]), table)}\n")
