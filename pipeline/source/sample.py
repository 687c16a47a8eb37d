"""The members of one key to a sample: which is the image, what the others say of it.

    image       one of IMAGE_EXTENSIONS
    caption     `.txt`, `.caption`, `.text`, `.cap`, `.captions`
    label       `.cls`, `.label`, `.class`, where it is a whole number
    metadata    `.json`, `.meta.json`; its values where none of those above says more
    as bytes    all else

In any case, and behind the image's whole name (`a.jpg.txt`); of several for a field the first of
these is taken. Nothing is lost: all others travel as bytes, and so does a `.txt`, `.cls` or `.json`
that its field could not give back exactly. What is not used is told, and costs itself alone.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from splatshard.pipeline.source.formats import EXTENSIONS, NAMED_EXTENSIONS
from splatshard.pipeline.source.patterns import is_archive
from splatshard.pipeline.source.tar import Group
from splatshard.pipeline.source.values import (
    caption_of,
    is_null,
    key_of,
    label_of,
    lists_boxes,
    not_utf8,
    says_nothing,
    text_of,
    uid_of,
)
from splatshard.schemas.errors import SampleError
from splatshard.schemas.splats import METADATA_MEMBER

IMAGE_EXTENSIONS = (*EXTENSIONS, *NAMED_EXTENSIONS)
"""Extensions of images, any case; of several in one sample the first of this list is the image.
Formats that can be named, but not read, become rows that say so."""

MEMBER_FIELDS = {
    **dict.fromkeys(("txt", "caption", "text", "cap", "captions"), "caption"),
    **dict.fromkeys(("cls", "label", "class"), "label"),
    **dict.fromkeys(("json", "meta.json"), "metadata"),
}
"""What a member is by its extension, in any case; of several for a field the first goes first."""

RANKS = {extension: rank for rank, extension in enumerate(MEMBER_FIELDS)}

SIDECAR_EXTENSIONS = ("txt", "json", "cls")
"""Those that are not kept if their field says it all."""

SPLATS = "holds splats, not images: give the images that they were made of"

BESIDE_EXTENSIONS = frozenset(MEMBER_FIELDS) - {"meta.json"}
"""What joins an image of the same stem in a folder."""

SCANNED_EXTENSIONS = frozenset(
    (*MEMBER_FIELDS, *(f"{i}.{e}" for i in IMAGE_EXTENSIONS for e in BESIDE_EXTENSIONS))
)
"""Those that say something of a sample, its image apart."""


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
    """The sample of one key; `default_label` where neither a member nor the JSON gives one."""
    passed = tuple(group.passed)
    if group.error and (group.error.status == "unsafe_path" or not group.members):
        return RawSample(group.key, error=group.error, unused=passed)
    images = [e for e in group.members if e.lower() in IMAGE_EXTENSIONS]
    image = min(images, key=lambda e: IMAGE_EXTENSIONS.index(e.lower()), default=None)
    error = group.error
    if image is None:
        found = ", ".join(e or "a file without extension" for e in list(group.members)[:10])
        found += ", ..." * (len(group.members) > 10)
        text = f"key {group.key} has no image ({' '.join(EXTENSIONS)}), only: {found}"
        if any(e.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for e in group.members):
            text += "; a key ends at the first dot of a file's name: write others for these"
            error = None  # too large: the images of many samples
        if group.key == METADATA_MEMBER:
            text = f"the tar {SPLATS}"
        if archives := {e for e in group.members if is_archive(f".{e}")}:
            text += "; an archive in an archive is not read: unpack it"
            group.members |= dict.fromkeys(archives)  # gigabytes, in ImageNet's tar of tars
        error = error or SampleError("no_image", text)
    for extension, why in group.missing.items():
        error = error or SampleError("no_image" if extension == image else "bad_metadata", why)
    beside = {e: d for e, d in group.members.items() if e != image and d is not None}
    fields, given, unused = _said(beside, image or "")
    document = by_name(fields.pop("json", None))
    inside = json_fields(document)
    if says_nothing(fields.get("caption")) and not says_nothing(inside.get("caption")):
        fields.pop("caption", None)  # a `.txt` of nothing, or of blanks
    labels: dict[str, Any] = {
        "a member": fields.get("label"),
        "the JSON": inside.get("label"),
        "the class folder": default_label,
    }
    first = next((place for place in labels if labels[place] is not None), "a member")
    fields = inside | fields | {"label": labels[first]}
    for place, label in labels.items():
        if label not in (None, labels[first]):
            unused.append((f"the label of {place}", f"it is {label}, and {first} has another"))
    return RawSample(
        key=group.key,
        image=(group.members[image] if image else None) or b"",
        image_name=f"{group.key}.{image}" if image else "",
        members=tuple((e, data) for e, data in beside.items() if e not in given),
        error=error,
        extensions=frozenset(group.members),
        unused=(*passed, *unused, *unused_in(document, fields)) if image else passed,
        **fields,
    )


def _said(
    beside: dict[str, bytes], image: str
) -> tuple[dict[str, Any], set[str], list[tuple[str, str]]]:
    """What the members beside the member `image` say: fields, and under `json` the parsed metadata;
    which of them these give back exactly; which are not used, and why."""
    fields: dict[str, Any] = {}
    taken, given, unused = dict[str, str](), set[str](), list[tuple[str, str]]()
    for extension, field in _meanings(tuple(beside), image):
        values, why = _parse(field, beside[extension])
        if not field and extension.lower() in IMAGE_EXTENSIONS:
            why = f"the image is taken from .{image}"
        elif field in taken and values.get(field) != fields[field]:
            why = f"the {field} is taken from .{taken[field]}"
        if why:
            unused.append((f".{extension}", why))
        elif field not in taken:
            taken[field] = extension
            if field == "caption" and not_utf8(beside[extension]):
                unused.append((f"what is not UTF-8 in .{extension}", REPLACED))
            fields.update(values)
            if extension in SIDECAR_EXTENSIONS and str(values[field]).encode() == beside[extension]:
                given.add(extension)
    return fields, given, unused


@lru_cache(1024)
def _meanings(extensions: tuple[str, ...], image: str) -> list[tuple[str, str]]:
    """Members beside the member `image` and their fields, by preference; most samples of a dataset
    have the same ones."""
    names = {e: e.lower().removeprefix(f"{image.lower()}.") for e in extensions}
    ranked = sorted(extensions, key=lambda e: (RANKS.get(names[e], 0), e != names[e]))
    return [(e, MEMBER_FIELDS.get(names[e], "")) for e in ranked]


def _parse(field: str, data: bytes) -> tuple[dict[str, Any], str]:
    """The values a member gives, or why it gives none; with metadata, as `json`, what they are when
    parsed."""
    if field == "caption":
        caption = caption_of(data)
        why = "it has zero bytes, so it is no text in UTF-8"
        if caption and lists_boxes(caption):
            caption, why = None, "it lists boxes of objects, and is no caption"
        return ({}, why) if caption is None else ({"caption": caption}, "")
    if field == "label":
        label = label_of(data[:LABEL_BYTES])
        why = not_taken("label", text_of(data[:LABEL_BYTES]))
        return ({}, why) if label is None or len(data) > LABEL_BYTES else ({"label": label}, "")
    if field == "metadata":
        try:
            text = text_of(data, "strict")
            return {"metadata": text, "json": json.loads(text)}, ""
        except (ValueError, RecursionError) as e:
            return {}, f"it cannot be parsed: {e}"
    return {}, NO_FIELD


REPLACED = "the caption has U+FFFD there: write texts in UTF-8"

OTHER_CAPTION = "another caption is taken, see docs/sources.md for the order"

LABEL_BYTES = 256
"""What is longer is no label."""

NO_FIELD = "no field takes such a member, so it is kept as bytes"
"""Said of members, and of columns that become some."""

NAMES = {"uid": ("uid",), "caption": ("caption", "text", "captions"), "label": ("label", "cls")}
"""Under which names a sample's JSON has its fields, as DataComp and timm write it; in any case."""

ALIKE = {
    "caption": (
        *("caption", "recaption", "text", "alt", "prompt", "title", "description", "sentence"),
        *("query", "question", "answer", "instruction", "conversation", "messages"),
        *("transcription", "tag", "keyword"),
    ),
    "label": ("label", "class", "target", "category", "categories", "digit", "species", "genre"),
}
"""Last words of other names that may mean a field, as in `edit_prompts` or `classId`; a caption's
may come first, as in `caption_llava`."""

NO_WORDS = ("id", "ids", "idx", "index", "en", "raw", "name", "names")
"""Behind a name's last word, as in `category_id`."""

KEY_LIKE = re.compile(
    "(image|img|photo|picture|sample|item|example|file)*(id|key|uid|uuid|guid|hash|sha|md|file|path)"
    "|(image|img|photo|picture|file)+name"
)
"""Names that may mean a key, their letters alone: `image_id`, `sha256`, `file_name`."""

MEANT = {
    "key": "a key is a column called key, a uid one called uid; rows are numbered",
    "caption": "a caption is a text in a column called caption",
    "label": "a label is a whole number in a column called label",
}
"""What is said of columns that may be meant by their names."""

MEANT_IN_JSON = {
    "caption": "a caption is a text called caption at the JSON's top",
    "label": "a label is a whole number called label at the JSON's top",
}

NEITHER = "no caption and no label is here by its name, see docs/sources.md for those"
"""Said of all else where a sample has neither, and nothing that may be one by its name."""

SAID = ("caption", "label", "metadata")
"""What may be said of an image, beside its key and uid."""

NOTHING_SAID = (
    "no captions, labels or metadata: nothing beside the images gives any (docs/sources.md says "
    "what would; a tar for each class is to be unpacked into a folder of its name)"
)
"""Said of a job in which no sample has one."""

FEW = 10
"""So many names are told then."""

JSON = "the JSON"
"""As a whole, where it is told."""

TAKES = {
    "key": (key_of, "a whole number or a non-empty text"),
    "uid": (uid_of, "a text or a number"),
    "caption": (caption_of, "a text or a list of texts"),
    "label": (label_of, "the number of a class"),
}
"""A field's value from what was found, and what that must be."""


def by_name(document: Any) -> Any:
    """A sample's JSON as fields by their names: a text, or several, are its caption; one that is
    JSON itself is parsed once more."""
    if isinstance(document, str) and document.lstrip().startswith(("{", "[")):
        with suppress(ValueError, RecursionError):
            document = json.loads(document)
    return document if says_nothing(caption_of(document)) else {"caption": document}


def json_fields(values: Any) -> dict[str, Any]:
    """uid, caption and label of a sample's JSON, null where it gives none."""
    if not isinstance(values, dict):
        return {}
    found: dict[str, Any] = {}
    given = {name.lower(): value for name, value in values.items()} | values
    for field, names in NAMES.items():
        taken = [TAKES[field][0](given.get(name)) for name in names]
        known = [value for value in taken if value is not None]
        found[field] = next((v for v in known if not says_nothing(v)), known[0] if known else None)
    return found


def spelled(names: Iterable[str], given: Iterable[str]) -> list[str]:
    """Those of `given` that are one of `names`, in any case, in the order of `names`."""
    lower = [(name.lower(), name) for name in given]
    return [name for wanted in names for low, name in lower if low == wanted]


def unused_in(values: Any, fields: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Values of a sample's JSON that have a field's name, while `fields` lacks that; those that may
    be it by another name, or further within; captions other than that which is taken; and where
    there is neither caption nor label, nor what may be one, the first of all."""
    found: dict[str, str] = {}
    top = values if isinstance(values, dict) else {}
    if (caption := fields.get("caption")) is not None:
        others = ((n, caption_of(top[n]) or "") for n in spelled(NAMES["caption"], top))
        alike = ("", caption.strip())
        found |= {name: OTHER_CAPTION for name, other in others if other.strip() not in alike}
    for field in (field for field in NAMES if says_nothing(fields.get(field))):
        own = spelled(NAMES[field], top)
        if fields.get(field) is None:
            found |= {n: not_taken(field, top[n]) for n in own if not is_null(top[n])}
        for path, name, value in inner(values) if field in ALIKE else ():
            if path not in own and may_be(field, name) and may_take(field, value):
                found.setdefault(path, MEANT_IN_JSON[field])
    if not found and fields.get("caption") is fields.get("label") is None:
        own = spelled((*NAMES["caption"], *NAMES["label"]), top)
        others = (name for name in top if not own and name.lower() not in NAMES["uid"])
        found |= dict.fromkeys(islice(others, FEW), NEITHER)
        if top is not values and not (is_null(values) or says_nothing(values)):
            found[JSON] = f"it is {reprlib.repr(values)}, without names for caption or label"
    return tuple(found.items())


def inner(values: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of all in a JSON document, of lists the first, to a depth of four."""
    if isinstance(values, list):
        values = values[0] if values else None
    if isinstance(values, dict) and path.count(".") < 3:
        for name, value in values.items():
            below = f"{path}.{name}" if path else name
            yield below, name, value
            yield from inner(value, below)


@lru_cache(maxsize=1 << 12)
def may_be(field: str, name: str) -> bool:
    """Whether a name may mean the field `caption`, `label` or `key`."""
    words = words_of(name)
    if field == "key":
        return bool(KEY_LIKE.fullmatch("".join(words)))
    while words and words[-1] in NO_WORDS:
        words.pop()
    if field == "label" and words == ["y"]:
        return True
    ends = {*words[-1:], *(words[:1] if field == "caption" else ())}
    return any(not ends.isdisjoint((word, f"{word}s", f"{word}es")) for word in ALIKE[field])


def of_class(name: str) -> bool:
    """Whether a class that is an object has its number or name under this one: `id`, `name`."""
    words = words_of(name)
    return bool(words) and all(word in NO_WORDS for word in words)


def words_of(name: str) -> list[str]:
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]


def may_take(field: str, value: Any) -> bool:
    """Whether a value, or the first of several, may be meant by a field: texts, also within what
    they belong to, and classes, also by their names or as objects of these."""
    first = value[0] if isinstance(value, list) and value else value
    if field == "label" and isinstance(first, dict):
        return any(of_class(name) and may_take(field, within) for name, within in first.items())
    if field == "label":
        known = not says_nothing(first) and not is_null(first)
        return known and isinstance(first, str | int | float)
    return isinstance(first, dict) or not says_nothing(caption_of(first))


def not_taken(field: str, value: Any) -> str:
    """Why `value` gave no `field`."""
    return f"{reprlib.repr(value)} is not {TAKES[field][1]}"


def unused_lines(unused: Mapping[str, str]) -> list[tuple[str, str]]:
    """Of names and why each is not used, those of one reason joined, and a line on them."""
    names_of: dict[str, list[str]] = {}
    for name, why in unused.items():
        names_of.setdefault(why, []).append(name)
    joined = [(", ".join(names), len(names) == 1, why) for why, names in names_of.items()]
    return [
        (names, f"{names} {'is' if one else 'are'} not used: {why}") for names, one, why in joined
    ]
