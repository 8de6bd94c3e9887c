"""How threads wait for one another."""

from collections.abc import MutableMapping


def wait_politely(environ: MutableMapping[str, str]) -> None:
    """Let idle OpenMP threads sleep; to be called before torch is imported, which reads it.

    Threads that spin while they wait take the cores from whatever else runs on the machine, and are then slower themselves: five
    times on a busy machine of two cores, none on an idle one.
    """
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
