"""Start of the page without the rest of galaxydist, as a Space and a container do it: ``python -m galaxy_app.standalone FOLDER``.

Nothing is written but temporary files, which are removed at the end.
"""

import os
import signal
import sys
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .published_model import CONFIG, PublishedFolderError, read_config
from .web_server import LOOPBACK, ServerOptions, serve

if TYPE_CHECKING:
    from .model import ServedModel

USAGE = """usage: python -m galaxy_app.standalone FOLDER ...

Show the page on which pictures are labelled with published models.
FOLDER was written by `galaxydist publish`, or holds such folders.
"""
EXIT_BAD_INPUT = 2


def find_folders(given: Sequence[Path]) -> list[Path]:
    """Return the published folders among some folders and directly inside them, in order.

    Raises:
        PublishedFolderError: one of the folders is no published folder and has none inside.
    """
    found: list[Path] = []
    for folder in given:
        inside = [folder] if (folder / CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        if not inside:
            raise PublishedFolderError(f"{folder} has no published model: give a folder that `galaxydist publish` wrote")
        found += inside
    return found


def names_of(folders: Sequence[Path], places: Sequence[str] = ()) -> list[str]:
    """Return the names that users choose from: the titles, with their places where a title occurs twice.

    Args:
        folders: published folders.
        places: names of the places by folder; none: the folders' own.

    Raises:
        PublishedFolderError: a folder cannot be read.
    """
    titles = [read_config(folder).title for folder in folders]
    names: list[str] = []
    for title, place in zip(titles, places or [folder.name for folder in folders], strict=True):
        name = title if titles.count(title) == 1 else f"{title} ({place})"
        names.append(name if name not in names else f"{name} {len(names) + 1}")
    return names


def open_models(folders: Sequence[Path], places: Sequence[str] = (), threads: int | None = None) -> dict[str, "ServedModel"]:
    """Open published folders, by the names that users choose from.

    Args:
        folders: published folders.
        places: as in ``names_of``.
        threads: as in ``ServedModel.open``.

    Raises:
        PublishedFolderError: one of them cannot be opened.
    """
    from .model import ServedModel

    names = names_of(folders, places)
    return {name: ServedModel.open(folder, threads) for name, folder in zip(names, folders, strict=True)}


def listening_options(environ: Mapping[str, str]) -> ServerOptions:
    """Return the address of the page: that of GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.

    Without the name it is loopback; in a Space, which has a container of its own, all addresses.

    Raises:
        PublishedFolderError: the port is no number.
    """
    host = environ.get("GRADIO_SERVER_NAME") or ("0.0.0.0" if environ.get("SPACE_ID") else LOOPBACK)
    port = environ.get("GRADIO_SERVER_PORT") or None
    if port is not None and not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise PublishedFolderError(f"GRADIO_SERVER_PORT={port} is no port: give a number from 1 to 65535")
    return ServerOptions(host=host, port=None if port is None else int(port))


def serve_folders(given: Sequence[Path], environ: MutableMapping[str, str]) -> None:
    """Serve the page of published folders until SIGTERM or Ctrl-C. The main thread calls it.

    Raises:
        PublishedFolderError: a folder cannot be opened.
        OSError: the port is not free.
    """
    is_over = threading.Event()
    previous = {number: signal.signal(number, lambda *_: is_over.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        options = listening_options(environ)
        with serve(open_models(find_folders(given)), options, environ) as server:
            sys.stderr.write(f"the page is on http://{options.host}:{server.port}\n")
            sys.stderr.flush()
            is_over.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Serve the page of the folders that are named, and return the exit code."""
    if not arguments or set(arguments) & {"-h", "--help"}:
        sys.stdout.write(USAGE)
        return 0 if arguments else EXIT_BAD_INPUT
    try:
        serve_folders([Path(name) for name in arguments], environ)
    except (PublishedFolderError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
