"""Whether the catalogues say what the samples' .json say."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from galaxydist.errors import UserError
from galaxydist.shards.catalogue import iterate_catalogue, open_catalogue
from galaxydist.shards.catalogue_table import ID, conform, table_of, unite
from galaxydist.shards.manifest import Manifest, catalogue_name

if TYPE_CHECKING:
    import pyarrow as pa

# Galaxies that are named for one shard.
NAMED = 3


class CatalogueCheck:
    """Reads the catalogues along with the shards, in the same order, so that little of them is held.

    Args:
        manifest: of the shards.
        lengths: split -> the number of samples in each of its shards.

    Attributes:
        problems: of the files themselves, once the check is entered.
    """

    def __init__(self, manifest: Manifest, lengths: Mapping[str, Sequence[int]]) -> None:
        self.problems: list[str] = []
        self._manifest, self._lengths = manifest, lengths
        self._stack = contextlib.ExitStack()
        self._rows: dict[str, Iterator[pa.Table]] = {}
        self._schemas: dict[str, pa.Schema] = {}
        self._found: dict[str, dict[str, pa.Schema]] = {}  # the different ones of the shards, in the order of their coming

    def __enter__(self) -> Self:
        for split in self._manifest.splits:
            if self._manifest.catalogues and catalogue_name(split) not in self._manifest.catalogues:
                self.problems.append(f"{self._manifest.location}: no checksum of {catalogue_name(split)}")
            elif self._manifest.catalogues:
                try:
                    file = self._stack.enter_context(open_catalogue(self._manifest, split))
                    self._schemas[split], self._found[split] = file.schema_arrow, {}
                    self._rows[split] = iterate_catalogue(file, self._lengths[split])
                except UserError as error:
                    self.problems.append(str(error))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def compare(self, split: str, location: str, metas: Sequence[tuple[str, bytes]] | None) -> list[str]:
        """The problems of the next shard's rows.

        Args:
            split: of the shard.
            location: of the shard, for messages.
            metas: its galaxies' keys and .json; None where they could not be read: its rows are passed over.
        """
        if split not in self._rows:
            return []
        rows = next(self._rows[split])
        if metas is None:
            self._found.pop(split, None)  # what the columns should be cannot be told any more
            return []
        try:
            table = table_of(metas)
            expected = conform(table, rows.schema)
        except ValueError as error:
            return [f"shard {location}: {catalogue_name(split)} cannot hold what its .json say ({error})"]
        if split in self._found:
            self._found[split].setdefault(table.schema.to_string(show_field_metadata=True), table.schema)
        if rows.equals(expected):
            return []
        pairs = zip(rows.to_pylist(), expected.to_pylist(), strict=False)
        others = [there[ID] for here, there in pairs if here != there]
        named = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
        return [f"shard {location}: the rows of {named} in {catalogue_name(split)} are not what their .json say"]

    def finish(self) -> list[str]:
        """The problems that only all shards together show: columns that are not there, too many or of another type."""
        return [
            f"{self._manifest.location}: the columns of {catalogue_name(split)} are not those that the .json of its galaxies have"
            for split, found in self._found.items()
            if unite(found.values()) != self._schemas[split]
        ]
