"""`_manifest.json`: what it says, what of it is believed, and that damage to it does no harm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs.cli.options import RunOptions
from splatshard.jobs.destination import manifest as manifest_module
from splatshard.jobs.destination.card import CARD_FILE
from splatshard.jobs.destination.manifest import Catalog
from splatshard.jobs.destination.plan import Plan, make_plan
from splatshard.jobs.driver import execute
from splatshard.jobs.driver.worker import Outcome
from splatshard.pipeline.shards import markers
from splatshard.pipeline.shards.commit import mark_failed, publish, staged_file
from splatshard.pipeline.shards.markers import data_files_by_shard, read_manifest, read_markers
from splatshard.pipeline.storage.fs import use_options
from splatshard.schemas.errors import CorruptShardError, FormatVersionError, UnavailableError
from splatshard.schemas.manifest import MANIFEST_FILE, dataset_fingerprint, manifest_lines
from splatshard.schemas.shard import FailedShard, ShardManifest, to_json
from tests.rows import config_of, make_ref, make_rows, write_shard

NAMES = ("00000000", "00000001", "a-deadbeef", "a-deadbeef-deadbeef1")


def commit(dst: Path, name: str, rows: int = 4, codec: str = "fp16") -> ShardManifest:
    config = config_of(codec=codec)
    with staged_file(str(dst), name) as path:
        write_shard(path, make_rows(rows, codec=codec), codec=codec)
        return publish(str(dst), path, make_ref(name), config, "cd" * 32)


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    """Four done shards and their manifest."""
    catalog = Catalog(str(tmp_path), [commit(tmp_path, name) for name in NAMES])
    catalog.write()
    return tmp_path


@pytest.fixture
def markers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the marker files that are read from now on."""
    read: list[str] = []
    original = markers.read_marker

    def counting(dst: str, file: str) -> ShardManifest | FailedShard:
        read.append(file)
        return original(dst, file)

    monkeypatch.setattr(markers, "read_marker", counting)
    return read


def text_of(dst: Path) -> str:
    return (dst / MANIFEST_FILE).read_text()


def test_it_stands_for_all_markers(dst: Path, markers_read: list[str]) -> None:
    believed = read_markers(str(dst))
    assert markers_read == []
    assert list(believed) == sorted(NAMES)
    assert believed == read_markers(str(dst), trust_manifest=False)
    assert sorted(markers_read) == sorted(f"{name}.json" for name in NAMES)
    assert {name: entry.manifest for name, entry in read_manifest(url(dst)).items()} == believed


def url(dst: Path) -> str:
    return f"{dst}/{MANIFEST_FILE}"


def test_it_says_what_the_dataset_is(dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = '{"key": "an-id", "secret": "hunter22", "https": {"params": {"user": "hunter33"}}}'
    use_options(json.loads(options))
    argv = ["jobs/convert.py", "s3://user:password@host/data", "out", "--storage-options", options]
    argv += [f"--storage-options={options}", "https://h/a b?jwt=hunter44 c::/in/d.tar"]
    monkeypatch.setattr("sys.argv", argv)
    found = list(read_markers(str(dst)).values())
    Catalog(str(dst), found[1:]).write()
    Catalog(str(dst), found).write()
    use_options({})
    document = json.loads(text_of(dst))
    assert document["manifest_version"] == 1
    assert document["fingerprint"] == dataset_fingerprint(found)
    assert document["totals"]["shards"] == 4
    assert document["totals"]["samples"] == 16
    assert document["totals"]["ok"] == 12
    assert document["totals"]["skipped"] == {"corrupt_image": 4}
    assert document["totals"]["shard_bytes"] == sum(m.size_bytes for m in found)
    assert document["schema"]["format_version"] == 2
    assert document["schema"]["columns"]["splats"] == "binary"
    assert document["schema"]["codecs"] == ["fp16"]
    assert len(document["recipes"]) == 1
    assert document["shards"]["00000000"]["inputs"]["source"]["etag"] == "e"
    provenance = document["provenance"]
    assert provenance["command"][2:5] == ["out", "--storage-options", "***"]
    assert provenance["command"][5:] == ["--storage-options=***", "https://h/a b?***::/in/d.tar"]
    for file in (MANIFEST_FILE, CARD_FILE):
        assert not re.search("password|hunter|an-id", (dst / file).read_text())
    assert provenance["versions"].keys() >= {"splatshard", "python", "torch", "ray", "pyarrow"}


def test_all_but_the_provenance_is_decided_by_the_markers(dst: Path, tmp_path: Path) -> None:
    found = list(read_markers(str(dst)).values())
    before = json.loads(text_of(dst))
    catalog = Catalog(str(dst), found[2:])
    for manifest in reversed(found[:2]):
        catalog.add(manifest)
    catalog.write()
    after = json.loads(text_of(dst))
    assert before.pop("provenance")
    assert after.pop("provenance")
    assert before == after


def test_several_recipes_are_kept_apart(tmp_path: Path) -> None:
    found = [commit(tmp_path, "a"), commit(tmp_path, "b", codec="balanced"), commit(tmp_path, "c")]
    Catalog(str(tmp_path), found).write()
    document = json.loads(text_of(tmp_path))
    assert len(document["recipes"]) == 2
    assert document["schema"]["codecs"] == ["balanced", "fp16"]
    assert list(read_markers(str(tmp_path)).values()) == found


# What is not believed


@pytest.mark.parametrize(
    "damage",
    [
        lambda dst, m: (dst / "00000001.json").write_text(to_json(m)[:-2]),
        lambda dst, m: (dst / "00000001.json").write_text(""),
        lambda dst, m: (dst / m.data_file).write_bytes(b"short"),
        lambda dst, m: (dst / m.data_file).unlink(),
        lambda dst, m: (dst / "00000001-00000000.parquet").write_bytes(b"another"),
        lambda dst, m: (dst / "00000001-00000000-abcdef0112.tar").write_bytes(b"another"),
        lambda dst, m: (dst / m.data_file).rename(dst / "00000001-00000000.parquet"),
    ],
    ids=["cut", "empty", "size", "gone", "second", "attempt", "renamed"],
)
def test_the_marker_is_read_where_the_listing_shows_a_change(
    dst: Path, markers_read: list[str], damage: Any
) -> None:
    damage(dst, read_markers(str(dst))["00000001"])
    found = read_markers(str(dst))
    assert markers_read == ["00000001.json"]
    assert str(found) == str(read_markers(str(dst), trust_manifest=False))


def test_a_replaced_shard_is_read_from_its_marker(dst: Path, markers_read: list[str]) -> None:
    (dst / "00000000.json").unlink()
    replaced = commit(dst, "00000000", rows=5)
    assert read_markers(str(dst))["00000000"] == replaced
    assert markers_read[-1] == "00000000.json"


def test_a_marker_that_is_gone_is_gone(dst: Path) -> None:
    (dst / "00000000.json").unlink()
    assert sorted(read_markers(str(dst))) == sorted(NAMES[1:])


def test_failed_shards_are_always_read(dst: Path) -> None:
    mark_failed(str(dst), make_ref("z"), config_of(), ValueError("no"))
    assert isinstance(read_markers(str(dst))["z"], FailedShard)


def test_a_failed_marker_that_a_running_job_deletes(
    dst: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark_failed(str(dst), make_ref("z"), config_of(), ValueError("no"))
    mark_failed(str(dst), make_ref("y"), config_of(), ValueError("no"))
    done: list[ShardManifest] = []
    original = markers.read_marker

    def meanwhile(folder: str, file: str) -> ShardManifest | FailedShard:
        if file == "z.failed.json":
            done.append(commit(dst, "z"))
        if file == "y.failed.json":
            (dst / file).unlink()
        return original(folder, file)

    monkeypatch.setattr(markers, "read_marker", meanwhile)
    found = read_markers(str(dst))
    assert found["z"] == done[0]
    assert "y" not in found


def test_data_files_belong_to_one_shard_however_it_is_called() -> None:
    files = {
        "a-00000000.parquet": "a",
        "a-00000000-deadbeef0.parquet": "a",
        "a-b-00000000-deadbeef12.tar": "a-b",
        "a-deadbeef-00000000.parquet": "a-deadbeef",
        "a-deadbeef-deadbeef1-00000000.tar": "a-deadbeef-deadbeef1",
        "a-deadbeef-deadbeef1-00000000-0000000099.tar": "a-deadbeef-deadbeef1",
    }
    for file, shard in files.items():
        assert data_files_by_shard([file]) == {shard: 1}
    for file in ("a.parquet", "a-0000000.parquet", "a-00000000.zip", "-00000000.tar", "a.json"):
        assert not data_files_by_shard([file])


# Damage and versions


def test_damage_of_it_only_costs_time(dst: Path, markers_read: list[str]) -> None:
    truth = read_markers(str(dst), trust_manifest=False)
    text = text_of(dst)
    cuts = [text[: len(text) * i // 40] for i in range(40)]
    others = ["[]", "{}\n", text.replace('"recipe"', '"recip"')]
    others += [re.sub('("marker_bytes": ?)[0-9]+', r"\1true", text)]
    others += [text.replace('"00000001":{', '"00000001":['), text.replace(": 1", ": NaN", 1)]
    others += [text.replace('"marker_bytes":', '"marker_bytes":"'), "\n" + text, "[" * 100_000]
    for damaged in (*cuts, *others):
        (dst / MANIFEST_FILE).write_text(damaged)
        with pytest.raises(CorruptShardError, match=r"_manifest\.json cannot be read.*delete it"):
            read_manifest(url(dst))
        assert read_markers(str(dst)) == truth
    (dst / MANIFEST_FILE).write_bytes(b"\xff\xfe" + text.encode())
    assert read_markers(str(dst)) == truth


def test_a_newer_one_is_refused(dst: Path) -> None:
    (dst / MANIFEST_FILE).write_text(text_of(dst).replace('_version": 1', '_version": 2', 1))
    with pytest.raises(FormatVersionError, match="manifest version 2"):
        read_markers(str(dst))


def test_an_empty_dataset_has_one_too(tmp_path: Path) -> None:
    Catalog(str(tmp_path), []).write()
    assert json.loads(text_of(tmp_path))["shards"] == {}
    assert read_manifest(url(tmp_path)) == {}


def test_a_stale_shard_whose_redo_failed_stays_in_it(
    dst: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of four are to be redone by another recipe: one is, the other fails."""
    other = config_of(codec="balanced")
    refs = [make_ref(name) for name in NAMES[:2]]
    plan = make_plan(refs, read_markers(str(dst)), other, lambda ref: "")
    assert sorted(plan.replaces) == sorted(NAMES[:2])

    def drive(
        plan: Plan, config: Any, dst: str, options: Any, progress: Any, catalog: Catalog
    ) -> int:
        assert [m.name for m in catalog.manifests] == sorted(NAMES)
        mark_failed(dst, refs[1], config, ValueError("no"))
        progress.failures[NAMES[1]] = Outcome(
            name=NAMES[1], kind="failed", error="ValueError", message="no"
        )
        with staged_file(dst, NAMES[0]) as path:
            write_shard(path, make_rows(3, codec="balanced"), codec="balanced")
            digest = plan.replaces[NAMES[0]]
            catalog.add(publish(dst, path, refs[0], other, "cd" * 32, replaces=digest))
        return 1

    monkeypatch.setattr(execute, "drive", drive)
    code = execute.execute(plan, refs, other, str(dst), RunOptions(), 0.0)
    assert (code, "1 shard failed" in capsys.readouterr().err) == (3, True)
    found = {name: entry.manifest for name, entry in read_manifest(url(dst)).items()}
    assert found == read_markers(str(dst), trust_manifest=False)
    assert sorted(found) == sorted(NAMES)
    codecs = [found[name].inputs["recipe"]["pack"]["codec"] for name in NAMES]
    assert codecs == ["balanced", "fp16", "fp16", "fp16"]
    assert json.loads(text_of(dst))["totals"]["shards"] == 4


# When it is written


def test_an_unchanged_dataset_leaves_it_alone(dst: Path) -> None:
    found = list(read_markers(str(dst)).values())
    before = (dst / MANIFEST_FILE).stat().st_mtime_ns
    Catalog(str(dst), found).write()
    assert (dst / MANIFEST_FILE).stat().st_mtime_ns == before
    (dst / MANIFEST_FILE).write_text("{")
    Catalog(str(dst), found).write()
    assert len(read_manifest(url(dst))) == 4
    Catalog(str(dst), found[:3]).write()
    assert len(read_manifest(url(dst))) == 3
    (dst / MANIFEST_FILE).unlink()
    Catalog(str(dst), found).write()
    assert len(read_manifest(url(dst))) == 4


def test_it_is_written_once_a_minute_and_seldom_when_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    writes: list[float] = []
    monkeypatch.setattr(manifest_module.time, "monotonic", lambda: now)
    shard = commit(tmp_path, "a")
    catalog = Catalog(str(tmp_path), [])

    def write(head: Any) -> None:
        nonlocal now
        writes.append(now)
        now += 6.0  # it takes that long
        catalog._changed = False

    monkeypatch.setattr(catalog, "_write", write)

    def until(end: float) -> list[float]:
        nonlocal now
        writes.clear()
        while now < end:
            catalog.add(shard)
            catalog.write_if_due()
            now += 1.0
        return writes

    assert until(150.0) == []
    assert until(400.0) == [160.0, 366.0]
    now = 2000.0
    catalog.write_if_due()
    assert writes[-1] == 2000.0
    now = 3000.0
    catalog.write_if_due()
    assert writes[-1] == 2000.0  # nothing new


def test_a_store_that_does_not_answer_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = Catalog(str(tmp_path), [])
    catalog.add(commit(tmp_path, "a"))
    monkeypatch.setattr(catalog, "_due", 0.0)
    with monkeypatch.context() as patch:

        def unavailable(head: Any, entries: Any) -> Any:
            raise UnavailableError("no answer")

        patch.setattr(manifest_module, "manifest_lines", unavailable)
        catalog.write_if_due()
    assert "no answer" in capsys.readouterr().err
    assert not (tmp_path / MANIFEST_FILE).exists()
    monkeypatch.setattr(catalog, "_due", 0.0)
    catalog.write_if_due()
    assert len(read_manifest(url(tmp_path))) == 1


def test_the_text_is_one_line_per_shard(dst: Path) -> None:
    entries = read_manifest(url(dst))
    assert len("".join(manifest_lines({}, entries)).splitlines()) == 6 + len(NAMES)
