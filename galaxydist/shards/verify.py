"""Verification of shards against their manifest: bytes, offsets, keys, labels, images, catalogues.

Also finds equal images in one data set. Loaders do not hash local shards: damage after which an image still decodes is found only
here.
"""

import contextlib
import hashlib
import itertools
import json
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from galaxydist.atomic_files import file_sha256
from galaxydist.cpus import available_cores
from galaxydist.errors import UserError, name_some
from galaxydist.galaxy import MARGIN
from galaxydist.object_store import Store, check_version, download
from galaxydist.shards.catalogue import ID, iterate_catalogue, open_catalogue, read_catalogue, table_of, unite
from galaxydist.shards.manifest import COLUMNS, TARS, Manifest, catalogue_name, column_name, index_name, read_manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import FileReader, file_reader, open_shards
from galaxydist.shards.remote.prefetcher import LocalShards
from galaxydist.shards.tar import BLOCK, Member, check_header, header_key, parse_index
from galaxydist.shards.writer.encode import PIXEL_HASH, decode_stored
from galaxydist.shards.writer.stages import key_hash
from galaxydist.surveys.tables.json_columns import conform

# Galaxies of a shard that a message names.
NAMED = 3


class CatalogueCheck:
    """Compares the catalogues with the samples' .json, shard by shard, so that little of a catalogue is in memory.

    Args:
        manifest: manifest of the shards.
        lengths: split -> the number of samples in each of its shards.
        stack: closes the catalogues.

    Attributes:
        problems: problems of the catalogue files themselves.
    """

    def __init__(self, manifest: Manifest, lengths: Mapping[str, Sequence[int]], stack: contextlib.ExitStack) -> None:
        self.problems: list[str] = []
        self._manifest = manifest
        self._rows: dict[str, Iterator[pa.Table]] = {}
        self._schemas: dict[str, pa.Schema] = {}
        self._found: dict[str, dict[str, pa.Schema]] = {}  # distinct schemas of the shards, in order of appearance
        for split in manifest.splits if manifest.catalogues else ():
            if catalogue_name(split) not in manifest.catalogues:
                self.problems.append(f"{manifest.location}: no checksum of {catalogue_name(split)}")
                continue
            try:
                file = stack.enter_context(open_catalogue(manifest, split))
                self._schemas[split], self._found[split] = file.schema_arrow, {}
                self._rows[split] = iterate_catalogue(file, lengths[split])
            except UserError as error:
                self.problems.append(str(error))

    def compare(self, split: str, location: str, metas: Sequence[tuple[str, bytes]] | None) -> list[str]:
        """Return the problems of the next shard's rows.

        Args:
            split, location: of the shard; the location is for messages.
            metas: keys and .json of its galaxies; None if they could not be read: its rows are then skipped.
        """
        if split not in self._rows:
            return []
        rows = next(self._rows[split])
        if metas is None:
            self._found.pop(split, None)  # the expected columns are no longer known
            return []
        try:
            table = table_of(metas)
            expected = conform(table, rows.schema)
        except ValueError as error:
            return [f"shard {location}: a .json has values that {catalogue_name(split)} cannot hold ({error})"]
        if split in self._found:
            self._found[split].setdefault(table.schema.to_string(show_field_metadata=True), table.schema)
        if rows.equals(expected):
            return []
        pairs = zip(rows.to_pylist(), expected.to_pylist(), strict=False)
        names = name_some([wanted[ID] for row, wanted in pairs if row != wanted], NAMED)
        return [f"shard {location}: the rows of {names} in {catalogue_name(split)} differ from their .json"]

    def finish(self) -> list[str]:
        """Return the problems found only over all shards: columns that are missing, superfluous or of another type."""
        return [
            f"{self._manifest.location}: the columns of {catalogue_name(split)} are not those of its galaxies' .json"
            for split, found in self._found.items()
            if unite(found.values()) != self._schemas[split]
        ]


# Problems listed in an error; the others are counted.
LISTED = 20
# Columns up to this total size, for some thirty million galaxies, are hashed by ``check_columns``.
QUICK_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class _Shard:
    """One shard to check, with its rows of the columns."""

    split: str
    number: int
    name: str
    location: str
    samples: int
    num_bytes: int
    sha256: bytes
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int32]


def check_shards(location: str | Path, cache: CacheConfig | None = None) -> Manifest:
    """Read, hash and decode all shards and compare them with the manifest, which is returned.

    Args:
        location: manifest.json or its folder, a path or a URL. Shards at a URL are fetched for the check and not kept.
        cache: cache for the columns and catalogues of a URL; None: ``location`` is a path.

    Raises:
        UserError: lists the damaged shards and, where known, the galaxies.
    """
    manifest = read_manifest(Path(location)) if cache is None else open_shards(location, cache)
    read = file_reader(manifest)
    problems = list(_check_columns(manifest))
    shards = [shard for split in manifest.splits for shard in _shards(manifest, split)]
    hashes: list[NDArray[np.uint64]] = []
    with (
        contextlib.ExitStack() as stack,
        ThreadPoolExecutor(available_cores()) as executor,
        tqdm(total=sum(shard.samples for shard in shards), desc="checking shards", unit="img", disable=None) as bar,
    ):
        lengths = {split: manifest.shards(split)["samples"].tolist() for split in manifest.splits}
        catalogues = CatalogueCheck(manifest, lengths, stack)
        problems += catalogues.problems
        for shard, (found, metas) in zip(
            shards, executor.map(lambda shard: _check_shard(shard, manifest, read), shards), strict=True
        ):
            problems += found
            is_read = not found and manifest.tars is None
            problems += catalogues.compare(shard.split, shard.location, metas if is_read else None)
            hashes.append(np.array([key_hash(key.encode()) for key, _ in metas], np.uint64))
            bar.update(shard.samples)
        problems += catalogues.finish()
    if not problems:
        problems += _duplicate_keys(shards, hashes, read) if manifest.tars is None else _duplicate_ids(manifest)
    if problems:
        more = f"\n... and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise UserError(
            f"{manifest.location}: {len(problems)} problem(s):\n"
            + "\n".join(problems[:LISTED])
            + more
            + (f"\nRemove the folder and {_remedy(manifest)}" if manifest.remote is None else "")
        )
    return manifest


def _remedy(manifest: Manifest) -> str:
    return "make the shards anew with: galaxydist data shard" if manifest.tars is None else manifest.remedy


def check_columns(manifest: Manifest) -> None:
    """Compare the columns' checksums with the manifest, unless they exceed ``QUICK_BYTES``, so that it takes a second at most.

    Raises:
        UserError: names the column.
    """
    paths = [manifest.dir / name for name in manifest.columns]
    if sum(path.stat().st_size for path in paths if path.is_file()) > QUICK_BYTES:
        return
    for problem in _check_digests(manifest):
        raise UserError(f"{problem}; look for more with: galaxydist data check {manifest.location}, then {manifest.remedy}")


def _check_digests(manifest: Manifest) -> Iterator[str]:
    for name, expected in manifest.columns.items():
        path = manifest.dir / name
        if not path.is_file():
            yield f"{path}: missing, though the manifest names it"
        elif file_sha256(path) != expected:
            yield f"{path}: its checksum is not the manifest's"


def _check_columns(manifest: Manifest) -> Iterator[str]:
    yield from _check_digests(manifest)
    for name, split in manifest.splits.items():
        for column in ("shards", *COLUMNS, *([TARS] if manifest.tars is not None else [])):
            if column_name(name, column) not in manifest.columns:
                yield f"{manifest.location}: no checksum of {column_name(name, column)}"
        table, labels = manifest.shards(name), manifest.labels(name)
        if int(table["samples"].sum()) != split.num_samples or int(table["bytes"].sum()) != split.num_bytes:
            yield f"{manifest.location}: split {name}: its totals are not the sums over its shards"
        counts = np.bincount(labels[labels >= 0], minlength=manifest.num_classes)
        if tuple(counts.tolist()) != split.class_counts:
            yield f"{manifest.location}: split {name}: its class counts are not those of its labels"


def _shards(manifest: Manifest, split: str) -> Iterator[_Shard]:
    start = 0
    for number, row in enumerate(manifest.shards(split)):
        rows = slice(start, start + int(row["samples"]))
        start = rows.stop
        yield _Shard(
            split,
            number,
            manifest.shard_name(split, number),
            manifest.shard_location(split, number),
            int(row["samples"]),
            int(row["bytes"]),
            row["sha256"].tobytes(),
            manifest.labels(split)[rows],
            manifest.offsets(split)[rows],
            manifest.lengths(split)[rows],
        )


def _check_shard(shard: _Shard, manifest: Manifest, read: FileReader) -> tuple[list[str], list[tuple[str, bytes]]]:
    """Return the problems of a shard, and the keys of its galaxies with their .json (empty if unreadable or a foreign tar)."""
    if manifest.tars is not None:
        return _check_foreign(shard, manifest), []
    try:
        data = read(shard.name, shard.sha256)
        samples = parse_index(read(index_name(shard.name), None).decode("ascii"))
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"], []
    except UserError as error:
        return [str(error)], []
    except ValueError as error:
        return [f"{shard.location.removesuffix(shard.name)}{index_name(shard.name)}: damaged index ({error})"], []
    problems = []
    if len(data) != shard.num_bytes:
        problems.append(f"shard {shard.location}: {len(data)} bytes where the manifest says {shard.num_bytes}")
    elif hashlib.sha256(data).digest() != shard.sha256:
        problems.append(f"shard {shard.location}: its checksum is not the manifest's")
    if len(samples) != shard.samples:
        problems.append(f"shard {shard.location}: its index has {len(samples)} galaxies, the manifest {shard.samples}")
        return problems, []
    metas = []
    for number, members in enumerate(samples):
        key, contents = members[0].name.partition(".")[0], {}
        try:
            contents = _contents(data, members)
            _check_sample(contents, members, shard, number, manifest)
        except (ValueError, OSError) as error:
            problems.append(f"shard {shard.location}, galaxy {key}: {error}")
        metas.append((key, contents.get("json", b"")))
    return problems, metas


def _check_foreign(shard: _Shard, manifest: Manifest) -> list[str]:
    """Return the problems of the samples that a split has in a tar that others wrote."""
    problems = []
    try:
        with _tar_file(shard, manifest) as path, path.open("rb") as file:
            key = ""
            for offset, length in zip(shard.offsets.tolist(), shard.lengths.tolist(), strict=True):
                file.seek(offset - BLOCK)
                data = file.read(BLOCK + length)
                try:
                    key = header_key(data[:BLOCK])
                    if len(data) != BLOCK + length:
                        raise ValueError("it is truncated")
                    decode_stored(data[BLOCK:], manifest.encoding, manifest.image_size)
                except (ValueError, OSError) as error:
                    problems.append(f"tar {shard.location}, image {key or 'unknown'} at byte {offset}: {error}")
    except UserError as error:
        return [str(error)]
    return problems


@contextlib.contextmanager
def _tar_file(shard: _Shard, manifest: Manifest) -> Iterator[Path]:
    """Yield the path of a foreign tar that is still the one that was indexed; a remote one is fetched for this.

    Raises:
        UserError: it is missing or was replaced.
    """
    sha256 = manifest.shard_sha256(shard.split, shard.number)
    if not manifest.has_remote_shards:
        LocalShards(manifest, shard.split).open(shard.number)
        if file_sha256(path := manifest.shard_path(shard.split, shard.number)) != (sha256 or b"").hex():
            raise UserError(f"tar {path}: its checksum is not the manifest's")
        yield path
        return
    store, stop = Store(manifest.shard_folder), threading.Event()
    if sha256 is None:
        check_version(store, shard.name, shard.num_bytes, manifest.shard_version(shard.split, shard.number), stop=stop)
    with tempfile.TemporaryDirectory(prefix="galaxydist-") as folder:
        download(store, shard.name, Path(folder) / "tar", stop=stop, num_bytes=shard.num_bytes, sha256=sha256)
        yield Path(folder) / "tar"


def _duplicate_ids(manifest: Manifest) -> list[str]:
    """Return a problem for each id that occurs twice in the catalogues."""
    counts: Counter[str] = Counter()
    for split in manifest.splits:
        counts.update(read_catalogue(manifest, split, (ID,))[ID].to_pylist())
    return [f"{manifest.location}: the id {name} occurs {count} times" for name, count in counts.items() if count > 1]


def _contents(data: bytes, members: list[Member]) -> dict[str, bytes]:
    """Return a sample's files by extension, read at the offsets in the index.

    Raises:
        ValueError: a file is missing or truncated.
    """
    contents = {}
    for member in members:
        check_header(data[member.offset - BLOCK : member.offset], member)
        contents[member.extension] = data[member.offset : member.offset + member.size]
        if len(contents[member.extension]) != member.size:
            raise ValueError(f"{member.name} is truncated")
    return contents


def _check_sample(contents: dict[str, bytes], members: list[Member], shard: _Shard, number: int, manifest: Manifest) -> None:
    """Compare one sample with the columns, its index and the manifest.

    Raises:
        ValueError: describes the problem.
    """
    label = int(shard.labels[number])
    if set(contents) != {manifest.extension, "json"} | ({"cls"} if label >= 0 else set()):
        raise ValueError(f"has the files {sorted(contents)}")
    image = next(member for member in members if member.extension == manifest.extension)
    if (image.offset, image.size) != (int(shard.offsets[number]), int(shard.lengths[number])):
        raise ValueError("its offset or length in the columns is not that in its index")
    if label >= 0 and contents["cls"] != str(label).encode():
        raise ValueError(f"its .cls is {contents['cls'].decode(errors='replace')}, its label in the columns {label}")
    json.loads(contents["json"])
    decode_stored(contents[manifest.extension], manifest.encoding, manifest.image_size)


def _duplicate_keys(shards: list[_Shard], hashes: list[NDArray[np.uint64]], read: FileReader) -> list[str]:
    """Return a problem for each key that occurs twice; the hashes only limit the shards that are searched."""
    numbers, counts = np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]), return_counts=True)
    suspects = {*numbers[counts > 1].tolist()}
    seen: dict[str, str] = {}
    problems = []
    for shard, found in zip(shards, hashes, strict=True):
        if suspects.isdisjoint(found.tolist()):
            continue
        for members in parse_index(read(index_name(shard.name), None).decode("ascii")):
            key = members[0].name.partition(".")[0]
            if key in seen:
                problems.append(f"galaxy {key} is in {seen[key]} and in {shard.location}")
            seen[key] = shard.location
    return problems


# Equal images are only reported, never moved: a split given by the user or a survey stays unchanged.

# Groups of equal images, and galaxies of each, that a message names.
MOST_NAMED = 5


def describe_equal_images(manifest: Manifest) -> list[str]:
    """Return warnings about images that are equal pixel for pixel, or about missing hashes; empty without either.

    Raises:
        UserError: a catalogue is missing or damaged.
    """
    rows = _repeated_images(manifest)
    if rows is None:
        return [
            f"{manifest.location} has no hashes of its images ({_without_hashes(manifest)}), so that equal images in two "
            f"splits cannot be found; {manifest.remedy} to compare them"
        ]
    across: list[str] = []
    two_labels: list[str] = []
    for _, members in itertools.groupby(rows.to_pylist(), itemgetter("hash")):
        group = list(members)
        names = " = ".join(f"{row['split']}/{row['id']}" for row in group[:MOST_NAMED])
        if len({row["split"] for row in group} - {MARGIN}) > 1:
            across.append(names)
        if len({row["label"] for row in group if row["label"] >= 0}) > 1:
            two_labels.append(names)
    lines = []
    if across:
        lines.append(
            f"{_images(across, 'is', 'are')} in more than one split, pixel for pixel: {name_some(across, MOST_NAMED)}. A model "
            "would be evaluated on images that it has learnt from: remove them from one of the splits"
        )
    if two_labels:
        lines.append(f"{_images(two_labels, 'has', 'have')} two labels, pixel for pixel: {name_some(two_labels, MOST_NAMED)}")
    return lines


def _without_hashes(manifest: Manifest) -> str:
    return "an earlier version wrote it" if manifest.tars is None else "the tars were indexed without --sha256"


def _repeated_images(manifest: Manifest) -> pa.Table | None:
    """Return hash, split, id and label of the galaxies whose image hash occurs again; None if the catalogues have no hashes."""
    if not manifest.catalogues:
        return None
    tables = []
    for name in (name for name, split in manifest.splits.items() if split.num_samples):
        table = read_catalogue(manifest, name, (ID, PIXEL_HASH))
        if PIXEL_HASH not in table.column_names:
            return None
        columns = {"hash": table[PIXEL_HASH], "split": pa.repeat(name, len(table)), "id": table[ID]}
        tables.append(pa.table({**columns, "label": manifest.labels(name)}))
    rows = pa.concat_tables(tables).filter(pc.field("hash").is_valid())
    counts = rows.group_by("hash").aggregate([([], "count_all")]).filter(pc.field("count_all") > 1)
    return rows.filter(pc.is_in(rows["hash"], counts["hash"])).sort_by("hash")


def _images(groups: list[str], singular: str, plural: str) -> str:
    return f"1 image {singular}" if len(groups) == 1 else f"{len(groups)} images {plural}"
