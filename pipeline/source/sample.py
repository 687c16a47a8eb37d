"""The members of one key to a sample: which is the image, what the others say of it.

Nothing is lost: caption, label, uid and JSON get fields of their own, every other member travels as
bytes, and so does a `.txt`, `.cls` or `.json` that its field could not give back exactly. What
cannot be parsed makes the sample a bad one, which carries its reason in `error`.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from splatshard.pipeline.source.formats import EXTENSIONS, NAMED_EXTENSIONS
from splatshard.pipeline.source.tar import Group
from splatshard.pipeline.source.values import (
    caption_of,
    is_null,
    key_of,
    label_of,
    text_of,
    uid_of,
)
from splatshard.schemas.errors import SampleError

IMAGE_EXTENSIONS = (*EXTENSIONS, *NAMED_EXTENSIONS)
"""Extensions of images, any case; of several in one sample the first of this list is the image.
Formats that can be named, but not read, become rows that say so."""

CAPTION_EXTENSIONS = ("txt", "caption", "text")
SIDECAR_EXTENSIONS = ("txt", "json", "cls")
"""Those that give way to none, and are not kept if their field says it all."""

BESIDE_EXTENSIONS = tuple(dict.fromkeys((*SIDECAR_EXTENSIONS, *CAPTION_EXTENSIONS)))
"""What joins an image of the same stem in a folder."""


@dataclass(frozen=True)
class RawSample:
    """One sample as the source holds it. With `error` set the image must not be used.

    `image` is the file's bytes, `image_name` its path for messages, `metadata` the JSON member as
    it came, `members` the further members as (extension, bytes). `label` is an integer as given.
    `extensions` are those of its members and image, `unused` fields that the source seems to have,
    and why they are none.
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
    extensions: frozenset[str] = frozenset()
    unused: tuple[tuple[str, str], ...] = ()


def assemble(group: Group, default_label: int | None = None) -> RawSample:
    """The sample of one key; `default_label` where neither a `.cls` nor the JSON gives one."""
    if group.error and group.error.status == "unsafe_path":
        return RawSample(group.key, error=group.error)
    images = [e for e in group.members if e.lower() in IMAGE_EXTENSIONS]
    image = min(images, key=lambda e: IMAGE_EXTENSIONS.index(e.lower()), default=None)
    error, fields, kept = group.error, {}, []
    if image is None:
        found = ", ".join(list(group.members)[:10]) + ", ..." * (len(group.members) > 10)
        text = f"key {group.key} has no image ({' '.join(EXTENSIONS)}), only: {found}"
        if any(e.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for e in group.members):
            text += "; a key ends at the first dot of a file's name: write others for these"
            error = None  # too large: the images of many samples
        error = error or SampleError("no_image", text)
    for extension, why in group.missing.items():
        error = error or SampleError("no_image" if extension == image else "bad_metadata", why)
    for extension, data in group.members.items():
        if extension == image or data is None:
            continue
        try:
            values, exact = _parse(extension.lower(), data)
        except (ValueError, RecursionError) as e:
            text = f"{group.key}.{extension} cannot be parsed: {e}"
            error, values, exact = error or SampleError("bad_metadata", text), {}, False
        own = extension in SIDECAR_EXTENSIONS  # another name (TXT, text) gives way, and is kept
        fields = fields | values if own else values | fields
        if not exact or not own:
            kept.append((extension, data))
    document = fields.pop("json", None)
    fields = json_fields(document) | fields
    if fields.get("label") is None:
        fields["label"] = default_label
    return RawSample(
        key=group.key,
        image=(group.members[image] if image else None) or b"",
        image_name=f"{group.key}.{image}" if image else "",
        members=tuple(kept),
        error=error,
        extensions=frozenset(group.members),
        unused=unused_in(document, fields),
        **fields,
    )


def _parse(extension: str, data: bytes) -> tuple[dict[str, Any], bool]:
    """The fields a member gives, and whether they alone would give its bytes back; under `json`
    the parsed metadata.

    Raises ValueError or RecursionError for a `.cls` or `.json` that cannot be parsed.
    """
    if extension in CAPTION_EXTENSIONS:
        caption = caption_of(data) or ""
        return {"caption": caption}, caption.encode() == data
    if extension == "cls":
        label = label_of(data)
        if label is None:
            raise ValueError(f"{data[:40]!r} is not an integer")
        return {"label": label}, str(label).encode() == data
    if extension in ("json", "meta.json"):
        text = text_of(data, "strict")
        return {"metadata": text, "json": json.loads(text)}, text.encode() == data
    return {}, False


NAMES = {"uid": ("uid",), "caption": ("caption", "text", "captions"), "label": ("label",)}
"""Under which names a sample's JSON has its fields, as DataComp and timm write it; in any case."""

TAKES = {
    "key": (key_of, "a text or a whole number"),
    "uid": (uid_of, "a text or a number"),
    "caption": (caption_of, "a text or a list of texts"),
    "label": (label_of, "a whole number"),
}
"""A field's value from what was found, and what that must be."""


def json_fields(values: Any) -> dict[str, Any]:
    """uid, caption and label of a sample's JSON, null where it gives none."""
    if not isinstance(values, dict):
        return {}
    found: dict[str, Any] = {}
    given = {name.lower(): value for name, value in values.items()} | values
    for field, names in NAMES.items():
        taken = (TAKES[field][0](given.get(name)) for name in names)
        found[field] = next((value for value in taken if value is not None), None)
    return found


def spelled(names: Iterable[str], given: Iterable[str]) -> list[str]:
    """Those of `given` that are one of `names`, in any case, in the order of `names`."""
    lower = [(name.lower(), name) for name in given]
    return [name for wanted in names for low, name in lower if low == wanted]


def unused_in(values: Any, fields: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Values of a sample's JSON that have a field's name, while `fields` lacks that."""
    if not isinstance(values, dict):
        return ()
    return tuple(
        (name, not_taken(field, values[name]))
        for field, names in NAMES.items()
        if fields.get(field) is None
        for name in spelled(names, values)
        if not is_null(values[name])
    )


def not_taken(field: str, value: Any) -> str:
    """Why `value` gave no `field`."""
    return f"{reprlib.repr(value)} is not {TAKES[field][1]}"
