"""`_plan.json`: it survives the round trip, keeps no secrets, and two jobs write it at once."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splatshard.jobs.destination import plan_file
from splatshard.jobs.destination.plan import (
    PlannedShard,
    make_plan,
    plan_from_json,
    plan_lines,
    planned,
    status,
)
from splatshard.schemas.errors import CorruptShardError, UsageError
from splatshard.schemas.shard import ShardRef
from tests.unit.planning import CONFIG, MARKERS, make_ref, markers_for, never, same_content


def plan_text(shards: dict[str, PlannedShard]) -> str:
    return "".join(plan_lines(shards))


EMPTY = make_plan([], {}, CONFIG, str)


@given(st.lists(st.sampled_from(sorted(MARKERS)), max_size=8))
def test_the_plan_file_survives_the_round_trip_and_agrees_with_status(kinds: list[str]) -> None:
    refs, markers = markers_for(kinds)
    plan = make_plan(refs, markers, CONFIG, same_content)
    shards = planned(refs, plan, CONFIG)
    text = plan_text(shards)
    assert plan_from_json(text, "_plan.json") == shards
    assert plan_text(dict(reversed(shards.items()))) == text
    state = status(shards, markers)
    assert {m.name for m in state.done} == {m.name for m in plan.done}
    assert set(state.missing) == {ref.name for ref in plan.todo}
    assert {s.name for s in state.stale} == {s.name for s in plan.stale}
    assert {name for name, _ in state.corrupt} == set(plan.corrupt)
    assert not state.unplanned


def test_the_plan_file_keeps_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "file")  # a secret that is also a word
    urls = ("https://me:hunter2@host/file.tar", "https://host/b.tar?hdnts=hunter2")
    refs = [
        dataclasses.replace(make_ref(name), urls=(url,), root=url)
        for name, url in zip("ab", urls, strict=True)
    ]
    shards = planned(refs, make_plan(refs, {}, CONFIG, never), CONFIG)
    text = plan_text(shards)
    assert "hunter2" not in text
    found = plan_from_json(text, "_plan.json")
    wanted = ["https://***@host/file.tar", "https://host/b.tar?***"]
    assert [found[name].ref.urls[0] for name in "ab"] == wanted
    assert [found[name].ref.root for name in "ab"] == wanted
    assert [found[name].fingerprint for name in "ab"] == [shards[n].fingerprint for n in "ab"]
    assert plan_text(found | shards) == plan_text(found) == text


def test_two_jobs_at_once_keep_each_others_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one starts just when this one has read what is there."""
    dst = str(tmp_path)
    of = {name: planned([ref := make_ref(name)], EMPTY, CONFIG) for name in "abc"}
    assert ref.name == "c"
    plan_file.write_plan(dst, of["a"])
    others: list[threading.Thread] = []

    def read_plan(dst: str) -> dict[str, PlannedShard]:
        found = real(dst)
        if not others:
            others.append(threading.Thread(target=plan_file.write_plan, args=(dst, of["b"])))
            others[0].start()
            others[0].join(1)  # it waits for us; without a lock it would not
        return found

    real = plan_file.read_plan
    monkeypatch.setattr(plan_file, "read_plan", read_plan)
    plan_file.write_plan(dst, of["c"])
    others[0].join()
    assert real(dst) == of["a"] | of["b"] | of["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["_plan.json"]


def test_an_unchanged_plan_is_left_alone(tmp_path: Path) -> None:
    """Also that of a part of it."""
    shards = planned(list(map(make_ref, "ab")), EMPTY, CONFIG)
    plan_file.write_plan(str(tmp_path), shards)
    before = (tmp_path / "_plan.json").stat()
    for names in ("ab", "a", ""):
        plan_file.write_plan(str(tmp_path), {name: shards[name] for name in names})
        assert (tmp_path / "_plan.json").stat().st_ino == before.st_ino


def test_status_knows_markers_without_a_plan() -> None:
    _, markers = markers_for(["done", "failed"])
    state = status({}, markers)
    assert len(state.done) == 1
    assert state.unplanned == ("00000000", "00000001")


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"plan_version": 1}', '{"plan_version": "x"}'),
        '{"plan_version": 1, "recipes": {}, "shards": {"a": {"ref": {"name": "a"}}}}',
        '{"plan_version": 1, "recipes": {}, "shards": {"a": {"ref": {"urls": []}}}}',
    ],
)
def test_a_broken_plan_file_says_what_to_do(text: str) -> None:
    with pytest.raises(CorruptShardError, match=r"out/_plan.json cannot be read.*delete it"):
        plan_from_json(text, "out/_plan.json")


def test_a_newer_plan_file_is_refused() -> None:
    with pytest.raises(UsageError, match="plan version 2"):
        plan_from_json('{"plan_version": 2}', "out/_plan.json")


def test_a_folders_plan_survives_the_round_trip() -> None:
    ref = ShardRef(
        name="pets-00000",
        kind="folder",
        urls=("in/pets/cat/1.jpg", "in/pets/é.jpg"),
        size_bytes=7,
        etag="d",
        limit=1,
        root="in/pets",
        labels=("cat", "dog"),
    )
    shards = planned([ref], make_plan([ref], {}, CONFIG, never), CONFIG)
    assert plan_from_json(plan_text(shards), "_plan.json") == shards


def test_a_plan_of_the_layout_before_this_one_reads() -> None:
    refs, markers = markers_for(["done", "stale"])
    shards = planned(refs, make_plan(refs, markers, CONFIG, never), CONFIG)
    document = json.loads(plan_text(shards))
    for name, entry in document["shards"].items():
        entry["ref"] |= {"limit": None, "root": "", "labels": []}
        entry["source"] = shards[name].inputs["source"]
    found = plan_from_json(json.dumps(document, indent=1), "_plan.json")
    assert [(s.ref, s.inputs, s.fingerprint) for s in found.values()] == [
        (s.ref, s.inputs, s.fingerprint) for s in shards.values()
    ]
