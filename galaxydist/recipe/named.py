"""Configurations that lie in named files: finding the file, reading it, and laying a command line's values over it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from galaxydist.recipe.document import read_document
from galaxydist.recipe.draft import COMMAND_LINE, FILE_NAME, ConfigKind, Draft, Resolved, shown
from galaxydist.recipe.fields import S


@dataclass(frozen=True)
class Setting:
    """A plain value that neither the recipe's file nor the command line gives.

    Attributes:
        value: text, number, bool, None or a list of those.
        origin: where it stands, such as ``slurm/sweeps/galaxy10.yaml:7``.
    """

    value: Any
    origin: str


def load_config(
    kind: ConfigKind[S],
    arguments: Sequence[str],
    folders: Sequence[Path],
    *,
    settings: Mapping[str, Setting] | None = None,
) -> Resolved[S]:
    """The configuration of a command line.

    Args:
        arguments: ``recipe=NAME`` or ``recipe=FILE.yaml`` (the kind's argument), then ``key=value`` for any key of the schema,
            in any order.
        folders: where names are looked up, first one first.
        settings: values by dotted key that stand between the file and the command line; the kind's argument may be one.

    Raises:
        ConfigError: the kind's, with all problems at once and where each came from.
    """
    draft = Draft(kind)
    overrides, between = _read_overrides(arguments, draft), dict(settings or {})
    named = between.pop(kind.argument, Setting(None, COMMAND_LINE))
    if kind.argument in overrides:
        named = Setting(overrides.pop(kind.argument), COMMAND_LINE)
    path = _find(named, folders, draft)
    if path is not None:
        _read_file(path, draft)
    else:
        for key in (key for key, known in kind.schema.fields.items() if known.required):
            draft.invalid.add(key)
            draft.origins[key] = kind.noun
    for key, setting in between.items():
        if key not in overrides:
            _override(key, setting, draft, is_text=False)
    for key, text in overrides.items():
        _override(key, Setting(text, COMMAND_LINE), draft, is_text=True)
    draft.values["name"] = _name_of(path, folders) if path is not None else ""
    draft.origins["name"] = FILE_NAME
    config = draft.finish()
    assert path is not None, "a missing file is a problem, and problems raise"
    return Resolved(config, draft.origins, path)


def list_files(folders: Sequence[Path]) -> dict[str, Path]:
    """Name -> file, of every YAML file that would be found by its name: ``vit``, or ``reference/vit`` for one in a subfolder."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("[!.]*/*.yaml")]):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return dict(sorted(found.items()))


def _name_of(path: Path, folders: Sequence[Path]) -> str:
    """What a file's configuration is called: one word for names of files, ``reference-vit`` for ``reference/vit``.

    It is the same whether the file was given by its name or by its path.
    """
    inside = path.parent.resolve()
    for folder in folders:
        if inside.is_relative_to(folder.resolve()):
            return "-".join([*inside.relative_to(folder.resolve()).parts, path.stem])
    return path.stem


def _override(written: str, setting: Setting, draft: Draft[S], *, is_text: bool) -> None:
    kind, origin = draft.kind, setting.origin
    key = written.removeprefix(kind.prefix)
    if key == written and kind.prefix:
        draft.problems.append((origin, f"{written}: no such key{kind.schema.suggest(key, prefix=kind.prefix)}"))
    elif key == "name":
        draft.problems.append((origin, f"{written}: a {kind.noun} is named by its file; copy the file under another name"))
    else:
        draft.put(key, setting.value, origin, is_text=is_text)


def _read_overrides(arguments: Sequence[str], draft: Draft[S]) -> dict[str, str]:
    kind = draft.kind
    overrides: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if _is_bare_name(argument, kind) and kind.argument not in overrides:
            overrides[kind.argument] = argument
        elif not equals or not key or key.startswith("-"):
            name, _, override = kind.examples
            draft.problems.append((COMMAND_LINE, f"{argument!r} is not key=value (like {kind.argument}={name} or {override})"))
        elif key in overrides:
            draft.problems.append((COMMAND_LINE, f"{key} is given twice, {shown(overrides[key])} and {shown(text)}; keep one"))
        else:
            overrides[key] = text
    return overrides


def _is_bare_name(argument: str, kind: ConfigKind[S]) -> bool:
    """``vit`` for ``recipe=vit``; a key whose value was forgotten is none."""
    return bool(argument) and "=" not in argument and not argument.startswith("-") and argument not in kind.schema.fields


def _find(named: Setting, folders: Sequence[Path], draft: Draft[S]) -> Path | None:
    """The file, or None with a problem noted."""
    argument, noun = draft.kind.argument, draft.kind.noun
    name, origin = named.value, named.origin
    known = list_files(folders)
    listed = f"{noun}s: {', '.join(known) or 'none found'}; or {argument}=FILE.yaml"
    if name is None:
        draft.problems.append((origin, f"{argument}=NAME is missing; {listed}"))
        return None
    if not isinstance(name, str):
        draft.problems.append((origin, f"{argument}={shown(name)}: must be a {noun}'s name or file; {listed}"))
        return None
    if name in known:
        return known[name]
    is_path = name.endswith((".yaml", ".yml")) or "/" in name
    if is_path and (path := Path(name).expanduser()).is_file():
        return path
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    what = f"there is no such file{hint}; {listed}" if is_path else f"no such {noun}{hint} ({listed})"
    draft.problems.append((origin, f"{argument}={name}: {what}"))
    return None


def _read_file(path: Path, draft: Draft[S]) -> None:
    kind = draft.kind
    try:
        document = read_document(path, noun=kind.noun, example=kind.examples[1])
    except OSError as error:
        raise kind.error([(str(path), f"cannot be read: {error.strerror}")]) from error
    for line, text in document.problems:
        draft.problems.append((f"{path}:{line}" if line else str(path), text))
    for key, value in document.values.items():
        origin = f"{path}:{document.lines[key]}"
        if key == "name":
            draft.problems.append((origin, f"name: a {kind.noun} is named by its file ({path.stem}); take the line out"))
        else:
            draft.put(key, value, origin)
