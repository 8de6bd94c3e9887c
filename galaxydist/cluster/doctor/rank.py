"""One rank of the doctor's job."""

import os
import socket
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from galaxydist.cluster.doctor.exchange import look_at_shared_files, look_for_signal, time_all_reduce, watch_signal
from galaxydist.cluster.doctor.link import Link, open_link
from galaxydist.cluster.doctor.network import interface_address, machine_id, own_address
from galaxydist.cluster.doctor.node import Place, check_machine
from galaxydist.cluster.doctor.report import RankReport
from galaxydist.cluster.doctor.software import library_versions
from galaxydist.cluster.worker import adopt_job
from galaxydist.cpus import bound_cores
from galaxydist.paths import data_root

# The ranks start together, but torch may take a minute to load from a network file system.
MEETING_S = 150.0
# Any of the parts; longer than the longest of their own limits.
PART_S = 180.0
GROUP_S = 60.0


@dataclass(frozen=True)
class Examination:
    """What the ranks are told.

    Args:
        folder: of the reports; all nodes must see it.
        data_dir: the data root, where it was given.
        scratch: of the profile, perhaps with variables of the ranks.
        gpus_per_node: that the job has.
        meeting_s: how long a rank waits for the others.
    """

    folder: Path
    data_dir: Path | None
    scratch: Path | None
    gpus_per_node: int
    meeting_s: float = MEETING_S


def examine_task(examination: Examination) -> None:
    """What submitit calls on every rank."""
    environ = os.environ
    adopt_job(environ)
    examine(examination, environ)


def examine(examination: Examination, environ: Mapping[str, str]) -> RankReport:
    """Look at the node, then at what the ranks can do together; the report is written after each part.

    Args:
        examination: what is looked at.
        environ: with torch's variables (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Raises:
        RuntimeError: another rank does not answer. The report says where this one was.
    """
    rank = int(environ["RANK"])
    host = environ.get("SLURMD_NODENAME") or socket.gethostname()
    report = RankReport(rank, int(environ["WORLD_SIZE"]), host, machine_id())
    folder = examination.folder
    try:
        with watch_signal() as watch:
            report.write(folder, "node")
            _look_at_node(report, examination, environ)
            report.write(folder, "rendezvous")
            link = _join(report, environ, examination.meeting_s)
            report.write(folder, "clocks")
            report.clock_s, report.round_trip_s = link.measure_clock()
            report.write(folder, "shared files")
            report.seen_s, report.renamed_s, report.torn = look_at_shared_files(link, folder)
            report.write(folder, "signal")
            report.signal_s, report.signal_error = look_for_signal(link, watch, environ)
            _time_backends(report, link, folder, int(environ["LOCAL_RANK"]))
            link.leave()
            report.write(folder, "done")
    except Exception as error:
        report.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        report.write(folder, report.part)
        traceback.print_exc()
        raise
    return report


def _look_at_node(report: RankReport, examination: Examination, environ: Mapping[str, str]) -> None:
    local_rank, ranks = int(environ["LOCAL_RANK"]), int(environ["LOCAL_WORLD_SIZE"])
    report.versions = library_versions()
    report.cores = len(bound_cores())
    given = environ.get("SLURM_CPUS_PER_TASK")
    report.cpus_per_task = int(given) if given else None
    report.visible_gpus = environ.get("CUDA_VISIBLE_DEVICES")
    report.slurm_gpus = environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS")
    report.num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices: tuple[str, ...] = ()
    if report.num_gpus:
        number = local_rank % report.num_gpus
        devices = (f"cuda:{number}",)
        report.gpu = str(torch.cuda.get_device_properties(number).uuid)
    place = Place(
        data_root=data_root(examination.data_dir, environ),
        runs=examination.folder,
        scratch=examination.scratch,
        gpus=min(examination.gpus_per_node, 1),
        ranks=ranks,
        devices=devices,
    )
    report.checks = check_machine(place, environ)
    report.interface = environ.get("GLOO_SOCKET_IFNAME")
    report.address = interface_address(report.interface) if report.interface else own_address(socket.gethostname())
    report.store = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"


def _join(report: RankReport, environ: Mapping[str, str], meeting_s: float) -> Link:
    start = time.monotonic()
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    link = open_link(host, port, report.rank, report.world_size, meeting_s)
    link.meet("rendezvous")
    link.set_timeout(PART_S)
    report.meeting_s = time.monotonic() - start
    return link


def _time_backends(report: RankReport, link: Link, folder: Path, local_rank: int) -> None:
    """gloo always, nccl where every rank has a GPU."""
    report.write(folder, "all-reduce, gloo")
    report.timings["gloo"] = time_all_reduce(link, "gloo", torch.device("cpu"), timeout_s=GROUP_S)
    can_nccl = report.num_gpus > 0 and dist.is_nccl_available()
    if all(link.gather("has a GPU", can_nccl)):
        report.write(folder, "all-reduce, nccl")
        device = torch.device("cuda", local_rank % report.num_gpus)
        torch.cuda.set_device(device)
        report.timings["nccl"] = time_all_reduce(link, "nccl", device, timeout_s=GROUP_S)
