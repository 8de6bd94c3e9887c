"""Which optimizers there are: all that timm's factory knows, less those that cannot work here, each with the reason."""

from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from galaxydist.errors import EveryRankError

# torch's own, which need no timm.
BUILT_IN = ("adamw", "sgd")
# In front of another name: Zhang et al. 2019, arXiv:1907.08610.
LOOKAHEAD = "lookahead_"

_DTYPE = "it keeps a data type among its settings, which a checkpoint of tensors and plain text cannot hold"
REFUSED = {
    "adahessian": "it needs second derivatives, for which the backward pass would have to be recorded too",
    "adafactorbv": _DTYPE,
    "adafactorbvc": _DTYPE,
    "cadafactorbv": _DTYPE,
    "cadafactorbvc": _DTYPE,
}
# Without it torch contracts Kron's factors in an order that takes memory without end.
_KRON_PACKAGE = "opt_einsum"
_KRON = ("kron", "kronc", "kronw")


def usable_names() -> list[str]:
    """Every name that ``find_optimizer`` takes on this machine, sorted, each possible with ``lookahead_`` in front too."""
    from timm.optim import get_optimizer_info, list_optimizers

    return [name for name in list_optimizers() if _refusal(name, get_optimizer_info(name)) is None]


def find_optimizer(name: str) -> Any:
    """Return timm's description of an optimizer: its class and settings; of the inner one for ``lookahead_NAME``.

    Cheap: may be called before anything is built or written. For ``adamw`` and ``sgd``, which are torch's, it returns None
    and does not import timm, which takes a second.

    Raises:
        EveryRankError: there is none of that name, it needs another package, or it cannot work here.
    """
    if name in BUILT_IN:
        return None
    from timm.optim import get_optimizer_info, list_optimizers

    inner = name.removeprefix(LOOKAHEAD)
    if inner not in list_optimizers():
        close = get_close_matches(inner.lower(), usable_names(), n=1, cutoff=0.6)
        hint = f"; did you mean {LOOKAHEAD if inner != name else ''}{close[0]}?" if close else "."
        raise EveryRankError(
            f"optim.name={name}: there is no such optimizer{hint} There are {', '.join(usable_names())}; "
            f"and {LOOKAHEAD}NAME for each of them."
        )
    info = get_optimizer_info(inner)
    if (reason := _refusal(inner, info)) is not None:
        raise EveryRankError(f"optim.name={name} cannot be used: {reason}. Take another one, such as adamw, sgd or lamb.")
    return info


def _refusal(name: str, info: Any) -> str | None:
    if isinstance(info.opt_class, str):
        package = info.opt_class.split(".")[0]
        return f"it needs the package {package}, which galaxydist does not use (its state was never seen to survive a restart)"
    if name in _KRON and find_spec(_KRON_PACKAGE) is None:
        return f"it needs the package {_KRON_PACKAGE}, which is not installed (pip install {_KRON_PACKAGE})"
    return REFUSED.get(name)
