"""The members of one key to a sample: which is the image, what the others say of it.

Nothing is lost: caption, label, uid and JSON get fields of their own, every other member travels as
bytes, and so does a `.txt`, `.cls` or `.json` that its field could not give back exactly. What
cannot be parsed makes the sample a bad one, which carries its reason in `error`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from splatshard.pipeline.source.formats import EXTENSIONS, NAMED_EXTENSIONS
from splatshard.pipeline.source.tar import Group
from splatshard.schemas.errors import SampleError

IMAGE_EXTENSIONS = (*EXTENSIONS, *NAMED_EXTENSIONS)
"""Extensions of images, any case; of several in one sample the first of this list is the image.
Formats that can be named, but not read, become rows that say so."""

SIDECAR_EXTENSIONS = ("txt", "json", "cls")
"""What joins an image of the same stem in a folder."""


@dataclass(frozen=True)
class RawSample:
    """One sample as the source holds it. With `error` set the image must not be used.

    `image` is the file's bytes, `image_name` its path for messages, `metadata` the JSON member as
    it came, `members` the further members as (extension, bytes). `label` is an integer as given.
    """

    key: str
    image: bytes = b""
    image_name: str = ""
    uid: str | None = None
    caption: str | None = None
    label: int | None = None
    metadata: str | None = None
    members: tuple[tuple[str, bytes], ...] = ()
    error: SampleError | None = None


def assemble(group: Group, default_label: int | None = None) -> RawSample:
    """The sample of one key; `default_label` where neither a `.cls` nor the JSON gives one."""
    if group.error and group.error.status == "unsafe_path":
        return RawSample(group.key, error=group.error)
    images = [e for e in group.members if e.lower() in IMAGE_EXTENSIONS]
    image = min(images, key=lambda e: IMAGE_EXTENSIONS.index(e.lower()), default=None)
    error, fields, kept = group.error, {}, []
    if image is None:
        found = ", ".join(group.members)
        text = f"key {group.key} has no image ({' '.join(EXTENSIONS)}), only: {found}"
        error = error or SampleError("no_image", text)
    for extension, data in group.members.items():
        if extension == image or data is None:
            continue
        try:
            values, exact = _parse(extension.lower(), data)
        except (ValueError, RecursionError) as e:
            text = f"{group.key}.{extension} cannot be parsed: {e}"
            error, values, exact = error or SampleError("bad_metadata", text), {}, False
        own = extension in SIDECAR_EXTENSIONS  # another spelling (TXT) gives way, and is kept
        fields = fields | values if own else values | fields
        if not exact or not own:
            kept.append((extension, data))
    from_json = _json_fields(fields.pop("json", None))
    if from_json.get("label") is None:
        from_json["label"] = default_label
    return RawSample(
        key=group.key,
        image=group.members.get(image) or b"",
        image_name=f"{group.key}.{image}" if image else "",
        members=tuple(kept),
        error=error,
        **(from_json | fields),
    )


def _parse(extension: str, data: bytes) -> tuple[dict[str, Any], bool]:
    """The fields a member gives, and whether they alone would give its bytes back; under `json`
    the parsed metadata.

    Raises ValueError or RecursionError for a `.cls` or `.json` that cannot be parsed.
    """
    if extension == "txt":
        caption = data.decode(errors="replace")
        return {"caption": caption}, caption.encode() == data
    if extension == "cls":
        if not re.fullmatch(rb"\s*[+-]?\d{1,18}\s*", data):
            raise ValueError(f"{data[:40]!r} is not an integer")
        return {"label": int(data)}, str(int(data)).encode() == data
    if extension in ("json", "meta.json"):
        text = data.decode()
        return {"metadata": text, "json": json.loads(text.removeprefix("\ufeff"))}, True
    return {}, False


def _json_fields(values: Any) -> dict[str, Any]:
    """uid, caption and label as DataComp and timm name them in a sample's JSON."""
    if not isinstance(values, dict):
        return {}
    uid, label = values.get("uid"), values.get("label")
    captions = [values.get(name) for name in ("caption", "text")]
    caption = next((c for c in captions if isinstance(c, str)), None)
    integer = isinstance(label, int) and not isinstance(label, bool) and abs(label) < 1 << 63
    return {
        "uid": None if uid is None else storable(str(uid)),
        "caption": None if caption is None else storable(caption),
        "label": label if integer else None,
    }


def storable(text: str) -> str:
    r"""Lone surrogates (JSON escapes, file names) as \udNNN: UTF-8 has no bytes for them."""
    return text.encode("utf-8", "backslashreplace").decode()
