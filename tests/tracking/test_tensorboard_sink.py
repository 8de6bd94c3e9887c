"""TensorBoard's event files, read back with its own reader: each step once, with its time, after kills and repeated pushes."""

import random
from pathlib import Path
from typing import Any

import pytest

from galaxydist.cli.main import main
from galaxydist.tracking.tensorboard_sink import event_files
from tests.helpers.runs import read_losses
from tests.helpers.trackio_files import write_long_run


def read_back(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def test_tensorboard_files_hold_each_step_once_also_after_a_killed_push(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_long_run(tmp_path / "long", 40)
    folder, arguments = run.path / "tensorboard", ["track", "push", str(run.path), "--to", "tensorboard"]
    (run.evaluation_dir / "test-confusion.png").write_bytes(run.galaxy_image(0).read_bytes())
    assert main(arguments) == 0
    assert f"tensorboard --logdir {tmp_path}" in capsys.readouterr().out
    expected = read_losses(run.path)

    def check() -> None:
        found = read_back(folder)
        points = found.Scalars("train/loss")
        assert {point.step: point.value for point in points} == pytest.approx(expected, rel=1e-6)
        assert [point.wall_time for point in points] == [1.7e9 + step for step in expected]  # when they were logged
        assert [(point.step, point.value) for point in found.Scalars("test/accuracy")] == [(40, 0.5)]
        assert [point.step for point in found.Scalars("val/recall/round")] == [20, 40]
        assert [image.step for image in found.Images("val/confusion")] == [20, 40]
        (figure,) = found.Images("test/confusion")
        assert figure.encoded_image_string == run.galaxy_image(0).read_bytes() and figure.width == 16
        assert {"_hparams_/session_start_info", "_hparams_/experiment"} <= set(found.PluginTagToContent("hparams"))

    check()
    before = {path: path.read_bytes() for path in event_files(folder)}
    assert main(arguments) == 0 and {path: path.read_bytes() for path in event_files(folder)} == before

    # A killed push leaves a file that ends anywhere, also within a record; the next one adds what is missing.
    (path,) = before
    for cut in [0, 9, *random.Random(0).sample(range(100, len(before[path])), 6)]:
        for other in event_files(folder):
            other.unlink()
        path.write_bytes(before[path][:cut])
        assert main(arguments) == 0
        check()
