"""The planner: every shard in exactly one class, and stale shards never silently redone or kept."""

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
    Marker,
    PlannedShard,
    make_plan,
    mixed,
    plan_from_json,
    plan_lines,
    planned,
    refuse_stale,
    status,
)
from splatshard.jobs.verify import recipe_notes
from splatshard.schemas.config import (
    PRESETS,
    ConvertConfig,
    FitConfig,
    config_from_output,
    fingerprint,
    identities,
    inputs,
    output_config,
)
from splatshard.schemas.errors import CorruptShardError, StaleShardError, UsageError
from splatshard.schemas.shard import FailedShard, ShardManifest, ShardRef, marker_digest

CONFIG = ConvertConfig()


def plan_text(shards: dict[str, PlannedShard]) -> str:
    return "".join(plan_lines(shards))


EMPTY = make_plan([], {}, CONFIG, str)
OTHER = ConvertConfig(fit=FitConfig(steps=300))


def make_ref(name: str, etag: str = "1", size_bytes: int = 100, limit: int | None = None):
    return ShardRef(
        name=name,
        kind="tar",
        urls=(f"in/{name}.tar",),
        size_bytes=size_bytes,
        etag=etag,
        limit=limit,
    )


def make_manifest(ref: ShardRef, config: ConvertConfig = CONFIG) -> ShardManifest:
    shard_inputs = inputs(config, ref)
    return ShardManifest(
        name=ref.name,
        data_file=f"{ref.name}.parquet",
        size_bytes=10,
        sha256="0" * 64,
        format="parquet",
        samples=3,
        counts={"ok": 2, "no_image": 1},
        statistics={"psnr_mean": 30.0, "payload_bytes": 12.0},
        fingerprint=fingerprint(shard_inputs),
        inputs=shard_inputs,
        source_url=ref.urls[0],
        source_sha256=f"content of {ref.name}",
    )


def make_failed(ref: ShardRef) -> FailedShard:
    return FailedShard(
        name=ref.name,
        source_url=ref.urls[0],
        error="SourceError",
        message="cut off",
        fingerprint=fingerprint(inputs(CONFIG, ref)),
    )


def same_content(ref: ShardRef) -> str:
    return f"content of {ref.name}"


def never(ref: ShardRef) -> str:
    raise AssertionError("no checksum is needed here")


MARKERS = {
    "none": lambda ref: None,
    "done": make_manifest,
    "failed": make_failed,
    "stale": lambda ref: make_manifest(ref, OTHER),
    "resized": lambda ref: make_manifest(dataclasses.replace(ref, size_bytes=99)),
    "touched": lambda ref: make_manifest(dataclasses.replace(ref, etag="0")),
    "corrupt": lambda ref: CorruptShardError("not JSON"),
}


def markers_for(kinds: list[str]) -> tuple[list[ShardRef], dict[str, Marker]]:
    refs = [make_ref(f"{i:08d}") for i in range(len(kinds))]
    found = {ref.name: MARKERS[kind](ref) for ref, kind in zip(refs, kinds, strict=True)}
    return refs, {name: marker for name, marker in found.items() if marker is not None}


@given(st.lists(st.sampled_from(sorted(MARKERS)), max_size=12))
def test_every_shard_is_in_exactly_one_class(kinds: list[str]) -> None:
    refs, markers = markers_for(kinds)
    plan = make_plan(refs, markers, CONFIG, same_content)
    classes = [
        {ref.name for ref in plan.todo},
        {manifest.name for manifest in plan.done},
        {failed.name for failed in plan.failed},
        {stale.name for stale in plan.stale},
        set(plan.corrupt),
    ]
    names = {ref.name for ref in refs}
    assert sum(map(len, classes)) == len(names)
    assert set().union(*classes) == names
    assert [ref.name for ref in plan.work] == sorted(names - classes[1])
    expected = {"done", "touched"}
    done = {ref.name for ref, kind in zip(refs, kinds, strict=True) if kind in expected}
    assert classes[1] == done


@given(st.lists(st.sampled_from(sorted(MARKERS)), max_size=12))
def test_what_may_be_replaced_and_what_else_is_there(kinds: list[str]) -> None:
    refs, markers = markers_for([*kinds, "done", "failed", "corrupt"])
    plan = make_plan(refs[: len(kinds)], markers, CONFIG, same_content)
    stale = {shard.name: markers[shard.name] for shard in plan.stale}
    assert plan.replaces == {name: marker_digest(marker) for name, marker in stale.items()}
    assert set(plan.replaces) <= {ref.name for ref in plan.work}
    everything = {n for n, marker in markers.items() if isinstance(marker, ShardManifest)}
    names = [manifest.name for manifest in (*plan.done, *plan.others)]
    assert sorted(names) == sorted(everything)


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


def test_no_checksum_unless_only_the_etag_changed() -> None:
    refs, markers = markers_for(["none", "done", "failed", "stale", "resized", "corrupt"])
    make_plan(refs, markers, CONFIG, never)


def test_checksums_are_told_apart() -> None:
    refs, markers = markers_for(["touched"] * 40)
    changed = {"00000003", "00000035"}
    plan = make_plan(
        refs, markers, CONFIG, lambda ref: same_content(ref) if ref.name not in changed else "new"
    )
    assert {shard.name for shard in plan.stale} == changed
    assert [manifest.name for manifest in plan.done] == sorted(markers.keys() - changed)


@pytest.mark.parametrize("before", ["", "1"])
def test_without_an_etag_the_checksum_decides(before: str) -> None:
    """A server that tells nothing but sizes, and tars are padded to whole blocks."""
    refs = [make_ref(name, etag="") for name in "ab"]
    old = [dataclasses.replace(ref, etag=before) for ref in refs]
    markers: dict[str, Marker] = {ref.name: make_manifest(ref) for ref in old}
    plan = make_plan(refs, markers, CONFIG, lambda ref: f"content of {'ax'['ab'.index(ref.name)]}")
    assert [manifest.name for manifest in plan.done] == ["a"]
    assert [(shard.name, shard.differences) for shard in plan.stale] == [
        ("b", ("source content of in/b.tar changed (same size)",))
    ]


def test_a_touched_source_with_other_content_is_stale() -> None:
    refs, markers = markers_for(["touched"])
    plan = make_plan(refs, markers, CONFIG, lambda ref: "something else")
    assert plan.stale[0].differences == ("source content of in/00000000.tar changed (same size)",)


def test_a_touched_source_and_another_recipe_is_stale() -> None:
    refs, markers = markers_for(["touched"])
    plan = make_plan(refs, markers, OTHER, never)
    assert plan.stale[0].differences == (
        "recipe.fit.steps: 100 -> 300",
        "source.etag: 0 -> 1",
    )


def test_stale_shards_are_refused_with_one_diff_per_difference() -> None:
    refs, markers = markers_for(["stale", "stale", "stale", "stale", "resized", "done"])
    plan = make_plan(refs, markers, CONFIG, never)
    with pytest.raises(StaleShardError) as error:
        refuse_stale(plan, markers, "out")
    text = str(error.value)
    assert "out holds 5 shards of another configuration" in text
    assert text.count("recipe.fit.steps: 300 -> 100") == 1
    assert "4 shards (00000000, 00000001, 00000002, ...)" in text
    assert text.count("source.size_bytes: 99 -> 100") == 1
    assert "--overwrite-stale" in text


def test_broken_markers_are_refused_too() -> None:
    refs, markers = markers_for(["corrupt", "done"])
    plan = make_plan(refs, markers, CONFIG, never)
    with pytest.raises(StaleShardError, match=r"1 shard with a broken marker.*not JSON"):
        refuse_stale(plan, markers, "out")


def test_nothing_stale_is_not_refused() -> None:
    refs, markers = markers_for(["none", "done", "failed", "touched"])
    refuse_stale(make_plan(refs, markers, CONFIG, same_content), markers, "out")


def test_shards_of_another_recipe_that_stay_are_told() -> None:
    """Only those that SRC does not name: the others are refused, or redone."""
    a, b, c = make_ref("a"), make_ref("b"), make_ref("c")
    markers: dict[str, Marker] = {"a": make_manifest(a, OTHER), "b": make_manifest(b, CONFIG)}
    line = mixed(make_plan([c], markers, CONFIG, str), CONFIG)
    assert "DST also holds 1 shard of another configuration" in line
    assert "recipe.fit.steps: 300 -> 100" in line
    assert mixed(make_plan([a, c], markers, CONFIG, str), CONFIG) == ""
    assert mixed(make_plan([c], {"b": markers["b"]}, CONFIG, str), CONFIG) == ""
    (note,) = recipe_notes(markers)
    assert "shards of 2 configurations" in note
    assert recipe_notes({"b": markers["b"]}) == []


def test_two_sources_of_one_name_are_refused() -> None:
    refs = [make_ref("a"), dataclasses.replace(make_ref("a"), urls=("elsewhere/a.tar",))]
    with pytest.raises(UsageError, match=r"named a \(in/a.tar and elsewhere/a.tar\)"):
        make_plan(refs, {}, CONFIG, never)


def test_another_limit_is_another_shard() -> None:
    ref = make_ref("a")
    plan = make_plan([make_ref("a", limit=2)], {"a": make_manifest(ref)}, CONFIG, never)
    assert plan.stale[0].differences == ("source.limit: None -> 2",)


def test_the_plan_file_keeps_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "file")  # a secret that is also a word
    urls = ("https://me:hunter2@host/file.tar", "https://host/b.tar?X-Amz-Signature=hunter2")
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


# Recipes


@given(
    etag=st.text(max_size=5),
    size_bytes=st.integers(0, 2**60),
    limit=st.none() | st.integers(1, 9),
    labels=st.lists(st.text(max_size=3), max_size=3).map(tuple),
)
def test_identities_are_those_of_each_shard_alone(
    etag: str, size_bytes: int, limit: int | None, labels: tuple[str, ...]
) -> None:
    ref = dataclasses.replace(make_ref("a", etag, size_bytes, limit), labels=labels)
    for config in (CONFIG, OTHER, PRESETS["paper"]):
        found, digest = identities(config)(ref)
        assert found == inputs(config, ref)
        assert digest == fingerprint(inputs(config, ref))


@pytest.mark.parametrize("config", [*PRESETS.values(), OTHER])
def test_a_recipe_gives_its_configuration_back(config: ConvertConfig) -> None:
    assert config_from_output(json.loads(json.dumps(output_config(config)))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages_version": 0}, r"made with stages_version 0, this build has \d+: redo them all"),
        ({"format_version": 99}, "format_version 99"),
        ({"fit": {"steps": 5}}, "not of this version.*fit.beta1: absent -> "),
        ({"fit": {"brightness": 5}}, "not of this version.*brightness"),
        ({"prune": None}, "not of this version"),
        ({"more": {}}, "more: {} -> absent"),
    ],
)
def test_a_recipe_of_another_version_is_refused(change: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config_from_output(output_config(CONFIG) | change)
