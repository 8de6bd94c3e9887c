"""Network checks of this machine: wandb's server, SLURM, and its own addresses."""

import ipaddress
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

from galaxydist.doctor.check import Check, failure, ok, warning
from galaxydist.training.trackers import has_wandb_key, is_reachable, wandb_address

SLURM_S = 20.0
FIXED_MODES = ("online", "offline", "disabled")


def check_wandb(environ: Mapping[str, str]) -> Check:
    """Check that runs with tracker.name=wandb are tracked online; the report has no part of the key.

    Args:
        environ: may have WANDB_MODE, WANDB_API_KEY and WANDB_BASE_URL.
    """
    name, later = "wandb", "runs are tracked offline; `wandb sync` in their folders sends them later"
    if environ.get("WANDB_MODE") in FIXED_MODES:
        return ok(name, f"WANDB_MODE={environ['WANDB_MODE']}")
    host, port = wandb_address(environ)
    has_key = has_wandb_key(environ, host)
    if not is_reachable(host, port):
        text = f"{host} does not answer ({'there is a key' if has_key else 'no key either'}): {later}"
        return warning(name, text, "nothing, where nodes have no network; else look at the network, WANDB_BASE_URL")
    if not has_key:
        return warning(name, f"{host} answers, but there is no key: {later}", "`wandb login`, or set WANDB_API_KEY")
    return ok(name, f"{host} answers and there is a key")


def check_slurm(*, is_needed: bool, program: str = "sinfo") -> Check:
    """Check that SLURM's programs are installed and its controller answers.

    Args:
        is_needed: jobs will be submitted from this machine.
        program: the SLURM program to call.
    """
    bad = failure if is_needed else warning
    if shutil.which(program) is None:
        if not is_needed:
            return ok("SLURM", f"not here ({program} is not on the PATH)")
        return failure(
            "SLURM", f"not here: {program} is not on the PATH", "give the command on a login node, or use cluster=local"
        )
    command = [program, "--noheader", "--format=%P %D"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return bad(
            "SLURM",
            f"{program} does not answer within {SLURM_S:.0f} s",
            "wait, or set SLURM_CONF; `scontrol ping` says whether slurmctld is up",
        )
    if answer.returncode != 0:
        said = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        return bad("SLURM", f"{program}: {said[-1]}", "wait, or set SLURM_CONF; `scontrol ping` says whether slurmctld is up")
    partitions: dict[str, int] = {}
    for line in answer.stdout.splitlines():
        partition, _, nodes = line.rpartition(" ")
        partitions[partition] = partitions.get(partition, 0) + int(nodes)
    return ok("SLURM", f"answers; nodes by partition: {', '.join(f'{key} {value}' for key, value in partitions.items())}")


def own_address(hostname: str) -> str | None:
    """Return the address that a host name resolves to, as gloo and c10d resolve it; None if it does not resolve."""
    try:
        return str(socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def interface_address(name: str) -> str | None:
    """Return the first IPv4 address of an interface, else the first IPv6 address; None if there is neither.

    Args:
        name: the interface, such as ``ib0``; of a list the first is used.
    """
    found = psutil.net_if_addrs().get(name.split(",", maxsplit=1)[0].lstrip("=^"), [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for address in found:
            if address.family == family:
                return address.address.partition("%")[0]
    return None


def is_loopback(address: str) -> bool:
    """Return True for a loopback address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def machine_id() -> str:
    """Return the kernel's boot id, which is the same for several SLURM nodes on one machine; else the host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
