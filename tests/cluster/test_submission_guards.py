"""What a submission needs around it: no second sender, no signal in between, no variables of the shell that change the job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from galaxydist.cluster.profile import load_cluster
from galaxydist.cluster.submit import adopt_settings, submission_lock, without_job_environment
from galaxydist.errors import UserError

HOLD = """
import sys
from pathlib import Path
from galaxydist.cluster.submit import submission_lock
with submission_lock(Path(sys.argv[1])):
    print("alone", flush=True)
    sys.stdin.read()
"""
SEND = """
import signal, sys
from pathlib import Path
from galaxydist.cluster.submit import deferred_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
with deferred_signals():
    print("sending", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1]).touch()
Path(sys.argv[1] + ".after").touch()
"""


def test_submission_lock_excludes_a_second_command_on_the_same_folder(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "alone\n"
    with pytest.raises(UserError, match="Another command has been submitting"), submission_lock(tmp_path, wait_s=0.2):
        pass
    with submission_lock(tmp_path / "elsewhere", wait_s=0.2):
        pass
    other.kill()  # the lock goes with the process
    other.communicate()
    with submission_lock(tmp_path, wait_s=0.2):
        pass


def test_adopt_settings_takes_shell_variables_only_for_keys_the_profile_leaves_open(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("account: astro\n")
    profile = load_cluster([f"cluster={tmp_path / 'mine.yaml'}"]).config
    shell = {"SBATCH_ACCOUNT": "other", "SBATCH_PARTITION": "gpu", "SBATCH_TIMELIMIT": "1", "GALAXYDIST_DATA": "/data"}
    adopted = adopt_settings(profile, shell)
    assert (adopted.account, adopted.partition, adopted.qos) == ("astro", "gpu", None)
    assert adopted.environment == ("GALAXYDIST_DATA=/data",)
    assert adopt_settings(adopted, {"GALAXYDIST_DATA": "/elsewhere"}) == adopted


def test_variables_of_a_job_and_of_sbatch_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    hidden = ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SBATCH_TIMELIMIT", "SUBMITIT_EXECUTOR", "MASTER_PORT", "RANK")
    for name in hidden:
        monkeypatch.setenv(name, "1")
    with without_job_environment():
        assert not set(hidden) & set(os.environ) and os.environ["SLURM_CONF"] == "/etc/slurm.conf"
    assert all(os.environ[name] == "1" for name in hidden)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_during_submission_is_deferred_until_the_job_is_recorded(sent: signal.Signals, tmp_path: Path) -> None:
    record = tmp_path / "record"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", SEND, str(record)], text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "sending\n"
    process.send_signal(sent)
    time.sleep(0.2)
    assert process.poll() is None and not record.exists()
    process.communicate("go on\n")
    assert process.returncode == -sent
    assert record.exists() and not record.with_name("record.after").exists()
