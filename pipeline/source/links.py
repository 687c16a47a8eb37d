"""Links in a tar to the bytes they stand for, where these are in the same archive.

GNU tar writes a file with several names once, and hard links for the others; symbolic links are
written as such unless it is told otherwise. An archive that is read front to back has passed what a
link leads to, or has not come to it. So at the first link the archive is opened a second time, and
where its members begin is kept, 16 bytes for each. Archives without links cost nothing.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from posixpath import dirname, join, normpath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Again = Callable[[], AbstractContextManager[BinaryIO]]
"""Opens an archive once more, as a stream that can seek."""

MAX_CHAIN = 40
"""Links that lead to links, as many as Linux follows."""


GNU_TIMES = re.compile(
    rb"(?s).{156}[^LKS].{100}ustar  \0.{80}(?:\0{12}|[0-7]{11}\0){2}.*"
).fullmatch
"""A header of GNU's with times, as incremental archives have them, where POSIX has a folder."""


class Member(tarfile.TarInfo):
    """tarfile would take GNU's times for the name of a folder, another one for each member."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Member:
        info = super().frombuf(buf, encoding, errors)
        if GNU_TIMES(buf):
            name = bytes(buf[:100]).partition(b"\0")[0].decode(encoding, errors)
            info.name = name.rstrip("/") if info.isdir() else name
        return info


def open_tar(stream: Any) -> tarfile.TarFile:
    # names that are not UTF-8 become \xNN: Arrow and JSON could not store tarfile's surrogates
    return tarfile.TarFile(
        fileobj=stream, tarinfo=Member, encoding="utf-8", errors="backslashreplace"
    )


def forget_headers(archive: Any) -> None:
    """tarfile would keep every header until the end, in a list that its published type lacks."""
    archive.members.clear()


class Links:
    """Follows the links of one archive; close it at the end. Raises what tarfile and the stream
    raise."""

    def __init__(self, again: Again) -> None:
        self._again = again
        self._open = ExitStack()
        self._archive: tarfile.TarFile | None = None
        self._names = np.empty(0, np.uint64)  # hashes of the members' names, in order
        self._offsets = np.empty(0, np.uint64)  # where each begins; of one name in order

    def close(self) -> None:
        self._open.close()

    def follow(self, link: tarfile.TarInfo) -> tarfile.TarInfo | str:
        """The file or folder that `link` leads to, or why there is none, with the remedy."""
        if self._archive is None:
            self._archive = open_tar(self._open.enter_context(self._again()))
            self._names, self._offsets = _where_members_begin(self._archive)
        path, end = _target(link), link.offset if link.islnk() else None
        for _ in range(MAX_CHAIN):
            found = self._last(path, end)
            if found and (found.isreg() or found.isdir()):
                return found
            if found and (found.issym() or found.islnk()):
                path, end = _target(found), found.offset if found.islnk() else None
            elif found or not (path := self._through_folder(path)):
                break
            else:
                end = None
        kind, option = ("hard ", "--hard-dereference") if link.islnk() else ("", "--dereference")
        return (
            f"{link.name} is a {kind}link to {link.linkname}, which leads to nothing in the "
            f"archive: write the tar with {option}"
        )

    def read(self, member: tarfile.TarInfo) -> bytes:
        """The bytes of a file that `follow` found."""
        assert self._archive is not None, "follow() comes first"
        stream = self._archive.extractfile(member)
        return stream.read() if stream else b""

    def _last(self, path: str, end: int | None = None) -> tarfile.TarInfo | None:
        """The last member of that name, before byte `end` of the archive where it is given."""
        code = np.uint64(_hash(path))
        begin, behind = (int(np.searchsorted(self._names, code, at)) for at in ("left", "right"))
        offsets = self._offsets[begin:behind].tolist()
        offsets = [offset for offset in offsets if end is None or offset < end]
        return self._member(offsets[-1]) if offsets else None

    def _through_folder(self, path: str) -> str:
        """`path` by way of the last of its folders that is a link; empty where none is."""
        parts = normpath(path).split("/")
        for n in range(len(parts) - 1, 0, -1):
            folder = self._last("/".join(parts[:n]))
            if folder and folder.issym():
                return join(_target(folder), *parts[n:])
        return ""

    def _member(self, offset: int) -> tarfile.TarInfo | None:
        archive: Any = self._archive
        archive.fileobj.seek(offset)
        archive.offset = offset
        info = archive.next()
        forget_headers(archive)
        return info


def _where_members_begin(
    archive: tarfile.TarFile,
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hashes of the names of all members, sorted, and where in the archive their headers begin."""
    found = array("Q")
    while info := archive.next():
        found.extend((_hash(info.name), info.offset))
        forget_headers(archive)
    names, offsets = np.frombuffer(found, np.uint64).reshape(-1, 2).T
    order = np.argsort(names, kind="stable")
    return names[order], offsets[order]


def _target(link: tarfile.TarInfo) -> str:
    """A hard link names a member before it, as the archive does; a symbolic one goes on from its
    folder."""
    return link.linkname if link.islnk() else join(dirname(link.name), link.linkname)


def _hash(path: str) -> int:
    """8 bytes instead of a path, in any of its spellings (`./a`)."""
    code = hashlib.blake2b(normpath(path).encode("utf-8", "backslashreplace"), digest_size=8)
    return int.from_bytes(code.digest(), "little")
