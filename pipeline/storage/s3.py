"""Listings of S3, through s3fs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def is_s3(fs: Any) -> bool:
    return "s3" in fs.protocol


def s3_listing(
    fs: Any, path: str, stem: str = "", delimiter: str = "/"
) -> Iterator[dict[str, Any]]:
    """What lies in the folder `path` and begins with `stem`; without `delimiter`, all files below.

    Page by page. The driver's `ls` would keep all pages, and list an empty folder's parent.
    """
    bucket, key, _ = fs.split_path(path.rstrip("/"))
    prefix = (f"{key}/" if key else "") + stem
    request = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
    while True:
        page = fs.call_s3("list_objects_v2", **request)
        for entry in page.get("Contents", ()):
            kind = "directory" if entry["Key"].endswith("/") else "file"  # made in a web console
            info = {"name": f"{bucket}/{entry['Key']}", "type": kind}
            yield info | {"size": entry["Size"], "ETag": entry["ETag"]}
        for entry in page.get("CommonPrefixes", ()):
            yield {"name": f"{bucket}/{entry['Prefix']}", "type": "directory"}
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]
