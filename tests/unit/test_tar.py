"""Archives: members of every kind, damage of every kind, and the same word as tarfile's."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import tracemalloc
from contextlib import nullcontext
from functools import partial
from tarfile import BLOCKSIZE
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splatshard.pipeline.source.links import Member
from splatshard.pipeline.source.read import read, scan
from splatshard.pipeline.source.tar import MAX_PADDING, read_groups, split_name
from splatshard.schemas.errors import SourceError
from tests.make import datacomp_tar, imagenet_tar, write_tar
from tests.unit.reading import (
    IMAGE,
    cut,
    end_of_second_sample,
    read_all,
    read_members,
    ref_of,
    statuses,
)

# Members


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("d.e/a.b.jpg", ("d.e/a", "b.jpg")),
        ("./a.meta.json", ("./a", "meta.json")),
        ("/a.jpg", ("/a", "jpg")),
        ("README", ("README", "")),
    ],
)
def test_key_rule(path, expected):
    assert split_name(path) == expected


def test_names_that_are_not_utf8_can_be_stored(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        info = tarfile.TarInfo("é.jpg")
        info.size = len(IMAGE)
        archive.addfile(info, io.BytesIO(IMAGE))
    (sample,) = read_all(path)
    assert sample.key.encode() == rb"\xe9"


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_folders_and_hidden_files_are_passed_over(tmp_path, style):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=style) as archive:
        for name, kind in [("d", tarfile.DIRTYPE), ("e", tarfile.SYMTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "d" if kind == tarfile.SYMTYPE else ""
            archive.addfile(info)
        name = "d/" + "a" * (90 if style == tarfile.USTAR_FORMAT else 250)
        for member in ("d/._a.jpg", "__MACOSX/b.jpg", ".DS_Store", f"{name}.jpg"):
            info = tarfile.TarInfo(member)
            info.size, info.mtime = len(IMAGE), 1.5 if style == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(IMAGE))
    (sample,) = read_all(path)
    assert (sample.key, sample.image) == (name, IMAGE)


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a/..\\..\\x"])
def test_unsafe_path_is_one_row(tmp_path, path):
    samples = read_members(tmp_path, (f"{path}.jpg", IMAGE), (f"{path}.txt", b""), ("y.jpg", IMAGE))
    assert statuses(samples) == ["unsafe_path", None]
    assert path in str(samples[0].error).replace("\\\\", "\\")
    assert "write the tar without --absolute-names" in str(samples[0].error)
    assert ".." not in samples[0].key  # a tar written from it must be safe, too
    assert not samples[0].key.startswith("/")
    assert samples[0].image == b""


def test_dots_inside_names_are_safe(tmp_path):
    samples = read_members(tmp_path, ("a/b..c/x.jpg", IMAGE), ("a..d/y.jpg", IMAGE))
    assert statuses(samples) == [None, None]


def test_oversized_sample_is_skipped_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("splatshard.pipeline.source.tar.MAX_SAMPLE_BYTES", 5000)
    samples = read_members(tmp_path, ("a.jpg", bytes(6000)), ("b.jpg", IMAGE))
    assert statuses(samples) == ["too_large", None]
    assert samples[0].image == b""


# Damage


def test_cut_inside_a_member(tmp_path):
    end = end_of_second_sample(tmp_path)
    with pytest.raises(SourceError, match=rf"cut.tar.*byte {end + 700}; download it again"):
        read_all(cut(tmp_path, end + 700))


def test_cut_inside_a_header(tmp_path):
    end = end_of_second_sample(tmp_path)
    with pytest.raises(SourceError, match=rf"cut.tar.*{end + 100}.*header; download it again"):
        read_all(cut(tmp_path, end + 100))


@pytest.mark.parametrize("zeros", [0, 512])
def test_cut_at_a_member_boundary(tmp_path, zeros):
    end = end_of_second_sample(tmp_path)
    path = cut(tmp_path, end)
    path.write_bytes(path.read_bytes() + bytes(zeros))
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 6  # tarfile finds nothing wrong
    with pytest.raises(SourceError, match=rf"byte {end + zeros} without the end-of-archive"):
        read_all(path)


@pytest.mark.parametrize("zeros", [MAX_PADDING - BLOCKSIZE, MAX_PADDING + BLOCKSIZE])
def test_a_download_with_its_room_made_before_is_not_whole(tmp_path, zeros):
    end = end_of_second_sample(tmp_path)
    path = cut(tmp_path, end)
    path.write_bytes(path.read_bytes() + bytes(zeros))
    if zeros <= MAX_PADDING:  # as tar fills its records
        assert len(read_all(path)) == 2
        return
    with pytest.raises(SourceError, match=rf"zero bytes from byte {end} on.*download it again"):
        read_all(path)
    os.truncate(path, end + 1024)  # as the message says
    assert len(read_all(path)) == 2


def test_every_cut_is_noticed(tmp_path):
    whole = imagenet_tar(tmp_path / "whole.tar", count=2).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        archive.getmembers()
        end = archive.offset
    path = tmp_path / "cut.tar"
    for size in range(0, end + 1024, 101):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"cut\.tar"):
            read_all(path)
    path.write_bytes(whole[: end + 1024])
    assert len(read_all(path)) == 2


def test_damaged_header_inside(tmp_path):
    end = end_of_second_sample(tmp_path)
    path = tmp_path / "whole.tar"
    whole = bytearray(path.read_bytes())
    whole[end + 150] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(SourceError, match=f"damaged header or a second archive from byte {end}"):
        read_all(path)


def test_second_archive_behind_the_first(tmp_path):
    one = imagenet_tar(tmp_path / "one.tar").read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    with pytest.raises(SourceError, match=r"second archive.*with tar --ignore-zeros"):
        read_all(tmp_path / "two.tar")


def test_empty_archive_has_no_samples(tmp_path):
    assert read_all(write_tar(tmp_path / "a.tar", [])) == []


def test_zero_byte_file(tmp_path):
    (tmp_path / "a.tar").touch()
    with pytest.raises(SourceError, match=r"a\.tar has zero bytes; download it again"):
        read_all(tmp_path / "a.tar")


def test_not_a_tar(tmp_path):
    """Said in the same words where only keys and captions are looked at."""
    tar = imagenet_tar(tmp_path / "b.tar").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n"
    path = tmp_path / "a.tar"
    for data, text in (
        (b"garbage" * 100, r"begins with b'garbageg'; a tar must not be compressed"),
        (b"<html>404 not found</html>" * 100, "is no tar, but a web page: download it again"),
        (gzip.compress(tar), "is no tar, but a gzip file: unpack it"),
        (bz2.compress(tar), "is no tar, but a bzip2 file: unpack it"),
        (lzma.compress(tar), r"is no tar, but a compressed file \(xz\): unpack it"),
        (pointer, "is no tar, but a Git LFS pointer: fetch its file: git lfs pull"),
        (b"", "has zero bytes"),
        (patched(tar, 0, 0, b"x", checksum=False), "bad checksum at byte 512; download it again"),
    ):
        path.write_bytes(data)
        for reader in (read_all, lambda path: list(scan(ref_of(path)))):
            with pytest.raises(SourceError, match=rf"a\.tar.* {text}"):
                reader(path)


def test_times_in_an_incremental_archive_are_no_folder(tmp_path):
    """GNU tar --listed-incremental has them where POSIX has the begin of a name; tarfile made each
    member another sample."""
    members = [PLAIN | {"name": f"d/{n}", "data": b"1"} for n in ("a.jpg", "a.txt")]
    data = archive(members, tarfile.GNU_FORMAT, {})
    for header, time in ((0, b"15303257570"), (1024, b"15303257571")):
        data = patched(data, header, 345, time + b"\0" + time + b"\0")
    (tmp_path / "a.tar").write_bytes(data)
    (sample,) = read_all(tmp_path / "a.tar")
    assert (sample.key, sample.caption, sample.error) == ("d/a", "1", None)


def test_the_rest_of_a_file_in_another_volume_is_a_row(tmp_path):
    data = imagenet_tar(tmp_path / "a.tar", count=2).read_bytes()
    (tmp_path / "a.tar").write_bytes(patched(data, 0, 156, b"M"))
    samples = read_all(tmp_path / "a.tar")
    assert statuses(samples) == ["no_image", None]
    assert "began in another volume: join them" in str(samples[0].error)


def test_memory_does_not_grow_with_the_shard(tmp_path):
    block = bytes(range(256)) * 1024
    big = write_tar(tmp_path / "big.tar", ((f"{i}.jpg", block) for i in range(128)))  # 32 MB
    many = write_tar(tmp_path / "many.tar", ((f"{i}.jpg", b"x") for i in range(4000)))
    for path in (big, many):
        tracemalloc.start()
        count = sum(1 for _ in read(ref_of(path), hashlib.sha256()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count in (128, 4000)
        assert peak < 2e6  # 3 MB if tarfile may keep its 4000 headers


def test_blocks_may_end_anywhere(tmp_path, monkeypatch):
    path = datacomp_tar(tmp_path / "a.tar")
    whole = read_all(path)
    for size in (512, 1536, 10240, 700, 1):
        monkeypatch.setattr("splatshard.pipeline.source.tar.BLOCK_BYTES", size)
        digest = hashlib.sha256()
        assert list(read(ref_of(path), digest)) == whole
        assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_digest_of_a_limited_read_is_that_of_what_it_took(tmp_path):
    path = datacomp_tar(tmp_path / "a.tar")
    digest = hashlib.sha256()
    assert len(list(read(ref_of(path, limit=2), digest))) == 2
    taken = path.read_bytes()[: end_of_second_sample(tmp_path) + 512]  # the next sample's header
    assert digest.hexdigest() == hashlib.sha256(taken).hexdigest()


# Beside tarfile


Listing = list[tuple[tuple[str, str], bytes]]


def listed(data: bytes) -> Listing:
    """Key, extension and bytes of all members, as we read them."""
    digest = hashlib.sha256()
    again = partial(nullcontext, io.BytesIO(data))
    groups = list(read_groups("a.tar", io.BytesIO(data), digest, again))
    assert digest.digest() == hashlib.sha256(data).digest()
    assert not any(group.error for group in groups)
    return [((group.key, e), bytes(d or b"")) for group in groups for e, d in group.members.items()]


def listed_by_tarfile(data: bytes) -> Listing:
    of_text: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
    with tarfile.open(fileobj=io.BytesIO(data), tarinfo=Member, **of_text) as tar:
        return [(split_name(i.name), tar.extractfile(i).read()) for i in tar if i.isreg()]


def archive(members: list[dict[str, Any]], style: int, common: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style, pax_headers=common) as tar:
        for fields in members:
            info = tarfile.TarInfo(fields["name"])
            data = b"" if fields["type"] == tarfile.DIRTYPE else fields["data"]
            info.size, info.mtime, info.type = len(data), fields["mtime"], fields["type"]
            info.uid, info.pax_headers = fields["uid"], fields["pax_headers"]
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


MEMBERS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a.jpg", "a.txt", "d/é.json", "x" * 100, "y" * 101, "z" * 300]),
        "data": st.one_of(st.binary(max_size=20), st.integers(0, 1500).map(bytes)),
        "mtime": st.sampled_from([0, 1, 1795222803, 1795222803.3416364, 0.25, 2**33 + 0.5]),
        "type": st.sampled_from([tarfile.REGTYPE] * 5 + [tarfile.AREGTYPE, tarfile.DIRTYPE, b"Z"]),
        "uid": st.sampled_from([0, 1000, 2**21]),
        "pax_headers": st.sampled_from([{}, {}, {"atime": "1.5"}, {"path": "p.q"}]),
    }
)
STYLES = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
COMMON = st.sampled_from([{}, {}, {"comment": "1"}, {"path": "all.jpg"}])
NUMBERS = st.sampled_from([b"0", b"7", b" ", b"9", b"\0", b"\x80", b"\xff", b"x", b"g", b"L"])


@given(st.lists(MEMBERS, min_size=1, max_size=6), STYLES, COMMON)
def test_every_kind_of_member_as_tarfile_has_it(members, style, common):
    data = archive(members, style, common)
    assert listed(data) == listed_by_tarfile(data)


def patched(data: bytes, header: int, at: int, new: bytes, checksum: bool = True) -> bytes:
    """With `new` at byte `at` of the header at byte `header`, and its checksum made right."""
    changed = bytearray(data)
    changed[header + at : header + at + len(new)] = new
    if checksum:
        changed[header + 148 : header + 156] = b" " * 8
        total = sum(changed[header : header + 512])
        changed[header + 148 : header + 156] = b"%06o\0 " % total
    return bytes(changed)


@given(st.lists(MEMBERS, min_size=2, max_size=4), STYLES, st.data())
def test_damage_is_an_error_or_reads_as_by_tarfile(members, style, draw):
    data = archive(members, style, {})
    blocks = range(0, len(data), 512)
    header = draw.draw(st.sampled_from([i for i in blocks if data[i + 257 : i + 262] == b"ustar"]))
    at = draw.draw(st.one_of(st.integers(0, 511), st.sampled_from([0, 124, 148, 156, 345])))
    data = patched(data, header, at, draw.draw(NUMBERS), draw.draw(st.booleans()))
    data = data[: draw.draw(st.sampled_from([len(data)] * 3 + [header + at, header]))]
    try:
        found = listed(data)
    except SourceError:
        return
    assert found == listed_by_tarfile(data)


PLAIN = {"mtime": 1.5, "type": b"0", "uid": 0, "pax_headers": {}}
SECOND, TIME, FILE = 2048, 2560, 3072
"""Of an archive of one-block members: the second's extension header, its block, its header."""


@pytest.mark.parametrize(
    ("header", "at", "new", "whole"),
    [
        (FILE, 0, b"n" * 100, True),
        (FILE, 0, b"\xff\xfe" * 40 + b".jpg\0", True),
        (FILE, 0, b"\0", True),
        (FILE, 124, b"          1 ", True),  # size
        (FILE, 124, b"00000000009 ", False),
        (FILE, 124, b"\x80" + bytes(10) + b"\1", True),
        (FILE, 124, b"\xff" * 12, False),
        (FILE, 124, b"\x80" + b"\x7f" * 11, False),
        (FILE, 156, b"\0", True),  # type
        (FILE, 156, b"7", True),
        (FILE, 156, b"1", False),
        (FILE, 329, b"x", False),  # device
        (FILE, 345, b"folder", True),  # prefix of the name
        (SECOND, 124, b"00000001000\0", True),  # twice the block: the next header is inside
        (SECOND, 156, b"g", True),  # for all that follow
        (TIME, 0, b"00", False),
        (TIME, 0, b"13 path=1.25\n", True),
    ],
)
def test_odd_headers(header, at, new, whole):
    data = archive([PLAIN | {"name": f"{n}.jpg", "data": b"1"} for n in "abcd"], 2, {})
    data = patched(data, header, at, new, checksum=header != TIME)
    if whole:
        assert listed(data) == listed_by_tarfile(data)
    else:
        with pytest.raises(SourceError, match=r"a\.tar.*download it again"):
            listed(data)


@pytest.mark.parametrize("header", [SECOND, FILE])
def test_every_checksum_is_checked(header):
    data = archive([PLAIN | {"name": f"{n}.jpg", "data": b"1"} for n in "abcd"], 2, {})
    with pytest.raises(SourceError, match=r"a\.tar.*download it again"):
        listed(patched(data, header, 0, b"z", checksum=False))


@pytest.mark.parametrize("mtime", [1795222803, 1795222803.3416364], ids=["plain", "webdataset"])
def test_plain_headers_do_not_need_tarfile(mtime, monkeypatch):
    """Only the first, the last and those that a block parts: tarfile would be half of the cost."""
    seen = []

    def frombuf(*args: Any) -> tarfile.TarInfo:
        seen.append(args)
        return real(*args)

    real = tarfile.TarInfo.frombuf
    fields = PLAIN | {"mtime": mtime, "data": bytes(5000)}
    members = [fields | {"name": f"{i}.jpg"} for i in range(200)]
    data = archive(members, tarfile.PAX_FORMAT, {})
    monkeypatch.setattr(tarfile.TarInfo, "frombuf", frombuf)
    assert len(listed(data)) == 200
    assert len(seen) < 16
