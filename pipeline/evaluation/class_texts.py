"""Names and prompts of a dataset's classes: convert copies them, evaluation reads them.

CLIP_benchmark's layout keeps both with the tars of a split or one folder up: classnames.txt, a name
per line in the order of the labels, and zeroshot_classification_templates.txt, prompts with {c} in
place of the name. Copies beside the shards are what zero-shot evaluation needs once the images are
elsewhere. They are no part of the shards: nothing depends on them, and a copy may be edited. Where
there are none, the names are those of the class folders.
"""

from __future__ import annotations

from collections.abc import Iterable

from splatshard.pipeline.source.classes import CLASSNAMES
from splatshard.pipeline.source.values import storable, text_of
from splatshard.pipeline.storage import fs
from splatshard.schemas.errors import SourceError, UnavailableError, UsageError
from splatshard.schemas.shard import ShardRef

TEMPLATES = "zeroshot_classification_templates.txt"


def find(name: str, folders: Iterable[str]) -> str | None:
    """The first of `folders` that has the file `name`, as its URL."""
    for folder in folders:
        url = f"{folder.rstrip('/')}/{name}"
        try:
            if fs.exists(url):
                return url
        except SourceError:  # the source's store is not there any more
            continue
    return None


def beside(folder: str) -> tuple[str, ...]:
    """Where the texts of a dataset in `folder` may be: there, and one folder up."""
    folder = folder.rstrip("/")
    return tuple(place for place in (folder, folder.rpartition("/")[0]) if place)


def read_lines(url: str, *, numbered: bool = True) -> list[str]:
    """The lines of a text without blanks at its end. Raises UsageError where there is none, or one
    among them is blank though their numbers count."""
    try:
        with fs.open_read(url) as stream:
            text = text_of(stream.read(), "strict")
    except (SourceError, ValueError) as e:
        raise UsageError(f"{url} cannot be read: {e}") from e
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise UsageError(f"{url} is empty: write one entry per line")
    if numbered and "" in lines:
        raise UsageError(f"{url}: line {lines.index('') + 1} is blank: the lines are numbered")
    return lines


def copy_texts(refs: Iterable[ShardRef], dst: str) -> list[str]:
    """Copy the texts that lie with the images `refs` to `dst`; the URLs of what was copied.

    Images of several folders are several datasets, and of none of them; what `dst` has is left as
    it is, and what cannot be read is passed over. Raises StorageError and UnavailableError.
    """
    folders = {ref.root or ref.urls[0].rpartition("/")[0] for ref in refs}
    if len(folders) != 1:
        return []
    copied: list[str] = []
    for name in (CLASSNAMES, TEMPLATES):
        target = f"{dst.rstrip('/')}/{name}"
        if fs.exists(target):
            continue
        try:
            if (url := find(name, beside(*folders))) is None:
                continue
            with fs.open_read(url) as stream:
                text = stream.read()
        except (SourceError, UnavailableError):
            continue
        fs.write_bytes(target, text)
        copied.append(url)
    return copied


def write_names(names: Iterable[str], url: str) -> bool:
    """Write class names to the file `url`, a line each, unless it is there. Raises StorageError and
    UnavailableError."""
    if fs.exists(url):
        return False
    lines = (" ".join(storable(name).split()) for name in names)
    fs.write_bytes(url, "".join(f"{line}\n" for line in lines).encode())
    return True
