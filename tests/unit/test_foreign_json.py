"""JSON of other tools beside shards is no marker; and no remedy leads in a circle."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from splatshard.jobs import convert, repair, status, verify
from splatshard.jobs.destination.plan import make_plan, planned
from splatshard.jobs.destination.plan_file import write_plan
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.shards.markers import read_markers, refuse_foreign
from splatshard.schemas.errors import CorruptShardError, UsageError
from splatshard.schemas.shard import is_foreign
from tests.rows import make_ref
from tests.splat_shards import commit, rows_of, splat_config

FOREIGN = {
    "litdata": '{"chunks": [], "config": {"data_format": ["binary"]}}',
    "wids": '{"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "x", "shardlist": []}',
    "newer": '{"format_version": 99, "name": "index"}',
    "list": '[{"file_name": "a.jpg", "caption": "a"}]',
    "lines": '{"file_name": "a.jpg"}\n{"file_name": "b.jpg"}\n',
    "empty": "{}",
    "null": " null",
    "nan": '{"loss": NaN}',
    "bom": '\ufeff{"a": 1}',
    "comment": "// settings\n{}",
    "words": "see README",
}


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    """Two done shards, planned."""
    folder, config = tmp_path / "splats", splat_config()
    for number in range(2):
        commit(str(folder), f"{number:05d}", rows_of(number, 8))
    refs = [make_ref(f"{number:05d}") for number in range(2)]
    markers = read_markers(str(folder))
    plan = make_plan(refs, markers, config, str)
    write_plan(str(folder), planned(refs, plan, config))
    return folder


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_json_of_others_is_left_alone_and_said(
    dst: Path, text: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_markers(str(dst))
    (dst / "index.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_markers(str(dst)) == read_markers(str(dst), trust_manifest=False) == before
        assert len(list(SplatDataset(str(dst), batch_size=4))) == 3
    assert [m for m in caplog.messages if "index.json" in m] == [
        f"{dst}: JSON that is no marker of a shard is left alone: index.json"
    ]
    for job in (status, verify, repair):
        assert job.main([str(dst), "--json"]) == 0
        out, _ = capsys.readouterr()
        assert "index" not in out
    assert (dst / "index.json").read_text() == text


def test_copies_of_markers_are_left_alone(dst: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As file managers make them; but not where the marker that was copied is gone."""
    before = read_markers(str(dst))
    copy = dst / "00000 (copy).json"
    copy.write_bytes((dst / "00000.json").read_bytes())
    with caplog.at_level(logging.WARNING):
        assert read_markers(str(dst)) == read_markers(str(dst), trust_manifest=False) == before
        assert len(list(SplatDataset(str(dst), batch_size=4))) == 3
    assert f"left alone: {copy.name}" in caplog.text
    (dst / "00000.json").unlink()
    with pytest.raises(CorruptShardError, match=r"is that of shard '00000'"):
        SplatDataset(str(dst), batch_size=4)


def test_a_damaged_marker_is_still_told(dst: Path) -> None:
    """Of what was one most fields are there, or it is no JSON, or its data are."""
    text = (dst / "00000.json").read_text()
    document = json.loads(text)
    for name in document:
        assert not is_foreign(json.dumps(document | {name: None}).encode())
        less = {key: value for key, value in document.items() if key != name}
        assert not is_foreign(json.dumps(less).encode())
    for size in range(0, len(text) - 1, 7):
        assert not is_foreign(text[:size].encode())
    for damaged in ("{}", "null", FOREIGN["litdata"], text[:99], "", "\0" * 9):
        (dst / "00000.json").write_text(damaged)
        assert isinstance(read_markers(str(dst))["00000"], CorruptShardError)
        with pytest.raises(CorruptShardError, match=f"{dst}/00000.json"):
            SplatDataset(str(dst), batch_size=4)


def test_a_shard_of_that_name_is_refused(dst: Path, tmp_path: Path) -> None:
    """Its marker would replace the file."""
    (dst / "index.json").write_text(FOREIGN["litdata"])
    refuse_foreign(str(dst), ["a"], ["index.json"])
    with pytest.raises(UsageError, match=r"index.json is not splatshard's.*move it away"):
        refuse_foreign(str(dst), ["a", "index"], ["index.json"])


def test_convert_does_not_replace_it(
    dst: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dst / "index.json").write_text(FOREIGN["wids"])
    (tmp_path / "index.tar").write_bytes(b"\0" * 1024)
    assert convert.main([f"{tmp_path}/index.tar", str(dst)]) == 1
    assert "index.json is not splatshard's" in capsys.readouterr().err
    assert (dst / "index.json").read_text() == FOREIGN["wids"]


@pytest.mark.parametrize("file", ["old.json", "old.failed.json"])
def test_a_damaged_marker_that_no_plan_mentions_has_a_remedy(
    dst: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What repair says to do helps; it said to run convert, which does nothing."""
    (dst / file).write_text("{")
    assert repair.main([str(dst), "--json"]) == 3
    out, _ = capsys.readouterr()
    why = json.loads(out)["still_bad"]["old"]
    assert f"delete {dst}/{file}, and convert its source again if it is wanted" in why
    assert status.main([str(dst)]) == 0
    assert "those that no plan mentions: delete these" in capsys.readouterr().out
    (dst / file).unlink()
    assert repair.main([str(dst)]) == 0
