"""Images to shards: those of a folder, and those that are given by name or by a pattern."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Collection, Iterable, Mapping
from posixpath import basename

from splatshard.pipeline.source.folder import cut, is_image, is_sidecar, split_stem, with_images
from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.fs import Stat
from splatshard.pipeline.storage.options import scheme_of
from splatshard.schemas.shard import ShardRef


def image_shards(
    root: str, stems: Mapping[str, list[str]], files: Mapping[str, Stat], size: int, name: str = ""
) -> list[ShardRef]:
    """Shards of `size` samples; `stems` are paths below `root`. `name`: another than the root's."""
    refs = []
    for number, paths in enumerate(cut(stems, size)):
        urls = [f"{root}/{path}" for path in paths]
        refs.append(
            ShardRef(
                name=f"{name or basename(root) or 'images'}-{number:05d}",
                kind="folder",
                urls=tuple(urls),
                size_bytes=sum(files[u].size_bytes for u in urls),
                etag=etag_of(root, urls, files),
                root=root,
            )
        )
    return refs


def etag_of(root: str, urls: Iterable[str], files: Mapping[str, Stat]) -> str:
    """Empty where one of the files has none: sizes alone, or names, tell too little."""
    urls = list(urls)
    if not all(files[u].etag for u in urls):
        return ""
    identity = "".join(f"{u[len(root) + 1 :]} {files[u]}\n" for u in urls)
    return hashlib.sha256(identity.encode("utf-8", "backslashreplace")).hexdigest()[:32]


def given_images(images: Mapping[str, Stat], size: int) -> tuple[list[ShardRef], list[str]]:
    """Shards of images (absolute) that SRC names one by one or by a pattern, with the captions and
    labels that lie beside them, and what to say of them. Keys are paths below the folder that they
    have in common; one image alone names its shard."""
    by_place: dict[str, dict[str, Stat]] = {}
    for url, stat in images.items():
        by_place.setdefault(_store(url), {})[url] = stat
    refs, notes = list[ShardRef](), list[str]()
    for own in by_place.values():
        folders = {url.rpartition("/")[0] for url in own}
        root = common_folder(own)
        files = own | _sidecars(folders, own)
        stems = with_images(url[len(root) + 1 :] for url in files)
        name = split_stem(basename(next(iter(own))))[0] if len(images) == 1 else ""
        refs += image_shards(root, stems, files, size, name)
        if len(folders) > 1:
            notes.append(
                f"no labels: the images of {root or '/'} are given one by one or by a pattern; if "
                "its folders are classes, give the folder itself"
            )
    return refs, notes


def common_folder(urls: Iterable[str]) -> str:
    """The deepest that holds all of `urls`; empty for the root, and for those of several stores."""
    folders = sorted({url.rpartition("/")[0] for url in urls})
    store = _store(folders[0])
    if any(_store(folder) != store for folder in folders):
        return ""
    return "/".join(posixpath.commonprefix([folder.split("/") for folder in folders]))


def _store(url: str) -> str:
    """What no common folder reaches across: `s3://bucket`, or nothing of a local path."""
    if fs.is_local(url):
        return ""
    scheme = f"{scheme_of(url)}://"
    return scheme + url[len(scheme) :].partition("/")[0]


def _sidecars(folders: Iterable[str], images: Collection[str]) -> dict[str, Stat]:
    """Files beside `images` that belong to one of them; web servers list none."""
    found: dict[str, Stat] = {}
    for folder in folders:
        if not folder.startswith(("http://", "https://")):
            near = {f"{folder}/{name}": stat for name, stat in fs.list_folder(folder).items()}
            found |= {u: s for u, s in near.items() if is_sidecar(u) and not is_image(u)}
    used = {path for paths in with_images([*images, *found]).values() for path in paths}
    return {url: stat for url, stat in found.items() if url in used}
