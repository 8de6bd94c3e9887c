"""Probe of an encoder: linear and nearest-neighbour classification of frozen features, with confidence intervals.

Logistic regression on standardised features, and k nearest neighbours by their cosine (Caron et al. 2021, arXiv:2104.14294,
section 4.1, has both as the usual measures of an encoder). The strength of the regularisation and k are chosen by balanced
accuracy on the validation split, or, if it is small, inside the training split; the test split is only counted.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import write_json
from galaxydist.distributed import World
from galaxydist.errors import UserError
from galaxydist.evaluation.bootstrap import LEVEL, count_intervals
from galaxydist.evaluation.leakage import ZOOBOT_NOTE
from galaxydist.evaluation.metrics import metrics_from_counts
from galaxydist.explore.encoder import PIXELS, Encoder, open_pixels, pixels_info
from galaxydist.explore.features_file import (
    EncoderInfo,
    FeatureRows,
    FeaturesFile,
    FeaturesInfo,
    features_path,
    read_features,
    write_features,
)
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.shards.manifest import Manifest

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
# Inverse strengths of the regularisation (scikit-learn's C), and numbers of neighbours, that are tried.
STRENGTHS = tuple(10.0**power for power in range(-6, 2))
NEIGHBOURS = (100, 50, 20, 10, 5, 3, 1)
# Strengths after the best one that are still tried: weak regularisation takes longest to fit, and is rarely better.
PATIENCE = 2
# Settings chosen on fewer validation galaxies would be chosen by chance.
LEAST_VALIDATION = 500
# Without such a validation split, five parts of the training split take turns; of a large one, one part is held out.
NUM_PARTS, LARGE = 5, 5000
LEAST_GALAXIES = 10
# Galaxies of a split that are classified: of 1,280 features, some GB of memory.
MOST_GALAXIES = 100_000
MAX_ITERATIONS = 2000
METRICS = {"balanced_accuracy": "balanced accuracy", "accuracy": "accuracy"}
METHODS = {
    "largest_class": "largest class",
    "logistic_regression": "logistic regression, C",
    "nearest_neighbours": "nearest neighbours, k",
}
# Galaxies whose similarities to all training galaxies are in memory at once.
_AT_ONCE = 512


@dataclass(frozen=True)
class LabelledFeatures:
    """Features N x D and labels N of the labelled galaxies of a split."""

    features_ND: Floats
    labels_N: Labels

    def __len__(self) -> int:
        return len(self.labels_N)

    def of(self, rows: Any) -> "LabelledFeatures":
        """Return some of the galaxies."""
        return LabelledFeatures(self.features_ND[rows], self.labels_N[rows])

    def first(self, fraction: float) -> "LabelledFeatures":
        """Return the first galaxies of each class in storage order, which is random: a fraction of them, at least one."""
        rows = [np.flatnonzero(self.labels_N == label) for label in np.unique(self.labels_N)]
        return self.of(np.sort(np.concatenate([of_class[: max(1, round(fraction * len(of_class)))] for of_class in rows])))


# Predictions of many settings: (setting, labels (M,) of the evaluated galaxies), in the order of the settings.
Predictions = Iterator[tuple[float, Labels]]


def regressions(train: LabelledFeatures, test: LabelledFeatures, strengths: Sequence[float]) -> Predictions:
    """Yield the labels that logistic regression predicts, at each strength of the regularisation, the strongest first."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(train.labels_N)) == 1:  # few galaxies, and in one part no other class
        yield from ((strength, np.repeat(train.labels_N[:1], len(test))) for strength in strengths)
        return
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)  # each fit starts from the one before
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=strength).fit(train.features_ND, train.labels_N)
        yield strength, np.asarray(model.predict(test.features_ND), np.int64)


def nearest(train: LabelledFeatures, test: LabelledFeatures, numbers: Sequence[int]) -> Predictions:
    """Yield the most frequent label among the k training galaxies of the largest cosine, for each number k.

    Neighbours have the weight 1 + cosine, which decides between labels that are equally frequent.
    """
    most, classes = max(numbers), np.unique(train.labels_N)
    directions_ND = _directions(train.features_ND)
    votes_kMK = np.zeros((len(numbers), len(test), len(classes)), np.float32)
    code_N = np.searchsorted(classes, train.labels_N)
    for start in range(0, len(test), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        cosine_BN = _directions(test.features_ND[part]) @ directions_ND.T
        near_BK = np.argpartition(-cosine_BN, most - 1, axis=1)[:, :most]
        near_BK = np.take_along_axis(near_BK, np.argsort(-np.take_along_axis(cosine_BN, near_BK, 1), axis=1, kind="stable"), 1)
        weight_BK = 1 + np.take_along_axis(cosine_BN, near_BK, 1)
        rows_B = np.arange(len(near_BK))[:, None]
        for index, number in enumerate(numbers):
            np.add.at(votes_kMK[index, part], (rows_B, code_N[near_BK[:, :number]]), weight_BK[:, :number])
    for number, votes_MK in zip(numbers, votes_kMK, strict=True):
        yield number, classes[votes_MK.argmax(axis=1)]


def _directions(features_ND: Floats) -> Floats:
    directions_ND: Floats = features_ND / np.maximum(np.linalg.norm(features_ND, axis=1, keepdims=True), 1e-12)
    return directions_ND


Method = Callable[[LabelledFeatures, LabelledFeatures, Sequence[Any]], Predictions]


def choose(
    method: Method, settings: Sequence[Any], pairs: Sequence[tuple[LabelledFeatures, LabelledFeatures]], patience: int
) -> Any:
    """Return the setting of the best balanced accuracy over the second parts of the pairs; of equal ones the first.

    Args:
        method: ``regressions`` or ``nearest``.
        settings: from the simplest on.
        pairs: galaxies to fit and to count.
        patience: settings after the best one that are still tried.
    """
    truth = np.concatenate([counted.labels_N for _, counted in pairs])
    running = [method(fitted, counted, settings) for fitted, counted in pairs]
    best, best_score, since = settings[0], -1.0, 0
    for found in zip(*running, strict=True):
        score = balanced_accuracy(truth, np.concatenate([predicted for _, predicted in found]))
        since = 0 if score > best_score else since + 1
        if score > best_score:
            best, best_score = found[0][0], score
        if since > patience:
            break
    return best


def balanced_accuracy(labels_N: Labels, predicted_N: Labels) -> float:
    """Return the mean recall of the classes that have galaxies."""
    return float(np.mean([(predicted_N[labels_N == label] == label).mean() for label in np.unique(labels_N)]))


def training_parts(train: LabelledFeatures) -> list[tuple[LabelledFeatures, LabelledFeatures]]:
    """Return pairs of galaxies to fit and to count inside the training split: stratified, in storage order, which is random."""
    part_N = np.empty(len(train), np.int64)
    part_N[np.argsort(train.labels_N, kind="stable")] = np.arange(len(train)) % NUM_PARTS
    used = range(1 if len(train) >= LARGE else min(NUM_PARTS, len(train)))
    return [(train.of(part_N != part), train.of(part_N == part)) for part in used]


def classify(train: LabelledFeatures, val: LabelledFeatures | None, test: LabelledFeatures) -> dict[str, tuple[float, Labels]]:
    """Return name of the method -> chosen setting and predicted labels of the test galaxies.

    Args:
        train, test: two classes or more in ``train``.
        val: for the choice of the settings; None: inside ``train``.
    """
    train, test, *others = _standardised(train, test, *([] if val is None else [val]))
    pairs = training_parts(train) if val is None else [(train, others[0])]
    strength = choose(regressions, STRENGTHS, pairs, PATIENCE)
    path = STRENGTHS[: STRENGTHS.index(strength) + 1]
    *_, (_, regressed) = regressions(train, test, path)
    fewest = min(len(fitted) for fitted, _ in pairs)
    numbers = [number for number in NEIGHBOURS if number <= fewest]
    number = choose(nearest, numbers, pairs, len(numbers))
    ((_, voted),) = nearest(train, test, [number])
    return {"logistic_regression": (strength, regressed), "nearest_neighbours": (number, voted)}


def _standardised(train: LabelledFeatures, *others: LabelledFeatures) -> list[LabelledFeatures]:
    """Return all galaxies with features of mean 0 and deviation 1 in ``train``."""
    mean_D, std_D = train.features_ND.mean(axis=0), train.features_ND.std(axis=0)
    std_D[std_D <= 1e-12 * np.abs(mean_D)] = 1.0  # constant
    return [LabelledFeatures((part.features_ND - mean_D) / std_D, part.labels_N) for part in (train, *others)]


def check_labels(manifest: Manifest) -> None:
    """Check that a data set can be probed.

    Raises:
        UserError: no test split, too few labelled galaxies, or fewer than two classes.
    """
    for split, least in (("train", LEAST_GALAXIES), ("test", 1)):
        labels_N = manifest.labels(split) if split in manifest.splits else np.empty(0, np.int32)
        known = labels_N[labels_N >= 0]
        if len(known) < least:
            raise UserError(
                f"{manifest.location} has {len(known)} labelled galaxies in its {split} split"
                + ("" if len(labels_N) == len(known) else f" ({len(labels_N) - len(known)} have no label)")
                + f"; a probe needs at least {least}: make shards of labelled galaxies with a training and a test split "
                "(galaxydist data shard)"
            )
        classes = np.unique(known)
        if split == "train" and len(classes) < 2:
            raise UserError(
                f"{manifest.location} has one class of labelled training galaxies ({manifest.class_names[int(classes[0])]}); a "
                "probe tells classes apart and needs two or more"
            )


@dataclass(frozen=True)
class ProbeOptions:
    """Options of a probe.

    Args:
        folder: folder of the files of features.
        out: file of the encoder's features; None: a file in ``folder``, named by all that the numbers depend on.
        overwrite: replace a file of other features at ``out``.
        fractions: of the training galaxies of each class to fit, for a learning curve.
    """

    folder: Path
    out: Path | None = None
    overwrite: bool = False
    fractions: tuple[float, ...] = (1.0,)


def probe(manifest: Manifest, encoder: Encoder, world: World, options: ProbeOptions) -> tuple[dict[str, Any], Path]:
    """Probe an encoder: store the features of a data set, classify them, and write the numbers beside them as JSON.

    Args:
        manifest: the data set.
        encoder: features are only computed if no file has them already.
        world: one process.
        options: the files.

    Returns:
        The numbers, as in the JSON file, and the path of the features.

    Raises:
        UserError: too few labels, a galaxy that cannot be read, another file in the way, or a full disk.
    """
    check_labels(manifest)
    info = FeaturesInfo.of(encoder.info, manifest)
    path = options.out or features_path(options.folder, info)
    stored = _reusable(path, info, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    if stored is None:
        write_features(path, info, encoder.features(manifest, world))
        stored = read_features(path)
    baseline = _pixel_features(manifest, world, path.parent)
    result = {
        **{key: value for key, value in asdict(info).items() if key != "encoder"},
        "encoder": asdict(info.encoder),
        "level": LEVEL,
        **_evaluate(manifest, {"encoder": stored, "pixels": baseline}, options.fractions),
    }
    write_json(path.with_suffix(".json"), result)
    return result, path


def _reusable(path: Path, info: FeaturesInfo, options: ProbeOptions) -> FeaturesFile | None:
    """Return the file of these features, if there is one.

    Raises:
        UserError: ``options.out`` is another file.
    """
    if path.suffix != ".parquet":
        raise UserError(f"--out {path}: features are a Parquet file; name it like {path.with_suffix('.parquet')}")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; give the name of a file in it")
    if not path.exists() or options.overwrite:
        return None
    stored = read_features(path)
    if different := info.differences(stored.info):
        raise UserError(
            f"{path} has other features ({'; '.join(different)}); give another file with --out, or --overwrite to replace it"
        )
    return stored


def _pixel_features(manifest: Manifest, world: World, folder: Path) -> FeaturesFile:
    info = FeaturesInfo.of(pixels_info(manifest), manifest)
    path = features_path(folder, info)
    if not path.exists():
        write_features(path, info, open_pixels(manifest, world).features(manifest, world))
    return read_features(path)


def _evaluate(manifest: Manifest, files: Mapping[str, FeaturesFile], fractions: Sequence[float]) -> dict[str, Any]:
    """Return the numbers of each method on each kind of features, and of the largest class."""
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    for kind, file in tqdm(files.items(), desc="classify", disable=None):
        train, val, test = (_labelled(file.split(name, MOST_GALAXIES)) for name in ("train", "val", "test"))
        if not rows:
            largest = np.full(len(test), np.bincount(train.labels_N).argmax())
            rows.append({"features": None, "method": "largest_class", **_numbers(test.labels_N, largest, manifest)})
        chosen_on = val if len(val) >= LEAST_VALIDATION else None
        for fraction in fractions:
            part = train.first(fraction)
            for method, (setting, predicted) in classify(part, chosen_on, test).items():
                kept = {"features": kind, "method": method, "num_train": len(part), "setting": setting}
                rows.append({**kept, **_numbers(test.labels_N, predicted, manifest)})
    chosen = "parts of the training split" if chosen_on is None else "the validation split"
    return {"count": len(test), "num_train": len(train), "chosen_on": chosen, "results": rows}


def _labelled(rows: FeatureRows) -> LabelledFeatures:
    is_labelled = rows.labels_B >= 0
    return LabelledFeatures(rows.features_BD[is_labelled].astype(np.float64), rows.labels_B[is_labelled].astype(np.int64))


def _numbers(labels_N: Labels, predicted_N: Labels, manifest: Manifest) -> dict[str, Any]:
    confusion_KK = np.zeros((manifest.num_classes, manifest.num_classes), np.int64)
    np.add.at(confusion_KK, (labels_N, predicted_N), 1)
    metrics, intervals = metrics_from_counts(confusion_KK, 0.0, manifest.class_names), count_intervals(confusion_KK)
    return {
        **{name: metrics[name] for name in METRICS},
        "intervals": {name: intervals[name] for name in METRICS},
        "confusion": confusion_KK.tolist(),
    }


def render_result(result: Mapping[str, Any]) -> str:
    """Return the numbers as a table, with their intervals."""
    encoder = EncoderInfo.from_dict(result["encoder"])
    names = {None: "", "encoder": f"{encoder.model}, ", "pixels": f"{PIXELS}, "}
    averaged = ", mean over D4" if encoder.tta == "d4" else ""
    labels = []
    for row in result["results"]:
        setting = f" = {row['setting']:g}" if "setting" in row else ""
        part = "" if row.get("num_train", result["num_train"]) == result["num_train"] else f" (N = {row['num_train']:,})"
        labels.append(f"{names[row['features']]}{METHODS[row['method']]}{setting}{part}")
    width = max(map(len, labels))
    is_galaxy10 = tuple(result["class_names"]) == GALAXY10_CLASSES and not result["dataset"].startswith("simulated")
    notes = [f"note: {ZOOBOT_NOTE}"] if is_galaxy10 and "zoobot" in encoder.model else []
    lines = [f"{'':{width}}   " + "   ".join(f"{METRICS[name]:24}" for name in METRICS)]
    for label, row in zip(labels, result["results"], strict=True):
        ends = [(row[name], *row["intervals"][name]) for name in METRICS]
        lines.append(f"{label:{width}}   " + "   ".join(f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in ends))
    return "\n".join(
        [
            f"{result['dataset']} ({result['variant']}), test split, N = {result['count']:,}; fitted to {result['num_train']:,}",
            f"{encoder.title}: {encoder.num_features:,} features of {encoder.image_size} pixels{averaged}",
            "",
            *(line.rstrip() for line in lines),
            "",
            f"{result['level']:.0%} intervals; C and k chosen on {result['chosen_on']}",
            *notes,
        ]
    )
