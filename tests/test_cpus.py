"""How many cores a process may use: binding, quotas of its control groups, and a fair share among a node's processes."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cpus import available_cores, bound_cores, cpu_quota, decoding_threads, fair_share, start_workers


def lay(root: Path, contents: dict[str, str]) -> Path:
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("contents", "quota"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        # A limit above the process's own group holds too, the smallest counts.
        (
            {
                "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
                "sys/fs/cgroup/slurm/job_7/step_0/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/slurm/job_7/cpu.max": "350000 100000\n",
                "sys/fs/cgroup/slurm/cpu.max": "max 100000\n",
            },
            3.5,
        ),
        # Version 1, in a container: the path is the host's, the mount the container's.
        (
            {
                "proc/self/cgroup": "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            math.inf,
        ),
        ({"proc/self/cgroup": "not what it was\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, math.inf),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "plenty\n"}, math.inf),
    ],
)
def test_cpu_quota_is_the_smallest_of_the_cgroups_above(tmp_path: Path, contents: dict[str, str], quota: float) -> None:
    assert cpu_quota(lay(tmp_path, contents)) == quota


@pytest.mark.parametrize(
    ("bound", "number", "quota", "cores"),
    [
        ([range(64)], 0, math.inf, 64),
        ([range(64)], 0, 2.0, 2),
        ([range(64)], 0, 1.5, 2),
        ([range(64)], 0, 0.2, 1),
        ([range(16)] * 4, 3, math.inf, 4),
        ([range(16)] * 3, 0, math.inf, 5),
        ([range(2)] * 8, 0, math.inf, 1),
        # Each with cores of its own, as srun binds them.
        ([range(8), range(8, 16)], 1, math.inf, 8),
        ([range(8), range(8, 16)], 1, 8.0, 4),
        # Two share four, one has its own.
        ([range(4), range(4), range(4, 10)], 0, math.inf, 2),
        ([range(4), range(4), range(4, 10)], 2, math.inf, 6),
        # Thirds that must add up to one.
        ([range(3)] * 3, 0, math.inf, 1),
        ([range(6)] * 6, 0, math.inf, 1),
        ([range(49)] * 49, 0, math.inf, 1),
    ],
)
def test_fair_share_divides_cores_among_the_processes_of_a_node(
    bound: list[range], number: int, quota: float, cores: int
) -> None:
    assert fair_share(bound, number, quota) == cores


@given(st.lists(st.frozensets(st.integers(0, 40), min_size=1), min_size=1, max_size=9))
def test_fair_shares_never_exceed_the_available_cores(bound: list[frozenset[int]]) -> None:
    shares = [fair_share(bound, number, math.inf) for number in range(len(bound))]
    assert all(1 <= share <= len(cores) for share, cores in zip(shares, bound, strict=True))
    # One core at least for each process, even where there are fewer cores than processes.
    assert sum(share for share in shares if share > 1) <= len(frozenset().union(*bound))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_available_cores_of_a_process_bound_to_one_core_is_1() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from galaxydist.cpus import available_cores; print(available_cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_available_cores_of_this_process_are_within_its_bound_cores() -> None:
    assert 1 <= available_cores() <= len(bound_cores())
    assert available_cores(10**6) == 1


def test_decoding_threads_leave_two_cores_to_the_trainer_only_with_a_gpu() -> None:
    assert [decoding_threads(cores, has_gpu=True) for cores in (1, 2, 3, 4, 16)] == [1, 1, 1, 2, 14]
    assert [decoding_threads(cores, has_gpu=False) for cores in (1, 2, 16)] == [1, 2, 16]


class InterruptsWhileSent:
    """Its pickling, which a worker does after the task, interrupts the worker as Ctrl-C does."""

    def __reduce__(self) -> tuple[type[int], tuple[()]]:
        os.kill(os.getpid(), signal.SIGINT)
        return int, ()


@pytest.mark.multiprocess
def test_worker_that_is_interrupted_while_it_sends_a_result_sends_it_whole() -> None:
    with start_workers(1) as pool:
        assert pool.submit(InterruptsWhileSent).result(timeout=300) == 0
        with pytest.raises(KeyboardInterrupt):
            pool.submit(int).result(timeout=300)
