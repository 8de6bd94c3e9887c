"""The reports of all ranks merged into one table.

Equal results become one line; different ones are listed by host.
"""

from collections.abc import Sequence

from galaxydist.doctor.check import Check, RankReport, Timing, describe_ranks, failure, ok, warning, worst_first
from galaxydist.doctor.machine import is_loopback

# Checks between ranks: rendezvous, clocks, shared files, the signal, all-reduces.

# Most groups of ranks that a line lists.
MOST_GROUPS = 4
CLOCK_S = 1.0
SLOW_S = 5.0
# Bus bandwidth in GB/s, see ``check_bandwidth``. Ethernet of 1 Gbit/s carries 0.125 GB/s, InfiniBand and RoCE at least 5 GB/s.
SLOW_NCCL = 2.0
SLOW_GLOO = 0.1


def check_addresses(reports: Sequence[RankReport]) -> list[Check]:
    """Check the network interface and address of each rank."""
    known = [report for report in reports if report.store]
    if not known:
        return []
    name = "interface"
    remedy = (
        "set cluster.interface to the one with an address of the network between nodes (ib0, eth0; see `ip -br addr`): "
        "it sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    )
    without = [report for report in known if report.address is None]
    if without:
        interface = without[0].interface
        problem = f"there is no interface {interface} with an address" if interface else "its own name resolves to no address"
        return [failure(name, f"{problem} on {describe_ranks(without, known)}", remedy)]
    machines = {report.machine for report in known}
    local = [report for report in known if report.address is not None and is_loopback(report.address)]
    if local and len(machines) > 1:
        text = f"{local[0].address} ({_interface(local[0])}) on {describe_ranks(local, known)}: no other node reaches it"
        return [failure(name, text, remedy)]
    addresses = list(dict.fromkeys(f"{report.host} {report.address} ({_interface(report)})" for report in known))
    same = ", all on one machine" if len(machines) == 1 and len({report.host for report in known}) > 1 else ""
    more = f" and {len(addresses) - MOST_GROUPS} more" if len(addresses) > MOST_GROUPS else ""
    return [ok(name, f"{', '.join(addresses[:MOST_GROUPS])}{more}{same}")]


def _interface(report: RankReport) -> str:
    return report.interface or "by its name"


def check_meeting(reports: Sequence[RankReport]) -> list[Check]:
    """Check that all ranks joined the rendezvous."""
    tried = [report for report in reports if report.store]
    missing = [report for report in tried if report.meeting_s is None]
    if not tried:
        return []
    if missing:
        text = f"{describe_ranks(missing, reports)} did not join the others at {missing[0].store}"
        return [failure("rendezvous", text, "check cluster.interface, a firewall between nodes, and the line 'ranks'")]
    slowest = max(report.meeting_s or 0.0 for report in tried)
    return [ok("rendezvous", f"{len(tried)} ranks joined at {tried[0].store} within {slowest:.1f} s")]


def check_clocks(reports: Sequence[RankReport]) -> list[Check]:
    """Compare the clocks with rank 0's."""
    known = [report for report in reports if report.clock_s is not None]
    if len(known) < 2:
        return []
    # Subtract the error of the measurement, half of the round trip.
    offsets = {report.rank: max(abs(report.clock_s or 0.0) - (report.round_trip_s or 0.0) / 2, 0.0) for report in known}
    off = [report for report in known if offsets[report.rank] > CLOCK_S]
    if off:
        worst = max(off, key=lambda report: offsets[report.rank])
        text = f"{worst.clock_s:+.1f} s against rank 0 on {describe_ranks(off, known)}"
        remedy = (
            "locks of run folders need clocks that agree within a minute: ask for a check of the node's time service (chrony)"
        )
        return [warning("clocks", text, remedy)]
    worst = max(known, key=lambda report: abs(report.clock_s or 0.0))
    text = f"at most {abs(worst.clock_s or 0) * 1e3:.1f} ms apart (round trip {(worst.round_trip_s or 0) * 1e3:.1f} ms)"
    return [ok("clocks", text)]


def check_shared_files(reports: Sequence[RankReport]) -> list[Check]:
    """Check that all ranks see a file of one rank, and its replacement."""
    tested = [report for report in reports if "shared files" in report.finished]
    if not tested:
        return []
    remedy = "put the run folders on a file system that all nodes share: run.root=FOLDER"
    unseen = [report for report in tested if report.seen_s is None]
    if unseen:
        return [failure("shared files", f"a file of rank 0 is not seen on {describe_ranks(unseen, tested)}", remedy)]
    stale = [report for report in tested if report.renamed_s is None]
    if stale:
        text = f"a file replaced by the last rank keeps its old contents on {describe_ranks(stale, tested)}"
        return [failure("shared files", text, remedy)]
    slowest = max(max(report.seen_s or 0.0, report.renamed_s or 0.0) for report in tested)
    text = f"writing and replacing are seen by all within {slowest:.2f} s"
    if slowest > SLOW_S:
        return [warning("shared files", text, "the nodes cache the contents of folders (NFS: mount with a smaller actimeo)")]
    return [ok("shared files", text)]


def check_signals(reports: Sequence[RankReport], *, in_container: bool = False) -> list[Check]:
    """Check that SIGUSR2, which SLURM sends before the time limit, reaches each rank; see ``check_preemption`` for preemption.

    Args:
        reports: reports of the ranks.
        in_container: the ranks run in a container, which seldom has SLURM's programs.
    """
    tested = [report for report in reports if "signal" in report.finished]
    if not tested or all(report.signal_error == "no SLURM" for report in tested):
        return []
    error = next((report.signal_error for report in tested if report.signal_error is not None), None)
    if error is not None:
        if in_container:
            text = f"not tested: scancel cannot be called from inside the container ({error})"
            remedy = "test it once with a run: after `scancel --signal=USR2 JOB` on the login node it must save and exit"
        else:
            text = f"not tested: scancel failed on the node: {error}"
            remedy = "SLURM's programs do not work on the nodes: inform the administrators"
        return [warning("signal", text, remedy)]
    missing = [report for report in tested if report.signal_s is None]
    if missing:
        text = f"SIGUSR2 did not reach {describe_ranks(missing, tested)}"
        remedy = (
            "a preempted run loses all steps since its last checkpoint there: save more often (train.save_minutes). "
            "Does a wrapper (cluster.container) forward signals?"
        )
        return [failure("signal", text, remedy)]
    return [ok("signal", f"SIGUSR2 from SLURM reached all ranks within {max(report.signal_s or 0.0 for report in tested):.1f} s")]


def check_bandwidth(reports: Sequence[RankReport]) -> list[Check]:
    """Check the all-reduce bandwidth of each backend.

    Algorithm bandwidth is bytes of the tensor / seconds. Bus bandwidth is that times 2 (n - 1) / n for n ranks; it does not
    depend on n where a link is the limit (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
    """
    return [_check_backend(backend, reports) for backend in dict.fromkeys(name for report in reports for name in report.timings)]


def _check_backend(backend: str, reports: Sequence[RankReport]) -> Check:
    name = f"all-reduce, {backend}"
    failed = [report for report in reports if backend not in report.timings or report.timings[backend].error is not None]
    if failed:
        missing = Timing(error="the rank ended before it")
        error = failed[0].timings.get(backend, missing).error
        remedy = "check cluster.interface and a firewall between nodes; NCCL_DEBUG=INFO (cluster.environment) shows more"
        return failure(name, f"{describe_ranks(failed, reports)}: {error}", remedy)
    timing = max((report.timings[backend] for report in reports), key=lambda timing: timing.median_s)
    size, rate = len(reports), timing.num_bytes / timing.median_s / 1e9
    bus = rate * 2 * (size - 1) / size
    text = (
        f"{timing.num_bytes / 1e6:.0f} MB in {timing.median_s * 1e3:.1f} ms (median of the slowest rank's): "
        f"{rate:.2f} GB/s, that is bytes / seconds; bus {bus:.2f} GB/s, times 2 (n - 1) / n"
    )
    if len({report.machine for report in reports}) > 1 and bus < (SLOW_NCCL if backend == "nccl" else SLOW_GLOO):
        remedy = (
            "is it the fast network? Set its interface (cluster.interface=ib0); NCCL_DEBUG=INFO shows the network that NCCL uses"
        )
        return warning(name, text, remedy)
    return ok(name, text)


def merge_reports(
    reports: Sequence[RankReport], num_tasks: int, gpus_per_node: int, *, in_container: bool = False
) -> list[Check]:
    """Merge the reports of a job into its checks.

    Args:
        reports: the reports that were written, in rank order.
        num_tasks: number of ranks of the job.
        gpus_per_node: GPUs per node in the profile.
        in_container: the ranks run in a container.
    """
    present = check_presence(reports, num_tasks)
    if not reports:
        return [present]
    examined = [report for report in reports if report.checks]
    checks = [present, *merge_checks(examined)]
    if examined:
        checks += [check_same_versions(examined), check_cpus(examined)]
    if examined and gpus_per_node:
        checks.append(check_gpu_shares(examined, gpus_per_node))
    checks += [*check_addresses(reports), *check_signals(reports, in_container=in_container)]
    together = [*check_meeting(reports), *check_clocks(reports), *check_shared_files(reports), *check_bandwidth(reports)]
    return [*checks, *(together if num_tasks > 1 else _of_one_rank(together))]


def _of_one_rank(checks: Sequence[Check]) -> list[Check]:
    """With a single process, replace passed rank-to-rank checks by one note and keep the others."""
    note = ok(
        "between ranks", "one process: rendezvous, shared files and all-reduce are not measured (they are with cluster.nodes=2)"
    )
    return [check for check in checks if check.level != "ok"] or [note]


def check_presence(reports: Sequence[RankReport], num_tasks: int) -> Check:
    """Check that every rank wrote a report and finished."""
    absent = sorted(set(range(num_tasks)) - {report.rank for report in reports})
    ended = [report for report in reports if not report.is_done]
    hosts = list(dict.fromkeys(report.host for report in reports))
    if not absent and not ended:
        return ok("ranks", f"{num_tasks} on {', '.join(hosts)}: all finished")
    parts = [f"ranks {', '.join(map(str, absent))} wrote no report"] if absent else []
    for report in ended:
        parts.append(
            f"rank {report.rank} ({report.host}) ended in the part '{report.part}'{f': {report.error}' if report.error else ''}"
        )
    remedy = "see the job's output, named below"
    if absent and reports:
        remedy += (
            "; a node without any report may not see the run folders: put them on a file system that all nodes share "
            "(--run-root FOLDER, run.root=FOLDER for runs)"
        )
    return failure("ranks", "; ".join(parts), remedy)


def merge_checks(reports: Sequence[RankReport]) -> list[Check]:
    """Merge the nodes' own checks by name: one line if all ranks have the same result."""
    names = dict.fromkeys(check.name for report in reports for check in report.checks)
    return [_merge_named(name, reports) for name in names]


def _merge_named(name: str, reports: Sequence[RankReport]) -> Check:
    found = [(report, check) for report in reports for check in report.checks if check.name == name]
    groups: dict[Check, list[RankReport]] = {}
    for report, check in found:
        groups.setdefault(check, []).append(report)
    ordered = worst_first(groups)
    worst = ordered[0]
    if len(groups) == 1:
        return worst
    if len({_without_numbers(check) for check in groups}) == 1 and worst.level == "ok":
        # Equal except for numbers such as free space, which always differ.
        return Check(name, "ok", f"{worst.text} ({describe_ranks(groups[worst], reports)}; similar elsewhere)")
    lines = [f"{describe_ranks(groups[check], reports)}: {check.text}" for check in ordered[:MOST_GROUPS]]
    if len(ordered) > MOST_GROUPS:
        lines.append(f"and {len(ordered) - MOST_GROUPS} other results")
    return Check(name, worst.level, "\n".join(lines), "\n".join(dict.fromkeys(check.remedy for check in ordered if check.remedy)))


def check_same_versions(reports: Sequence[RankReport]) -> Check:
    """Check that interpreter and libraries have the same versions on all ranks."""
    names = dict.fromkeys(name for report in reports for name in report.versions)
    lines = []
    for name in names:
        versions: dict[str, list[RankReport]] = {}
        for report in reports:
            versions.setdefault(report.versions.get(name, "missing"), []).append(report)
        if len(versions) > 1:
            lines.append(
                f"{name}: {', '.join(f'{version} on {describe_ranks(some, reports)}' for version, some in versions.items())}"
            )
    if lines:
        remedy = "use one environment on a file system that all nodes share (cluster.python, cluster.container, cluster.setup)"
        return failure("versions", "\n".join(lines), remedy)
    shown = {name: reports[0].versions.get(name) for name in ("Python", "torch", "CUDA", "NCCL")}
    return ok("versions", f"the same on all ranks ({', '.join(f'{name} {value}' for name, value in shown.items() if value)})")


def check_cpus(reports: Sequence[RankReport]) -> Check:
    """Compare the cores that each rank may run on with the cores that SLURM gave it."""
    name = "cores a rank"
    few = [report for report in reports if report.cpus_per_task is not None and report.cores < report.cpus_per_task]
    if few:
        text = f"SLURM gave {few[0].cpus_per_task} to a rank, but it is bound to {few[0].cores} on {describe_ranks(few, reports)}"
        return warning(name, text, "srun got another number: check SRUN_CPUS_PER_TASK, and --cpu-bind in cluster.srun")
    counts = sorted({report.cores for report in reports})
    span = " to ".join(str(count) for count in (counts if len(counts) < 3 else (counts[0], counts[-1])))
    requested = sorted({report.cpus_per_task for report in reports if report.cpus_per_task is not None})
    if not requested:
        return ok(name, f"{span} (cluster.cpus_per_task is not set)")
    free = [report for report in reports if report.cpus_per_task is not None and report.cores > report.cpus_per_task]
    unbound = ": SLURM does not bind processes here, the trainer uses the requested number" if free else ""
    return ok(name, f"{span}, requested {', '.join(map(str, requested))}{unbound}")


def check_gpu_shares(reports: Sequence[RankReport], gpus_per_node: int) -> Check:
    """Check that each rank sees only GPUs of its own job, and that no two ranks use the same GPU.

    Args:
        reports: reports of the ranks.
        gpus_per_node: GPUs per node in the profile.
    """
    name = "GPUs a rank"
    foreign = [report for report in reports if not _is_own(report)]
    if foreign:
        report = foreign[0]
        text = (
            f"CUDA_VISIBLE_DEVICES={report.visible_gpus or '(not set)'}, but SLURM gave GPUs {report.slurm_gpus} "
            f"on {describe_ranks(foreign, reports)}: these may be another job's"
        )
        remedy = (
            "do not set CUDA_VISIBLE_DEVICES (profile, ~/.bashrc); else the site must confine jobs to their GPUs (gres.conf with "
            "files, ConstrainDevices in cgroup.conf): ask its administrators"
        )
        return failure(name, text, remedy)
    without = [report for report in reports if report.num_gpus == 0]
    if without:
        text = f"none visible to torch on {describe_ranks(without, reports)}, where the job has {gpus_per_node} a node"
        return failure(name, text, "see the line GPUs; cluster.gpu_request chooses how GPUs are requested")
    unusable = [report for report in reports if report.gpu is None]
    if unusable:
        text = f"{unusable[0].num_gpus} visible on {describe_ranks(unusable, reports)}, but none that this rank can use"
        if unusable[0].gpu_problem is not None:
            text += f": {unusable[0].gpu_problem}"
        return failure(name, text, "one task a GPU: set cluster.tasks_per_node to cluster.gpus_per_node (or 0); see nvidia-smi")
    users: dict[tuple[str, str], list[RankReport]] = {}
    for report in reports:
        users.setdefault((report.machine, str(report.gpu)), []).append(report)
    shared = next((ranks for ranks in users.values() if len(ranks) > 1), None)
    if shared is not None:
        text = f"ranks {', '.join(str(report.rank) for report in shared)} on {shared[0].host} share one GPU"
        return failure(name, text, "one task a GPU: set cluster.tasks_per_node to cluster.gpus_per_node (or 0)")
    visible = sorted({report.num_gpus for report in reports})
    return ok(name, f"each rank has one of its own ({' or '.join(map(str, visible))} visible), all of them the job's")


def _is_own(report: RankReport) -> bool:
    """Return True if CUDA_VISIBLE_DEVICES has the job's GPUs: SLURM's numbers, or from 0 if a control group hides the others."""
    if report.slurm_gpus is None:
        return True
    given = report.slurm_gpus.split(",")
    if report.visible_gpus is None:
        return report.num_gpus <= len(given)
    visible = [number for number in report.visible_gpus.split(",") if number]
    if any(name.startswith(("GPU-", "MIG-")) for name in visible):  # unique ids, which cannot be compared with SLURM's numbers
        return len(visible) <= len(given)
    renumbered = [str(number) for number in range(len(given))]
    return set(visible) <= set(given) or (set(visible) <= set(renumbered) and report.num_gpus <= len(given))


def _without_numbers(check: Check) -> tuple[str, str]:
    return check.level, "".join("0" if character.isdigit() else character for character in check.text)
