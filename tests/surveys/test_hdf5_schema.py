"""Writing survey files: the official schema, piece by piece, whole or not at all."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from galaxydist.surveys.hdf5_schema import COLUMNS, SurveyFileWriter
from tests.helpers.survey_files import run_with_file_limit, write_survey


def test_written_survey_file_has_the_galaxy10_schema(tmp_path: Path) -> None:
    labels = write_survey(tmp_path / "deep" / "s.h5")
    with h5py.File(tmp_path / "deep" / "s.h5") as h5:
        assert set(h5) == {"images", "ans", "ra", "dec", "redshift", "pxscale"}
        assert h5["images"].shape == (120, 256, 256, 3) and h5["images"].dtype == np.uint8
        assert {name: h5[name].dtype for name in COLUMNS} == dict(COLUMNS)
        assert np.array_equal(h5["ans"][:], labels) and h5["ans"].dtype == np.uint8
        assert h5.attrs["survey"] == "simulated" and h5.attrs["seed"] == 0


def test_interrupted_survey_file_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), SurveyFileWriter(tmp_path / "s.h5", 5):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_survey_file_with_too_few_galaxies_is_removed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="0 of 5"), SurveyFileWriter(tmp_path / "s.h5", 5):
        pass
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_while_writing_a_survey_is_reported_and_leaves_no_file(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from galaxydist.errors import UserError
from tests.helpers.survey_files import write_survey
try:
    write_survey(Path({str(tmp_path / "s.h5")!r}))
except UserError as error:
    print(error)
"""
    result = run_with_file_limit(code, 5_000_000)
    assert "no room left" in result.stdout and "s.h5" in result.stdout, result
    assert result.returncode == 0 and list(tmp_path.iterdir()) == []
