"""What SRC means: a path, pattern, folder or list to source shards, in a fixed order.

SRC is one of, or several joined by `::` of

    one shard        train-0000.tar, train-00000-of-00004.parquet
    an image         photo.jpg, with the caption or label beside it (image_shards.py)
    a brace pattern  shards/{00000000..00001287}.tar      every file must exist
    a glob           shards/*.tar, kodak/*.png
    a folder         its .tar and image .parquet files, at any depth; where there are none, its
                     images, cut into shards by sorted path (folder.py)
    a list file      files.txt: one source per line, # comments, relative to the list's folder

on a local disk or any fsspec URL. Links are followed; one that leads nowhere is an error, as is a
folder that cannot be listed. Hidden folders are not looked into.

Beside each `00000000.tar` img2dataset leaves a metadata file `00000000.parquet`: where both are in
one folder the tar is meant, and Parquet files without images are passed over.

What was listed and is not converted is counted in `Listing.left_out` (left_out.py).

Left out: compressed tars; list files inside list files; fsspec's chained URLs (`::` joins here).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from posixpath import basename

from splatshard.pipeline.source.classes import notes_on_classes
from splatshard.pipeline.source.folder import (
    class_of,
    classes_in,
    doubts,
    few,
    is_image,
    is_sidecar,
    of_imagefolder,
    side_by_side,
    split_stem,
    with_images,
)
from splatshard.pipeline.source.image_shards import etag_of, given_images, image_shards
from splatshard.pipeline.source.left_out import hidden_with_images, matched
from splatshard.pipeline.source.parquet import Declared, declared
from splatshard.pipeline.source.patterns import (
    COMPRESSED,
    above,
    is_glob,
    is_hidden,
    kind_of,
    of_partitions,
    path_of,
    patterns_of,
    refuse_compressed,
    stem_of,
)
from splatshard.pipeline.source.read import count_samples, source_sha256
from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.fs import Stat
from splatshard.pipeline.storage.options import redact, scheme_of
from splatshard.schemas.errors import SourceError, UsageError
from splatshard.schemas.shard import ShardManifest, ShardRef


@dataclass
class Listing:
    """What is at SRC: its shards, the folders of images that are all in them, what of it is left
    out (by reason, then extension), and what the user should know of it, in lines. `class_names`
    has the Parquet files whose schema names the classes, with the names by number."""

    refs: list[ShardRef] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class folders in the order of their numbers, or the names in Parquet's schemas, if
        they are all alike."""
        found = {ref.labels for ref in self.refs if ref.labels}
        return found.pop() if len(found) == 1 else ()

    def add_shard(self, url: str, stat: Stat) -> None:
        self.refs.append(
            ShardRef(
                name=basename(stem_of(url)),
                kind=kind_of(url)[1:],
                urls=(fs.absolute(url),),
                size_bytes=stat.size_bytes,
                etag=stat.etag,
                labels=self.class_names.get(url, ()),
            )
        )

    def leave_out(self, reason: str, urls: Iterable[str]) -> None:
        if found := Counter(split_stem(path_of(url))[1].lower() for url in urls):
            self.left_out[reason].update(found)


def list_shards(
    src: str, limit: int | None = None, samples_per_shard: int = 1000, dst: str = ""
) -> list[ShardRef]:
    """The shards alone of `list_source`."""
    return list_source(src, limit, samples_per_shard, dst).refs


def list_source(
    src: str,
    limit: int | None = None,
    samples_per_shard: int = 1000,
    dst: str = "",
    classes: Sequence[str] = (),
) -> Listing:
    """The shards of `src` in order; with `limit`, those that hold its first `limit` samples.

    The last shard then has a limit of its own, unless all of it is wanted. `samples_per_shard` cuts
    a folder of images, whose class folders have the numbers that they have among `classes`, where
    these are given. Raises UsageError when there is nothing at `src`, part of it is missing, two
    shards would have one name, a class is none of `classes`, or what is converted into `dst` and
    its sources would mix; SourceError when a place cannot be read; UnavailableError.
    """
    for name, value in (("limit", limit), ("samples-per-shard", samples_per_shard)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be 1 or more")
    try:
        found = _list(src, samples_per_shard, dst, tuple(classes))
    except UsageError as e:  # messages name URLs, and a signed URL is a secret
        raise UsageError(redact(str(e))) from e
    if limit is not None:
        found.refs = _take(found.refs, limit)
    return found


def _list(src: str, samples_per_shard: int, dst: str, classes: tuple[str, ...]) -> Listing:
    patterns = [pattern for source in src.split("::") for pattern in patterns_of(source.strip())]
    for pattern in patterns:
        refuse_compressed(pattern)
    found = _resolve(src, patterns, samples_per_shard, dst, classes)
    _number_classes(found, classes)
    found.notes = notes_on_classes(found.refs) + found.notes
    _check_names(found.refs)
    if dst:
        check_apart(found.refs, dst)
    return found


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
            if other.urls == ref.urls:
                raise UsageError(f"SRC has {ref.urls[0]} twice: leave one out")
            raise UsageError(
                f"{other.urls[0]} and {ref.urls[0]} would both become shard {ref.name}: "
                "rename one, or convert them into two destinations"
            )
    seen = set[str]()
    for url in (url for ref in refs for url in ref.urls):
        if url in seen:
            raise UsageError(f"SRC has {url} twice, by two of the places that it names: give one")
        seen.add(url)


def check_apart(refs: Iterable[ShardRef], dst: str) -> None:
    """Raises UsageError for a source in or below `dst`: it could be taken for a shard of `dst`."""
    folders = {url.rpartition("/")[0]: url for ref in refs for url in ref.urls}
    for folder, url in folders.items():
        if _lies_in(folder, dst):
            raise UsageError(redact(f"{url} of SRC lies in DST {dst}: choose another DST"))


def _check_outside(dst: str, source: str, as_glob: bool) -> None:
    """Raises UsageError where files of `dst` would be found in the folder or glob `source`."""
    if dst and (fs.matches(source, dst) if as_glob else _lies_in(dst, source)):
        raise UsageError(
            f"DST {dst} lies in SRC {source}, and the next run would take its shards for sources: "
            "choose a DST outside of SRC, or move this one there"
        )


def _lies_in(url: str, folder: str) -> bool:
    """Whether `url` is the folder `folder`, or below it."""
    if len({"" if fs.is_local(u) else scheme_of(u) for u in (url, folder)}) > 1:
        return False
    return f"{fs.place(url)}/".startswith(f"{fs.place(folder).rstrip('/')}/")


def _resolve(
    src: str, patterns: list[str], samples_per_shard: int, dst: str, classes: tuple[str, ...]
) -> Listing:
    globs = {p for p in patterns if is_glob(p)}
    # on the web an image is its path: keys, which are shards' content, hold no query
    one = [p for p in patterns if kind_of(p) or (is_image(p) and p == path_of(p))]
    named = [p for p in one if p not in globs]
    files = fs.stats(named)
    found, given, missing = Listing(), list[tuple[str, Stat]](), list[str]()
    no_images = _without_images(found, files)
    for pattern in patterns:
        if pattern in no_images:
            raise UsageError(no_images[pattern])
        if pattern in globs:
            _check_outside(dst, pattern, as_glob=True)
            given += [(fs.absolute(u), s) for u, s in _add_glob(found, pattern, dst).items()]
        elif pattern in files and not kind_of(pattern):
            given.append((fs.absolute(pattern), files[pattern]))
        elif pattern in files:
            found.add_shard(pattern, files[pattern])
        elif pattern in named and len(patterns) > 1:
            missing.append(pattern)
        elif fs.is_dir(pattern):
            _check_outside(dst, pattern, as_glob=False)
            _add_folder(found, pattern, samples_per_shard, classes)
        elif fs.exists(pattern):
            web = "; on the web the path without its query must end so: else download it"
            what = f"{pattern} is no .tar, .parquet, image, .txt list or folder; give one of these"
            raise UsageError(what + web * pattern.startswith("http"))
        else:
            missing.append(pattern)
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UsageError(
            f"SRC {src} matches nothing at {len(missing)} of {len(patterns)} places: {some}; "
            "correct the path or pattern, or fetch what is missing"
        )
    images = dict(given)
    refs, notes = given_images(images, samples_per_shard)
    found.refs += refs
    found.notes += notes
    if again := len(given) - len(images):
        found.notes.append(f"images are taken once that SRC names several times: {again:,} of them")
    return found


def _add_glob(found: Listing, pattern: str, dst: str) -> dict[str, Stat]:
    """The shards that match, if there are any, else the images, which are returned."""
    folders = set[str]()
    listed = fs.glob(pattern, folders)
    hidden = [u for u in listed if is_hidden(basename(u)) and not is_hidden(basename(pattern))]
    matches = {url: stat for url, stat in listed.items() if url not in hidden}
    found.leave_out("hidden", {u for u in hidden if is_image(u) or kind_of(u)})
    images = dict[str, Stat]()
    if not _add_shards(found, matches):
        used = {url for urls in with_images(matches).values() for url in urls}
        if not used:
            for url in matches:
                refuse_compressed(url)
            raise UsageError(f"SRC {pattern} matches {matched(pattern, matches)}")
        images = {url: stat for url, stat in matches.items() if is_image(url)}
        _leave_out_beside_images(found, matches.keys() - used)
    folders = {f for f in folders if not is_hidden(basename(f))}
    if folders := {f for f in folders if not dst or fs.place(f) != fs.place(dst)}:
        found.left_out["folder"]["folder"] += len(folders)
        names = few(sorted(map(basename, folders)))
        found.notes.append(
            f"{pattern} matches folders, too, and a pattern reads files alone: {names}; give each "
            f"as a SRC of its own, or {above(pattern)}"
        )
    return images


def _add_folder(found: Listing, url: str, samples_per_shard: int, classes: tuple[str, ...]) -> None:
    root = fs.absolute(url).rstrip("/")
    place = fs.driver(root)[1].rstrip("/")
    hidden, below = list[str](), set[str]()

    def wanted(path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if is_hidden(name):
            hidden.append(path)
        elif folder == place:
            below.add(name)
        return not is_hidden(name)

    start = len(root) + 1
    listed = {u[start:]: s for u, s in fs.find(root, wanted).items()}
    hidden += [path for path in listed if is_hidden(path)]  # where a store lists all at once
    files = {f"{root}/{p}": s for p, s in listed.items() if not is_hidden(p)}
    found.leave_out("hidden", {p for p in hidden if is_image(p) or kind_of(p)})
    found.notes += hidden_with_images(place, hidden)
    if _add_shards(found, files):
        return
    folders = {class_of(u[start:]) for u in files} - {""} | (below - listed.keys())
    if not _add_images(found, root, files, folders, samples_per_shard, classes):
        for file in files:
            refuse_compressed(file)
        extensions = Counter(split_stem(path_of(file))[1] for file in files).most_common(5)
        some = ", ".join(f"{n:,} .{kind}" if kind else f"{n:,} without" for kind, n in extensions)
        said = "".join(f"; {why}" for why in list(_without_images(found, files).values())[:1])
        if hidden:
            said += f"; what begins with a dot is left out: {few([*map(basename, sorted(hidden))])}"
        raise UsageError(
            f"SRC {url} has no .tar, no image .parquet and no images in it; by extension: "
            f"{some or 'no file'}; write its images as one of these{said}"
        )


def _add_shards(found: Listing, files: dict[str, Stat]) -> bool:
    """The tars, and Parquet files with images and no tar beside them, among `files`; whether there
    are any. Then all others are left out."""
    tars = {stem_of(url) for url in files if kind_of(url) == ".tar"}
    shards = [u for u in files if kind_of(u) == ".tar" or (kind_of(u) and stem_of(u) not in tars)]
    no_images = _without_images(found, shards)
    shards = [url for url in shards if url not in no_images]
    if not shards:
        return False
    for url in shards:
        found.add_shard(url, files[url])
    rest = files.keys() - set(shards)
    found.leave_out("no_image_column", no_images)
    found.leave_out("same_name", {u for u in rest - no_images.keys() if kind_of(u)})
    images = sorted(filter(is_image, rest))
    found.leave_out("beside_shards", images)
    _leave_out_others(found, rest - set(images))
    found.notes += of_partitions(shards)
    if images:
        found.notes.append(
            f"{len(images):,} images are left out, since tars or Parquet files lie beside them, "
            f"such as {shards[0]}: give the images in a folder of their own ({images[0]}, ...)"
        )
    return True


def _add_images(
    found: Listing,
    root: str,
    files: dict[str, Stat],
    folders: set[str],
    samples_per_shard: int,
    classes: tuple[str, ...],
) -> bool:
    """Shards of the images among `files`; whether there are any. `folders` are those directly below
    `root`."""
    paths = [url[len(root) + 1 :] for url in files]
    stems = with_images(paths)
    if not stems:
        return False
    used = {path for files in stems.values() for path in files}
    images = sorted(filter(is_image, used))
    labels, notes = classes_in(root, images, folders, classes)
    found.folders.add(root)
    refs = image_shards(root, stems, files, samples_per_shard)
    found.refs += [replace(ref, labels=labels) for ref in refs]
    found.notes += notes
    rest = set(paths) - used
    found.notes += of_imagefolder(root, rest)
    _leave_out_beside_images(found, rest)
    return True


def _leave_out_beside_images(found: Listing, urls: set[str]) -> None:
    found.leave_out("no_image_column", {u for u in urls if kind_of(u)})
    alone = {u for u in urls if is_sidecar(u)}
    found.leave_out("no_image", alone)
    _leave_out_others(found, urls - alone)


def _leave_out_others(found: Listing, urls: set[str]) -> None:
    others = {url for url in urls if not kind_of(url)}
    found.leave_out("compressed", {u for u in others if u.endswith(COMPRESSED)})
    found.leave_out("other", {u for u in others if not u.endswith(COMPRESSED)})


def _number_classes(found: Listing, classes: tuple[str, ...]) -> None:
    """One number for a class in all folders of SRC. Raises UsageError for `classes` of nothing."""
    labelled = [ref for ref in found.refs if _by_folder(ref)]
    one_by_one = side_by_side(found.refs, classes)
    if classes and not labelled:
        what = "--classes is for folders of images whose folders are classes; SRC has none"
        raise UsageError("; ".join([what, *one_by_one]))
    names = classes or tuple(sorted({name for ref in labelled for name in ref.labels}))
    if names:
        found.refs = [replace(r, labels=names) if _by_folder(r) else r for r in found.refs]
        some = "1 class" if len(names) == 1 else f"{len(names):,} classes"
        found.notes.insert(0, f"{some} by folder: {few(names)}")
        found.notes += [] if classes else doubts(names)
    found.notes += one_by_one


def _by_folder(ref: ShardRef) -> bool:
    return ref.kind == "folder" and bool(ref.labels)


def _without_images(found: Listing, urls: Iterable[str]) -> dict[str, str]:
    """The Parquet files among `urls` without an image column, and what to say of each; damaged ones
    will fail later. The class names of the others are noted."""

    def look(url: str) -> Declared:
        try:
            return declared(url)
        except SourceError:
            return Declared()

    parquet = [url for url in urls if kind_of(url) == ".parquet"]
    with ThreadPoolExecutor(16) as pool:
        said = dict(zip(parquet, pool.map(look, parquet), strict=True))
    once: dict[tuple[str, ...], tuple[str, ...]] = {}  # of many files
    found.class_names |= {
        url: once.setdefault(each.classes, each.classes)
        for url, each in said.items()
        if each.classes
    }
    return {url: each.no_images for url, each in said.items() if each.no_images}


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
        return replace(ref, size_bytes=size_bytes, etag=etag_of(ref.root, ref.urls, found))
    return replace(ref, size_bytes=size_bytes, etag=found[ref.urls[0]].etag)


def is_source_of(ref: ShardRef, manifest: ShardManifest) -> bool:
    """Whether the files of `ref` are, by now, those that the shard was made of: by size and etag,
    and where the etag is another one, or there is none, by their checksum.

    Raises SourceError when a place cannot be read, and UnavailableError.
    """
    (now,), before = current([ref]), manifest.inputs["source"]
    if now.size_bytes != before.get("size_bytes"):
        return False
    if now.etag and now.etag == before.get("etag"):
        return True
    checksum = source_sha256(replace(now, limit=before.get("limit")))
    return bool(checksum) and checksum == manifest.source_sha256
