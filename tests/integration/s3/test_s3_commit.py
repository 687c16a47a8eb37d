"""S3 as source and destination, over HTTP: the whole line, and what a commit asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.commit import (
    check_destination,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.pipeline.source.listing import list_shards
from splatshard.schemas.errors import UnavailableError, UsageError
from tests.integration.s3.faulty import CONFIG, JOB, Server, assert_one_shard, commit_shard
from tests.make import datacomp_tar, image_folder, image_parquet
from tests.rows import config_of

pytestmark = pytest.mark.integration


def test_from_s3_to_s3(server: Server, dst: str, tmp_path: Path) -> None:
    """A tar, a Parquet file and a folder of images give the same rows as from a local disk."""
    datacomp_tar(tmp_path / "in" / "00000000.tar", 4)
    image_parquet(tmp_path / "in" / "p.parquet", 3)
    image_folder(tmp_path / "photos", per_class=2)
    source = dst.replace("/splats", "")
    for folder in ("in", "photos"):
        files = (path for path in sorted((tmp_path / folder).rglob("*")) if path.is_file())
        names = {str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in files}
        server.put(f"{source}/{folder}", names)
    refs = list_shards(f"{source}/in/{{00000000.tar,p.parquet}}::{source}/photos")
    assert [(ref.name, ref.kind) for ref in refs] == [
        ("00000000", "tar"),
        ("p", "parquet"),
        ("photos-00000", "folder"),
    ]
    local = list_shards(f"{tmp_path}/in::{tmp_path}/photos")
    backend = select_backend("cpu")
    check_destination(dst)
    for ref, there in zip(refs, local, strict=True):
        (tmp_path / "out").mkdir(exist_ok=True)
        ours = convert_shard(ref, CONFIG, dst, backend)
        other = convert_shard(there, CONFIG, str(tmp_path / "out"), backend)
        assert ours.source_sha256 == other.source_sha256
        assert ours.statistics == other.statistics
        rows = list(read_rows(f"{dst}/{ours.data_file}"))
        assert rows == list(read_rows(f"{tmp_path}/out/{other.data_file}"))
        assert verify_shard(dst, ours) == []
    assert set(read_markers(dst)) == {"00000000", "p", "photos-00000"}
    (ref,) = list_shards(f"{source}/in/*.tar", limit=2)
    assert (ref.name, ref.limit) == ("00000000", 2)


@pytest.mark.parametrize("paged", [False, True])
def test_listings_of_sources(server: Server, dst: str, paged: bool) -> None:
    """A folder and `**` cost one listing, other patterns one for each folder on their way."""
    server.put(dst, {f"{part}/{part}{i}.tar": b"" for part in "abc" for i in range(5)})
    server.put(dst, {"a/deep/d.tar": b"", "other/deep/e.tar": b"", "a/": b""})
    server.fault = lambda _: "paged" if paged else ""

    def listed(pattern: str) -> tuple[int, int]:
        server.asked.clear()
        found = len(list_shards(f"{dst}{pattern}"))
        listings = [each for each in server.asked if "list-type" in each.query]
        return found, sum("max-keys=1" not in each.query for each in listings)  # does it exist?

    if paged:
        assert [listed(p)[0] for p in ("", "/**/*.tar", "/*/*.tar")] == [17, 17, 15]
        return
    assert listed("") == (17, 1)
    assert listed("/**/*.tar") == (17, 1)
    assert listed("/[ab]/*.tar") == (10, 3)
    assert listed("/a/*.tar") == (5, 1)
    assert listed("/a*/*.tar") == (5, 2)


def test_a_folder_that_the_store_does_not_list(server: Server, dst: str) -> None:
    server.put(dst, {f"{part}/{part}.tar": b"" for part in "abc"})
    server.fault = lambda request: "SlowDown" if "%2Fb%2F" in request.query else ""
    with pytest.raises(UnavailableError, match=rf"cannot read {dst}/b/?: SlowDown"):
        list_shards(f"{dst}/*/*.tar")
    assert len(list_shards(f"{dst}/**/*.tar")) == 3
    with pytest.raises(UsageError, match=rf"{dst}/a/a\.tar of SRC lies in DST {dst}"):
        list_shards(f"{dst}/a/a.tar", dst=dst)
    for dst_in_src in (f"{dst}/splats", dst.replace("s3://", "s3a://") + "/splats"):
        with pytest.raises(UsageError, match=rf"DST {dst_in_src} lies in SRC {dst}"):
            list_shards(dst, dst=dst_in_src)


def test_a_commit_costs_few_requests(server: Server, dst: str) -> None:
    check_destination(dst)
    server.asked.clear()
    commit_shard(dst)
    assert [request.method for request in server.asked] == ["HEAD", "PUT", "HEAD", "PUT", "DELETE"]


def test_names_hold_the_attempt(server: Server, dst: str) -> None:
    manifest = commit_shard(f"{dst}/", f"{JOB}17")
    assert manifest.data_file == f"00000000-{manifest.fingerprint[:8]}-{JOB}17.parquet"
    assert_one_shard(server, dst)
    manifest = commit_shard(dst, "", config_of("webdataset"), manifest)
    assert manifest == assert_one_shard(server, dst)
