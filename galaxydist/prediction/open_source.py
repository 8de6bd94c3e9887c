"""Opening of any source of galaxies to label: shards, surveys, tables, folders and files of images."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from galaxydist.errors import UserError, name_some
from galaxydist.galaxy import Survey
from galaxydist.object_store import is_url
from galaxydist.prediction.sources import SOURCE_ID, PredictionSource, ShardsToLabel, SurveyToLabel
from galaxydist.shards.manifest import MANIFEST_NAME
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.store_errors import MissingError
from galaxydist.surveys.file_kinds import folder_kind
from galaxydist.surveys.folder_scan import CLUTTER, natural_key, safe_name
from galaxydist.surveys.image_files import EXTENSIONS
from galaxydist.surveys.image_table import TableOptions, open_table
from galaxydist.surveys.survey_sources import SourceOptions, open_survey
from galaxydist.surveys.table_columns import ColumnNames
from galaxydist.surveys.tables.listed_images import ListedImages
from galaxydist.surveys.tables.tar_scan import names_tars

logger = logging.getLogger(__name__)

# Characters with a meaning in patterns of tars.
_META = {*"{},*?[]\\"}


@dataclass(frozen=True)
class SourceChoice:
    """A user's choice of galaxies.

    Args:
        locations: one manifest, survey file, table or folder (path or URL), or several image files and folders of images.
        split: of shards; None: all.
        options: of tables and other surveys.
        cache: for the files of a URL.
    """

    locations: tuple[str, ...]
    split: str | None
    cache: CacheConfig
    options: SourceOptions = field(default_factory=SourceOptions)

    @property
    def has_options(self) -> bool:
        """True if the user gave options of tables and other surveys."""
        return replace(self.options, cache_dir=None) != SourceOptions()


def open_source(choice: SourceChoice) -> PredictionSource:
    """Open the galaxies to label, by what the locations hold.

    Raises:
        UserError: nothing there, a file that holds no images, or options that do not belong to the source.
    """
    if len(choice.locations) > 1 and all(map(names_tars, choice.locations)) and not _META & {*"".join(choice.locations)}:
        choice = replace(choice, locations=(f"{{{','.join(choice.locations)}}}",))  # a shell has expanded a pattern of tars
    if len(choice.locations) > 1:
        _refuse_options(choice, "several files and folders of images")
        return SurveyToLabel(open_images([Path(location) for location in choice.locations]), " ".join(choice.locations))
    (location,) = choice.locations
    path = Path(location)
    if location.endswith(MANIFEST_NAME) or (path / MANIFEST_NAME).is_file():
        return _open_shards(choice, location)
    if names_tars(location) and choice.split is None:
        return _open_survey(choice, location)
    if is_url(location):
        return _open_url(choice, location)
    if choice.split is not None:
        raise UserError(f"--split {choice.split} is for shards, and {location} has none; all its galaxies are labelled")
    if _is_images(path):
        _refuse_options(choice, "images")
        return SurveyToLabel(open_images([path]), location)
    if not path.exists() and not Path(location.partition("[")[0]).exists():  # TABLE.fits[2]
        raise UserError(f"{location}: there is no such file or folder, and no shards of that name in the data root")
    if path.is_dir() and folder_kind(path) is None:
        raise UserError(f"{location} has no images ({', '.join(sorted(EXTENSIONS))}), and is not a folder of shards")
    return _open_survey(choice, location)


def _open_survey(choice: SourceChoice, location: str) -> SurveyToLabel:
    options = replace(choice.options, is_labelled=False)
    return SurveyToLabel(open_survey(location, source=options), location, repr(replace(options, cache_dir=None)))


def _open_url(choice: SourceChoice, url: str) -> PredictionSource:
    """Open shards at a URL, and what else is there if it has no manifest."""
    if not choice.has_options:
        try:
            return _open_shards(choice, url)
        except UserError as error:
            if choice.split is not None or not isinstance(error.__cause__ or error.__context__, MissingError):
                raise
    return _open_survey(choice, url)


def _open_shards(choice: SourceChoice, location: str) -> ShardsToLabel:
    if choice.has_options:
        raise UserError(
            f"{location}: --images, --scale, names of columns and the like are for tables, not for shards: remove them"
        )
    manifest = open_shards(location, choice.cache)
    names = [name for name, split in manifest.splits.items() if split.num_samples]
    if choice.split is None:
        return ShardsToLabel(manifest, tuple(names))
    if choice.split not in names:
        raise UserError(f"--split {choice.split}: {manifest.location} has galaxies in {', '.join(names)}")
    return ShardsToLabel(manifest, (choice.split,))


def _refuse_options(choice: SourceChoice, kind: str) -> None:
    if choice.split is not None:
        raise UserError(f"--split {choice.split} is for shards, and this is {kind}: remove it")
    if choice.has_options:
        raise UserError(f"--images, --scale and names of columns are for tables, and this is {kind}: remove them")


def _is_images(path: Path) -> bool:
    """Return True for an image file, and for a folder with image files anywhere inside that is no other data set."""
    if not path.is_dir():
        return path.is_file() and path.suffix.lower() in EXTENSIONS
    return folder_kind(path) is None and next(_walk(path, Counter()), None) is not None


def open_images(paths: Sequence[Path]) -> Survey:
    """Open image files, and folders with all images inside, as a survey without labels.

    Of a single folder the column ``file`` is relative to it; otherwise files are named as they were given.

    Raises:
        UserError: a path does not exist or is no image, or there are no images.
    """
    import pyarrow as pa

    left_out: Counter[str] = Counter()
    single = paths[0] if len(paths) == 1 and paths[0].is_dir() else None
    files: list[str] = []
    for path in paths:
        if path.is_dir():
            found = sorted((file for file in _walk(path, left_out)), key=natural_key)
            files += found if single is not None else [str(path / file) for file in found]
        elif not path.exists():
            raise UserError(f"{path}: there is no such file or folder")
        elif path.suffix.lower() not in EXTENSIONS:
            raise UserError(f"{path} is not an image ({', '.join(sorted(EXTENSIONS))}); give tables and surveys one at a time")
        else:
            files.append(str(path))
    if left_out:
        logger.warning("left out: %s", name_some([f"{count} {ending}" for ending, count in left_out.most_common()]))
    name = safe_name((single or paths[0].absolute().parent).resolve().name)
    shown = [os.fsencode(file).decode("utf-8", "backslashreplace") for file in files]
    images = ListedImages(name, single or Path(), files)
    columns = ColumnNames(file="file", label="none", id="none", split="none", ra="none", dec="none")
    survey = open_table(pa.table({"file": shown}), images, str(paths[0]), TableOptions(name, columns, is_labelled=False))
    # The stems of the files, which may be equal in two folders; the ids made from them are not.
    return replace(survey, extras=survey.extras.drop_columns([SOURCE_ID]))


def _walk(folder: Path, left_out: Counter[str]) -> Iterator[str]:
    """Yield the image files in a folder and its subfolders, relative to it; count other files by ending."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name.lower() not in CLUTTER)
        for file in files:
            ending = Path(file).suffix.lower()
            if file.startswith("."):
                continue
            path = Path(root) / file
            if ending not in EXTENSIONS:
                left_out[ending or "without an ending"] += 1
            elif path.is_file() or not path.exists():
                yield os.path.relpath(path, folder)
            else:
                left_out["pipe, socket or device"] += 1  # reading it might never end
