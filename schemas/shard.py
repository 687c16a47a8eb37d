"""Shards as plain data: where one comes from (`ShardRef`), and the done or failed marker beside it.

A marker is the only thing readers trust. `{shard}.json` says a shard is done and names its data
file; `{shard}.failed.json` says the last attempt failed and why. Both are deterministic: no clock,
no host, so that two runs over the same input on the same kind of machine leave byte-identical
folders (a GPU up to the rounding of batches of another size).

Markers are parsed by hand: every field, also inside the dictionaries, is checked for type and
range, and whatever is wrong is a CorruptShardError. A schema library would say the same in more
words and one more dependency.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from sys import intern
from typing import Any, Literal, TypeGuard, cast, get_args

from splatshard.schemas.document import document, first_json, is_text, text_in_utf
from splatshard.schemas.errors import CorruptShardError, FormatVersionError
from splatshard.schemas.splats import EXTENSIONS, FORMAT_VERSION

OK = "ok"
SkipStatus = Literal[
    "no_image",  # a key without an image member
    "duplicate_key",  # a second sample with a key already seen in this shard
    "unsafe_path",  # absolute or ../ member path
    "empty_image",  # zero bytes
    "not_an_image",  # no image format that is read
    "corrupt_image",  # header fine, pixels not, or in a layout that is not read
    "too_large",  # the header promises more pixels than allowed
    "animated_image",  # more than one frame, or page
    "bad_metadata",  # a member beside the image that is a link to nothing
    "fit_diverged",  # non-finite splats
    "quarantined",  # killed its worker, or kept it busy beyond --sample-timeout
]
"""Why a sample has no splats."""
SKIP_STATUSES = get_args(SkipStatus)
STATUSES = frozenset((OK, *SKIP_STATUSES))


PSNR_STEP = 0.5
"""dB per step of a marker's psnr_histogram; quantiles do not merge over shards, histograms do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRef:
    """One unit of work: a source shard and how much of it to take.

    `name` is the output name (the source's base name without extension). `kind` is "tar", "parquet"
    or "folder". `urls` has one entry, except for a folder's shard: its files, sorted. `etag` is the
    store's, or the modification time on a local disk, or a digest of both over a folder's files;
    empty where the store tells none, so that only a checksum knows whether the source is the same.
    `labels` are the classes in the order of their numbers: class directories of a folder, or names
    that the schema of a Parquet file has.
    """

    name: str
    kind: str
    urls: tuple[str, ...]
    size_bytes: int
    etag: str
    limit: int | None = None
    root: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardManifest:
    """The done marker of one shard: what was committed, and everything needed to check it.

    `data_file` is a name in the marker's folder. `inputs` is what the fingerprint covers: recipe
    and source identity. `counts` maps the statuses that occur to numbers of rows and sums to
    `samples`. `statistics` holds payload_bytes and, where there are ok rows, their
    num_gaussians_mean, psnr_mean, psnr_min and psnr_max in dB, and psnr_histogram: numbers of rows
    in steps of PSNR_STEP dB from psnr_histogram_from on, as text ("3 0 17"), since 100,000 lists of
    numbers would take most of a driver's memory.
    """

    name: str
    data_file: str
    size_bytes: int
    sha256: str
    format: str
    samples: int
    counts: dict[str, int]
    statistics: dict[str, Any]
    fingerprint: str
    inputs: dict[str, Any]
    source_url: str
    source_sha256: str
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """The accounting identity: samples in = ok + each skip reason."""
        if sum(self.counts.values()) != self.samples:
            raise CorruptShardError(
                f"shard {self.name}: {self.samples} samples, but the rows add up to "
                f"{sum(self.counts.values())} ({reprlib.repr(self.counts)})"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedShard:
    """The failed marker of one shard: the last error, by class and message."""

    name: str
    source_url: str
    error: str
    message: str
    fingerprint: str
    format_version: int = FORMAT_VERSION


def to_json(marker: ShardManifest | FailedShard) -> str:
    """Canonical JSON: sorted keys, two-space indent, closing newline."""
    values = {name: getattr(marker, name) for name in _FIELDS[type(marker)]}
    return json.dumps(values, sort_keys=True, indent=2, allow_nan=False) + "\n"


def marker_digest(manifest: ShardManifest) -> str:
    """SHA-256 (hex) of a done marker's bytes, by which an attempt knows what it may replace."""
    return hashlib.sha256(to_json(manifest).encode()).hexdigest()


def manifest_from_json(text: str | bytes, name: str) -> ShardManifest:
    """Parse a done marker. `name` (a path or URL) goes into error messages.

    Raises `FormatVersionError` for a newer version and `CorruptShardError` for anything malformed.
    """
    return manifest_of(document(text, f"marker {name}", _REMEDY), name)


def manifest_of(values: dict[str, Any], name: str) -> ShardManifest:
    """A done marker from its parsed fields, checked; raises as `manifest_from_json`.

    All markers share the strings of inner keys and formats, which would be a third of their memory.
    """
    _checked(ShardManifest, values, name)
    needed = ("payload_bytes", *(_OF_OK_ROWS if values["counts"].get(OK) else ()))
    if missing := [statistic for statistic in needed if statistic not in values["statistics"]]:
        raise CorruptShardError(f"marker {name}: statistics have no {missing[0]}; {_REMEDY}")
    inputs: dict[str, Any] = values["inputs"]
    values["inputs"] = _shared_keys(inputs | {"source": _shared_keys(inputs["source"])})
    for field in ("counts", "statistics"):
        values[field] = _shared_keys(values[field])
    values["format"] = intern(values["format"])
    try:
        return ShardManifest(**values)
    except CorruptShardError as e:
        raise CorruptShardError(f"marker {name}: {e}; {_REMEDY}") from e


def _shared_keys(values: dict[str, Any]) -> dict[str, Any]:
    return {intern(key): value for key, value in values.items()}


def failed_from_json(text: str | bytes, name: str) -> FailedShard:
    """Parse a failed marker; raises as `manifest_from_json`."""
    return FailedShard(**_checked(FailedShard, document(text, f"marker {name}", _REMEDY), name))


def is_foreign(text: bytes) -> bool:
    """Whether these are something else than a marker: another tool's index, say. Of one that is
    damaged most fields are there, or it is no JSON, but begins as one, or is no text."""
    try:
        found = first_json(text)
    except UnicodeError:
        return False
    except (ValueError, RecursionError):
        begin = text_in_utf(text).lstrip()[:1]
        return begin not in ("", "\0", "{") and not any(name.encode() in text for name in _OWN)
    return not isinstance(found, dict) or len(_OWN & cast("dict[str, Any]", found).keys()) < 2


def _checked(
    cls: type[ShardManifest | FailedShard], values: dict[str, Any], name: str
) -> dict[str, Any]:
    """`values` if they are the fields of `cls`; raises as `manifest_from_json`."""
    version = values.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"marker {name} has format version {reprlib.repr(version)}, this build reads up to "
            f"{FORMAT_VERSION}: upgrade splatshard or choose another DST"
        )
    fields = _FIELDS[cls]
    if values.keys() != fields.keys():
        missing, unknown = sorted(fields.keys() - values.keys()), values.keys() - fields.keys()
        raise CorruptShardError(
            f"marker {name}: missing fields {missing}, unknown fields "
            f"{reprlib.repr(sorted(unknown))}; {_REMEDY}"
        )
    for key, (check, wanted) in fields.items():
        if not check(values[key]):
            raise CorruptShardError(
                f"marker {name}: {key} is {reprlib.repr(values[key])}, not {wanted}; {_REMEDY}"
            )
    return values


_REMEDY = "delete it and run convert again"
LIMIT = 1 << 63
"""Numbers in markers are below: sums and means of them are numbers, too."""
_DIGEST_PATTERN = re.compile("[0-9a-f]{64}")
_HISTOGRAM_PATTERN = re.compile("[0-9]{1,18}( [0-9]{1,18}){0,999}")
_BUDGETS_PATTERN = re.compile("([0-9]{1,9}(,[0-9]{1,9})*)?")
_FILE_PATTERN = re.compile(r"[^/\\\0]+\.(parquet|tar)")


def is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < LIMIT


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < LIMIT


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST_PATTERN.fullmatch(value) is not None


def _is_counts(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    counts = cast("dict[str, object]", value)
    return STATUSES.issuperset(counts) and all(map(is_count, counts.values()))


def _is_statistics(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    statistics = cast("dict[str, object]", value)
    if "psnr_histogram" not in statistics:
        return all(map(is_number, statistics.values()))
    numbers = statistics.copy()
    return (
        _is_histogram(numbers.pop("psnr_histogram"))
        and statistics.keys() >= _HISTOGRAM_NEEDS
        and all(map(is_number, numbers.values()))
    )


_OF_OK_ROWS = ("num_gaussians_mean", "psnr_mean")
_HISTOGRAM_NEEDS = {"psnr_histogram_from", "psnr_mean", "psnr_min", "psnr_max"}


def _is_histogram(value: object) -> bool:
    return isinstance(value, str) and _HISTOGRAM_PATTERN.fullmatch(value) is not None


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and _FILE_PATTERN.fullmatch(value) is not None


def _is_inputs(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    parts = cast("dict[str, Any]", value)
    recipe, source = parts.get("recipe"), parts.get("source")
    if not isinstance(recipe, dict) or not isinstance(source, dict):
        return False
    counts = (cast("dict[str, object]", source).get(name) for name in ("limit", "size_bytes"))
    return is_recipe(cast("dict[str, Any]", recipe)) and all(
        n is None or is_count(n) for n in counts
    )


def is_recipe(recipe: dict[str, Any]) -> bool:
    """Whether `recipe` has what readers, cards and reports take from it. What else a conversion
    needs, `schemas.config.config_from_output` says."""
    stages: list[object] = [recipe.get(n) for n in ("decode", "fit", "pack")]
    if not all(isinstance(stage, dict) for stage in stages):
        return False
    decode, fit, pack = cast("list[dict[str, Any]]", stages)
    return (
        is_count(decode.get("image_size"))
        and is_number(fit.get("cutoff"))
        and is_text(nested := fit.get("nested", ""))
        and _BUDGETS_PATTERN.fullmatch(nested) is not None
        and is_text(pack.get("codec"))
        and is_text(pack.get("format"))
        and is_count(recipe.get("format_version", FORMAT_VERSION))
    )


_TEXT = (is_text, "a string")
_COUNT = (is_count, "a whole number")
_DIGEST = (_is_digest, "64 hex digits")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data_file": (_is_file_name, "the name of a .parquet or .tar file"),
    "size_bytes": _COUNT,
    "sha256": _DIGEST,
    "format": (lambda value: value in tuple(EXTENSIONS), f"one of {', '.join(EXTENSIONS)}"),
    "samples": _COUNT,
    "counts": (_is_counts, "numbers of rows by known status"),
    "statistics": (_is_statistics, "numbers and a histogram"),
    "fingerprint": _DIGEST,
    "inputs": (_is_inputs, "a recipe and a source"),
    "source_sha256": (lambda value: value == "" or _is_digest(value), "64 hex digits"),
    "format_version": (lambda value: is_count(value) and value > 0, "a positive whole number"),
}
"""What a field must be, and how to say so; fields not listed are strings."""

_OWN = frozenset(("fingerprint", "format_version", "source_url"))
"""Fields of every marker that others hardly have."""

_FIELDS = {
    cls: {f.name: _CHECKS.get(f.name, _TEXT) for f in dataclasses.fields(cls)}
    for cls in (ShardManifest, FailedShard)
}
"""The fields of each marker, with their checks."""

MARKER_FIELDS = tuple(_FIELDS[ShardManifest])
"""Names of a done marker's fields."""
