"""What all tests share: the real galaxies beside the checkout, where they are."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from mini_cluster import MiniCluster

# How long an example takes says how busy the machine is, not whether the code is right. make test-nightly tries more of them.
settings.register_profile("quick", deadline=None, max_examples=30)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile("quick")

# As galaxydist sets it for itself, before torch is imported: threads that spin while they wait take the cores from one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests import onnxruntime themselves; see serving/app/onnx_runtime.py.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Workers of the test run share the cores: threads that wait for one another on cores that are busy with another worker are slow.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_CORES[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(_CORES)]})

# A shell's background job ignores these signals, and so would every program that a test starts and sends them to.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays to the end anyway: torch, and thousands of tests."""
    gc.collect()
    gc.freeze()


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
    from galaxydist.shards.writer.writer import write_shards
    from tests.helpers.blobs import BlobSurvey

    return write_shards(BlobSurvey(), tmp_path_factory.mktemp("blobs") / "shards", encoding="png", shard_size=16, workers=1).path


@pytest.fixture(scope="session")
def started_cluster(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[MiniCluster]":
    """A real SLURM of two nodes, for all tests of this process."""
    from mini_cluster import MiniCluster, MiniClusterError, check_programs

    try:
        check_programs()
    except MiniClusterError as error:
        pytest.skip(f"no SLURM: {error}")
    cluster = MiniCluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def mini_cluster(started_cluster: "MiniCluster", monkeypatch: pytest.MonkeyPatch) -> "Iterator[MiniCluster]":
    """The real SLURM for one test; jobs that it leaves are cancelled, and daemons that it kills are started again."""
    from tests.helpers.mini_cluster import tidy

    environ = started_cluster.environ()
    for name in set(os.environ) - set(environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", environ["SLURM_CONF"])
    yield started_cluster
    tidy(started_cluster)
