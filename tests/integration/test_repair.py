"""Damage of every kind, repaired: the same bytes as before, and nothing good touched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs import export, repair, report, retry_failed, status, verify
from splatshard.pipeline.shards.commit import publish, staged_file
from splatshard.pipeline.shards.markers import read_marker
from splatshard.pipeline.shards.write import open_writer
from splatshard.pipeline.source.listing import list_shards
from splatshard.pipeline.storage.fs import use_options
from splatshard.schemas.config import config_from_output, output_config
from splatshard.schemas.shard import ShardManifest, marker_digest
from splatshard.schemas.splats import shard_metadata
from tests.integration.running import (
    Converted,
    assert_verified,
    convert_json,
    convert_once,
    files,
    finished,
    run_json,
    tars,
)
from tests.integration.stores import ACCESS_KEY, REGION, SECRET_KEY, Store

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("shared_ray")]

Capsys = pytest.CaptureFixture[str]

SHARDS = 5


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, shared_ray: None) -> Converted:
    return convert_once(tmp_path_factory.mktemp("converted"), SHARDS)


@pytest.fixture
def made(converted: Converted) -> tuple[str, Path, dict[str, bytes]]:
    """SRC, DST and the files of DST."""
    return converted.put_back()


def marker(dst: Path, name: str) -> ShardManifest:
    found = read_marker(str(dst), f"{name}.json")
    assert isinstance(found, ShardManifest)
    return found


def data_file(dst: Path, name: str) -> Path:
    return dst / marker(dst, name).data_file


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_kind_of_damage_is_repaired(
    made: tuple[str, Path, dict[str, bytes]], capsys: Capsys
) -> None:
    _, dst, before = made
    untouched = finished(dst)["00000004.json"]
    flip(data_file(dst, "00000000"))
    data_file(dst, "00000001").unlink()
    (dst / "00000002.json").write_text("{")
    (dst / "00000003.json").unlink()
    code, found, err = run_json(capsys, repair, dst)
    assert code == 0, err
    assert found["ok"]
    assert list(found["bad"]) == [f"{i:08d}" for i in range(4)]
    assert found["redone"] == [f"{i:08d}" for i in range(4)]
    assert "SHA-256" in found["bad"]["00000000"]
    assert found["bad"]["00000003"] == "missing"
    assert files(dst) == before
    assert finished(dst)["00000004.json"] == untouched
    assert_verified(capsys, dst)
    code, found, err = run_json(capsys, repair, dst)
    assert (code, found["bad"], found["redone"]) == (0, {}, [])


def test_quick_sees_sizes_only(made: tuple[str, Path, dict[str, bytes]], capsys: Capsys) -> None:
    _, dst, before = made
    flip(data_file(dst, "00000000"))
    with data_file(dst, "00000001").open("ab") as data:
        data.write(b"more")
    data_file(dst, "00000002").unlink()
    code, found, err = run_json(capsys, repair, dst, "--quick")
    assert (code, found["redone"]) == (0, ["00000001", "00000002"]), err
    assert run_json(capsys, repair, dst)[1]["redone"] == ["00000000"]
    assert files(dst) == before


def test_a_changed_source_is_told_and_converted_as_it_is(
    made: tuple[str, Path, dict[str, bytes]], capsys: Capsys
) -> None:
    src, dst, before = made
    tar = Path(list_shards(src)[1].urls[0])
    os.utime(tar, ns=(1, 1))
    data_file(dst, "00000001").unlink()
    code, found, err = run_json(capsys, repair, dst)
    assert (code, found["redone"]) == (0, ["00000001"]), err
    assert "the source of 00000001 has changed" in err
    assert_verified(capsys, dst)
    assert {n: b for n, b in files(dst).items() if "00000001" not in n and n[0] != "_"} == {
        n: b for n, b in before.items() if "00000001" not in n and n[0] != "_"
    }
    code, summary, err = convert_json(capsys, src, dst)
    assert (code, summary["shards_skipped_done"]) == (0, SHARDS), err


def test_what_cannot_be_repaired_is_named(
    made: tuple[str, Path, dict[str, bytes]], capsys: Capsys
) -> None:
    src, dst, _ = made
    Path(list_shards(src)[0].urls[0]).unlink()
    data_file(dst, "00000000").unlink()
    data_file(dst, "00000001").unlink()
    code, found, err = run_json(capsys, repair, dst)
    assert code == 3
    assert found["redone"] == ["00000001"]
    assert list(found["still_bad"]) == ["00000000"]
    assert "still bad: 00000000" in err
    (dst / "_plan.json").unlink()
    code, found, err = run_json(capsys, repair, dst)
    assert code == 3
    assert "no plan mentions it" in found["still_bad"]["00000000"]


def test_stale_shards_and_other_versions_are_left_alone(
    made: tuple[str, Path, dict[str, bytes]], capsys: Capsys
) -> None:
    _, dst, before = made
    plan = dst / "_plan.json"
    text = plan.read_text()
    plan.write_text(text.replace('"steps":3', '"steps":4').replace('"fingerprint":"', '"f', 1))
    document = json.loads(text)
    document["shards"]["00000002"]["fingerprint"] = "0" * 64
    plan.write_text(json.dumps(document))
    code, found, _ = run_json(capsys, repair, dst)
    assert code == 3
    assert list(found["still_bad"]) == ["00000002"]
    assert "--overwrite-stale" in found["still_bad"]["00000002"]
    plan.write_text(text.replace('"stages_version":', '"stages_version":9'))
    data_file(dst, "00000001").unlink()
    assert repair.main([str(dst)]) == 1
    assert "made with stages_version 9" in capsys.readouterr().err
    plan.write_text(text)
    assert run_json(capsys, repair, dst)[0] == 0
    assert files(dst) == before


def test_orphans_are_listed_and_deleted_on_request(
    made: tuple[str, Path, dict[str, bytes]], capsys: Capsys
) -> None:
    _, dst, before = made
    data = data_file(dst, "00000000").read_bytes()
    ours = [dst / "00000000-0123abcd-deadbeef7.parquet", dst / "zebra-0123abcd.parquet"]
    foreign = [dst / name for name in ("mine.parquet", "notes.txt", "train-00000001.tar")]
    for path in ours:
        path.write_bytes(data)
    for path in foreign:
        path.write_bytes(b"left by somebody")
    code, found, err = run_json(capsys, repair, dst)
    assert (code, found["orphans"]) == (0, [path.name for path in ours])
    assert "--delete-orphans" in err
    assert all(path.exists() for path in (*ours, *foreign))
    code, found, _ = run_json(capsys, repair, dst, "--delete-orphans")
    assert (code, found["orphans_deleted"]) == (0, True)
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in foreign)
    for path in foreign:
        path.unlink()
    assert files(dst) == before


# The same on S3


@pytest.fixture
def options(moto: Store) -> Iterator[str]:
    """`--storage-options` for the S3 server, which no later test in this process inherits."""
    yield json.dumps(
        {
            "key": ACCESS_KEY,
            "secret": SECRET_KEY,
            "client_kwargs": {"endpoint_url": moto.endpoint, "region_name": REGION},
        }
    )
    use_options({})


def test_damage_on_s3_is_found_and_repaired(
    tmp_path: Path, capsys: Capsys, moto: Store, options: str
) -> None:
    flag = f"--storage-options={options}"
    moto.put("repair", {})
    src, dst, s3 = tars(tmp_path / "in", SHARDS), "s3://repair/out", moto.client()
    code, _, err = convert_json(capsys, src, dst, flag)
    assert code == 0, err
    before = moto.objects(dst, ".parquet")
    names = sorted(name for name in before if name.endswith(".parquet"))
    assert run_json(capsys, verify, dst, flag)[1]["notes"] == []
    data = bytearray(before[names[0]])
    data[len(data) // 2] ^= 1
    s3.put_object(Bucket="repair", Key=f"out/{names[0]}", Body=bytes(data))
    s3.delete_object(Bucket="repair", Key=f"out/{names[1]}")
    s3.put_object(Bucket="repair", Key="out/00000002.json", Body=b"{")
    s3.delete_object(Bucket="repair", Key="out/00000003.json")
    code, found, _ = run_json(capsys, verify, dst, flag)
    assert code == 1
    assert [p for p in found["problems"] if "SHA-256" in p and f"{dst}/{names[0]}" in p]
    state = run_json(capsys, status, dst, flag)[1]
    assert (state["shards_done"], state["shards_corrupt"], state["missing"]) == (
        *(SHARDS - 2, 1),
        ["00000003"],
    )
    code, found, err = run_json(capsys, repair, dst, flag)
    assert (code, found["redone"]) == (0, [f"{i:08d}" for i in range(4)]), err
    code, found, err = run_json(capsys, repair, dst, flag, "--delete-orphans")
    assert (code, found["bad"]) == (0, {}), err
    code, found, err = run_json(capsys, verify, dst, flag)
    assert (code, found["problems"], found["notes"]) == (0, [], [])
    after = moto.objects(dst, ".parquet")
    rows = {name.partition("-")[0]: data for name, data in after.items() if "parquet" in name}
    assert rows == {n.partition("-")[0]: d for n, d in before.items() if "parquet" in n}
    assert names[4] in after
    png, page = tmp_path / "sample.png", tmp_path / "page.html"
    key = f"{SHARDS:012d}"
    code, found, err = run_json(capsys, export, dst, key, f"--output={png}", flag)
    assert (code, found["key"], png.read_bytes()[:4]) == (0, key, b"\x89PNG"), err
    code, found, err = run_json(capsys, report, dst, "--samples=2", f"--output={page}", flag)
    assert (code, found["output"], found["pictures"]) == (0, str(page), 2), err
    texts = {name: text for name, text in moto.objects(dst).items() if "json" in name}
    assert not any(SECRET_KEY.encode() in text for text in texts.values())


def quarantine(src: str, dst: Path, name: str, status: str = "quarantined") -> None:
    """Put a shard in place of `name`'s in which no sample was converted, for that reason."""
    old = marker(dst, name)
    config = config_from_output(old.inputs["recipe"])
    ref = next(ref for ref in list_shards(src) if ref.name == name)
    rows: list[dict[str, Any]] = [
        {"key": f"{i:012d}", "status": status, "error": "killed its worker", "num_gaussians": 0}
        for i in range(old.samples)
    ]
    metadata = shard_metadata(config.pack.codec, config.fit.cutoff, output_config(config))
    with staged_file(str(dst), name) as path:
        with open_writer(path, config.pack.format, metadata) as writer:
            writer.write(rows)
        publish(str(dst), path, ref, config, old.source_sha256, None, replaces=marker_digest(old))


def test_retry_failed_redoes_what_is_worth_it(
    made: tuple[str, Path, dict[str, bytes]], capsys: Capsys
) -> None:
    src, dst, before = made
    code, found, err = run_json(capsys, retry_failed, dst)
    assert (code, found["redone"]) == (0, []), err
    assert "nothing to retry" in err
    quarantine(src, dst, "00000001")
    quarantine(src, dst, "00000002", "corrupt_image")
    quarantine(src, dst, "00000003", "fit_diverged")
    assert run_json(capsys, status, dst)[1]["skipped"]["quarantined"] == 3
    code, found, err = run_json(capsys, retry_failed, dst)
    assert (code, found["redone"]) == (0, ["00000001", "00000003"]), err
    assert found["before"] == {"quarantined": 3, "fit_diverged": 3}
    assert found["after"] == {}
    code, found, err = run_json(capsys, retry_failed, dst, "--status", "corrupt_image")
    assert (code, found["redone"]) == (0, ["00000002"]), err
    assert files(dst) == before
    assert_verified(capsys, dst)


def test_retry_failed_redoes_failed_shards(tmp_path: Path, capsys: Capsys) -> None:
    src, dst = tars(tmp_path / "in", 3), tmp_path / "out"
    tar = Path(list_shards(src)[1].urls[0])
    whole, moment = tar.read_bytes(), tar.stat().st_mtime_ns
    tar.write_bytes(whole[: len(whole) // 2])
    code, _, err = convert_json(capsys, src, dst)
    assert code == 3, err
    code, found, err = run_json(capsys, retry_failed, dst)
    assert (code, found["redone"], found["failed"]) == (3, [], ["00000001"]), err
    tar.write_bytes(whole)
    os.utime(tar, ns=(moment, moment))
    code, found, err = run_json(capsys, retry_failed, dst)
    assert (code, found["redone"], found["failed"]) == (0, ["00000001"], []), err
    assert_verified(capsys, dst)


def test_a_dataset_of_two_recipes_is_repaired_with_both(tmp_path: Path, capsys: Capsys) -> None:
    one, two, dst = tars(tmp_path / "a", 2), tars(tmp_path / "b", 4), tmp_path / "out"
    two = "::".join(ref.urls[0] for ref in list_shards(two)[2:])
    assert convert_json(capsys, one, dst)[0] == 0
    code, _, err = convert_json(capsys, two, dst, "--format=webdataset", "--steps=2")
    assert code == 0, err
    assert "warning: DST also holds 2 shards of another configuration" in err
    assert_two_recipes(capsys, dst)
    before = files(dst)
    assert json.loads((dst / "_manifest.json").read_text())["totals"]["shards"] == 4
    for name in ("00000001", "00000003"):
        data_file(dst, name).unlink()
    code, found, err = run_json(capsys, repair, dst)
    assert (code, found["redone"]) == (0, ["00000001", "00000003"]), err
    assert files(dst) == before
    assert_two_recipes(capsys, dst)
    card = (dst / "_card.md").read_text()
    assert "with 2 recipes" in card


def assert_two_recipes(capsys: Capsys, dst: Path) -> None:
    code, found, err = run_json(capsys, verify, dst)
    assert (code, found["problems"]) == (0, []), err
    assert [note[:26] for note in found["notes"]] == ["shards of 2 configurations"]


def test_verify_does_not_believe_the_manifest(
    made: tuple[str, Path, dict[str, bytes]], capsys: Capsys
) -> None:
    _, dst, _ = made
    path = dst / "00000001.json"
    text = path.read_text()
    other = text.replace('"source_sha256": "', '"source_sha256": "', 1)
    digit = "0" if '"sha256": "0' not in text else "1"
    place = text.index('"sha256": "') + len('"sha256": "')
    other = text[:place] + digit + text[place + 1 :]
    assert len(other) == len(text)
    path.write_text(other)
    code, found, _ = run_json(capsys, verify, dst)
    assert code == 1
    assert any("00000001" in problem and "SHA-256" in problem for problem in found["problems"])
    assert any("_manifest.json differs" in note for note in found["notes"])
