"""Naming ranks by their hosts."""

from collections.abc import Sequence

from galaxydist.cluster.doctor.report import RankReport

MOST_HOSTS = 4


def name_places(some: Sequence[RankReport], every: Sequence[RankReport]) -> str:
    """Where some of the ranks are: "n1, n2", or "n1 (rank 3)" where not all ranks of a host are meant.

    Args:
        some: the ranks.
        every: all of them.
    """
    if len(some) == len(every):
        return "all ranks" if len(every) > 1 else f"{every[0].host}"
    names = []
    for host in dict.fromkeys(report.host for report in some):
        here = [report.rank for report in some if report.host == host]
        whole = len(here) == sum(report.host == host for report in every)
        ranks = ", ".join(str(rank) for rank in here[:MOST_HOSTS]) + (", ..." if len(here) > MOST_HOSTS else "")
        names.append(host if whole else f"{host} (rank{'' if len(here) == 1 else 's'} {ranks})")
    shown = ", ".join(names[:MOST_HOSTS])
    return shown if len(names) <= MOST_HOSTS else f"{shown} and {len(names) - MOST_HOSTS} more hosts"
