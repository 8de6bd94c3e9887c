"""Galaxies of one data set whose pictures are equal, pixel for pixel: some in two splits, some with two labels.

They are said and never moved: a split that the user or a survey gives stays as it is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.encode import PIXEL_HASH
from galaxydist.shards.manifest import Manifest

# Groups of equal pictures that a message names.
NAMED = 5


@dataclass(frozen=True)
class EqualPictures:
    """Groups of equal pictures, each as its galaxies' ``split/id``.

    Args:
        across: groups that stand in more than one split.
        two_labels: groups that have more than one label.
    """

    across: list[list[str]]
    two_labels: list[list[str]]


def find_equal_pictures(manifest: Manifest) -> EqualPictures | None:
    """Look at the hashes in the catalogues; None where they have none, which shards made by an earlier version do not.

    Raises:
        UserError: a catalogue that is missing or damaged.
    """
    splits = [name for name, split in manifest.splits.items() if split.num_samples]
    if not manifest.catalogues:
        return None
    hashes = []
    for code, split in enumerate(splits):
        table = read_catalogue(manifest, split, (PIXEL_HASH,))
        if not table.column_names:
            return None
        column = table.column(PIXEL_HASH)
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        found = np.empty(len(rows), [("hash", "<i8"), ("split", "<i4"), ("row", "<i8"), ("label", "<i4")])
        found["hash"], found["row"] = column.drop_null().to_numpy(), rows
        found["split"], found["label"] = code, manifest.labels(split)[rows]
        hashes.append(found)
    across, two_labels = _groups(np.concatenate(hashes))
    wanted = {split for group in (*across, *two_labels) for split in group["split"].tolist()}
    ids = {code: read_catalogue(manifest, splits[code], ("id",)).column("id") for code in wanted}

    def name(group: NDArray[np.void]) -> list[str]:
        return [f"{splits[code]}/{ids[code][row].as_py()}" for code, row in group[["split", "row"]].tolist()]

    return EqualPictures([name(group) for group in across], [name(group) for group in two_labels])


def describe_equal_pictures(manifest: Manifest) -> list[str]:
    """Lines about a data set's equal pictures; none where all is well."""
    found = find_equal_pictures(manifest)
    if found is None:
        return [
            f"{manifest.location} has no hashes of its pictures (an earlier version made it), so that equal pictures in two "
            "splits are not found; make the shards anew to have them compared"
        ]
    lines = []
    if found.across:
        lines.append(
            f"{_pictures(found.across, 'is', 'are')} in more than one split, pixel for pixel: {_some(found.across)}. A model is "
            "judged there on what it has learnt from: leave them out of one of the splits"
        )
    if found.two_labels:
        lines.append(f"{_pictures(found.two_labels, 'has', 'have')} two labels, pixel for pixel: {_some(found.two_labels)}")
    return lines


def _pictures(groups: list[list[str]], singular: str, plural: str) -> str:
    return f"1 picture {singular}" if len(groups) == 1 else f"{len(groups)} pictures {plural}"


def _groups(rows: NDArray[np.void]) -> tuple[list[NDArray[np.void]], list[NDArray[np.void]]]:
    """Groups of equal hashes that stand in several splits, and those that have several labels."""
    rows = rows[np.argsort(rows["hash"], kind="stable")]
    starts = np.flatnonzero(np.append(True, np.diff(rows["hash"]) != 0)) if len(rows) else np.empty(0, np.int64)
    ends = np.append(starts[1:], len(rows))
    several = np.flatnonzero(ends - starts > 1)
    groups = [rows[starts[number] : ends[number]] for number in several.tolist()]
    across = [group for group in groups if len(set(group["split"].tolist())) > 1]
    return across, [group for group in groups if len(set(group["label"][group["label"] >= 0].tolist())) > 1]


def _some(groups: list[list[str]]) -> str:
    more = f" and {len(groups) - NAMED} more" if len(groups) > NAMED else ""
    return ", ".join(" = ".join(group[:NAMED]) for group in groups[:NAMED]) + more
