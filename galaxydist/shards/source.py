"""Where a reader's shards come from: a folder on this machine, read in place, or a store, through the node's cache."""

import errno
import threading
from collections import OrderedDict
from typing import Protocol

from galaxydist.errors import UserError
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.openfile import OpenFile

# Shards that are held open; fewer than the 1,024 files that a process may usually have.
MAX_OPEN = 384


class Source(Protocol):
    """The shards of one split."""

    def open(self, shard: int) -> OpenFile:
        """A shard, whole and on this machine; waits until it is. Any thread may call.

        Raises:
            UserError: naming it, if it is missing or cannot be had.
        """
        ...

    def advance(self, step: int) -> None:
        """All batches up to this one have been read."""
        ...

    def close(self) -> None:
        """Let go of everything; whoever waits in ``open`` is sent away with an error. May be called twice."""
        ...


class FolderSource:
    """Shards that lie in the manifest's own folder: the last used are kept open, and there is nothing else to do."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        self._manifest, self._split = manifest, split
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, shard: int) -> OpenFile:
        """See ``Source``."""
        with self._lock:
            file = self._files.get(shard)
            if file is not None:
                self._files.move_to_end(shard)
                return file
        file = self._open(shard)
        with self._lock:
            self._files[shard] = file
            if len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)
        return file

    def advance(self, step: int) -> None:
        """See ``Source``."""

    def close(self) -> None:
        """See ``Source``."""
        with self._lock:
            self._files.clear()

    def _open(self, shard: int) -> OpenFile:
        path = self._manifest.shard_path(self._split, shard)
        try:
            return OpenFile.at(str(path))
        except FileNotFoundError:
            raise UserError(f"shard {path} is missing; make the shards anew with: galaxydist data shard") from None
        except OSError as error:
            hint = "; raise the limit with: ulimit -n 4096" if error.errno == errno.EMFILE else ""
            raise UserError(f"shard {path} cannot be opened ({error.strerror}){hint}") from None
