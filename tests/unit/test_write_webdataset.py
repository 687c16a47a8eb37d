"""Shards as tars: what plain webdataset makes of them, safe names for any key."""

from __future__ import annotations

import gc
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.shards.write import member_base
from tests.rows import make_rows, write_shard

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import webdataset


def samples_of(path: Path) -> list[dict[str, Any]]:
    """What plain webdataset makes of a tar. It leaves closing the file to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
        gc.collect()
    return samples


def test_webdataset_groups_each_sample(tmp_path: Path) -> None:
    rows = make_rows(8)
    path = write_shard(tmp_path / "x.tar", rows, "webdataset")
    samples = samples_of(path)
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    for row, sample in zip(rows, samples, strict=True):
        assert sample.get("splat") == row.get("splats")
        assert sample["txt"].decode() == row["caption"]
        assert sample["cls"] == str(row["label"]).encode()
        assert sample["json"].decode() == row["metadata"]
        assert sample["seg.png"] == row["members"][0]["data"]
        scalars = json.loads(sample["splat.json"])
        assert scalars["status"] == row["status"]
        assert scalars["num_gaussians"] == row["num_gaussians"]


def test_tar_headers_tell_nothing_of_the_machine(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", make_rows(2), "webdataset")
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert members[0].name == "__splatshard__"
    found = {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in members}
    assert found == {(0, 0, "", "", 0, 0o644)}


UNSAFE_KEYS = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "",
    ".",
    "..",
    "a//b",
    "a/",
    "a.b.c",
    "x.jpg",
    "n01440764/n01440764_18.JPEG",
    "./a",
    "v1.5/a",
    "__MACOSX__/a",
    "__a__",
    "100%",
    "%2E",
    "a\\b",
    "new\nline",
    "nul\0",
    "ключ/キー",
    "k" * 300,
    f"{'folder/' * 40}k",
]


@pytest.mark.parametrize("key", UNSAFE_KEYS, ids=range(len(UNSAFE_KEYS)))
def test_any_key_gives_a_safe_name_that_webdataset_groups(tmp_path: Path, key: str) -> None:
    row = make_rows(1)[0] | {"key": key}
    path = write_shard(tmp_path / "x.tar", [row], "webdataset")
    (sample,) = samples_of(path)
    assert json.loads(sample["splat.json"])["key"] == key
    assert sample["splat"] == row["splats"]
    assert next(read_rows(str(path)))["key"] == key
    with tarfile.open(path) as tar:
        for member in tar if hasattr(tarfile, "data_filter") else ():  # not in Python 3.11.2
            assert tarfile.data_filter(member, str(tmp_path)).name == member.name


@given(st.lists(st.text(st.sampled_from("a.%/_\\\n2EF~"), max_size=6), unique=True, max_size=30))
def test_different_keys_give_different_names(keys: list[str]) -> None:
    bases = [member_base(key) for key in keys]
    assert len(set(bases)) == len(keys)
    for base in bases:
        assert "." not in base.rpartition("/")[2]
        assert not base.startswith("/")
        assert not {"", ".", ".."} & set(base.split("/"))
        assert "~" not in base or "~" in "".join(keys)


def test_samples_of_one_key_stay_apart(tmp_path: Path) -> None:
    first, second = make_rows(2)
    second = {"key": first["key"], "status": "duplicate_key", "num_gaussians": 0, "caption": "b"}
    path = write_shard(tmp_path / "x.tar", [first, second], "webdataset")
    assert [s["txt"] for s in samples_of(path)] == [first["caption"].encode(), b"b"]
    assert [row["key"] for row in read_rows(str(path))] == [first["key"]] * 2


def test_members_with_awkward_names(tmp_path: Path) -> None:
    names = ["txt", "PNG", "png", "splat", "splat.json", "__key__", "a/../b", "", "json", "é%"]
    members = [{"name": name, "data": name.encode()} for name in names]
    row = make_rows(1)[0] | {"members": members}
    path = write_shard(tmp_path / "x.tar", [row], "webdataset")
    assert next(read_rows(str(path)))["members"] == members
    assert next(read_rows(str(path)))["caption"] == row["caption"]
    (sample,) = samples_of(path)
    assert sample["txt"] == b"txt"  # the member as it came, not the caption
    assert sample["png"] == b"PNG"
    assert sample["splat"] == row["splats"]
    assert sample["json"].decode() == row["metadata"]
