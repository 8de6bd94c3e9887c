"""Analysis of a data set: all numbers that the exploration page shows."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.explore.checks import Neighbours, Pair, find_duplicates, find_neighbours
from galaxydist.explore.datasets import ExploredDataset, Positions, choose_sample, random_order
from galaxydist.explore.embedding import Map, map_sample
from galaxydist.explore.scan import ImageScan, scan_images


@dataclass(frozen=True)
class Findings:
    """Results of the analysis.

    Args:
        sample_size: number of galaxies in the sample, including unreadable ones.
        scan: measurements of the readable images of the sample.
        positions: of all galaxies.
        neighbours: None if no position is known.
        duplicates: pairs of indices in the sample.
        map: None if the sample is too small for a map.
    """

    population: ExploredDataset
    sample_size: int
    seed: int
    scan: ImageScan
    positions: Positions
    neighbours: Neighbours | None
    duplicates: list[Pair]
    map: Map | None

    def members(self, label: int) -> NDArray[np.int64]:
        """Return the indices in the sample of the galaxies of a class, in random order."""
        ordered = np.searchsorted(self.scan.rows, random_order(self.scan.rows, self.seed))
        return np.asarray(ordered[self.scan.labels[ordered] == label])

    @property
    def odd_images(self) -> dict[str, int]:
        """Kind of odd image -> number of such images in the sample."""
        unreadable = {"unreadable": len(self.scan.problems)} if self.scan.problems else {}
        return unreadable | {kind: len(indices) for kind, indices in self.scan.odd_images.items()}


def analyse(population: ExploredDataset, *, sample: int, seed: int) -> Findings:
    """Analyse a data set.

    Args:
        sample: largest number of galaxies whose images are read.
        seed: of the choice of galaxies and of the map.
    """
    rows = choose_sample(population, sample, seed)
    scan = scan_images(population.source.images(rows), population.labels_N, len(rows))
    positions = population.source.positions() or Positions(*np.full((3, len(population)), np.nan))
    return Findings(
        population=population,
        sample_size=len(rows),
        seed=seed,
        scan=scan,
        positions=positions,
        neighbours=find_neighbours(population, positions) if positions.known.any() else None,
        duplicates=find_duplicates(scan.hash_nB, scan.digests, scan.thumbnails_nHWC),
        map=map_sample(scan, seed, population.features),
    )


def pixel_statistics(scan: ImageScan, label: int) -> dict[str, Any]:
    """Return mean and deviation of each channel (R G B, full scale 1) and shares of 0 and 255 for a class of the sample."""
    shares_CL = scan.histograms[label] / scan.histograms[label].sum(axis=1, keepdims=True)
    values_L = np.arange(256) / 255.0
    mean_C = shares_CL @ values_L
    std_C = np.sqrt(np.maximum(shares_CL @ values_L**2 - mean_C**2, 0))
    return {
        "galaxies": int((scan.labels == label).sum()),
        "mean": mean_C.round(4).tolist(),
        "std": std_C.round(4).tolist(),
        "black": round(float(shares_CL[:, 0].mean()), 4),
        "saturated": round(float(shares_CL[:, 255].mean()), 4),
    }


def summary(findings: Findings) -> dict[str, Any]:
    """Return the results as plain values, for ``survey.json``."""
    population, scan = findings.population, findings.scan
    known = {label: name for label, name in population.groups.items() if label in scan.histograms}
    near = findings.neighbours
    measured = {"half_light_radius_px": scan.size_n, "brightness": scan.brightness_n, "sky": scan.sky_n, "colour": scan.colour_n}
    return {
        "dataset": population.dataset,
        "variant": population.variant,
        "source": {"kind": population.kind, "location": population.location, "sha256": population.source_hash},
        "class_names": list(population.groups.values()),
        "counts": population.counts(),
        "sample": {"chosen": findings.sample_size, "read": len(scan), "of": len(population), "seed": findings.seed},
        "pixels": {name: pixel_statistics(scan, label) for label, name in known.items()},
        "median": {
            name: {quantity: _median(values_n[scan.labels == label]) for quantity, values_n in measured.items()}
            for label, name in known.items()
        },
        "neighbours": None
        if near is None
        else {
            "positions": int(findings.positions.known.sum()),
            "pairs": len(near.pairs_P2),
            "galaxies": near.num_galaxies,
            "pairs_across_splits": int(near.across_P.sum()),
            "places_with_two_labels": int(near.two_labels_P.sum()),
        },
        "duplicates": [
            {
                "ids": [scan.ids[pair.first], scan.ids[pair.second]],
                "identical": pair.identical,
                "hash_distance": pair.distance,
                "correlation": round(pair.correlation, 4),
            }
            for pair in findings.duplicates
        ],
        "map": None
        if findings.map is None
        else {
            "galaxies": len(findings.map.indices),
            "features": findings.map.features,
            "agreement": round(findings.map.agreement, 4),
            "by_chance": round(findings.map.by_chance, 4),
            "doubtful": [
                {"id": scan.ids[one.index], "label": int(scan.labels[one.index]), "neighbours": one.other, "votes": one.votes}
                for one in findings.map.doubtful
            ],
        },
        "odd": {kind: [scan.ids[index] for index in indices] for kind, indices in scan.odd_images.items()},
        "unreadable": scan.problems,
    }


def label_conflicts(findings: Findings) -> int:
    """Return the number of duplicates with two labels."""
    labels = findings.scan.labels
    return sum(1 for pair in findings.duplicates if labels[pair.first] != labels[pair.second])


def split_leaks(findings: Findings) -> int:
    """Return the number of duplicates across splits, without those in the margin."""
    rows = findings.scan.rows
    first, second = np.array([(pair.first, pair.second) for pair in findings.duplicates], np.int64).reshape(-1, 2).T
    return int(findings.population.are_across(rows[first], rows[second]).sum())


def widths(scan: ImageScan) -> str:
    common = Counter(scan.widths_n.tolist()).most_common()
    if not common:
        return "no image could be read"
    return f"{common[0][0]} pixels wide" if len(common) == 1 else f"{min(common)[0]} to {max(common)[0]} pixels wide"


def _median(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return round(float(np.median(finite)), 4) if len(finite) else None
