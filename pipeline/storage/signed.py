"""Texts that are written anew, unless somebody has changed them: whoever changes one owns it.

The last line holds a digest of what stands above.
"""

from __future__ import annotations

import hashlib

from splatshard.pipeline.storage import fs


def write_unless_changed(url: str, text: str) -> None:
    """Write `text`, signed, unless a file is there that is not as it was written. Raises
    StorageError and others."""
    if not fs.exists(url) or _is_ours(fs.read_bytes(url).decode("utf-8", "replace")):
        fs.write_bytes(url, signed(text).encode())


def signed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text}\n<!-- splatshard writes this file anew, unless it is changed: {digest} -->\n"


def unsigned(text: str) -> str:
    """`text` as it was before `signed`."""
    return text.rpartition("\n<!-- ")[0] if _is_ours(text) else text


def _is_ours(text: str) -> bool:
    return text == signed(text.rpartition("\n<!-- ")[0])
