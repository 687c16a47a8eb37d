"""A source shard to samples, streamed: tar, Hugging Face Parquet or a folder of images.

One sample at a time is in memory (a few rows for Parquet), and the source's bytes go into a digest
as they pass. tar.py says how the members of an archive are grouped, sample.py what becomes of a
group, parquet.py how rows are read.

A bad sample carries its reason in `error`; only a source that cannot be read to its end raises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice

from splatshard.pipeline.source.folder import class_of, folder_samples, is_image, what_else
from splatshard.pipeline.source.parquet import count_parquet, read_parquet, scan_parquet
from splatshard.pipeline.source.sample import (
    IMAGE_EXTENSIONS,
    SAID,
    SCANNED_EXTENSIONS,
    RawSample,
    assemble,
)
from splatshard.pipeline.source.seen import SeenKeys
from splatshard.pipeline.source.tar import MAX_SAMPLE_BYTES, Group, read_groups, scan_groups
from splatshard.pipeline.source.values import storable
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import SampleError, SourceError
from splatshard.schemas.shard import ShardRef

Samples = Generator[RawSample, None, None]


def read(ref: ShardRef, digest: fs.Digest) -> Generator[RawSample]:
    """The samples of `ref` in order, at most `ref.limit` of them.

    A whole read leaves in `digest` all bytes of the tar or Parquet file, or the names, sizes and
    bytes of a folder's files. A limited read leaves what it took: a prefix of the tar, the images
    of a Parquet file. Raises SourceError for what cannot be read to its end, and for a tar in which
    the members of a sample are not side by side.
    """
    seen = SeenKeys()
    with closing(_READERS[ref.kind](ref, digest)) as samples:
        for sample in islice(samples, ref.limit):
            before = seen.before(sample.key, sample.extensions)
            if before is not None:
                if _are_one_sample(before, sample.extensions):
                    raise SourceError(
                        f"{ref.urls[0]}: the members of sample {sample.key} are not side by side: "
                        f"other samples lie between {_some(before)} and "
                        f"{_some(sample.extensions)}; write the tar sorted by name (tar "
                        "--sort=name)"
                    )
                text = f"key {sample.key} occurs a second time in shard {ref.name}"
                sample = replace(sample, error=SampleError("duplicate_key", text))
            if sample.label is not None and sample.label < 0:
                sample = replace(sample, unused=(*sample.unused, ("a label below 0", BELOW_0)))
            yield sample


def _are_one_sample(first: frozenset[str], then: frozenset[str]) -> bool:
    """Whether members of one key, with these extensions, are an image and what belongs to it. Two
    of one extension are not, nor are two images, nor files without one (README, README.md)."""
    has_image = [any(e.lower() in IMAGE_EXTENSIONS for e in part) for part in (first, then)]
    return sum(has_image) == 1 and bool(first and then) and first.isdisjoint(then)


def _some(extensions: frozenset[str]) -> str:
    return ", ".join(f".{extension}" for extension in sorted(extensions))


def source_sha256(ref: ShardRef) -> str:
    """The checksum that the shard's marker would hold; "" for a source that is damaged by now."""
    digest = hashlib.sha256()
    try:
        for _ in read(ref, digest):
            pass
    except SourceError:
        return ""
    return digest.hexdigest()


def count_samples(ref: ShardRef, at_most: int) -> int:
    """How many samples `ref` has, up to `at_most`; image data is passed over where possible.

    A damaged source counts as far as it can be read, with the sample in which it breaks; the
    conversion will report it.
    """
    count = 0
    try:
        for _ in islice(_COUNTERS[ref.kind](ref), at_most):
            count += 1
    except SourceError:
        return count + 1 if count else 0
    return count


def scan(ref: ShardRef) -> Iterator[RawSample]:
    """The samples of `ref` in order, at most `ref.limit` of them, without their images: those are
    passed over where possible. Raises SourceError for what cannot be read to its end."""
    yield from islice(_SCANNERS[ref.kind](ref), ref.limit)


# Tar


def _read_tar(ref: ShardRef, digest: fs.Digest) -> Samples:
    (url,) = ref.urls
    again = partial(fs.open_anywhere, url)
    with fs.open_read(url) as stream, closing(read_groups(url, stream, digest, again)) as groups:
        for group in groups:
            yield _with_names(assemble(group), ref.name)


def _with_names(sample: RawSample, tar: str) -> RawSample:
    """A sample of a tar that says nothing but by its folder, or the name of its tar, with a word on
    that."""
    if any(getattr(sample, name) is not None for name in SAID) or not sample.image:
        return sample
    key = sample.key.removeprefix("./")
    told = [("folders in the tar", FOLDERS)] * ("/" in key)
    told = told or [("the tar's name", TAR_NAME)] * _names_class(tar, key)
    return replace(sample, unused=(*sample.unused, *told))


def _names_class(tar: str, key: str) -> bool:
    """Whether a tar may hold one class, as ImageNet's `n01440764.tar` with `n01440764_18.JPEG`."""
    return key.startswith(f"{tar}_") and not what_else([tar], [tar])


BELOW_0 = "-1 is none to readers, and classes count from 0: number them so, if it is one"
FOLDERS = "they give no labels: unpack it, and convert the folder of class folders, or add a .cls"
TAR_NAME = (
    "it gives no label: if each tar is a class, unpack each into a folder of its name, and convert "
    "the folder of these, without the tars"
)


def _count_tar(ref: ShardRef) -> Iterator[Group]:
    again = partial(fs.open_anywhere, ref.urls[0])
    with fs.open_read(ref.urls[0]) as stream:
        yield from scan_groups(ref.urls[0], stream, again)


def _scan_tar(ref: ShardRef) -> Iterator[RawSample]:
    again = partial(fs.open_anywhere, ref.urls[0])
    with fs.open_read(ref.urls[0]) as stream:
        yield from map(assemble, scan_groups(ref.urls[0], stream, again, SCANNED_EXTENSIONS))


# Folder


def _read_folder(ref: ShardRef, digest: fs.Digest) -> Samples:
    label_of = {name: i for i, name in enumerate(ref.labels)}
    for key, files in folder_samples(ref):
        group = Group(storable(key))
        for extension, url in files.items():
            with fs.open_read(url) as stream:
                data = stream.read(MAX_SAMPLE_BYTES + 1 - group.size_bytes)
            digest.update(f"{group.key}\0{extension}\0{len(data)}\0".encode() + data)
            group.size_bytes += len(data)
            group.members[extension] = data
        if group.size_bytes > MAX_SAMPLE_BYTES:
            text = f"the files of {group.key} exceed {MAX_SAMPLE_BYTES} bytes"
            group = Group(group.key, error=SampleError("too_large", text))
        path = next(filter(is_image, files.values()))[len(ref.root) :].lstrip("/")
        yield replace(assemble(group, label_of.get(class_of(key))), image_name=storable(path))


def _scan_folder(ref: ShardRef) -> Iterator[RawSample]:
    label_of = {name: i for i, name in enumerate(ref.labels)}
    for key, files in folder_samples(ref):
        group = Group(storable(key))
        for extension, url in files.items():
            wanted = extension.lower() in SCANNED_EXTENSIONS
            group.members[extension] = fs.read_bytes(url) if wanted else None
        yield assemble(group, label_of.get(class_of(key)))


_READERS = {"tar": _read_tar, "parquet": read_parquet, "folder": _read_folder}
_SCANNERS = {"tar": _scan_tar, "parquet": scan_parquet, "folder": _scan_folder}
_COUNTERS = {"tar": _count_tar, "parquet": count_parquet, "folder": folder_samples}
