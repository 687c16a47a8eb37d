"""Files of SRC that are listed and not converted, or not read: by reason, and in words.

beside_shards   images in a folder or glob that has tars or Parquet files with images
same_name       Parquet files beside a tar of their name
no_image_column Parquet files without images
no_image        captions, labels, .json without an image of their name beside them
compressed      compressed archives
folder          folders that a pattern matches beside files
hidden          images, tars and Parquet files whose name begins with a dot
other           all else: no extension that is known
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from splatshard.pipeline.source.folder import few, is_image
from splatshard.pipeline.source.patterns import above, folders_of
from splatshard.pipeline.storage import fs

LEFT_OUT = {
    "beside_shards": "images beside tars or Parquet files",
    "same_name": "Parquet files beside a tar of their name",
    "no_image_column": "Parquet files without images",
    "no_image": "texts without an image of their name beside them",
    "compressed": "compressed archives",
    "folder": "folders that a pattern matches (give each as a SRC, or the folder above)",
    "hidden": "hidden",
    "other": "of no known kind",
}
"""By reason, as `Listing.left_out` has them."""


def left_out_line(left_out: Mapping[str, Mapping[str, int]]) -> str:
    """`left out of SRC: 6 files: 5 images beside tars or Parquet files (5 jpg), 1 of no known kind
    (1 md)`; empty where nothing was."""
    parts = [
        f"{sum(found.values()):,} {LEFT_OUT.get(reason, reason)}"
        + (f" ({_extensions(found)})" if reason != "folder" else "")
        for reason, found in left_out.items()
    ]
    total = sum(sum(found.values()) for found in left_out.values())
    many = "files and folders" if left_out.get("folder") else "files"
    files = "1 file" if total == 1 and many == "files" else f"{total:,} {many}"
    return f"left out of SRC: {files}: {', '.join(parts)}" if total else ""


def matched(pattern: str, urls: Iterable[str]) -> str:
    """What a glob without shards matches, and what to give instead."""
    urls = list(urls)
    if urls:
        return f"{len(urls):,} files, but no .tar, image .parquet or image; correct the pattern"
    if folders := folders_of(pattern):
        some = few([folder.rpartition("/")[2] for folder in folders], 3)
        return (
            f"nothing but folders ({some}), and a pattern reads files alone; give {above(pattern)}"
            ", or each as a SRC of its own, joined by ::"
        )
    return "nothing; correct the pattern"


def hidden_with_images(folder: str, paths: Iterable[str]) -> list[str]:
    """What to say of hidden folders directly below a local `folder` that hold images; `paths` are
    hidden files and folders. One may be a class, such as .NET."""
    near = sorted(p for p in paths if p.rpartition("/")[0] == folder and fs.is_dir(p))
    names = [p.rpartition("/")[2] for p in near if any(map(is_image, fs.list_folder(p)))]
    dotted = [name for name in names if name.startswith(".")]
    why = "images are left out, since the names of their folders begin with a dot (rename them)"
    return [f"{why}: {few(dotted)}"] if dotted else []


def _extensions(found: Mapping[str, int]) -> str:
    most = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    some = ", ".join(f"{number:,} {name or 'without extension'}" for name, number in most[:5])
    return some + (", ..." if len(most) > 5 else "")
