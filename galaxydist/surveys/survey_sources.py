"""Opening of any survey: an HDF5 file in Galaxy10's schema or an image folder."""

from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.surveys.folder_scan import check_name
from galaxydist.surveys.galaxy10 import Galaxy10Survey, open_galaxy10
from galaxydist.surveys.image_folder import TREES, FolderSurvey, open_image_folder

_CONFLICTING = ("keep", "drop")


def open_survey(
    path: Path,
    variant: str = "original",
    *,
    conflicting: str = "keep",
    name: str | None = None,
    fold: tuple[int, int] | None = None,
    classes: str | None = None,
    has_val: bool = True,
) -> FolderSurvey | Galaxy10Survey:
    """Open an HDF5 file in Galaxy10's schema, or an image folder.

    Args:
        path: the file or folder.
        variant: ``original`` or ``balanced``.
        conflicting: ``keep`` or ``drop`` galaxies that the source lists with two labels (all of them are in train).
        name: the data set's name; None to take it from the source.
        fold: ``(k, n)``: instead of the split, fold k (0 ... n-1) of an n-fold cross-validation: train, test, and an empty val.
        classes: ``galaxy10``: the folders, named 0 to 9 or by class, are Galaxy10's classes. A survey file's always are.
        has_val: False for no validation split; image folders only.

    Raises:
        UserError: the source is missing or unusable, or the options contradict each other.
    """
    path = Path(path)
    if variant not in TREES:
        raise UserError(f"no variant {variant!r}; choose from {', '.join(TREES)}")
    if conflicting not in _CONFLICTING:
        raise UserError(f"conflicting={conflicting!r}; choose from {', '.join(_CONFLICTING)}")
    if fold is not None and variant != "original":
        raise UserError("a cross-validation uses the original variant; remove variant or fold")
    if name is not None:
        check_name(name)
    if path.is_dir():
        return open_image_folder(path, variant, conflicting=conflicting, name=name, fold=fold, classes=classes, has_val=has_val)
    if not has_val:
        raise UserError(
            f"{path} is a survey file, whose split with its validation part is fixed; --val 0 is for folders of images"
        )
    return open_galaxy10(path, variant, conflicting=conflicting, name=name, fold=fold)
