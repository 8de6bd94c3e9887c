"""What all tests share: the real galaxies beside the checkout, where they are."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Workers of the test run share the cores: threads that wait for one another on cores that are busy with another worker are slow.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_CORES[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(_CORES)]})

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data to test with (read-only)."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data of ../shared/data is not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="session")
def real_sample(real_data: Path) -> Path:
    """999 real Galaxy10 DECaLS images, one folder a label (0-9)."""
    sample = real_data / "galaxy10_decals_sample"
    if not sample.is_dir():
        pytest.skip("../shared/data/galaxy10_decals_sample is not on this machine")
    return sample


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a small data set of drawn blobs, in three classes."""
    from galaxydist.shards.write import write_shards
    from tests.blobs import BlobSurvey

    return write_shards(BlobSurvey(), tmp_path_factory.mktemp("blobs") / "shards", encoding="png", shard_size=16, workers=1).path
