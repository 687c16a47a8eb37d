"""The planner: every shard in exactly one class, and stale shards never silently redone or kept."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splatshard.jobs.destination.plan import Marker, make_plan, mixed, refuse_stale
from splatshard.jobs.driver.execute import beside
from splatshard.jobs.verify import recipe_notes
from splatshard.schemas.config import (
    PRESETS,
    ConvertConfig,
    config_from_output,
    fingerprint,
    identities,
    inputs,
    output_config,
)
from splatshard.schemas.errors import StaleShardError, UsageError
from splatshard.schemas.shard import ShardManifest, marker_digest
from tests.unit.planning import (
    CONFIG,
    MARKERS,
    OTHER,
    make_manifest,
    make_ref,
    markers_for,
    never,
    same_content,
)


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
        "recipe.fit.steps: 150 -> 300",
        "source.etag: 0 -> 1",
    )


def test_stale_shards_are_refused_with_one_diff_per_difference() -> None:
    refs, markers = markers_for(["stale", "stale", "stale", "stale", "resized", "done"])
    plan = make_plan(refs, markers, CONFIG, never)
    with pytest.raises(StaleShardError) as error:
        refuse_stale(plan, markers, "out")
    text = str(error.value)
    assert "out holds 5 shards of another configuration" in text
    assert text.count("recipe.fit.steps: 300 -> 150") == 1
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
    assert "recipe.fit.steps: 300 -> 150" in line
    assert mixed(make_plan([a, c], markers, CONFIG, str), CONFIG) == ""
    assert mixed(make_plan([c], {"b": markers["b"]}, CONFIG, str), CONFIG) == ""
    (note,) = recipe_notes(markers)
    assert "shards of 2 configurations" in note
    assert recipe_notes({"b": markers["b"]}) == []


def test_shards_that_src_does_not_name_are_told() -> None:
    """A folder of images that was renamed gives shards of other names beside the old ones."""
    a, b = make_ref("old-00000"), make_ref("new-00000")
    markers: dict[str, Marker] = {"old-00000": make_manifest(a, CONFIG)}
    line = beside(make_plan([b], markers, CONFIG, str))
    assert "1 shard that SRC does not name, and readers take them, too: old-00000" in line
    assert beside(make_plan([a, b], markers, CONFIG, str)) == ""
    assert beside(make_plan([a], {"old-00000": make_manifest(a, OTHER)}, CONFIG, str)) == ""


def test_two_sources_of_one_name_are_refused() -> None:
    refs = [make_ref("a"), dataclasses.replace(make_ref("a"), urls=("elsewhere/a.tar",))]
    with pytest.raises(UsageError, match=r"named a \(in/a.tar and elsewhere/a.tar\)"):
        make_plan(refs, {}, CONFIG, never)


def test_another_limit_is_another_shard() -> None:
    ref = make_ref("a")
    plan = make_plan([make_ref("a", limit=2)], {"a": make_manifest(ref)}, CONFIG, never)
    assert plan.stale[0].differences == ("source.limit: None -> 2",)


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
        ({"more": {}}, "not of this version.*more is no field"),
    ],
)
def test_a_recipe_of_another_version_is_refused(change: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config_from_output(output_config(CONFIG) | change)
