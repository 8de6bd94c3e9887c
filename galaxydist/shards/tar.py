"""Tar members of WebDataset shards, and DALI's index of them.

The tars equal those of webdataset's own writer with fixed time, owner and mode (a test compares them). That writer is not used
because it imports torch, which takes seconds in each writing process.
"""

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass

BLOCK = tarfile.BLOCKSIZE
INDEX_VERSION = "v1.2"
# USTAR keeps 100 characters of a name; the longest ending is ".json".
LONGEST_KEY = 95


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a tar: ``extension`` is the part after the name's first dot, ``offset`` the first byte of the content."""

    extension: str
    offset: int
    size: int
    name: str


def sample_members(key: str, contents: Mapping[str, bytes], start: int) -> tuple[list[Member], list[bytes]]:
    """Return one sample's members for a tar that is ``start`` bytes long, and the pieces to append to it."""
    members, pieces = [], []
    for extension in sorted(contents):
        content = contents[extension]
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size, info.mode, info.uname, info.gname = len(content), 0o444, "bigdata", "bigdata"
        members.append(Member(extension, start + BLOCK, len(content), info.name))
        pieces += [info.tobuf(tarfile.USTAR_FORMAT), content, b"\0" * (-len(content) % BLOCK)]
        start += BLOCK + len(content) + -len(content) % BLOCK
    return members, pieces


def end_of_tar(length: int) -> bytes:
    """Return the end of a tar of ``length`` bytes: two empty blocks, then zeros up to a whole record."""
    return b"\0" * (2 * BLOCK + (-(length + 2 * BLOCK) % tarfile.RECORDSIZE))


def index_text(samples: list[list[Member]]) -> str:
    """Return DALI's index (tools/wds2idx.py, version 1.2): per sample a line of ``extension offset size name`` per file."""
    lines = [f"{INDEX_VERSION} {len(samples)}"]
    lines += [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members) for members in samples]
    return "\n".join(lines) + "\n"


def parse_index(text: str) -> list[list[Member]]:
    """Return the samples of an index.

    Raises:
        ValueError: the text is not an index, or its number of lines differs from its header.
    """
    head, *lines = text.splitlines()
    version, count = head.split(" ")
    if version != INDEX_VERSION or int(count) != len(lines):
        raise ValueError(f"not an index of {INDEX_VERSION} with {len(lines)} samples: {head!r}")
    samples = []
    for line in lines:
        fields = line.split(" ")
        if len(fields) % 4:
            raise ValueError(f"not groups of four fields: {line!r}")
        samples.append(
            [Member(fields[i], int(fields[i + 1]), int(fields[i + 2]), fields[i + 3]) for i in range(0, len(fields), 4)]
        )
    return samples


def header_key(block: bytes) -> str:
    """Return the key of the file whose header a block is: its name without folders, up to the first dot.

    Raises:
        ValueError: the block is not a header.
    """
    try:
        name = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").name
    except tarfile.HeaderError as error:
        raise ValueError(f"not a header ({error})") from None
    return name.rpartition("/")[2].partition(".")[0]


def check_header(block: bytes, member: Member) -> None:
    """Check that a block of a tar is the header of the file that the index names.

    Raises:
        ValueError: describes the difference.
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except tarfile.HeaderError as error:
        raise ValueError(f"no file of the tar where the index says ({error})") from None
    if (info.name, info.size) != (member.name, member.size):
        raise ValueError(f"the index says {member.name} of {member.size} bytes, the tar {info.name} of {info.size}")
