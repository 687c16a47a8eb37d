"""A tar archive to groups of members with one key, streamed and strict.

Members are grouped by WebDataset's rule: the key is the path up to the first dot of the base name,
the extension is the rest; a group ends where the key changes or an extension comes again.

Stricter than tarfile and webdataset, which both take a tar that was cut between two members, or has
a damaged header inside, for a whole one: it must end in two blocks of zeros with nothing behind.

Left out: compressed archives (a cut shows only after unpacking).
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from schemas.errors import SampleError, SourceError

MAX_SAMPLE_BYTES = 1 << 28
"""All members of one sample together; what is larger is skipped unread, so memory stays bounded."""


class DigestedStream:
    """Hashes what is read from a stream, and knows how many zero bytes it ends in so far."""

    def __init__(self, stream: BinaryIO, digest: hashlib._Hash) -> None:
        self.stream, self.digest = stream, digest
        self.position = self.zeros = 0
        self.head = b""

    def read(self, size: int) -> bytes:
        block = self.stream.read(size)
        self.head = self.head or block[:8]
        self.digest.update(block)
        self.position += len(block)
        zeros = len(block) - len(block.rstrip(b"\0"))
        self.zeros = self.zeros + zeros if zeros == len(block) else zeros
        return block


@dataclass
class Group:
    """The members of one key by extension; None for bytes that were not read."""

    key: str
    members: dict[str, bytes | None] = field(default_factory=dict)
    size_bytes: int = 0
    error: SampleError | None = None


def read_groups(url: str, stream: BinaryIO, digest: hashlib._Hash) -> Iterator[Group]:
    """All groups of the archive, read front to back; every byte goes into `digest`.

    Raises SourceError for what is not a whole tar archive, naming `url` and the byte.
    """
    source = DigestedStream(stream, digest)
    with _errors(url, source), _open(source, "r|") as archive:
        yield from _groups(archive, with_data=True)
        while source.read(1 << 20):
            pass
    _check_end(url, source, archive.offset)


def scan_groups(url: str, stream: BinaryIO) -> Iterator[Group]:
    """The groups without their bytes, seeking from header to header. Raises SourceError."""
    with _errors(url, DigestedStream(stream, hashlib.sha256())), _open(stream, "r:") as archive:
        yield from _groups(archive, with_data=False)


def _open(stream: Any, mode: Any) -> tarfile.TarFile:
    # names that are not UTF-8 become \xNN: Arrow and JSON could not store tarfile's surrogates
    return tarfile.open(fileobj=stream, mode=mode, encoding="utf-8", errors="backslashreplace")


def _groups(archive: tarfile.TarFile, with_data: bool) -> Iterator[Group]:
    """Consecutive members of one key; folders, links, devices and hidden files are passed over."""
    group = None
    while (info := archive.next()) is not None:
        archive.members.clear()  # tarfile would remember every header
        path = _safe(info.name)
        if not info.isreg() or _hidden(path):
            continue
        key, extension = split_name(path)
        if group is None or key != group.key or extension in group.members:
            if group:
                yield group
            group = Group(key)
        group.members[extension] = None
        if path != info.name:
            text = f"member path {info.name!r} leads out of the archive"
            group.error = SampleError("unsafe_path", text)
        elif group.size_bytes + info.size > MAX_SAMPLE_BYTES:
            text = f"{info.name} has {info.size} bytes; a sample may have {MAX_SAMPLE_BYTES}"
            group.error = SampleError("too_large", text)
        elif with_data:
            group.size_bytes += info.size
            group.members[extension] = archive.extractfile(info).read()
    if group:
        yield group


@contextmanager
def _errors(url: str, source: DigestedStream) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, ValueError, RecursionError) as e:
        problem = f"{url}: {e} at byte {source.position}"
        if not source.position:
            problem = f"{url} has zero bytes"
        elif isinstance(e, tarfile.ReadError) and str(e) != "unexpected end of data":
            problem += f" (it begins with {source.head!r}; a tar must not be compressed)"
        raise SourceError(f"{problem}; download it again") from e


def _check_end(url: str, source: DigestedStream, end: int) -> None:
    """From `end`, where the last member ends, there must be two zero blocks or more."""
    size, rest = source.position, source.position - end
    if source.zeros >= rest and rest >= 2 * tarfile.BLOCKSIZE:
        return
    if source.zeros >= rest:
        problem = (
            f"ends at byte {size} without the end-of-archive marker, so samples may be missing"
        )
    elif rest < tarfile.BLOCKSIZE:
        problem = f"is cut short at byte {size}, inside a member's header"
    else:
        problem = f"has a damaged header or a second archive from byte {end} on (of {size})"
    raise SourceError(f"{url} {problem}; download it again")


def split_name(path: str) -> tuple[str, str]:
    """WebDataset's key and extension: `a.b/c.meta.json` is (`a.b/c`, `meta.json`)."""
    base = path.rpartition("/")[2]
    stem, _, extension = base.partition(".")
    return path[: len(path) - len(base)] + stem, extension


def _hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".") or "__MACOSX" in path.split("/")


def _safe(path: str) -> str:
    """The path; its `..` and leading slash are percent-encoded if it leads out of the archive."""
    parts = re.split(r"[/\\]", path)
    if ".." in parts:
        path = "/".join("%2E%2E" if part == ".." else part for part in parts)
    return "%2F" + path[1:] if path.startswith("/") else path
