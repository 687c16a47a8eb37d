"""The commit: verified, repeatable, and nothing that does not hold."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from splatshard.pipeline.shards.commit import (
    clean_staging,
    mark_failed,
    publish,
    staged_file,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.schemas.errors import (
    CorruptShardError,
    SourceError,
)
from splatshard.schemas.splats import EXTENSIONS
from tests.rows import FORMATS, config_of, make_ref, make_rows, write_shard
from tests.unit.committing import (
    DIGEST,
    MORE_ROWS,
    assert_nothing_committed,
    commit_shard,
    snapshot,
)


def payload_bytes(path: Path) -> int:
    """What the payloads take in a shard file: compressed columns, or tar members."""
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            members = [m for m in tar if re.search(r"\.splat(_\d+)?$", m.name)]
            return sum(m.size for m in members)
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    return sum(
        column.total_compressed_size
        for column in columns
        if re.match(r"splats(_\d+)?(\.|$)", column.path_in_schema)
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("codec", "budgets"),
    [("fp16", ()), ("balanced", ()), ("compact", ()), ("balanced", (8, 13, 20)), ("fp16", (8, 20))],
)
def test_a_committed_shard_verifies(
    tmp_path: Path, format: str, codec: str, budgets: tuple[int, ...]
) -> None:
    manifest = commit_shard(tmp_path, config_of(format, codec, budgets), samples=8)
    assert sorted(snapshot(tmp_path)) == [manifest.data_file, "00000000.json"]
    prefix = f"00000000-{manifest.fingerprint[:8]}"
    assert manifest.data_file == f"{prefix}.{EXTENSIONS[format]}"
    assert read_markers(str(tmp_path)) == {"00000000": manifest}
    assert verify_shard(str(tmp_path), manifest) == []
    assert manifest.counts == {"ok": 6, "corrupt_image": 2}
    assert manifest.source_url == "/in/00000000.tar"
    psnr = [25.1 + i for i in (0, 1, 2, 4, 5, 6)]
    stored = payload_bytes(tmp_path / manifest.data_file)
    assert stored > 6 * 20 * 3
    assert codec != "fp16" or format != "webdataset" or stored == 6 * 20 * 16
    assert manifest.statistics == {
        "psnr_mean": pytest.approx(sum(psnr) / 6),
        "psnr_min": pytest.approx(25.1),
        "psnr_max": pytest.approx(31.1),
        "num_gaussians_mean": 20,
        "payload_bytes": stored,
        "psnr_loss_mean": 0.125,
        "psnr_histogram_from": 25.0,
        "psnr_histogram": "1 0 1 0 1 0 0 0 1 0 1 0 1",
    }


@pytest.mark.parametrize("format", FORMATS)
def test_two_runs_leave_the_same_bytes(tmp_path: Path, format: str) -> None:
    for name in "ab":
        commit_shard(tmp_path / name, config_of(format))
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_of_skipped_samples_and_an_empty_one(tmp_path: Path, format: str) -> None:
    skipped = make_rows(4)[3:]
    for name, rows in (("a", skipped), ("b", [])):
        manifest = commit_shard(tmp_path, config_of(format), name, rows)
        left = payload_bytes(tmp_path / manifest.data_file) if rows else 0  # headers of nulls
        assert manifest.statistics == {"payload_bytes": left}
        assert left < 100
        assert verify_shard(str(tmp_path), manifest) == []


def test_replacing_a_shard_deletes_what_it_replaces(tmp_path: Path) -> None:
    commit_shard(tmp_path, name="00000000-1234abcd")  # a neighbour with a confusing name
    others = snapshot(tmp_path)
    old = commit_shard(tmp_path, config_of("webdataset"))
    mark_failed(str(tmp_path), make_ref(), config_of(), SourceError("cut"))
    manifest = commit_shard(tmp_path, replaces=old)
    assert sorted(snapshot(tmp_path).keys() - others.keys()) == [
        manifest.data_file,
        "00000000.json",
    ]


def test_a_commit_does_not_list_its_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would be the square of the number of shards in a job; leftovers wait for its end."""
    dst, other = tmp_path / "dst", tmp_path / "other"
    dst.mkdir()
    other.mkdir()
    killed = dst / "00000000-0123abcd.parquet"  # of another fingerprint
    shutil.copy(other / commit_shard(other).data_file, killed)

    def refuse(*_: object) -> None:
        raise AssertionError("listed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        patch.setattr(os, "scandir", refuse)
        manifest = commit_shard(dst)
    assert killed.exists()
    clean_staging(str(dst))
    assert sorted(snapshot(dst)) == [manifest.data_file, "00000000.json"]


def test_a_lost_sample_is_not_committed(tmp_path: Path) -> None:
    with pytest.raises(CorruptShardError, match="9 samples came in, 8 rows were written"):
        commit_shard(tmp_path, samples=9)
    assert_nothing_committed(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splats": b"123"}, "fp16 payload of 3 bytes"),
        ({"splats": b"\xff" * 320}, "not finite"),
        ({"splats": bytes(320)}, "not positive"),
        ({"num_gaussians": 19}, "20 Gaussians in the payload, num_gaussians is 19"),
        ({"psnr": None}, "PSNR is None"),
        ({"width": None}, "no splats, width or height"),
        ({"status": "no_image"}, "yet it has splats"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_do_not_hold_are_not_committed(
    tmp_path: Path, format: str, change: dict[str, Any], message: str
) -> None:
    rows = make_rows(8)
    rows[5] |= change
    with pytest.raises(CorruptShardError, match=f"row 5 .*{message}"):
        commit_shard(tmp_path, config_of(format), rows=rows)
    assert_nothing_committed(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("splats", {"bits": b""}, "planes do not fit together"),
        ("splats", {"gap": b"\x40"}, "planes do not fit together"),
        ("splats_20", {"ratio": b"\x80" * 12}, "a shape is out of range"),
        ("splats_20", {}, "20 Gaussians in the payload, num_gaussians is 19"),
        ("splats_20", None, "no splats, width or height"),
        ("psnr_8", None, "psnr_8 is None"),
    ],
)
def test_planes_and_budgets_that_do_not_hold_are_not_committed(
    tmp_path: Path, name: str, damage: dict[str, bytes] | None, message: str
) -> None:
    rows = make_rows(8, codec="balanced", budgets=(8, 20))
    if damage is None:
        del rows[5][name]
    else:
        rows[5][name] = rows[5][name] | damage
        rows[5]["num_gaussians"] -= not damage
    # a tar does not even hold planes of different lengths
    with pytest.raises(CorruptShardError, match=f"row 5 .*{message}"):
        commit_shard(tmp_path, config_of("parquet", "balanced", (8, 20)), rows=rows)
    assert_nothing_committed(tmp_path)


def test_a_file_that_does_not_read_back_is_not_committed(tmp_path: Path) -> None:
    def cut_and_publish() -> None:
        with staged_file(str(tmp_path), "00000000") as path:
            write_shard(path, make_rows(8))
            path.write_bytes(path.read_bytes()[:-20])
            publish(str(tmp_path), path, make_ref(), config_of(), DIGEST)

    with pytest.raises(CorruptShardError, match="cannot be read"):
        cut_and_publish()
    assert_nothing_committed(tmp_path)


def test_other_bytes_of_the_same_fingerprint_get_a_name_of_their_own(tmp_path: Path) -> None:
    first = commit_shard(tmp_path)
    second = commit_shard(tmp_path, rows=make_rows(MORE_ROWS), replaces=first)
    assert second.fingerprint == first.fingerprint
    stem = first.data_file.removesuffix(".parquet")
    assert second.data_file == f"{stem}-{second.sha256[:8]}0.parquet"
    assert sorted(snapshot(tmp_path)) == [second.data_file, "00000000.json"]
    assert commit_shard(tmp_path, replaces=second) == first
    assert sorted(snapshot(tmp_path)) == [first.data_file, "00000000.json"]
