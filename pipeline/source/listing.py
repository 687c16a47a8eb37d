"""What SRC means: a path, pattern, folder or list to source shards, in a fixed order.

SRC is one of, or several joined by `::` of

    one shard        train-0000.tar, train-00000-of-00004.parquet
    a brace pattern  shards/{00000000..00001287}.tar      every file must exist
    a glob           shards/*.tar
    a folder         its .tar and image .parquet files, at any depth; where there are none, its
                     images, cut into shards by sorted path
    a list file      files.txt: one source per line, # comments, relative to the list's folder

on a local disk or any fsspec URL. Links are followed; one that leads nowhere is an error, as is a
folder that cannot be listed. Of a folder, hidden files and folders are left out.

Beside each `00000000.tar` img2dataset leaves a metadata file `00000000.parquet`: where both are in
one folder the tar is meant, and Parquet files without images are passed over.

Left out: compressed tars; list files inside list files; fsspec's chained URLs (`::` joins here).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import compress
from posixpath import basename

from splatshard.pipeline.source.parquet import has_images
from splatshard.pipeline.source.read import count_samples, split_stem
from splatshard.pipeline.source.sample import IMAGE_EXTENSIONS, SIDECAR_EXTENSIONS
from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.fs import Stat
from splatshard.pipeline.storage.options import redact, scheme_of
from splatshard.schemas.errors import SourceError, UsageError
from splatshard.schemas.shard import ShardRef

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def list_shards(
    src: str, limit: int | None = None, samples_per_shard: int = 1000, dst: str = ""
) -> list[ShardRef]:
    """The shards of `src` in order; with `limit`, those that hold its first `limit` samples.

    The last shard then has a limit of its own, unless all of it is wanted. `samples_per_shard` cuts
    a folder of images. Raises UsageError when there is nothing at `src`, part of it is missing, two
    shards would have one name, or what is converted into `dst` and its sources would mix;
    SourceError when a place cannot be read; UnavailableError.
    """
    for name, value in (("limit", limit), ("samples-per-shard", samples_per_shard)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be 1 or more")
    try:
        refs = _list(src, samples_per_shard, dst)
    except UsageError as e:  # messages name URLs, and a signed URL is a secret
        raise UsageError(redact(str(e))) from e
    return refs if limit is None else _take(refs, limit)


def _list(src: str, samples_per_shard: int, dst: str) -> list[ShardRef]:
    patterns = [pattern for source in src.split("::") for pattern in _patterns(source.strip())]
    for pattern in patterns:
        _refuse_compressed(pattern)
    refs = _resolve(src, patterns, samples_per_shard, dst)
    _check_names(refs)
    if dst:
        check_apart(refs, dst)
    return refs


def _take(refs: list[ShardRef], limit: int) -> list[ShardRef]:
    taken = []
    for ref in refs:
        if limit <= 0:
            break
        count = count_samples(ref, at_most=limit + 1)
        taken.append(replace(ref, limit=limit) if count > limit else ref)
        limit -= count
    return taken


def _check_names(refs: list[ShardRef]) -> None:
    first: dict[str, ShardRef] = {}
    for ref in refs:
        other = first.setdefault(ref.name, ref)
        if other is not ref:
            raise UsageError(
                f"{other.urls[0]} and {ref.urls[0]} would both become shard {ref.name}: "
                "rename one, or convert them into two destinations"
            )


def check_apart(refs: Iterable[ShardRef], dst: str) -> None:
    """Raises UsageError for a source in or below `dst`: it could be taken for a shard of `dst`."""
    folders = {url.rpartition("/")[0]: url for ref in refs for url in ref.urls}
    for folder, url in folders.items():
        if _lies_in(folder, dst):
            raise UsageError(redact(f"{url} of SRC lies in DST {dst}: choose another DST"))


def _check_outside(dst: str, source: str, is_glob: bool) -> None:
    """Raises UsageError where files of `dst` would be found in the folder or glob `source`."""
    if dst and (fs.matches(source, dst) if is_glob else _lies_in(dst, source)):
        raise UsageError(
            f"DST {dst} lies in SRC {source}, and the next run would take its shards for sources: "
            "choose a DST outside of SRC, or move this one there"
        )


def _lies_in(url: str, folder: str) -> bool:
    """Whether `url` is the folder `folder`, or below it."""
    if len({"" if fs.is_local(u) else scheme_of(u) for u in (url, folder)}) > 1:
        return False
    return f"{fs.place(url)}/".startswith(f"{fs.place(folder).rstrip('/')}/")


# From SRC to paths and globs


def _patterns(source: str, in_list: bool = False) -> list[str]:
    """Paths and globs: lists read, braces expanded."""
    if not source:
        raise UsageError("SRC is empty: give a tar, a pattern, a folder or a list file")
    if source.endswith(".txt") and in_list:
        raise UsageError(f"{source}: a list file cannot name another list file")
    if source.endswith(".txt"):
        return _read_list(source)
    if "{" not in source or fs.exists(source):
        return [source]
    return _expand(source)


def _expand(pattern: str) -> list[str]:
    try:
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError as e:
        raise UsageError(
            f"{pattern}: braces are expanded by braceexpand, which is not installed: pip install "
            "braceexpand, or give a glob (*.tar), a folder or a list file"
        ) from e
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as e:
        raise UsageError(f"{pattern}: unbalanced braces; write {{00000..00009}}.tar") from e


def _read_list(url: str) -> list[str]:
    if not fs.exists(url):
        raise UsageError(f"{url}: no such list file")
    with fs.open_read(url) as stream:
        lines = stream.read().decode(errors="replace").splitlines()
    folder = fs.absolute(url).rpartition("/")[0]
    sources = [s.strip() for line in lines for s in line.partition("#")[0].split("::")]
    sources = [s if re.match(r"/|~|\w+://", s) else f"{folder}/{s}" for s in sources if s]
    if not sources:
        raise UsageError(f"{url}: the list names no source; write one per line")
    return [pattern for source in sources for pattern in _patterns(source, in_list=True)]


def _refuse_compressed(url: str) -> None:
    if url.endswith(COMPRESSED):
        raise UsageError(f"{url}: compressed archives are not read; unpack it to a .tar first")


def _is_glob(pattern: str) -> bool:
    return bool(re.search(r"[*?\[]", _path(pattern))) and not fs.exists(pattern)


# From paths to shards


def _resolve(src: str, patterns: list[str], samples_per_shard: int, dst: str) -> list[ShardRef]:
    globs = {p for p in patterns if _is_glob(p)}
    found = fs.stats(p for p in patterns if _kind(p) and p not in globs)
    no_images = _without_images(found)
    refs, missing = [], []
    for pattern in patterns:
        if pattern in no_images:
            raise UsageError(f"{pattern} has no image column; is it img2dataset's metadata?")
        if pattern in globs:
            _check_outside(dst, pattern, is_glob=True)
            refs += _from_glob(pattern)
        elif pattern in found:
            refs.append(_shard(pattern, found[pattern]))
        elif _kind(pattern) and len(patterns) > 1:
            missing.append(pattern)
        elif fs.is_dir(pattern):
            _check_outside(dst, pattern, is_glob=False)
            refs += _from_folder(pattern, samples_per_shard)
        elif fs.exists(pattern):
            raise UsageError(
                f"{pattern} is no .tar, .parquet, .txt list or folder; give one of these"
            )
        else:
            missing.append(pattern)
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UsageError(
            f"SRC {src} matches nothing at {len(missing)} of {len(patterns)} places: {some}; "
            "correct the path or pattern, or fetch what is missing"
        )
    return refs


def _from_glob(pattern: str) -> list[ShardRef]:
    matches = fs.glob(pattern)
    refs = _choose(matches)
    if not refs:
        for url in matches:
            _refuse_compressed(url)
        what = f"{len(matches)} files, but no .tar or image .parquet" if matches else "nothing"
        raise UsageError(f"SRC {pattern} matches {what}; correct the pattern")
    return refs


def _from_folder(url: str, samples_per_shard: int) -> list[ShardRef]:
    root = fs.absolute(url).rstrip("/")
    start = len(root) + 1
    found = fs.find(root, lambda path: not _hidden(path.rpartition("/")[2]))
    files = {u: s for u, s in found.items() if not _hidden(u[start:])}
    refs = _choose(files) or _cut(root, files, samples_per_shard)
    if not refs:
        for file in files:
            _refuse_compressed(file)
        raise UsageError(f"SRC {url} has no .tar, no image .parquet and no images in it")
    return refs


def _choose(files: dict[str, Stat]) -> list[ShardRef]:
    """The shards among `files`: tars, and Parquet files with images and no tar beside them."""
    tars = {_stem(url) for url in files if _kind(url) == ".tar"}
    shards = [u for u in files if _kind(u) == ".tar" or (_kind(u) and _stem(u) not in tars)]
    no_images = _without_images(shards)
    return [_shard(url, files[url]) for url in shards if url not in no_images]


def _without_images(urls: Iterable[str]) -> set[str]:
    """The Parquet files among `urls` without an image column; damaged ones will fail later."""

    def lacks_images(url: str) -> bool:
        try:
            return not has_images(url)
        except SourceError:
            return False

    parquet = [url for url in urls if _kind(url) == ".parquet"]
    with ThreadPoolExecutor(16) as pool:
        return set(compress(parquet, pool.map(lacks_images, parquet)))


def _shard(url: str, stat: Stat) -> ShardRef:
    return ShardRef(
        name=basename(_stem(url)),
        kind=_kind(url)[1:],
        urls=(fs.absolute(url),),
        size_bytes=stat.size_bytes,
        etag=stat.etag,
    )


def _cut(root: str, files: dict[str, Stat], samples_per_shard: int) -> list[ShardRef]:
    """Shards of a folder of images: samples by sorted key, each with its sidecar files."""
    samples: dict[str, list[str]] = {}
    for url in files:
        key, extension = split_stem(url[len(root) + 1 :])
        if extension.lower() in (*IMAGE_EXTENSIONS, *SIDECAR_EXTENSIONS):
            samples.setdefault(key, []).append(url)
    keys = sorted(k for k, urls in samples.items() if any(_is_image(u) for u in urls))
    in_folders = all("/" in key for key in keys)
    labels = sorted({key.partition("/")[0] for key in keys}) if in_folders else ()
    refs = []
    for number, start in enumerate(range(0, len(keys), samples_per_shard)):
        urls = [u for key in keys[start : start + samples_per_shard] for u in samples[key]]
        refs.append(
            ShardRef(
                name=f"{basename(root)}-{number:05d}",
                kind="folder",
                urls=tuple(urls),
                size_bytes=sum(files[u].size_bytes for u in urls),
                etag=_etag_of(root, urls, files),
                root=root,
                labels=tuple(labels),
            )
        )
    return refs


def _etag_of(root: str, urls: Iterable[str], files: dict[str, Stat]) -> str:
    """Empty where one of the files has none: sizes alone, or names, tell too little."""
    urls = list(urls)
    if not all(files[u].etag for u in urls):
        return ""
    identity = "".join(f"{u[len(root) + 1 :]} {files[u]}\n" for u in urls)
    return hashlib.sha256(identity.encode("utf-8", "backslashreplace")).hexdigest()[:32]


def current(refs: Iterable[ShardRef]) -> list[ShardRef]:
    """`refs` with the sizes and etags that their files have now; as it was where one is gone.

    Raises SourceError when a place cannot be read, and UnavailableError.
    """
    refs = list(refs)
    found = fs.stats(url for ref in refs for url in ref.urls)
    return [_current(ref, found) if all(u in found for u in ref.urls) else ref for ref in refs]


def _current(ref: ShardRef, found: dict[str, Stat]) -> ShardRef:
    size_bytes = sum(found[url].size_bytes for url in ref.urls)
    if ref.kind == "folder":
        return replace(ref, size_bytes=size_bytes, etag=_etag_of(ref.root, ref.urls, found))
    return replace(ref, size_bytes=size_bytes, etag=found[ref.urls[0]].etag)


def _is_image(url: str) -> bool:
    return split_stem(url)[1].lower() in IMAGE_EXTENSIONS


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _path(url: str) -> str:
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def _kind(url: str) -> str:
    """ ".tar", ".parquet" or empty."""
    path = _path(url)
    return ".tar" if path.endswith(".tar") else ".parquet" if path.endswith(".parquet") else ""


def _stem(url: str) -> str:
    return _path(url).removesuffix(_kind(url))
