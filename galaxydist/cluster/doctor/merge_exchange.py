"""Judging what the ranks found together: rendezvous, clocks, shared files, the signal, all-reduces."""

from collections.abc import Sequence

from galaxydist.cluster.doctor.check import Check, failure, ok, warning
from galaxydist.cluster.doctor.network import is_loopback
from galaxydist.cluster.doctor.report import RankReport, Timing
from galaxydist.cluster.doctor.where import name_places

CLOCK_S = 1.0
SLOW_S = 5.0
# Of busbw, see ``check_bandwidth``. Ethernet of 1 Gbit/s carries 0.125 GB/s, InfiniBand and RoCE from 5 GB/s on.
SLOW_NCCL = 2.0
SLOW_GLOO = 0.1


def check_addresses(reports: Sequence[RankReport]) -> list[Check]:
    """By which interface and address each rank is reached."""
    known = [report for report in reports if report.store]
    if not known:
        return []
    name = "interface"
    remedy = (
        "set cluster.interface to the one with an address of the network between nodes (ib0, eth0; see `ip -br addr`): "
        "it sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    )
    lost = [report for report in known if report.address is None]
    if lost:
        asked = lost[0].interface
        what = f"there is no interface {asked} with an address" if asked else "its own name resolves to no address"
        return [failure(name, f"{what} on {name_places(lost, known)}", remedy)]
    machines = {report.machine for report in known}
    inward = [report for report in known if report.address is not None and is_loopback(report.address)]
    if inward and len(machines) > 1:
        text = f"{inward[0].address} ({_by(inward[0])}) on {name_places(inward, known)}: no other node reaches it"
        return [failure(name, text, remedy)]
    told = dict.fromkeys(f"{report.host} {report.address} ({_by(report)})" for report in known)
    alone = ", all on one machine" if len(machines) == 1 and len({report.host for report in known}) > 1 else ""
    shown = list(told)[:4]
    more = f" and {len(told) - len(shown)} more" if len(told) > len(shown) else ""
    return [ok(name, f"{', '.join(shown)}{more}{alone}")]


def _by(report: RankReport) -> str:
    return report.interface or "by its name"


def check_meeting(reports: Sequence[RankReport]) -> list[Check]:
    """Whether the ranks found one another."""
    tried = [report for report in reports if report.store]
    apart = [report for report in tried if report.meeting_s is None]
    if not tried:
        return []
    if apart:
        text = f"{name_places(apart, reports)} did not meet the others at {apart[0].store}"
        return [failure("rendezvous", text, "look at cluster.interface, at a firewall between nodes, and at the line 'ranks'")]
    slowest = max(report.meeting_s or 0.0 for report in tried)
    return [ok("rendezvous", f"{len(tried)} ranks met at {tried[0].store} within {slowest:.1f} s")]


def check_clocks(reports: Sequence[RankReport]) -> list[Check]:
    """Clocks against rank 0's."""
    known = [report for report in reports if report.clock_s is not None]
    if len(known) < 2:
        return []
    # What the way there and back leaves open cannot be held against a clock.
    sure = {report.rank: max(abs(report.clock_s or 0.0) - (report.round_trip_s or 0.0) / 2, 0.0) for report in known}
    off = [report for report in known if sure[report.rank] > CLOCK_S]
    if off:
        worst = max(off, key=lambda report: sure[report.rank])
        text = f"{worst.clock_s:+.1f} s against rank 0 on {name_places(off, known)}"
        remedy = "locks of run folders need clocks that agree within a minute: have the node's time service (chrony) looked at"
        return [warning("clocks", text, remedy)]
    worst = max(known, key=lambda report: abs(report.clock_s or 0.0))
    text = f"at most {abs(worst.clock_s or 0) * 1e3:.1f} ms apart (round trip {(worst.round_trip_s or 0) * 1e3:.1f} ms)"
    return [ok("clocks", text)]


def check_shared_files(reports: Sequence[RankReport]) -> list[Check]:
    """Whether a file of one rank, and its replacement, are seen by all."""
    looked = [report for report in reports if "shared files" in report.finished]
    if not looked:
        return []
    shared = "put the run folders on a file system that all nodes share: run.root=FOLDER"
    blind = [report for report in looked if report.seen_s is None]
    if blind:
        return [failure("shared files", f"what rank 0 writes is not seen on {name_places(blind, looked)}", shared)]
    stale = [report for report in looked if report.renamed_s is None]
    if stale:
        text = f"a file replaced by the last rank keeps its old contents on {name_places(stale, looked)}"
        return [failure("shared files", text, shared)]
    torn = [report for report in looked if report.torn]
    if torn:
        text = f"a file is replaced, and {name_places(torn, looked)} saw neither the old nor the new one for a moment"
        return [failure("shared files", text, shared)]
    slowest = max(max(report.seen_s or 0.0, report.renamed_s or 0.0) for report in looked)
    text = f"writing and replacing are seen by all within {slowest:.2f} s"
    if slowest > SLOW_S:
        return [warning("shared files", text, "the nodes keep what they know of folders (NFS: mount with a smaller actimeo)")]
    return [ok("shared files", text)]


def check_signals(reports: Sequence[RankReport], *, in_container: bool = False) -> list[Check]:
    """Whether SIGUSR2, which SLURM sends before the time limit, reaches each rank; before a preemption: ``preemption.py``.

    Args:
        reports: of the ranks.
        in_container: they run in one, which has SLURM's programs seldom.
    """
    asked = [report for report in reports if "signal" in report.finished]
    if not asked or all(report.signal_error == "no SLURM" for report in asked):
        return []
    error = next((report.signal_error for report in asked if report.signal_error is not None), None)
    if error is not None:
        return [_not_tried(error, in_container=in_container)]
    deaf = [report for report in asked if report.signal_s is None]
    if deaf:
        text = f"SIGUSR2 did not reach {name_places(deaf, asked)}"
        remedy = (
            "a preempted run loses what it did since its last save there: save more often (train.save_minutes). "
            "Does a wrapper (cluster.container) keep signals?"
        )
        return [failure("signal", text, remedy)]
    return [ok("signal", f"SIGUSR2 from SLURM reached all ranks within {max(report.signal_s or 0.0 for report in asked):.1f} s")]


def _not_tried(error: str, *, in_container: bool) -> Check:
    if in_container:
        text = f"not tried: scancel cannot be called from inside the container ({error})"
        remedy = "try it once with a run: `scancel --signal=USR2 JOB` on the login node must make it save and end"
    else:
        text = f"not tried: scancel on the node says: {error}"
        remedy = "SLURM's programs do not work on the nodes: tell its administrators"
    return warning("signal", text, remedy)


def check_bandwidth(reports: Sequence[RankReport]) -> list[Check]:
    """All-reduces of each backend.

    Algorithm bandwidth is bytes of the tensor / seconds; bus bandwidth is that times 2 (n - 1) / n for n ranks, which does not
    depend on n where a link is the limit (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
    """
    return [_judge(backend, reports) for backend in dict.fromkeys(name for report in reports for name in report.timings)]


def _judge(backend: str, reports: Sequence[RankReport]) -> Check:
    name = f"all-reduce, {backend}"
    failed = [report for report in reports if backend not in report.timings or report.timings[backend].error is not None]
    if failed:
        missing = Timing(error="it did not come so far")
        error = failed[0].timings.get(backend, missing).error
        remedy = "look at cluster.interface and at a firewall between nodes; NCCL_DEBUG=INFO (cluster.environment) says more"
        return failure(name, f"{name_places(failed, reports)}: {error}", remedy)
    timing = max((report.timings[backend] for report in reports), key=lambda timing: timing.median_s)
    size, rate = len(reports), timing.num_bytes / timing.median_s / 1e9
    bus = rate * 2 * (size - 1) / size
    text = (
        f"{timing.num_bytes / 1e6:.0f} MB in {timing.median_s * 1e3:.1f} ms (median of the slowest rank's): "
        f"{rate:.2f} GB/s, that is bytes / seconds; bus {bus:.2f} GB/s, times 2 (n - 1) / n"
    )
    several = len({report.machine for report in reports}) > 1
    if several and bus < (SLOW_NCCL if backend == "nccl" else SLOW_GLOO):
        remedy = "is it the fast network? Choose its interface (cluster.interface=ib0); see NCCL_DEBUG=INFO for what NCCL uses"
        return warning(name, text, remedy)
    return ok(name, text)
