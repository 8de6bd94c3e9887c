"""Surveys (HDF5 files, folders of pictures) for exploration: only the rows that are wanted are read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.evaluation.exploration.population import Picture, Population, Position, Positions
from galaxydist.galaxy import EncodedImage, Galaxy, Survey
from galaxydist.surveys.galaxy10 import Galaxy10Survey
from galaxydist.surveys.image_files import decode_file
from galaxydist.surveys.image_folder import FolderSurvey

# Slabs up to this length are several of the file's own chunks: single rows of them are read on their own.
_SHORT_SLAB = 32


def survey_population(survey: Survey, path: Path) -> Population:
    """The galaxies of a survey that stand in a split, in the order of its rows."""
    names = tuple(name for name, rows in survey.splits.items() if len(rows))
    codes = np.full(len(survey.labels), -1, np.int8)
    for number, name in enumerate(names):
        codes[survey.splits[name]] = number
    placed = np.flatnonzero(codes >= 0)
    is_folder = isinstance(survey, FolderSurvey)
    return Population(
        dataset=survey.name,
        variant=survey.variant,
        kind="folder of pictures" if is_folder else "HDF5 file",
        location=str(path),
        source_hash="" if is_folder else survey.source_hash,
        class_names=survey.class_names,
        labels_N=np.asarray(survey.labels[placed], np.int64),
        split_names=names,
        split_N=codes[placed],
        source=SurveySource(survey, placed),
    )


@dataclass(frozen=True)
class SurveySource:
    """A survey as a :class:`~galaxydist.evaluation.exploration.population.Source`; ``placed`` are the survey's own rows."""

    survey: Survey
    placed: NDArray[np.int64]

    def pictures(self, rows: NDArray[np.int64]) -> Iterator[Picture]:
        """See ``Source``."""
        wanted = self.placed[rows]
        for row, (start, stop, own) in zip(*_runs(rows, wanted, self._step()), strict=True):
            numbers = dict(zip(own.tolist(), row.tolist(), strict=True))
            try:
                for number, galaxy in enumerate(self.survey.read(start, stop), start=start):
                    if number in numbers:
                        yield _picture(numbers.pop(number), galaxy)
            except UserError as error:
                for number, place in numbers.items():
                    yield Picture(place, self._name(number), None, Position(), str(error))

    def positions(self) -> Positions | None:
        """See ``Source``."""
        if isinstance(self.survey, Galaxy10Survey):
            columns = self.survey.file.columns
            found = [np.asarray(columns[name][self.placed], np.float64) for name in ("ra", "dec", "redshift")]
        elif isinstance(self.survey, FolderSurvey):
            rows = [self.survey.rows[number] for number in self.placed.tolist()]
            values = [(row.ra, row.dec, row.extras.get("redshift")) for row in rows]
            found = [*np.array([[_number(value) for value in line] for line in values], np.float64).reshape(-1, 3).T]
        else:
            return None
        return Positions(np.arange(len(self.placed)), *found)

    def candidates(self, number: int, seed: int) -> None:
        """See ``Source``."""
        del number, seed

    def _step(self) -> int:
        """Rows that are read together: a picture file on its own, so that a damaged one takes no other with it."""
        is_folder = isinstance(self.survey, FolderSurvey)
        return 1 if is_folder or self.survey.slab_length <= _SHORT_SLAB else self.survey.slab_length

    def _name(self, number: int) -> str:
        if isinstance(self.survey, FolderSurvey):
            return self.survey.files[number]
        return self.survey.galaxy_id(number) if isinstance(self.survey, Galaxy10Survey) else f"row {number}"


_Run = tuple[int, int, NDArray[np.int64]]


def _runs(rows: NDArray[np.int64], wanted: NDArray[np.int64], step: int) -> tuple[list[NDArray[np.int64]], list[_Run]]:
    """For each slab that holds wanted rows: our numbers of them, and (first, stop, the survey's numbers)."""
    if not len(wanted):
        return [], []
    cuts = np.flatnonzero(np.diff(wanted // step)) + 1
    parts = np.split(wanted, cuts)
    return np.split(rows, cuts), [(int(part[0]), int(part[-1]) + 1, part) for part in parts]


def _picture(row: int, galaxy: Galaxy) -> Picture:
    position = Position(*(_number(value) for value in (galaxy.ra, galaxy.dec, galaxy.extras.get("redshift"))))
    image = galaxy.image
    if not isinstance(image, EncodedImage):
        return Picture(row, galaxy.id, image, position)
    try:
        return Picture(row, galaxy.id, decode_file(image.data, galaxy.id), position)
    except UserError as error:
        return Picture(row, galaxy.id, None, position, str(error))


def _number(value: object) -> float:
    """A number that may be missing, as a float; nan where it is, or is no number."""
    return float(value) if isinstance(value, int | float) else np.nan
