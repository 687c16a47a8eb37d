"""Markers, fingerprints and configuration: what is valid goes round, what is not is named."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splatshard.schemas.config import (
    PRESETS,
    STAGES_VERSION,
    ConvertConfig,
    DecodeConfig,
    FitConfig,
    PackConfig,
    PresetName,
    PruneConfig,
    config_from_output,
    describe_difference,
    fingerprint,
    inputs,
    output_config,
    recipe_digest,
)
from splatshard.schemas.errors import CorruptShardError, FormatVersionError, SampleError, UsageError
from splatshard.schemas.shard import (
    OK,
    SKIP_STATUSES,
    FailedShard,
    ShardManifest,
    failed_from_json,
    manifest_from_json,
    to_json,
)
from splatshard.schemas.splats import (
    CODECS,
    FORMAT_VERSION,
    MAX_LOSS_DB,
    PLANAR,
    PLANES,
    arrow_schema,
    columns,
    payload_bytes,
    psnr_columns,
    scalars,
    shard_metadata,
    splat_columns,
    splat_suffix,
)
from tests.rows import make_ref

CONFIG = ConvertConfig()
INPUTS = inputs(CONFIG, make_ref())

MANIFEST = ShardManifest(
    name="00000000",
    data_file=f"00000000-{fingerprint(INPUTS)[:8]}.parquet",
    size_bytes=12345,
    sha256="ab" * 32,
    format="parquet",
    samples=4,
    counts={"ok": 3, "corrupt_image": 1},
    statistics={"psnr_mean": 26.5, "num_gaussians_mean": 20.0, "payload_bytes": 960},
    fingerprint=fingerprint(INPUTS),
    inputs=INPUTS,
    source_url="/in/00000000.tar",
    source_sha256="cd" * 32,
)
FAILED = FailedShard(
    name="00000000",
    source_url="/in/00000000.tar",
    error="SourceError",
    message="cut at byte 5",
    fingerprint=fingerprint(INPUTS),
)


def test_markers_go_round() -> None:
    assert manifest_from_json(to_json(MANIFEST), "x.json") == MANIFEST
    assert failed_from_json(to_json(FAILED), "x.json") == FAILED
    assert to_json(manifest_from_json(to_json(MANIFEST), "x")) == to_json(MANIFEST)


@pytest.mark.parametrize(
    ("preset", "digest"), [("default", "68a1bd82f78a8506"), ("paper", "1447e1becefcd75c")]
)
def test_the_recipe_of_a_preset_is_that_of_its_stages(preset: PresetName, digest: str) -> None:
    """Or finished shards would be stale: whoever changes it raises one of the versions."""
    assert (STAGES_VERSION, FORMAT_VERSION) == (9, 2)
    assert recipe_digest(output_config(PRESETS[preset])) == digest


def test_rows_must_add_up_to_the_samples() -> None:
    with pytest.raises(CorruptShardError, match="5 samples, but the rows add up to 4"):
        dataclasses.replace(MANIFEST, samples=5)
    text = to_json(MANIFEST).replace('"samples": 4', '"samples": 5')
    with pytest.raises(CorruptShardError, match=r"marker d/x.json: .* add up to 4.*; delete it"):
        manifest_from_json(text, "d/x.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3),
        ("data_file", "../../etc/passwd"),
        ("data_file", "/x.parquet"),
        ("data_file", "x.zip"),
        ("size_bytes", -1),
        ("size_bytes", True),
        ("size_bytes", 1.0),
        ("sha256", "ab"),
        ("sha256", "AB" * 32),
        ("format", "zip"),
        ("format", ["parquet"]),
        ("samples", None),
        ("counts", {"ok": "4"}),
        ("counts", {"ok": True, "no_image": 3}),
        ("counts", {"fine": 4}),
        ("counts", {"ok": 5, "no_image": -1}),
        ("counts", []),
        ("statistics", {"psnr_mean": "26"}),
        ("statistics", {"psnr_mean": True}),
        ("statistics", None),
        ("fingerprint", ""),
        ("inputs", {}),
        ("inputs", {"recipe": 1, "source": {}}),
        ("format_version", 0),
        ("format_version", True),
        ("format_version", "1"),
        ("format_version", 2.0),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any) -> None:
    document = json.loads(to_json(MANIFEST)) | {field: value}
    with pytest.raises(CorruptShardError, match=rf"marker dst/a\.json: {field} is .*run convert"):
        manifest_from_json(json.dumps(document), "dst/a.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "NaN",
        '{"a": 1e999}',
        b"\xff\xfe\x00",
        b"\x80",
        "[" * 100_000,
        "1" * 10_000,
        "{}",
        '{"format_version": 1, "more": 1}',
    ],
    ids=range(12),
)
def test_what_is_no_marker_is_corrupt(text: str | bytes) -> None:
    for parse in (manifest_from_json, failed_from_json):
        with pytest.raises(CorruptShardError, match="marker x"):
            parse(text, "x")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**30])
def test_a_newer_marker_is_refused_by_version(version: int) -> None:
    document = {"format_version": version, "whatever": "it holds"}
    for parse in (manifest_from_json, failed_from_json):
        with pytest.raises(FormatVersionError, match="has format version"):
            parse(json.dumps(document), "x")


TEXT = st.text(st.sampled_from("ok1/.\0é\ud800"), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def paths_of(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key path into nested objects."""
    if not isinstance(value, dict):
        return []
    return [p for k, v in value.items() for p in [(*path, k), *paths_of(v, (*path, k))]]


@given(st.data())
def test_mutated_markers_never_raise_anything_else(data: st.DataObject) -> None:
    marker, parse = data.draw(
        st.sampled_from([(MANIFEST, manifest_from_json), (FAILED, failed_from_json)])
    )
    document = copy.deepcopy(json.loads(to_json(marker)))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(paths_of(document)))
        place = document
        for key in parents:
            place = place[key]
        if data.draw(st.booleans()):
            place[last] = data.draw(JSON)
        else:
            del place[last]
        if not document:
            break
    try:
        parsed = parse(json.dumps(document), "x")
    except (CorruptShardError, FormatVersionError):
        return
    assert parse(to_json(parsed), "x") == parsed


@given(st.binary(max_size=60), st.integers(0, 2000))
def test_damaged_text_never_raises_anything_else(noise: bytes, place: int) -> None:
    text = to_json(MANIFEST).encode()
    with suppress(CorruptShardError, FormatVersionError):
        manifest_from_json(text[:place] + noise + text[place + len(noise) :], "x")


# Fingerprints


def test_the_fingerprint_covers_what_changes_the_bytes() -> None:
    ref = make_ref()
    base = fingerprint(inputs(CONFIG, ref))
    assert base == fingerprint(inputs(ConvertConfig(), make_ref("another name")))
    runs_only = dataclasses.replace(CONFIG, batch_size=3, backend="reference")
    assert base == fingerprint(inputs(runs_only, ref))
    others = [
        inputs(dataclasses.replace(CONFIG, decode=DecodeConfig(image_size=64)), ref),
        inputs(dataclasses.replace(CONFIG, fit=FitConfig(steps=10)), ref),
        inputs(dataclasses.replace(CONFIG, prune=PruneConfig(prune="energy")), ref),
        inputs(dataclasses.replace(CONFIG, pack=PackConfig(codec="fp16")), ref),
        inputs(dataclasses.replace(CONFIG, fit=FitConfig(nested="200,400")), ref),
        inputs(CONFIG, dataclasses.replace(ref, etag="f")),
        inputs(CONFIG, dataclasses.replace(ref, size_bytes=1)),
        inputs(CONFIG, dataclasses.replace(ref, limit=1)),
        inputs(CONFIG, dataclasses.replace(ref, labels=("cat", "dog"))),
        inputs(CONFIG, dataclasses.replace(ref, labels=("dog", "cat"))),
    ]
    assert len({base, *map(fingerprint, others)}) == len(others) + 1


def test_the_fingerprint_outlives_json() -> None:
    for config in PRESETS.values():
        found = inputs(config, make_ref())
        assert fingerprint(json.loads(json.dumps(found))) == fingerprint(found)


def test_differences_are_readable() -> None:
    new = inputs(dataclasses.replace(CONFIG, fit=FitConfig(steps=300)), make_ref())
    assert describe_difference(INPUTS, new) == ["recipe.fit.steps: 150 -> 300"]
    assert describe_difference({"a": None}, {}) == ["a: None -> absent"]
    assert describe_difference({"a": {"b": 1}}, {"a": 2}) == ["a: {'b': 1} -> 2"]
    assert describe_difference(INPUTS, INPUTS) == []


# The wire format


def metadata_with(codec: str, nested: str = "") -> dict[str, Any]:
    config = ConvertConfig(fit=FitConfig(nested=nested), pack=PackConfig(codec=codec))  # type: ignore[arg-type]
    return shard_metadata(codec, 3.0, output_config(config))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("nested", ["", "4,9,16"])
def test_columns_and_constants_agree(codec: str, nested: str) -> None:
    metadata = metadata_with(codec, nested)
    assert metadata["format_version"] == FORMAT_VERSION
    assert metadata["budgets"] == ([4, 9, 16] if nested else [])
    schema = columns(metadata)
    stored = arrow_schema(metadata)
    assert stored.equals(schema)
    assert json.loads(stored.metadata[b"splatshard"]) == metadata
    assert len(set(schema.names)) == len(schema.names)
    assert OK not in SKIP_STATUSES
    payloads = [name for name in schema.names if name.startswith("splats")]
    assert payloads == (["splats", "splats_9", "splats_16"] if nested else ["splats"])
    kind = schema.field("splats").type
    assert [schema.field(name).type for name in payloads] == [kind] * len(payloads)
    assert [kind.field(i).name for i in range(kind.num_fields)] == list(
        PLANES if codec in PLANAR else ()
    )
    assert {"psnr_4", "psnr_9"} & set(schema.names) == ({"psnr_4", "psnr_9"} if nested else set())
    small = scalars(metadata)
    assert set(schema.names) - set(small) == {"metadata", "members", *payloads}


def test_names_of_budgets() -> None:
    assert splat_columns((4, 9)) == ("splats", "splats_9")
    assert splat_columns(()) == splat_columns((4,)) == ("splats",)
    assert [splat_suffix(name) for name in splat_columns((4, 9))] == ["splat", "splat_9"]
    assert psnr_columns((4, 9)) == ("psnr_4",)
    assert psnr_columns(()) == psnr_columns((4,)) == ()


def test_the_columns_of_version_1() -> None:
    """As they were: a shard without budgets, psnr_loss or planes."""
    old = {"format_version": 1, "codec": "q11", "bytes_per_gaussian": 11, "header_bytes": 4}
    schema = columns(old)
    new = columns(metadata_with("fp16"))
    assert schema.names == [name for name in new.names if name != "psnr_loss"]
    assert str(schema.field("splats").type) == "binary"


def test_bytes_of_payloads() -> None:
    assert payload_bytes({"key": "a", "splats": None, "metadata": "text"}) == 0
    assert payload_bytes({"splats": b"123", "splats_9": b"1"}) == 4
    assert payload_bytes({"splats": {"gap": b"12", "bits": b"123"}, "splats_9": {"gap": b""}}) == 5


def test_every_planar_codec_has_a_limit() -> None:
    assert set(PLANAR) == set(MAX_LOSS_DB) < set(CODECS)
    assert ConvertConfig().pack.codec in PLANAR


@pytest.mark.parametrize(
    "make",
    [
        lambda: DecodeConfig(image_size=-1),
        lambda: FitConfig(num_gaussians=0),
        lambda: FitConfig(steps=-1),
        lambda: FitConfig(cutoff=float("nan")),
        lambda: FitConfig(target_psnr=-3.0),
        lambda: PruneConfig(prune_share=1.0),
        lambda: PackConfig(format="zip"),  # type: ignore[arg-type]
        lambda: PackConfig(codec="zip"),  # type: ignore[arg-type]
        lambda: PackConfig(codec="q11"),  # type: ignore[arg-type]
        lambda: FitConfig(nested="400"),
        lambda: FitConfig(nested="900,400"),
        lambda: FitConfig(nested="400,400"),
        lambda: FitConfig(nested="400, 900"),
        lambda: FitConfig(nested="0,900"),
        lambda: FitConfig(nested="400,900,"),
        lambda: FitConfig(nested="400,99999"),
        lambda: FitConfig(nested="400,900", target_psnr=30.0),
        lambda: ConvertConfig(fit=FitConfig(nested="400,900"), prune=PruneConfig(prune="energy")),
        lambda: ConvertConfig(batch_size=0),
    ],
)
def test_absurd_options_name_the_flag(make: Any) -> None:
    with pytest.raises(UsageError, match=r"^--[a-z-]+ .*: "):
        make()


def test_nested_budgets_replace_the_number_of_gaussians() -> None:
    fit = FitConfig(nested="4,9,16", num_gaussians=7)
    assert fit.budgets == (4, 9, 16)
    assert fit.num_gaussians == 16
    assert fit == FitConfig(nested="4,9,16")
    assert FitConfig(num_gaussians=7).budgets == ()


def test_recipes_go_round() -> None:
    for config in (*PRESETS.values(), ConvertConfig(fit=FitConfig(nested="4,9"))):
        assert output_config(config_from_output(output_config(config))) == output_config(config)
    for old in ({"format_version": 1}, {"stages_version": 2}):
        with pytest.raises(UsageError, match="redo them all with convert --overwrite-stale"):
            config_from_output(output_config(CONFIG) | old)


def test_a_sample_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(SampleError("no_image", "row 3 has no image bytes")))
    assert (error.status, str(error)) == ("no_image", "row 3 has no image bytes")


def test_schemas_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from splatshard.schemas import config, errors, shard, splats\n"
        "assert not {'torch', 'ray', 'fsspec'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
