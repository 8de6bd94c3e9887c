"""``galaxydist publish``: a whole folder whose model predicts what its run predicts."""

import numpy as np

import galaxydist
from tests.helpers.blobs import BlobSurvey
from tests.helpers.published import PublishedRun


def test_a_published_folder_predicts_the_same_as_its_run_bit_for_bit(published_run: PublishedRun) -> None:
    images = np.stack([np.asarray(galaxy.image) for galaxy in BlobSurvey().read(0, 24)])
    known = galaxydist.load_predictor(published_run.run_dir, device="cpu")(images)
    found = galaxydist.load_predictor(published_run.folder, device="cpu")(images)
    np.testing.assert_array_equal(found.logits, known.logits)
    assert found.temperature == known.temperature is not None
    assert found.class_names == known.class_names
