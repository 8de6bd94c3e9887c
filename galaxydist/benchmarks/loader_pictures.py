"""The pictures of a folder of shards as bytes, one after another, read through the shards' own indexes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from galaxydist.shards.tar import parse_index


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """One picture: its galaxy's key, the number of its class, the bytes of its file."""

    key: str
    label: int
    data: bytes


def stored_pictures(shards_dir: Path, split: str = "train") -> Iterator[StoredPicture]:
    """The JPEGs of a split, in the order in which they are stored."""
    for path in sorted(shards_dir.glob(f"{split}-*.tar")):
        tar = path.read_bytes()
        for members in parse_index(path.with_suffix(".idx").read_text("ascii")):
            parts = {member.extension: tar[member.offset : member.offset + member.size] for member in members}
            yield StoredPicture(members[0].name.partition(".")[0], int(parts.get("cls", b"-1")), parts["jpg"])
