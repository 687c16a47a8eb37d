"""Random and damaged bytes into the parsers of markers, manifests and plans: refused by name, or
harmless to whoever counts with them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splatshard.jobs.destination.figures import dataset_figures
from splatshard.jobs.destination.manifest import psnr_quantiles
from splatshard.jobs.destination.plan import make_plan, plan_from_json, plan_lines, planned
from splatshard.pipeline.shards.commit import publish, staged_file
from splatshard.pipeline.shards.markers import read_markers
from splatshard.schemas.config import fingerprint, inputs
from splatshard.schemas.errors import CorruptShardError, FormatVersionError, UsageError
from splatshard.schemas.manifest import Entry, manifest_lines, read_entries
from splatshard.schemas.shard import (
    FailedShard,
    ShardManifest,
    failed_from_json,
    manifest_from_json,
    to_json,
)
from tests.fuzzing import mutated
from tests.rows import config_of, make_ref, make_rows, write_shard


def done_text() -> str:
    """A marker with everything a marker can have."""
    config, ref = config_of(), make_ref("a")
    document = inputs(config, ref)
    statistics = {"payload_bytes": 960, "psnr_mean": 26.1, "psnr_min": 25.1, "psnr_max": 27.1}
    statistics |= {"num_gaussians_mean": 20.0, "psnr_histogram_from": 25.0}
    statistics |= {"psnr_histogram": "1 0 1 0 1"}
    return to_json(
        ShardManifest(
            name="a",
            data_file="a-01234567.parquet",
            size_bytes=4321,
            sha256="ab" * 32,
            format="parquet",
            samples=4,
            counts={"ok": 3, "corrupt_image": 1},
            statistics=statistics,
            fingerprint=fingerprint(document),
            inputs=document,
            source_url="/in/caf\u00e9/a.tar",
            source_sha256="cd" * 32,
        )
    )


DONE_TEXT = done_text()
FAILED_TEXT = to_json(
    FailedShard(
        name="a", source_url="a.tar", error="ValueError", message="\u00e9", fingerprint="0" * 64
    )
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, -1, 0])
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["\ud800", "../x.tar", "a.parquet", "\0", "9" * 64]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(document: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in it."""
    yield before
    if isinstance(document, dict | list):
        steps = document if isinstance(document, dict) else range(len(document))
        for step in steps:
            yield from paths(document[step], (*before, step))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = replaced(document[path[0]], path[1:], value)
    return copy


@st.composite
def changed(draw: st.DrawFn, text: str) -> bytes:
    """A document with one value replaced, or its bytes mutated."""
    if draw(st.booleans()):
        return mutated(text.encode(), random.Random(draw(st.integers(0, 2**32))))
    document = json.loads(text)
    path = draw(st.sampled_from(list(paths(document))))
    return json.dumps(replaced(document, path, draw(json_values))).encode()


@given(changed(DONE_TEXT))
@settings(max_examples=500)
def test_damaged_done_markers_are_refused_or_harmless(text: bytes) -> None:
    try:
        manifest = manifest_from_json(text, "x")
    except (CorruptShardError, FormatVersionError) as e:
        str(e).encode()
        return
    assert manifest_from_json(to_json(manifest), "x") == manifest
    f"{manifest.name} {manifest.data_file} {manifest.source_url}".encode()
    json.dumps(dataset_figures([manifest, manifest]), allow_nan=False)
    psnr_quantiles([manifest])
    entries = {"a": Entry(manifest, 1)}
    lines = "".join(manifest_lines({}, entries)).encode().split(b"\n")
    (found,) = read_entries(lines, "m").values()
    assert found.manifest.statistics == manifest.statistics


@given(changed(FAILED_TEXT))
@settings(max_examples=200)
def test_damaged_failed_markers_are_refused_or_harmless(text: bytes) -> None:
    try:
        marker = failed_from_json(text, "x")
    except (CorruptShardError, FormatVersionError):
        return
    f"{marker.name}{marker.error}{marker.message}".encode()


@pytest.mark.parametrize("parse", [manifest_from_json, failed_from_json])
@given(text=st.binary(max_size=300) | st.text(max_size=100))
def test_anything_is_no_marker(parse: Any, text: bytes | str) -> None:
    with pytest.raises(CorruptShardError):
        parse(text, "x")


@pytest.mark.parametrize(
    "text",
    [b"[" * 10**6, b'{"a":' * 10**6, b"9" * 10**6, b'{"a":' + b"9" * 5000 + b"}", b'"\\ud800"']
    + [text.encode("utf-16") for text in (DONE_TEXT,)]
    + [
        DONE_TEXT.encode().replace(b"in/", b"\xed\xa0\x80", 1),
        b"\xef\xbb\xbf" + DONE_TEXT.encode(),
    ],
)
def test_what_only_python_takes_for_json(text: bytes) -> None:
    for parse in (manifest_from_json, failed_from_json):
        with pytest.raises(CorruptShardError):
            parse(text, "x")


def manifest_text() -> str:
    manifest = manifest_from_json(DONE_TEXT, "x")
    return "".join(manifest_lines({"totals": {}}, {manifest.name: Entry(manifest, 9)}))


@given(st.integers(0, 2**32))
@settings(max_examples=300)
def test_damaged_manifests_are_refused_or_harmless(seed: int) -> None:
    text = mutated(manifest_text().encode(), random.Random(seed))
    try:
        entries = read_entries(text.split(b"\n"), "m")
    except (CorruptShardError, FormatVersionError):
        return
    for name, entry in entries.items():
        f"{name} {entry.manifest.data_file}".encode()
    json.dumps(dataset_figures([e.manifest for e in entries.values()]), allow_nan=False)


@given(st.integers(0, 2**32))
@settings(max_examples=300)
def test_damaged_plans_are_refused_or_harmless(seed: int) -> None:
    refs = [make_ref("a"), make_ref("b")]
    config = config_of()
    text = "".join(plan_lines(planned(refs, make_plan(refs, {}, config, str), config)))
    damaged = mutated(text.encode(), random.Random(seed)).decode(errors="replace")
    try:
        plan_from_json(damaged, "_plan.json")
    except (CorruptShardError, UsageError) as e:
        str(e).encode()


def test_a_destination_of_damaged_markers_is_listed(tmp_path: Path) -> None:
    """Whatever lies there, each shard has its marker or an error that names it."""
    with staged_file(str(tmp_path), "a") as path:
        write_shard(path, make_rows(4))
        publish(str(tmp_path), path, make_ref("a"), config_of(), "cd" * 32)
    text = (tmp_path / "a.json").read_bytes()
    text = text.replace(b'"name": "a"', b'"name": "b"')  # copies of a's would be left alone
    for seed in range(100, 300):  # whose files are not quite torn to pieces
        (tmp_path / f"s{seed}.json").write_bytes(mutated(text, random.Random(seed)))
    try:
        found = read_markers(str(tmp_path))
    except FormatVersionError:
        pytest.fail("one of these seeds is a newer version: choose others")
    assert len(found) == 201
    for name, marker in found.items():
        if name != "a":
            assert isinstance(marker, CorruptShardError)
            assert f"{name}.json" in str(marker)
