"""Models from a function of the user's own: ``(num_classes, image_size) -> nn.Module``, imported only if its code is trusted."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.errors import UserError, first_line
from galaxydist.recipe.model_names import TRUST_VARIABLE, ModelReference, parse_model_name

if TYPE_CHECKING:
    from torch import nn

    from galaxydist.recipe.schema import ModelConfig

RATES = ("drop_rate", "drop_path_rate")


def trusts_code(environ: Mapping[str, str]) -> bool:
    """Return True if code that a run folder names may be run: ``--trust-code`` and the user's environment set the variable."""
    return environ.get(TRUST_VARIABLE, "") not in ("", "0")


def find_source(name: str) -> Path | None:
    """Return the source file of a ``model.name`` that is a function, without running it; None for other names or without a file.

    Modules are searched as Python does, and in the current folder.
    """
    reference = parse_model_name(name)
    if reference.kind != "function":
        return None
    parts = reference.name.split(".")
    with _current_folder():
        # find_spec of "a.b" would import "a": only the first part is searched.
        spec = importlib.util.find_spec(parts[0]) if parts[0] not in sys.modules else sys.modules[parts[0]].__spec__
    if spec is None:
        return None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if len(parts) == 1 and spec.origin and Path(spec.origin).is_file():
        return Path(spec.origin)
    inside = [place.joinpath(*parts[1:]) for place in places]
    choices = [path for place in inside for path in (place.with_suffix(".py"), place / "__init__.py")]
    return next((path for path in choices if path.is_file()), None)


def copied_sources(name: str) -> dict[str, Path]:
    """Return the files that a job needs of a ``model.name`` that is a function, by their names beside the package.

    They are the module, or all modules of its outermost package, if it lies in the current folder; none for other names and for
    installed packages, which a job finds by itself.
    """
    source = find_source(name)
    if source is None or not source.is_relative_to(Path.cwd()):
        return {}
    outermost = Path.cwd() / parse_model_name(name).name.partition(".")[0]
    files = sorted(outermost.rglob("*.py")) if outermost.is_dir() and source.is_relative_to(outermost) else [source]
    return {str(file.relative_to(Path.cwd())): file for file in files}


def check_source(name: str) -> None:
    """Refuse a ``model.name`` that is a function of a module that is not found, without running it.

    Raises:
        UserError: there is no such module.
    """
    if parse_model_name(name).kind == "function" and find_source(name) is None:
        raise _no_module(name)


def source_hash(name: str) -> str | None:
    """Return the SHA-256 of the source file of a ``model.name`` that is a function, in hex; None for other names."""
    path = find_source(name)
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def build_own_model(config: "ModelConfig", num_classes: int, image_size: int, *, trust_code: bool) -> "nn.Module":
    """Call the user's function and check the model that it returns on two images.

    Rates of the recipe are passed if the function has parameters of their names.

    Raises:
        UserError: the code is not trusted, cannot be imported, fails, or returns no classifier of these images.
    """
    from torch import nn

    from galaxydist.models.timm_models import check_logits

    reference = parse_model_name(config.name)
    if not trust_code:
        raise UserError(
            f"model.name={config.name} names code, which is not run because it may come with a downloaded run: look at "
            f"{find_source(config.name) or reference.name}, and give --trust-code (or set {TRUST_VARIABLE}=1) if you trust it"
        )
    with _current_folder():
        function = _import(reference, config.name)
        rates = _accepted_rates(function, config)
        try:
            model = function(num_classes, image_size, **rates)
        except Exception as error:  # the user's code may raise anything
            raise _failed(config.name, error) from error
        if not isinstance(model, nn.Module):
            raise UserError(
                f"model.name={config.name}: the function returned {type(model).__name__}, and must return a torch.nn.Module"
            )
        check_logits(config.name, model, num_classes, image_size)
    return model


def _import(reference: ModelReference, name: str) -> Any:
    try:
        module = importlib.import_module(reference.name)
    except Exception as error:  # the user's code may raise anything
        is_missing = isinstance(error, ModuleNotFoundError) and error.name in (reference.name, reference.name.partition(".")[0])
        if is_missing:
            raise _no_module(name) from error
        raise _failed(name, error) from error
    function = getattr(module, str(reference.version), None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
        has = f"its functions are {', '.join(found)}" if found else "it has no function"
        raise UserError(f"model.name={name}: {module.__file__ or reference.name} has no function {reference.version}; {has}")
    return function


def _no_module(name: str) -> UserError:
    return UserError(
        f"model.name={name}: there is no module {parse_model_name(name).name}; it is searched in the current folder "
        f"{Path.cwd()} and among the installed packages"
    )


def _accepted_rates(function: Any, config: "ModelConfig") -> dict[str, float]:
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables have none
        parameters = {}
    refused = [rate for rate in RATES if getattr(config, rate) and rate not in parameters]
    if refused:
        raise UserError(
            f"model.{refused[0]}={getattr(config, refused[0])}: the function of {config.name} has no parameter {refused[0]}; "
            "add it, or set this to 0"
        )
    return {rate: getattr(config, rate) for rate in RATES if rate in parameters}


def _failed(name: str, error: Exception) -> UserError:
    """Return an error with the last place in the user's code, which is the last frame outside of installed packages if any."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith(str(_PACKAGE))]
    frame = own[-1] if own else None
    place = f" ({frame.filename}, line {frame.lineno}, in {frame.name})" if frame is not None else ""
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}, line {error.lineno})"
    return UserError(f"model.name={name}: your code failed with {type(error).__name__}: {first_line(error)}{place}")


_PACKAGE = Path(__file__).parents[1]


@contextmanager
def _current_folder() -> Iterator[None]:
    """Search the current folder for modules too, after all others: a submitted job has a copy of the code elsewhere."""
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
