"""The app on this machine: runs are published once, opened, and served on one address until Ctrl-C.

A process of its own publishes, since that needs torch; meanwhile this one imports gradio, and stays small afterwards.
"""

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from galaxydist.cpus import available_cores
from galaxydist.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError
from galaxydist.job_environment import tunnel_command
from galaxydist.log import set_up_logging
from galaxydist.runs.folder import BEST, RunFolder
from galaxydist.serving.app.model import ServedModel
from galaxydist.serving.app.published_model import CONFIG, FORMAT, PUBLISHED, REFERENCE, PublishedFolderError
from galaxydist.serving.app.reference_set import Reference
from galaxydist.serving.app.standalone import open_models
from galaxydist.serving.app.web_server import (
    FIRST_PORT,
    LOOPBACK,
    NUM_PORTS,
    RunningServer,
    ServerOptions,
    find_port,
    import_page,
    serve,
)
from galaxydist.version import __version__

# By its full name: the process that publishes runs this module as ``__main__``.
logger = logging.getLogger("galaxydist.serving.run_app")

PACKAGES = ("gradio", "onnxruntime")


@dataclass(frozen=True)
class AppOptions:
    """Options of the app.

    Args:
        server: address and limits.
        trust_code: run the function of a module that a run's ``model.name`` names.
    """

    server: ServerOptions = field(default_factory=ServerOptions)
    trust_code: bool = False


def run_app(sources: Sequence[Path], options: AppOptions, environ: MutableMapping[str, str], show: Callable[[str], None]) -> None:
    """Serve the page of some models until Ctrl-C or SIGTERM.

    Args:
        sources: run folders and published folders.
        options: of the app.
        environ: the environment of this process.
        show: is called with the lines of the address.

    Raises:
        UserError: a package is missing, a source is neither a run nor published, a run cannot be published, or the port is taken.
    """
    check_packages()
    try:
        port = find_port(options.server.host, options.server.port)
    except OSError as error:
        raise UserError(_explain_port(options.server, error)) from error
    server_options = replace(options.server, port=port)
    with ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        models = stack.enter_context(publish_and_open(sources, environ, trust_code=options.trust_code))
        try:
            server = stack.enter_context(serve(models, server_options, environ))
        except PublishedFolderError as error:
            raise UserError(str(error)) from error
        for line in address_lines(server, server_options):
            show(line)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        logger.info("ended")


def check_packages() -> None:
    """Refuse to start without the packages of the page.

    Raises:
        UserError: some are not installed.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"the app needs {' and '.join(missing)}, not installed here: pip install 'galaxydist[app]'")


@contextmanager
def publish_and_open(
    sources: Sequence[Path], environ: MutableMapping[str, str], *, trust_code: bool = False
) -> Iterator[dict[str, ServedModel]]:
    """Open published folders, and publish runs before; yields the models by the names that users choose from.

    Args:
        sources: run folders and published folders, in the order of the choice.
        environ: the environment of this process.
        trust_code: see ``AppOptions``.

    Raises:
        UserError: a source is neither, or a run cannot be published.
    """
    with tempfile.TemporaryDirectory(prefix="galaxydist-published-") as temporary:
        found = [find_publication(source, Path(temporary)) for source in sources]
        missing = [publication for publication in found if not publication.is_current]
        with _publishing(missing, environ, trust_code=trust_code) as wait:
            import_page(environ, Path(temporary))
            wait()
        try:
            folders, places = [publication.folder for publication in found], [source.name for source in sources]
            models = open_models(folders, places, available_cores())
        except PublishedFolderError as error:
            raise UserError(str(error)) from error
        for source, name in zip(sources, models, strict=True):
            logger.info("%s: %s", source, name)
        yield models


@dataclass(frozen=True)
class RunPublication:
    """Published folder of a run.

    Args:
        run: the run folder.
        folder: that holds its publication, or will.
        made_from: hash of what the run has now.
        is_current: the folder has been made of that.
    """

    run: Path
    folder: Path
    made_from: str
    is_current: bool


def find_publication(source: Path, temporary: Path) -> RunPublication:
    """Return the publication of a run, or the source itself if it is published.

    Args:
        source: a run folder or a published folder.
        temporary: for the publication of a run whose folder cannot be written.

    Raises:
        UserError: it is neither.
    """
    if RunFolder(source).is_started:
        made_from = hash_inputs(source)
        if is_made_from(source / PUBLISHED, made_from):
            return RunPublication(source, source / PUBLISHED, made_from, is_current=True)
        if os.access(source, os.W_OK):
            return RunPublication(source, source / PUBLISHED, made_from, is_current=False)
        logger.warning("%s cannot be written: the run is published for this time only", source)
        folder = temporary / source.absolute().as_posix().strip("/").replace("/", "-")
        return RunPublication(source, folder, made_from, is_current=False)
    if (source / CONFIG).is_file():
        return RunPublication(source, source, "", is_current=True)
    raise UserError(f"{source} is neither a run nor a published folder: give a run folder, or what `galaxydist publish` wrote")


def hash_inputs(run: Path) -> str:
    """Return a hash of what a run is published from: recipe, checkpoints and evaluations.

    It needs no torch and reads no weights, so that a start of the app without publishing is fast. A run in training has another
    hash after each checkpoint.

    Raises:
        UserError: the recipe is damaged.
    """
    folder = RunFolder(run)
    recipe = dict(folder.read_recipe().recipe)
    saved = sorted(path.name for path in folder.checkpoints_dir.glob("step-*"))
    files = [folder.checkpoints_dir / BEST, folder.result_path]
    files += sorted(path for path in folder.evaluation_dir.glob("*") if path.suffix in (".json", ".parquet"))
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    return hashlib.sha256(json.dumps([recipe, saved, state], sort_keys=True, default=str).encode()).hexdigest()


def is_made_from(folder: Path, made_from: str) -> bool:
    """Return True if a published folder was made of what a hash stands for, by the versions installed here, and can be opened."""
    try:
        Reference.open(folder)
        record = json.loads((folder / CONFIG).read_bytes())["galaxydist"]
        found = [record[name] for name in ("made_from", "format", "version", "libraries")]
        versions = {name: version(name) for name in record["libraries"]}
        return found == [made_from, FORMAT, __version__, versions] and all((folder / name).is_file() for name in record["files"])
    except (OSError, ValueError, KeyError, TypeError, PackageNotFoundError):
        return False


@contextmanager
def _publishing(
    publications: Sequence[RunPublication], environ: MutableMapping[str, str], *, trust_code: bool
) -> Iterator[Callable[[], None]]:
    """Publish runs in a process of its own; yields a function that waits for its end.

    Args:
        publications: that are not current.
        environ: of the process.
        trust_code: see ``AppOptions``.
    """
    if not publications:
        yield lambda: None
        return
    runs = [[str(one.run), str(one.folder), one.made_from] for one in publications]
    command = [sys.executable, "-m", "galaxydist.serving.run_app", json.dumps({"runs": runs, "trust_code": trust_code})]
    # A session of its own: Ctrl-C reaches this process, which ends the other one without a traceback.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(environ), start_new_session=True)

    def wait() -> None:
        output, _ = process.communicate()
        if process.returncode == EXIT_BAD_INPUT:
            raise UserError(json.loads(output)["error"])
        if process.returncode:
            names = ", ".join(str(one.run) for one in publications)
            raise UserError(f"publishing {names} failed with exit code {process.returncode}: see above")

    try:
        yield wait
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def publish_runs(asked: str, environ: MutableMapping[str, str]) -> int:
    """Publish runs, and return the exit code; a user's error is printed as JSON. SIGTERM ends it and leaves nothing half-written.

    Args:
        asked: JSON of ``_publishing``.
        environ: the environment of this process.
    """
    try:
        with _ended_by_sigterm():
            return _publish_each(json.loads(asked), environ)
    except UserError as error:
        sys.stdout.write(json.dumps({"error": str(error)}))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _publish_each(asked: Mapping[str, Any], environ: MutableMapping[str, str]) -> int:
    from galaxydist.prediction.trained_model import ModelChoice
    from galaxydist.serving.publish import PublishOptions, publish

    options = PublishOptions(ModelChoice(trust_code=asked["trust_code"]), program=False, overwrite=True, quick=True)
    for run, out, made_from in asked["runs"]:
        report = publish(Path(run), Path(out), environ, replace(options, made_from=made_from))
        logger.info("%s: published into %s", run, report.folder)
        for note in report.notes:
            logger.info("note: %s", note)
        if not (report.folder / REFERENCE).is_file():
            logger.info("to store training galaxies at the next start, remove %s", report.folder)
    return 0


def address_lines(server: RunningServer, options: ServerOptions) -> list[str]:
    """Return what a user has to know about a page that is being served."""
    host = options.host if options.host not in ("0.0.0.0", "::") else "localhost"
    lines = [f"the app: http://{f'[{host}]' if ':' in host else host}:{server.port}"]
    if options.host == LOOPBACK:
        lines.append(f"to see it on another machine, type there: {tunnel_command(server.port)}")
    else:
        lines.append(f"it listens on {options.host}: all who reach this machine can use it, without a password")
    if server.share_url is not None:
        lines.append(f"public link, for a week at most: {server.share_url}")
    elif options.is_shared:
        lines.append("no public link could be made: gradio's servers were not reached")
    return [*lines, "Ctrl-C ends it."]


def _explain_port(options: ServerOptions, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        if options.port is None:
            return f"ports {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} of {options.host} are in use: give --port N"
        return f"--port {options.port} of {options.host} is in use by another program: give another --port, or none"
    if error.errno == errno.EACCES:
        return f"--port {options.port} is reserved on this machine: give one of 1024 or more"
    return (
        f"--host {options.host} is not an address of this machine ({error.strerror}): give 127.0.0.1, 0.0.0.0 or one of its own"
    )


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Take SIGTERM, with which schedulers and containers end a program, for Ctrl-C; a second one does not disturb the end."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    set_up_logging()
    sys.exit(publish_runs(sys.argv[1], os.environ))
