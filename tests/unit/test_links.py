"""Tars as tar writes them by itself: links, and members of a sample that are apart."""

from __future__ import annotations

import hashlib
import io
import tarfile
import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import pytest

from splatshard.pipeline.source.links import Links
from splatshard.pipeline.source.read import count_samples, read, scan
from splatshard.schemas.errors import SourceError
from tests.unit.reading import IMAGE, read_all, read_members, ref_of, statuses

HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE


def tar_of(
    path: Path,
    *members: tuple[str, bytes] | tuple[str, bytes, str],
    style: int = tarfile.PAX_FORMAT,
) -> Path:
    """Files as (name, bytes), links as (name, type, target)."""
    with tarfile.open(path, "w", format=style) as archive:
        for name, value, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = value, target[0]
                archive.addfile(info)
            else:
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
    return path


@pytest.mark.parametrize(
    ("link", "kind", "target"),
    [
        ("d/1.jpg", HARD, "d/0.jpg"),
        ("d/1.jpg", SYMBOLIC, "0.jpg"),
        ("d/1.jpg", SYMBOLIC, "./../d/0.jpg"),
        ("e/1.jpg", SYMBOLIC, "../d/0.jpg"),
    ],
)
def test_links_are_followed_inside_the_archive(
    tmp_path: Path, link: str, kind: bytes, target: str
) -> None:
    members = [("d/0.jpg", IMAGE), (link, kind, target), (link[:-3] + "txt", b"a boat")]
    path = tar_of(tmp_path / "a.tar", *members)
    samples = read_all(path)
    assert statuses(samples) == [None, None]
    assert [s.image for s in samples] == [IMAGE, IMAGE]
    assert samples[1].caption == "a boat"
    assert [s.caption for s in scan(ref_of(path))] == [None, "a boat"]
    assert count_samples(ref_of(path), 9) == 2


def test_links_to_what_comes_later_and_to_links(tmp_path: Path) -> None:
    path = tar_of(
        tmp_path / "a.tar",
        ("a.jpg", SYMBOLIC, "b.jpg"),
        ("a.txt", SYMBOLIC, "c.txt"),
        ("b.jpg", SYMBOLIC, "c.jpg"),
        ("c.jpg", IMAGE),
        ("c.txt", b"a boat"),
    )
    samples = read_all(path)
    assert statuses(samples) == [None] * 3
    assert [s.image for s in samples] == [IMAGE] * 3
    assert [s.caption for s in samples] == ["a boat", None, "a boat"]


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", [HARD, SYMBOLIC])
def test_links_with_long_names(tmp_path: Path, style: int, kind: bytes) -> None:
    long = "ä" * 120
    members = [(f"d/{long}.jpg", IMAGE), ("d/b.jpg", kind, f"{'d/' * (kind == HARD)}{long}.jpg")]
    samples = read_all(tar_of(tmp_path / "a.tar", *members, style=style))
    assert [s.image for s in samples] == [IMAGE, IMAGE]


def test_links_of_names_with_a_dot_in_front(tmp_path: Path) -> None:
    members = [("./d/0.jpg", IMAGE), ("./d/1.jpg", HARD, "./d/0.jpg"), ("d/2.jpg", HARD, "d/0.jpg")]
    samples = read_all(tar_of(tmp_path / "a.tar", *members))
    assert [(s.key, s.image) for s in samples] == [(k, IMAGE) for k in ("./d/0", "./d/1", "d/2")]


def test_links_through_folders_that_are_links(tmp_path: Path) -> None:
    members = [
        ("alias", SYMBOLIC, "real"),
        ("a.jpg", SYMBOLIC, "alias/0.jpg"),
        ("b.jpg", HARD, "a.jpg"),
        ("d/c.jpg", SYMBOLIC, "deep/deeper/0.jpg"),
        ("d/deep", SYMBOLIC, "../over"),
        ("over/deeper", SYMBOLIC, "/nowhere"),
        ("over/deeper", SYMBOLIC, "../alias"),
        ("real/0.jpg", IMAGE),
    ]
    samples = read_all(tar_of(tmp_path / "a.tar", *members))
    found = {s.key: s.image for s in samples if not s.error}
    assert found == dict.fromkeys(("a", "b", "d/c", "real/0"), IMAGE)


def test_of_several_versions_the_last_is_meant(tmp_path: Path) -> None:
    """As when the archive is unpacked: a hard link is to what its name was when it was written."""
    texts = (b"first", b"second", b"third")
    versions = [("c.txt", text) for text in texts]
    hard = [("a.jpg", IMAGE), ("a.txt", HARD, "c.txt")]
    symbolic = [("b.jpg", IMAGE), ("b.txt", SYMBOLIC, "c.txt")]
    path = tar_of(tmp_path / "a.tar", *versions[:2], *hard, *symbolic, *versions[2:])
    captions = {s.key: s.caption for s in read_all(path) if not s.error}
    assert captions == {"a": "second", "b": "third"}


def test_sparse_members_and_links_to_them(tmp_path: Path) -> None:
    """As GNU tar --sparse writes a file with holes: here all of it is one piece."""
    name, size = b"a.bin", 512
    info = tarfile.TarInfo(name.decode())
    info.type, info.size = tarfile.GNUTYPE_SPARSE, size
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    pieces = [(1024, size), (0, 0), (0, 0), (0, 0)]  # where, how many bytes
    header[386:482] = b"".join(b"%011o\0%011o\0" % piece for piece in pieces)
    header[483:495] = b"%011o\0" % 2048  # of the whole file
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    rest = tar_of(tmp_path / "b.tar", ("a.jpg", IMAGE), ("b.bin", HARD, "a.bin"), ("b.jpg", IMAGE))
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(header) + b"x" * size + rest.read_bytes())
    whole = bytes(1024) + b"x" * size + bytes(512)
    samples = read_all(path)
    assert statuses(samples) == [None, None]
    assert [s.members for s in samples] == [(("bin", whole),)] * 2


def test_what_a_link_leads_to_is_read_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splatshard.pipeline.source.tar.MAX_SAMPLE_BYTES", 5000)
    path = tar_of(tmp_path / "a.tar", ("a.jpg", bytes(6000)), ("b.jpg", HARD, "a.jpg"))
    assert statuses(read_all(path)) == ["too_large", "too_large"]
    whole = path.read_bytes()
    for size in (1000, 7000, len(whole) - 9728):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"a\.tar.*download it again"):
            read_all(path)


def test_links_leave_the_digest_and_limits_as_they_are(tmp_path: Path) -> None:
    members = [("a.jpg", SYMBOLIC, "c.jpg"), ("b.jpg", HARD, "a.jpg"), ("c.jpg", IMAGE)]
    path = tar_of(tmp_path / "a.tar", *members)
    digest = hashlib.sha256()
    whole = list(read(ref_of(path), digest))
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [read_all(path, limit=n) for n in (1, 2, 3)] == [whole[:1], whole[:2], whole]


def test_a_million_members_are_sixteen_megabytes() -> None:
    """Of each member two numbers are kept, not its header."""
    members = [(f"{i:05d}.txt", b"") for i in range(5000)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, _ in members:
            archive.addfile(tarfile.TarInfo(name))
    buffer.seek(0)
    links = Links(lambda: nullcontext(buffer))
    link = tarfile.TarInfo("a.txt")
    link.type, link.linkname = SYMBOLIC, "04999.txt"
    tracemalloc.start()
    found = links.follow(link)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert isinstance(found, tarfile.TarInfo)
    assert found.name == "04999.txt"
    assert size < 5000 * 16 + 30_000


@pytest.mark.parametrize(
    ("kind", "target", "option"),
    [
        (HARD, "elsewhere.jpg", "--hard-dereference"),
        (HARD, "z.jpg", "--hard-dereference"),  # a hard link leads to what came before
        (SYMBOLIC, "/annex/objects/x.jpg", "--dereference"),
        (SYMBOLIC, "../x.jpg", "--dereference"),
        (SYMBOLIC, "a.jpg", "--dereference"),  # to itself
        (SYMBOLIC, "b.jpg", "--dereference"),  # in a circle
    ],
)
def test_a_link_that_leads_nowhere_is_a_row(
    tmp_path: Path, kind: bytes, target: str, option: str
) -> None:
    members = [("a.jpg", kind, target), ("b.jpg", SYMBOLIC, "a.jpg"), ("z.jpg", IMAGE)]
    path = tar_of(tmp_path / "a.tar", *members)
    samples = read_all(path)
    assert statuses(samples) == ["no_image", "no_image", None]
    assert (
        f"link to {target}, which leads to nothing in the archive: write the tar with {option}"
        in str(samples[0].error)
    )
    assert count_samples(ref_of(path), 9) == 3


def test_a_missing_caption_is_a_row(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", ("a.jpg", IMAGE), ("a.txt", SYMBOLIC, "/x.txt"))
    (sample,) = read_all(path)
    assert statuses([sample]) == ["bad_metadata"]
    assert "a.txt is a link to /x.txt" in str(sample.error)


@pytest.mark.parametrize(
    "members",
    [
        [(f"{i}.cls", b"%d" % i) for i in range(3)] + [(f"{i}.jpg", IMAGE) for i in range(3)],
        [(f"{i}.jpg", IMAGE) for i in range(3)] + [(f"{i}.txt", b"a") for i in range(3)],
        [(f"{i}.{e}", b"1") for e in ("cls", "txt", "jpg") for i in range(3)],
        [(f"{i}.jpg", b"") for i in range(10_001)] + [("0.txt", b"a")],
    ],
    ids=["labels first", "images first", "three parts", "10,000 others between"],
)
def test_members_that_are_apart_are_one_error(
    tmp_path: Path, members: list[tuple[str, bytes]]
) -> None:
    with pytest.raises(SourceError, match=r"sample 0 are not side by side.*tar --sort=name") as e:
        read_members(tmp_path, *members)
    assert "download" not in str(e.value)


@pytest.mark.parametrize("image", ["a.jpg", "a.png"])
def test_a_second_image_of_a_key_is_a_duplicate(tmp_path: Path, image: str) -> None:
    members = [("a.jpg", IMAGE), ("b.jpg", IMAGE), (image, IMAGE), ("a.txt", b"x")]
    assert statuses(read_members(tmp_path, *members)) == [None, None, "duplicate_key"]


def test_files_without_an_image_are_not_one_that_is_apart(tmp_path: Path) -> None:
    members = [("README", b""), ("a.jpg", IMAGE), ("README.md", b"x")]
    assert statuses(read_members(tmp_path, *members)) == ["no_image", None, "duplicate_key"]
