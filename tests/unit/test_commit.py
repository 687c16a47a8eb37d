"""The commit: verified, atomic, repeatable after a kill at any step, clean after any error."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from splatshard.pipeline.shards.commit import (
    check_destination,
    clean_staging,
    mark_failed,
    marker_digest,
    publish,
    staged_file,
)
from splatshard.pipeline.shards.markers import read_markers
from splatshard.pipeline.shards.verify import verify_shard
from splatshard.pipeline.storage import atomic, staging
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.errors import (
    CorruptShardError,
    FormatVersionError,
    SourceError,
    StorageError,
    UnavailableError,
    UsageError,
)
from splatshard.schemas.shard import FailedShard, ShardManifest, to_json
from splatshard.schemas.splats import EXTENSIONS, FORMAT_VERSION
from tests.make import datacomp_sample, write_tar
from tests.rows import FORMATS, config_of, make_ref, make_rows, write_shard

DIGEST = "cd" * 32


def commit_shard(
    dst: Path,
    config: ConvertConfig | None = None,
    name: str = "00000000",
    rows: list[dict[str, Any]] | None = None,
    samples: int | None = None,
    replaces: ShardManifest | None = None,
) -> ShardManifest:
    """Write and publish one shard as convert_shard does."""
    config = config or config_of()
    codec, budgets = config.pack.codec, config.fit.budgets
    rows = make_rows(8, codec=codec, budgets=budgets) if rows is None else rows
    digest = marker_digest(replaces) if replaces else ""
    with staged_file(str(dst), name) as path:
        write_shard(path, rows, config.pack.format, codec, budgets)
        return publish(str(dst), path, make_ref(name), config, DIGEST, samples, replaces=digest)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`; None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


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


# What must not be committed


def assert_nothing_committed(folder: Path) -> None:
    assert snapshot(folder) == {}


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


# Several bytes of one fingerprint: samples that were quarantined, and are not any more

MORE_ROWS = 12


def test_other_bytes_of_the_same_fingerprint_get_a_name_of_their_own(tmp_path: Path) -> None:
    first = commit_shard(tmp_path)
    second = commit_shard(tmp_path, rows=make_rows(MORE_ROWS), replaces=first)
    assert second.fingerprint == first.fingerprint
    stem = first.data_file.removesuffix(".parquet")
    assert second.data_file == f"{stem}-{second.sha256[:8]}0.parquet"
    assert sorted(snapshot(tmp_path)) == [second.data_file, "00000000.json"]
    assert commit_shard(tmp_path, replaces=second) == first
    assert sorted(snapshot(tmp_path)) == [first.data_file, "00000000.json"]


# Kills and errors at every step

STEPS = ("replace", "fsync", "unlink", "open")


def die_at(monkeypatch: pytest.MonkeyPatch, step: int, die: Callable[[], None]) -> None:
    """Call `die` instead of the `step`th call of any of STEPS."""
    left = [step]

    def patch(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                die()
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, patch(getattr(os, name)))


def killed_commit(
    dst: Path,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    replaces: ShardManifest | None,
    rows: list[dict[str, Any]] | None,
) -> bool:
    """Commit in a child that SIGKILLs itself at `step`; whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            die_at(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            commit_shard(dst, rows=rows, replaces=replaces)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("before", ["nothing", "another shard", "fewer rows"])
def test_a_kill_at_any_step_is_repaired_by_running_again(
    tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(dst: Path) -> ShardManifest | None:
        if before == "nothing":
            return None
        mark_failed(str(dst), make_ref(), config_of(), SourceError("cut"))
        if before == "fewer rows":
            return commit_shard(dst)
        old = commit_shard(dst, config_of("webdataset"))
        mark_failed(str(dst), make_ref(), config_of(), SourceError("cut"))
        return old

    old = prepare(tmp_path / "undisturbed")
    rows = make_rows(MORE_ROWS) if before == "fewer rows" else None
    new = commit_shard(tmp_path / "undisturbed", rows=rows, replaces=old)
    wanted = snapshot(tmp_path / "undisturbed")
    done = 0
    for step in itertools.count():
        old = prepare(dst := tmp_path / str(step))
        if not killed_commit(dst, step, monkeypatch, old, rows):
            break
        marker = read_markers(str(dst)).get("00000000")
        if isinstance(marker, ShardManifest):
            assert verify_shard(str(dst), marker) == []
        clean_staging(str(dst))
        if marker == new:
            done += 1
        else:
            commit_shard(dst, rows=rows, replaces=old)
        assert snapshot(dst) == wanted, step
    assert step >= 12
    assert done >= 1  # some kills came after the marker


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_step_leaves_no_half_commit(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    done, messages = 0, []
    for step in itertools.count():
        dst = tmp_path / str(step)
        failed = len(messages)
        try:
            with monkeypatch.context() as patch:
                die_at(patch, step, fail)
                commit_shard(dst)
        except StorageError as e:
            messages.append(str(e))
        if len(messages) == failed and done:  # it came to its end
            break
        marker = read_markers(str(dst)).get("00000000")
        if marker is not None:
            assert isinstance(marker, ShardManifest)
            assert verify_shard(str(dst), marker) == []
            done += 1
        clean_staging(str(dst))
        assert not (dst / "_staging").exists()
    assert len(messages) >= 10
    for message in messages:
        assert re.match(rf"cannot \w+ {tmp_path}/\d+.*run the same command", message)


def test_a_full_disk_leaves_no_marker_and_no_staging(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        big = make_rows(8, n=2000)
        with pytest.raises(StorageError, match="no space left: free some"):
            commit_shard(tmp_path, rows=big)
        assert_nothing_committed(tmp_path)
        commit_shard(tmp_path, rows=make_rows(8))  # there is room for this one
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Staging


def dead_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_staged_files_are_unique_and_vanish(tmp_path: Path) -> None:
    with staged_file(str(tmp_path), "a") as first, staged_file(str(tmp_path), "a") as second:
        assert first != second
        assert first.parent == tmp_path / "_staging"
        assert str(os.getpid()) in first.name
    assert_nothing_committed(tmp_path)


def staged_name(shard: str, pid: int) -> str:
    """As this host would name a file of the process `pid`."""
    with staged_file(tempfile.gettempdir(), shard) as path:
        return path.name.replace(f"-{os.getpid()}-", f"-{pid}-")


def test_only_dead_processes_of_this_host_are_cleaned_up(tmp_path: Path) -> None:
    """Not those of hosts whose name ends like ours, and not what other versions named otherwise."""
    folder = tmp_path / "_staging"
    folder.mkdir()
    host, dead = socket.gethostname(), dead_pid()
    theirs = staged_name("a", dead)
    kept = [
        *(staged_name("a", pid) for pid in (os.getpid(), 1)),
        *(theirs.replace("@", separator) for separator in ("@x-", "@x", "-")),
        *(f"a-{host}-{dead}-00ff", f"a-gpu-{host}-{dead}-00ff", "notes"),
    ]
    for name in [theirs, staged_name("a@b", dead), staged_name(f"a@{host}-0", dead), *kept]:
        (folder / name).touch()
    clean_staging(str(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)
    clean_staging(str(tmp_path / "none"))


@pytest.mark.parametrize("what", ["boot_id", "namespace"])
def test_other_process_ids_of_the_same_number_are_left_alone(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a host of our name, and of a container that shares the folder with us."""
    folder = tmp_path / "_staging"
    folder.mkdir()
    if what == "boot_id":
        monkeypatch.setattr(Path, "read_text", lambda _: "another")
    else:
        monkeypatch.setattr(os, "readlink", lambda _: "pid:[1]")
    name = staged_name("a", dead_pid())
    monkeypatch.undo()
    (folder / name).touch()
    clean_staging(str(tmp_path))
    assert [path.name for path in folder.iterdir()] == [name]


def test_what_nobody_has_written_to_for_long_is_cleaned_up(tmp_path: Path) -> None:
    """Of other hosts, of this one before it was started anew, of older versions."""
    folder = tmp_path / "_staging"
    folder.mkdir()
    ours, theirs = staged_name("a", os.getpid()), staged_name("a", dead_pid()).replace("@", "@x")
    for name in (ours, theirs, "a-host-17-00ff"):
        (folder / name).touch()
        os.utime(folder / name, (1, 1))
    (folder / f"{theirs}1").touch()
    clean_staging(str(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == sorted([ours, f"{theirs}1"])


def test_files_for_s3_are_staged_below_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sweeps what killed workers left there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with staged_file("s3://bucket/splats", "00000000") as path:
        assert path.parent == tmp_path / f"splatshard-{os.getuid()}" / "_staging"
        left = path.with_name(staged_name("00000001", dead_pid()))
        left.touch()
        with staged_file("s3://bucket/splats", "00000002"):
            assert path.exists()
            assert not left.exists()
    assert not path.exists()


def test_a_commit_that_is_under_way_is_left_alone(tmp_path: Path) -> None:
    """Its data file is in place, its marker not yet; another job starts on the folder."""
    done = commit_shard(tmp_path)
    other = tmp_path / "00000000-0123abcd.parquet"
    with atomic.exclusive(str(tmp_path), "00000000"):
        shutil.copy(tmp_path / done.data_file, other)
        clean_staging(str(tmp_path))
        assert other.exists()
    clean_staging(str(tmp_path))
    assert not other.exists()
    assert not (tmp_path / "_staging").exists()


@pytest.mark.parametrize("name", ["_plan", ".x", "a/b", "a.failed", "", "..", "a\0"])
def test_names_that_would_clash_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="rename the source"), staged_file(str(tmp_path), name):
        pass


# Markers


def test_failed_markers(tmp_path: Path) -> None:
    mark_failed(str(tmp_path), make_ref(), config_of(), SourceError("cut at byte 5"))
    (marker,) = read_markers(str(tmp_path)).values()
    assert isinstance(marker, FailedShard)
    assert (marker.error, marker.message) == ("SourceError", "cut at byte 5")
    first = snapshot(tmp_path)
    mark_failed(str(tmp_path), make_ref(), config_of(), SourceError("cut at byte 5"))
    assert snapshot(tmp_path) == first
    manifest = commit_shard(tmp_path)
    assert read_markers(str(tmp_path)) == {"00000000": manifest}


def test_a_done_marker_hides_a_failed_replacement(tmp_path: Path) -> None:
    manifest = commit_shard(tmp_path)
    mark_failed(str(tmp_path), make_ref(), config_of("webdataset"), SourceError("cut"))
    assert read_markers(str(tmp_path)) == {"00000000": manifest}
    clean_staging(str(tmp_path))  # of another fingerprint, so it stays
    assert (tmp_path / "00000000.failed.json").exists()


def test_broken_markers_come_back_as_values(tmp_path: Path) -> None:
    manifest = commit_shard(tmp_path)
    (tmp_path / "a.json").write_bytes(b"\xff{")
    (tmp_path / "b.failed.json").write_text("{}")
    (tmp_path / "c.json").write_text(to_json(manifest))  # of another shard
    (tmp_path / "_run.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    markers = read_markers(str(tmp_path))
    assert list(markers) == ["00000000", "a", "b", "c"]
    for name, message in (("a", "not JSON"), ("b", "missing fields"), ("c", "of shard '00000000'")):
        assert isinstance(markers[name], CorruptShardError)
        assert message in str(markers[name])
        assert f"{tmp_path}/{name}." in str(markers[name])


def test_newer_markers_raise(tmp_path: Path) -> None:
    manifest = commit_shard(tmp_path)
    document = json.loads(to_json(manifest)) | {
        "format_version": FORMAT_VERSION + 1,
        "new_field": 1,
    }
    (tmp_path / "00000000.json").write_text(json.dumps(document))
    with pytest.raises(FormatVersionError, match=r"00000000\.json has format version 3"):
        read_markers(str(tmp_path))


def test_no_folder_has_no_markers(tmp_path: Path) -> None:
    assert read_markers(str(tmp_path / "none")) == {}


# Destinations


def test_a_destination_is_created_and_left_clean(tmp_path: Path) -> None:
    check_destination(str(tmp_path / "a" / "b"))
    check_destination(f"file://{tmp_path}/c")
    assert snapshot(tmp_path) == {"a": None, "a/b": None, "c": None}


def test_a_destination_may_be_a_file_url(tmp_path: Path) -> None:
    dst = f"file://{tmp_path}/splats/"
    check_destination(dst)
    with staged_file(dst, "00000000") as path:
        assert path.parent == tmp_path / "splats" / "_staging"
        write_shard(path, make_rows(4))
        manifest = publish(dst, path, make_ref(), config_of(), DIGEST)
    mark_failed(dst, make_ref("b"), config_of(), SourceError("cut"))
    clean_staging(dst)
    assert sorted(snapshot(tmp_path / "splats")) == [
        manifest.data_file,
        "00000000.json",
        "b.failed.json",
    ]
    assert verify_shard(dst, manifest) == []


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_destination_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file is not a folder; choose another"):
        check_destination(str(tmp_path / "file" / below))


def test_an_unwritable_destination_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(staging, "_create", refuse)
    with pytest.raises(StorageError, match="Read-only file system: check permissions"):
        check_destination(str(tmp_path))


@pytest.mark.parametrize("dst", ["gs://b/x", "https://u:pw@example.org/x", "s3://"])
def test_other_destinations_are_refused(dst: str) -> None:
    with pytest.raises(UsageError, match=r"only local folders and s3://bucket") as caught:
        check_destination(dst)
    assert "pw" not in str(caught.value)


# Several attempts at one shard


def test_the_first_of_two_equal_attempts_stays(tmp_path: Path) -> None:
    first = commit_shard(tmp_path)
    files = snapshot(tmp_path)
    inode = (tmp_path / first.data_file).stat().st_ino
    assert commit_shard(tmp_path) == first
    assert snapshot(tmp_path) == files
    assert (tmp_path / first.data_file).stat().st_ino == inode


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    """Also when the shard that was to be replaced has been replaced by somebody else since."""
    old = commit_shard(tmp_path, config_of("webdataset"))
    first = commit_shard(tmp_path, config_of("parquet", "balanced"), replaces=old)
    files = snapshot(tmp_path)
    for replaces in (None, old):
        with pytest.raises(StorageError, match=r"pack\.codec: balanced -> fp16.*another job"):
            commit_shard(tmp_path, config_of("parquet", "fp16"), replaces=replaces)
        assert snapshot(tmp_path) == files
    assert verify_shard(str(tmp_path), first) == []


def test_a_damaged_marker_and_damaged_data_are_replaced(tmp_path: Path) -> None:
    first = commit_shard(tmp_path)
    wanted = snapshot(tmp_path)
    (tmp_path / "00000000.json").write_text("{}")
    commit_shard(tmp_path)
    assert snapshot(tmp_path) == wanted
    (tmp_path / first.data_file).write_bytes(b"damaged")
    commit_shard(tmp_path, replaces=first)
    assert snapshot(tmp_path) == wanted


@pytest.mark.parametrize("configs", [("parquet", "parquet"), ("parquet", "webdataset")])
def test_many_jobs_at_once_leave_one_shard(tmp_path: Path, configs: tuple[str, str]) -> None:
    """Equal ones all succeed; of two configurations the slower one's jobs all stop."""
    torch.set_num_threads(1)

    def job(number: int) -> ShardManifest | StorageError:
        try:
            return commit_shard(tmp_path, config_of(configs[number % 2]))
        except StorageError as e:
            return e

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(job, range(16)))
    (marker,) = read_markers(str(tmp_path)).values()
    assert isinstance(marker, ShardManifest)
    assert sorted(snapshot(tmp_path)) == [marker.data_file, "00000000.json"]
    assert verify_shard(str(tmp_path), marker) == []
    for number, result in enumerate(results):
        if configs[number % 2] == marker.format:
            assert result == marker
        else:
            assert "pack.format" in str(result)


def test_only_what_splatshard_wrote_is_a_leftover(tmp_path: Path) -> None:
    """img2dataset's numbers look like our fingerprints."""
    write_tar(tmp_path / "train-00000001.tar", datacomp_sample(0))
    (tmp_path / "train-00000002.parquet").write_bytes(b"damaged")
    theirs = snapshot(tmp_path)
    first = commit_shard(tmp_path, name="train")
    shutil.copy(tmp_path / first.data_file, tmp_path / "train-00000003.parquet")
    assert commit_shard(tmp_path, name="train") == first
    shutil.copy(tmp_path / first.data_file, tmp_path / "train-00000003.parquet")
    clean_staging(str(tmp_path))
    left = snapshot(tmp_path)
    assert left.keys() - theirs.keys() == {first.data_file, "train.json"}
    assert left | theirs == left


def test_a_zombie_does_not_mark_a_done_shard_failed(tmp_path: Path) -> None:
    commit_shard(tmp_path)
    files = snapshot(tmp_path)
    mark_failed(str(tmp_path), make_ref(), config_of(), SourceError("cut"))
    assert snapshot(tmp_path) == files


def test_a_lock_that_is_held_for_long_is_given_up(tmp_path: Path) -> None:
    with (
        atomic.exclusive(str(tmp_path), "a"),
        pytest.raises(UnavailableError, match=r"a\.lock is held by another process"),
        atomic.exclusive(str(tmp_path), "a", 0),
    ):
        pass
    with atomic.exclusive(str(tmp_path), "a"), atomic.exclusive(str(tmp_path), "b"):
        pass
    assert_nothing_committed(tmp_path)


def test_file_systems_without_locks_are_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    old = commit_shard(tmp_path, config_of("webdataset"))
    manifest = commit_shard(tmp_path, replaces=old)
    assert sorted(snapshot(tmp_path)) == [manifest.data_file, "00000000.json"]
    assert "no file locks here, start only one job at a time" in caplog.text


def test_secrets_stay_out_of_markers(tmp_path: Path) -> None:
    signed = "https://me:hunter2@host/a.tar?X-Amz-Signature=abcdef&X-Amz-Credential=xyz"
    ref = dataclasses.replace(make_ref(), urls=(signed,))
    mark_failed(str(tmp_path), ref, config_of(), SourceError(f"cannot read {signed}: cut"))
    text = (tmp_path / "00000000.failed.json").read_text()
    assert "https://***@host/a.tar?***" in text
    with staged_file(str(tmp_path), ref.name) as path:
        write_shard(path, make_rows(4))
        manifest = publish(str(tmp_path), path, ref, config_of(), DIGEST)
    assert manifest.source_url == "https://***@host/a.tar?***"
    text += (tmp_path / "00000000.json").read_text()
    assert not re.search("hunter2|abcdef|xyz", text)


# Verification of what lies in DST


@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_found_and_named(tmp_path: Path, format: str) -> None:
    manifest = commit_shard(tmp_path, config_of(format))
    path = tmp_path / manifest.data_file
    data = path.read_bytes()
    marker = tmp_path / "00000000.json"

    def problem() -> str:
        (text,) = verify_shard(f"{tmp_path}/", manifest)
        assert str(path) in text
        assert text.endswith(f"delete {marker} and run convert again")
        return text

    path.write_bytes(data[:-1])
    assert f"{len(data) - 1} bytes, its marker says {len(data)}" in problem()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "SHA-256" in problem()
    path.unlink()
    assert "No such file" in problem()


@pytest.mark.parametrize("format", FORMATS)
def test_a_marker_that_tells_other_things_is_found(tmp_path: Path, format: str) -> None:
    manifest = commit_shard(tmp_path, config_of(format))
    dst = str(tmp_path)

    def problems(**change: Any) -> list[str]:
        return verify_shard(dst, dataclasses.replace(manifest, **change))

    (text,) = problems(statistics={**manifest.statistics, "psnr_mean": 99.0})
    assert "statistics are" in text
    assert len(problems(samples=9, counts={"ok": 9})) == 2
    (text,) = problems(inputs={"recipe": {}, "source": {}})
    assert "another recipe" in text
    (text,) = problems(inputs={**manifest.inputs, "source": {}})
    assert "fingerprint" in text
    other = "webdataset" if format == "parquet" else "parquet"
    (text,) = problems(format=other)
    assert "cannot be read" in text


def test_a_destination_that_another_process_is_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears between two looks at it."""
    real = os.path.lexists

    def appears(path: str | Path) -> bool:
        Path(path).mkdir(exist_ok=True)
        return real(path)

    monkeypatch.setattr(os.path, "lexists", appears)
    check_destination(str(tmp_path / "out"))
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        check_destination(str(tmp_path / "file"))
