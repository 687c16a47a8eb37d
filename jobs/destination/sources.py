"""Which of the sources that DST names may be read.

Whoever can write to DST can name any file in its `_plan.json` and markers, and a command that read
it there would hand it on: into DST, into a report. So a source that DST names is read only where
the user has named it, too: with `--src`, or as SRC of a `convert` or `embed` for this DST, which is
remembered in a folder that is this user's alone:

    {XDG_STATE_HOME, or ~/.local/state}/splatshard/{digest of DST's place}.json

Where that cannot be written nothing is remembered. Links are followed before anything is compared,
so none leads out of what was named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from glob import escape
from pathlib import Path
from urllib.parse import unquote

from splatshard.pipeline.source.folder import is_image, is_sidecar, stem_of_image
from splatshard.pipeline.source.image_shards import common_folder
from splatshard.pipeline.source.patterns import is_glob, path_of, patterns_of
from splatshard.pipeline.storage import fs
from splatshard.pipeline.storage.options import redact_url
from splatshard.pipeline.storage.staging import make_private
from splatshard.schemas.document import document, is_text
from splatshard.schemas.errors import SplatshardError, UsageError
from splatshard.schemas.shard import ShardRef


def remember(dst: str, src: str) -> None:
    """Keep `src` as what this user has named for `dst`, without secrets."""
    given = "::".join(redact_url(fs.absolute(part.strip())) for part in src.split("::"))
    known = remembered(dst)
    if given in known:
        return
    with suppress(OSError, RuntimeError, SplatshardError):
        path = _file_of(dst)
        make_private(path.parent)
        text = json.dumps({"dst": fs.place(dst), "sources": [*known, given]}, indent=2)
        fs.write_bytes(str(path), f"{text}\n".encode())


def remembered(dst: str) -> list[str]:
    """What `remember` has kept for `dst`; nothing where that cannot be read."""
    with suppress(OSError, RuntimeError, SplatshardError):
        path = _file_of(dst)
        if path.exists():
            make_private(path.parent)
            found = document(path.read_bytes(), str(path), "delete it").get("sources")
            return [text for text in found if is_text(text)] if isinstance(found, list) else []
    return []


def _file_of(dst: str) -> Path:
    """Raises RuntimeError for a user without a home."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    state = state if state.is_absolute() else Path.home() / ".local" / "state"
    digest = hashlib.sha256(os.fsencode(fs.place(dst))).hexdigest()
    return state / "splatshard" / f"{digest[:32]}.json"


def refuse_outside(refs: Iterable[ShardRef], dst: str, src: str, remedy: str) -> None:
    """Raises UsageError where a source in `refs` is none that this user has named, see `outside`.
    `remedy` is how to name one."""
    if found := outside(refs, dst, src):
        raise UsageError(explain(found, dst, src, remedy))


def explain(found: dict[str, str], dst: str, src: str, remedy: str) -> str:
    """What `outside` has found, and what to do."""
    name, url = next(iter(found.items()))
    real = fs.place(url)
    place = redact_url(url) if real == url else f"{redact_url(url)} (a link to {real})"
    given = src or "what convert was given for this DST by this user on this machine"
    return (
        f"{dst} names {place} as the source of shard {name}, which is not in {given}; if it may be "
        f"read, say so with {remedy}, such as {remedy} {real.rpartition('/')[0] or '/'}"
    )


def outside(refs: Iterable[ShardRef], dst: str, src: str = "") -> dict[str, str]:
    """The first source of each shard, by its name, that is neither in `src` nor in what is
    remembered for `dst`; without shards of which all are.

    Raises UsageError for a `src` that cannot be understood.
    """
    is_named = named(dst, src)
    found: dict[str, str] = {}
    for ref in refs:
        urls = _to_name(ref, is_named) if ref.root else ref.urls
        if not_named := next((url for url in urls if not is_named(url)), None):
            found[ref.name] = not_named
    return found


def _to_name(ref: ShardRef, is_named: Callable[[str], bool]) -> list[str]:
    """What of a shard of images is to be named: all, but with an image the captions and labels
    beside it are named, too, and with all of them the folder that they have in common."""
    stems = stem_of_image(ref.urls)
    with_them = {stems[url] for url in ref.urls if is_image(url) and is_named(url)}

    def goes_along(url: str) -> bool:
        if not is_sidecar(url) or is_image(url) or stems[url] not in with_them:
            return False
        folder, _, name = url.rpartition("/")
        return fs.place(url) == f"{fs.place(folder).rstrip('/')}/{name}"  # and is no link

    root = [] if ref.root == common_folder(ref.urls) else [ref.root]
    return [*root, *(url for url in ref.urls if not goes_along(url))]


def named(dst: str, src: str = "") -> Callable[[str], bool]:
    """Whether a URL is one that the user has named: with `src`, or before for `dst`. Raises
    UsageError for a `src` that cannot be understood."""
    patterns = _patterns(src) if src else []
    for given in remembered(dst):
        with suppress(SplatshardError):  # a list file that is gone, say
            patterns += _patterns(given)
    return _matcher(patterns)


def _patterns(src: str) -> list[str]:
    return [fs.absolute(p) for part in src.split("::") for p in patterns_of(part.strip())]


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether a URL is what one of `patterns` names, or below a folder that one names."""
    real_folder = cache(fs.place)
    places: set[str] = set()
    globs: list[re.Pattern[str]] = []
    for pattern in map(_bare, patterns):
        if is_glob(pattern):
            fixed = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
            begin = escape(real_folder(fixed or "/").rstrip("/"))
            globs.append(fs.glob_regex(begin + pattern[len(fixed) :]))
        else:
            places.add(_real(pattern, real_folder))

    def is_named(url: str) -> bool:
        if not fs.is_local(url) and ".." in unquote(url).split("/"):
            return False  # what a server makes of it, only it knows
        real = _real(_bare(url), real_folder)
        if any(regex.match(real) for regex in globs):
            return True
        while real:
            if real in places:
                return True
            real = real.rpartition("/")[0]
        return "/" in places and fs.is_local(url)

    return is_named


def _bare(url: str) -> str:
    """`url` without secrets and query, as plans and markers have it."""
    return path_of(redact_url(url)).rstrip("/") or "/"


def _real(url: str, real_folder: Callable[[str], str]) -> str:
    """`fs.place(url)`, quickly for many files of one local folder."""
    path = url if url.startswith("/") else fs.driver(url)[1]
    folder, _, name = path.rpartition("/")
    if not fs.is_local(url) or name in ("", ".", "..") or os.path.islink(path):
        return fs.place(url)
    return f"{real_folder(folder or '/').rstrip('/')}/{name}"
