"""What all tests share: the real galaxies beside the checkout, where they are."""

from pathlib import Path

import pytest

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
