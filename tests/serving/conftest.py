"""One published run for all tests of this folder; a test that changes it works on a copy."""

import pytest

from tests.helpers.published import PublishedRun, publish_blobs


@pytest.fixture(scope="session")
def published_run(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    return publish_blobs(tmp_path_factory.mktemp("published"))
