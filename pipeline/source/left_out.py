"""Files of SRC that are listed and not converted, or not read: by reason, and in words.

beside_shards   images in a folder or glob that has tars or Parquet files with images
same_name       Parquet files beside a tar of their name
no_image_column Parquet files without images
no_image        captions, labels, .json without an image of their name beside them
compressed      compressed archives
hidden          images, tars and Parquet files whose name begins with a dot
other           all else: no extension that is known
"""

from __future__ import annotations

from collections.abc import Mapping

LEFT_OUT = {
    "beside_shards": "images beside tars or Parquet files",
    "same_name": "Parquet files beside a tar of their name",
    "no_image_column": "Parquet files without images",
    "no_image": "texts without an image of their name beside them",
    "compressed": "compressed archives",
    "hidden": "hidden",
    "other": "of no known kind",
}
"""By reason, as `Listing.left_out` has them."""


def left_out_line(left_out: Mapping[str, Mapping[str, int]]) -> str:
    """`left out of SRC: 6 files: 5 images beside tars or Parquet files (5 jpg), 1 of no known kind
    (1 md)`; empty where nothing was."""
    parts = [
        f"{sum(found.values()):,} {LEFT_OUT.get(reason, reason)} ({_extensions(found)})"
        for reason, found in left_out.items()
    ]
    total = sum(sum(found.values()) for found in left_out.values())
    files = "1 file" if total == 1 else f"{total:,} files"
    return f"left out of SRC: {files}: {', '.join(parts)}" if total else ""


def _extensions(found: Mapping[str, int]) -> str:
    most = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    some = ", ".join(f"{number:,} {name or 'without extension'}" for name, number in most[:5])
    return some + (", ..." if len(most) > 5 else "")
