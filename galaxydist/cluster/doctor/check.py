"""What a check found, and how it is told."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

Level = Literal["ok", "warning", "failure"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "failure")


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        name: what was looked at.
        level: how it is.
        text: what was found.
        remedy: what to do; empty where all is well.
    """

    name: str
    level: Level
    text: str
    remedy: str = ""

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        return cls(plain["name"], plain["level"], plain["text"], plain["remedy"])


def ok(name: str, text: str) -> Check:
    """All is well."""
    return Check(name, "ok", text)


def warning(name: str, text: str, remedy: str) -> Check:
    """A run starts, but is slow or lacks something."""
    return Check(name, "warning", text, remedy)


def failure(name: str, text: str, remedy: str) -> Check:
    """A run would not start, or not survive."""
    return Check(name, "failure", text, remedy)


def has_failed(checks: Iterable[Check]) -> bool:
    """Whether any of them is a failure."""
    return any(check.level == "failure" for check in checks)


def worst_first(checks: Iterable[Check]) -> list[Check]:
    """By level, in their order."""
    return sorted(checks, key=lambda check: -LEVELS.index(check.level))


def to_dicts(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """As JSON has it."""
    return [asdict(check) for check in checks]


def render(sections: Mapping[str, Iterable[Check]]) -> str:
    """The report as text: a title a section, a line a check, its remedy below.

    Args:
        sections: title -> checks.
    """
    sections = {title: list(checks) for title, checks in sections.items()}
    every = [check for checks in sections.values() for check in checks]
    width = max((len(check.name) for check in every), default=0)
    lines: list[str] = []
    for title, checks in sections.items():
        lines.append(f"{title}:")
        for check in checks:
            first, *rest = check.text.splitlines() or [""]
            lines.append(f"  {check.level:<7}  {check.name:<{width}}  {first}")
            lines += [f"{'':{width + 13}}{line}" for line in rest]
            lines += [f"{'':{width + 13}}-> {line}" for line in check.remedy.splitlines()]
    counts = {level: sum(check.level == level for check in every) for level in LEVELS}
    lines.append(f"{counts['ok']} ok, {_count(counts['warning'], 'warning')}, {_count(counts['failure'], 'failure')}")
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
