"""A tar archive to groups of members with one key, streamed and strict.

Members are grouped by WebDataset's rule: the key is the path up to the first dot of the base name,
the extension is the rest; a group ends where the key changes or an extension comes again.

Stricter than tarfile and webdataset, which both take a tar that was cut between two members, or has
a damaged header inside, for a whole one: it must end in two blocks of zeros with nothing behind.

Fast, because a GPU takes thousands of images a second: blocks are read and hashed large enough that
other threads run meanwhile, and the header of a plain file, which nearly all are, is recognised by
a regular expression. tarfile reads every other header, and has the say on all that is damaged.

Links are followed within the archive (links.py); one that leads elsewhere is told in its sample.

Left out: compressed archives (a cut shows only after unpacking).
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from tarfile import BLOCKSIZE
from typing import IO, BinaryIO, cast
from zlib import adler32

from splatshard.pipeline.source.formats import (
    EXTENSIONS,
    HEAD_BYTES,
    NAMED_EXTENSIONS,
    disguised,
)
from splatshard.pipeline.source.links import Again, Links, forget_headers, open_tar
from splatshard.pipeline.source.patterns import SYSTEM_FOLDERS
from splatshard.pipeline.storage.fs import Digest
from splatshard.schemas.errors import SampleError, SourceError

MAX_SAMPLE_BYTES = 1 << 28
"""All members of one sample together; what is larger is skipped unread, so memory stays bounded."""

MAX_PADDING = 1 << 21
"""Zeros at the end of an archive: tar fills its last record with them, of 10 KiB, on tapes 1 MiB.
aria2 and others give a file its size before they have its bytes."""

IMAGE = "|".join((*EXTENSIONS, *NAMED_EXTENSIONS))
names_image = re.compile(rf"(?is)(?:.*/)?(?!\._)[^/]*\.(?:{IMAGE})").fullmatch
"""A path of one; those of macOS (`._a.jpg`) are none."""

OF_SYSTEMS = "systems keep thumbnails there, or what was deleted: move what is wanted out of it"
PASSED = {folder: (f"an image in {folder}", OF_SYSTEMS) for folder in SYSTEM_FOLDERS}
"""What is said of images in the folders that systems make."""

MULTIVOLUME = b"M"
"""The type of a member that began in another volume."""

BLOCK_BYTES = 1 << 18
"""Read and hashed at once: still in the cache when its members are taken out; 1 MiB is slower."""

NUMBERS = (
    rb"(?:[0-7]{7}[\0 ]){3}"  # mode, uid, gid
    rb"(?P<size>[0-7]{11})[\0 ]"
    rb"[0-7]{11}[\0 ]"  # time
    rb"(?=(?P<checksum>[0-7]{6,7})\0).{8}"
)
DEVICE = rb"(?:\0{8}|[0-7]{7}[\0 ]){2}"

match_file = re.compile(
    rb"(?s)(?=(?P<name>[^\0]{1,100})).{100}" + NUMBERS + rb"0.{172}" + DEVICE + rb"\0.{166}"
).match
"""A header in which tarfile would find a regular file of that name and size, and nothing more."""

match_extension = re.compile(rb"(?s).{100}" + NUMBERS + rb"x.{172}" + DEVICE + rb".{167}").match
match_time = re.compile(rb"(?P<record>(?P<size>\d\d) mtime=\d+\.\d+\n)\0+").fullmatch
"""A header extension and its block, when it only says the time to fractions of a second:
webdataset, and so img2dataset, puts that before every member."""


class TarStream:
    """Reads a stream front to back, and hashes what was taken from it.

    `position` is how far the stream itself was read, `zeros` how many zero bytes it ends in so far,
    `head` its first bytes. It has what tarfile needs of a file: read, tell, seek forwards.
    """

    def __init__(self, stream: BinaryIO, digest: Digest) -> None:
        self.stream, self.digest = stream, digest
        self.block, self.start = b"", 0  # `start`: of what was not yet taken from the block
        self.position = self.zeros = 0
        self.head = b""

    def next_block(self) -> bytes:
        """The next block, or none at the end; gives up what is left of the present one."""
        self.digest.update(self.block)
        self.block, self.start = b"", 0  # should the stream raise
        self.block = block = self.stream.read(BLOCK_BYTES)
        self.head = self.head or block[:HEAD_BYTES]
        self.position += len(block)
        zeros = len(block) - len(block.rstrip(b"\0"))
        self.zeros = self.zeros + zeros if zeros == len(block) else zeros
        return block

    def peek(self, size: int) -> bytes:
        """Up to `size` bytes without taking them, as the block has them; none only at the end."""
        if self.start == len(self.block):
            self.next_block()
        return self.block[self.start : self.start + size]

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        if size < 0:
            raise tarfile.StreamError(f"a member of {size} bytes")
        end = self.start + size
        if end <= len(self.block):
            data = self.block[self.start : end]
            self.start = end
            return data
        parts = [memoryview(self.block)[self.start :]]
        missing = size - len(parts[0])
        while missing and (block := self.next_block()):
            parts.append(memoryview(block)[:missing])
            self.start = len(parts[-1])
            missing -= self.start
        return b"".join(parts)

    def tell(self) -> int:
        return self.position - len(self.block) + self.start

    def seek(self, position: int) -> None:
        """Forwards, not beyond the end. Raises StreamError for a way back."""
        distance = position - self.tell()
        if distance < 0:
            raise tarfile.StreamError("seeking backwards is not allowed")
        while (left := len(self.block) - self.start) < distance:
            distance -= left
            if not self.next_block():
                return
        self.start += distance

    def finish(self) -> None:
        """Put into the digest what was taken since the last block."""
        self.digest.update(self.block[: self.start])
        self.block, self.start = b"", 0


@dataclass
class Group:
    """The members of one key by extension; None for bytes that were not read. `missing` are links
    that lead nowhere, by extension, and why; `passed` images of no sample before or behind them, by
    place, and why."""

    key: str
    members: dict[str, bytes | None] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    passed: list[tuple[str, str]] = field(default_factory=list)
    size_bytes: int = 0
    error: SampleError | None = None


def read_groups(
    url: str, stream: BinaryIO, digest: Digest, again: Again
) -> Generator[Group, None, None]:
    """All groups of the archive, read front to back; every byte taken goes into `digest`. `again`
    opens the archive once more, for links.

    Raises SourceError for what is not a whole tar archive, naming `url` and the byte.
    """
    source = TarStream(stream, digest)
    try:
        with (
            _errors(url, source.tell, lambda: source.head),
            open_tar(source) as archive,
            closing(Links(again)) as links,
        ):
            data = partial(_data, archive, source)
            yield from _groups(_members(archive, source), links, data)
            while source.next_block():
                pass
        _check_end(url, source, archive.offset)
    finally:
        source.finish()


def scan_groups(
    url: str, stream: BinaryIO, again: Again, extensions: Collection[str] = ()
) -> Iterator[Group]:
    """The groups without their bytes but for members with one of `extensions`, seeking from header
    to header; `again` as for `read_groups`. Raises SourceError."""

    def head() -> bytes:
        stream.seek(0)
        return stream.read(HEAD_BYTES)

    with (
        _errors(url, stream.tell, head),
        open_tar(stream) as archive,
        closing(Links(again)) as links,
    ):
        data = partial(_extracted, archive)
        yield from _groups(_members(archive, None), links, data, extensions)


def _members(archive: tarfile.TarFile, source: TarStream | None) -> Iterator[tarfile.TarInfo]:
    info = archive.next()
    while info is not None:
        forget_headers(archive)
        yield info
        info = (_plain(archive, source) if source else None) or archive.next()


def _plain(archive: tarfile.TarFile, source: TarStream) -> tarfile.TarInfo | None:
    """The next member as archive.next() would give it, if its header is plain.

    Else None, and the header is still there for tarfile.
    """
    source.seek(archive.offset)
    blocks = source.peek(3 * BLOCKSIZE)
    begin = 2 * BLOCKSIZE if _only_a_time(blocks) else 0
    match = match_file(blocks, begin)
    # a global extension changes every member
    if match is None or archive.pax_headers or not _sum_is_right(match):
        return None
    source.start += begin + BLOCKSIZE
    info = tarfile.TarInfo(match["name"].decode("utf-8", "backslashreplace"))
    info.size = int(match["size"], 8)
    archive.offset += begin + BLOCKSIZE + -(-info.size // BLOCKSIZE) * BLOCKSIZE
    return info


def _only_a_time(blocks: bytes) -> bool:
    """Whether they begin with a header extension that says nothing but the time."""
    header = match_extension(blocks)
    if not header:
        return False
    time = match_time(blocks, BLOCKSIZE, 2 * BLOCKSIZE)
    if not time or not _sum_is_right(header):
        return False
    return len(time["record"]) == int(time["size"]) == int(header["size"], 8)


def _sum_is_right(header: re.Match[bytes]) -> bool:
    """The checksum is the sum of all bytes, its own field counted as eight spaces.

    The low half of Adler's is 1 + the sum modulo 65521, which 256 bytes cannot reach.
    """
    block = header[0]
    total = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
    return total - sum(block[148:156]) + 8 * ord(" ") == int(header["checksum"], 8)


def _extracted(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    return cast("IO[bytes]", archive.extractfile(info)).read()


def _data(archive: tarfile.TarFile, source: TarStream, info: tarfile.TarInfo) -> bytes:
    """The bytes of the member whose header was just taken."""
    if info.sparse is not None:
        return _extracted(archive, info)
    data = source.read(info.size)
    if len(data) < info.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _groups(
    members: Iterable[tarfile.TarInfo],
    links: Links,
    data: Callable[[tarfile.TarInfo], bytes],
    extensions: Collection[str] | None = None,
) -> Iterator[Group]:
    """Consecutive members of one key; folders, devices and hidden files are passed over, but hidden
    images are told. Bytes are read of those with one of `extensions`, by default of all."""
    group, passed, alone = None, list[tuple[str, str]](), ""
    for info in members:
        path = _safe(info.name)
        file = _file_of(info, links)
        if file is None:
            continue
        if folder := _of_system(path):
            if names_image(path):
                passed.append(PASSED[folder])
                alone = alone or split_name(path)[0]
            continue
        if path.rpartition("/")[2].startswith("."):
            if names_image(path):
                text = f"{info.name} is hidden, since its name begins with a dot: rename it"
                yield Group(path.rpartition(".")[0], error=SampleError("no_image", text))
            continue
        key, extension = split_name(path)
        if group is None or key != group.key or extension in group.members:
            if group:
                yield group
            group = Group(key, passed=passed)
            passed = []
        group.members[extension] = None
        if path != info.name:
            text = (
                f"member path {info.name!r} leads out of the archive: write the tar without "
                "--absolute-names (-P)"
            )
            group.error = SampleError("unsafe_path", text)
        elif isinstance(file, str):
            group.missing[extension] = file
        elif group.size_bytes + file.size > MAX_SAMPLE_BYTES:
            text = f"{info.name} has {file.size} bytes; a sample may have {MAX_SAMPLE_BYTES}"
            group.error = SampleError("too_large", text)
        elif extensions is None or extension.lower() in extensions:
            group.size_bytes += file.size
            group.members[extension] = data(info) if file is info else links.read(file)
    if passed and not group:
        places = ", ".join(dict.fromkeys(place for place, _ in passed))
        group = Group(alone, error=SampleError("no_image", f"there is only {places}: {OF_SYSTEMS}"))
    if group:
        group.passed += passed
        yield group


def _file_of(info: tarfile.TarInfo, links: Links) -> tarfile.TarInfo | str | None:
    """The file that a member is or leads to, or why there is none; None for what is no file."""
    if info.isreg():
        return info
    if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        found = links.follow(info)
        is_folder = isinstance(found, tarfile.TarInfo) and found.isdir()
        return None if is_folder else found  # its files are members themselves
    if info.type == MULTIVOLUME:
        return f"{info.name} began in another volume: join them, with tar --multi-volume"
    return None


@contextmanager
def _errors(url: str, place: Callable[[], int], head: Callable[[], bytes]) -> Iterator[None]:
    """Errors of the block as SourceError; the archive is read up to `place`, and begins with
    `head`."""
    try:
        yield
    except (tarfile.TarError, OSError, ValueError, RecursionError) as e:
        problem, start = f"{url}: {e} at byte {place()}", head()
        if not start:
            problem = f"{url} has zero bytes"
        elif kind := disguised(url, start):
            raise SourceError(f"{url} is no tar, but {kind}") from e
        elif not str(e).startswith("unexpected end") and start[257:262] != b"ustar":
            problem += f" (it begins with {start[:8]!r}; a tar must not be compressed)"
        raise SourceError(f"{problem}; download it again") from e


def _check_end(url: str, source: TarStream, end: int) -> None:
    """From `end`, where the last member ends, there must be two zero blocks or more."""
    size, rest = source.position, source.position - end
    if source.zeros >= rest > MAX_PADDING:
        raise SourceError(
            f"{url} ends in {rest:,} zero bytes from byte {end} on, as a download does whose room "
            "was made before: download it again, or, if it is whole, cut them off: truncate "
            f"--size {end + 2 * BLOCKSIZE}"
        )
    if source.zeros >= rest >= 2 * BLOCKSIZE:
        return
    if source.zeros >= rest:
        problem = (
            f"ends at byte {size} without the end-of-archive marker, so samples may be missing"
        )
    elif rest < BLOCKSIZE:
        problem = f"is cut short at byte {size}, inside a member's header"
    else:
        raise SourceError(
            f"{url} has a damaged header or a second archive from byte {end} on (of {size}); "
            "download it again, or unpack joined archives with tar --ignore-zeros and write one"
        )
    raise SourceError(f"{url} {problem}; download it again")


def split_name(path: str) -> tuple[str, str]:
    """WebDataset's key and extension: `a.b/c.meta.json` is (`a.b/c`, `meta.json`)."""
    base = path.rpartition("/")[2]
    stem, _, extension = base.partition(".")
    return path[: len(path) - len(base)] + stem, extension


def _of_system(path: str) -> str:
    """The folder of a system's own that a path lies in, empty where in none."""
    return next((part for part in path.split("/") if part in SYSTEM_FOLDERS), "")


def _safe(path: str) -> str:
    """The path; its `..` and leading slash are percent-encoded if it leads out of the archive."""
    if ".." in path:
        parts = re.split(r"[/\\]", path)
        if ".." in parts:
            path = "/".join("%2E%2E" if part == ".." else part for part in parts)
    return "%2F" + path[1:] if path.startswith("/") else path
