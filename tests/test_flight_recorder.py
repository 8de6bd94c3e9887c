"""The variables of torch's flight recorder."""

from pathlib import Path

from galaxydist.distributed import flight_recorder_variables, set_flight_recorder, write_flight_record


def test_flight_recorder_variables_are_set_if_unset(tmp_path: Path) -> None:
    environ: dict[str, str] = {"HOME": "/root"}
    set_flight_recorder(environ)
    assert environ == {"HOME": "/root", "TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    set_flight_recorder(environ, tmp_path)
    assert environ.pop("TORCH_FR_DUMP_TEMP_FILE") == str(tmp_path / "flight_rank_")
    assert len(environ) == 3


def test_flight_recorder_keeps_user_variables_under_old_and_new_names(tmp_path: Path) -> None:
    """torch lets the new name win over the older one, so setting it would overrule the user."""
    users = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/x", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    environ = dict(users)
    set_flight_recorder(environ, tmp_path)
    assert environ == users
    assert {name for names in flight_recorder_variables(tmp_path) for name in names} > users.keys()


def test_flight_record_without_a_process_group_is_not_written(tmp_path: Path) -> None:
    assert write_flight_record(tmp_path, 0) is None
    assert not list(tmp_path.iterdir())
