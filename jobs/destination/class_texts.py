"""The classes of a dataset: their names and prompts, which `evaluate` and `explain` share, and the
lists by which they are numbered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splatshard.jobs.cli.log import log
from splatshard.jobs.cli.text import count, say
from splatshard.jobs.destination.plan import PlannedShard
from splatshard.jobs.destination.plan_file import read_plan
from splatshard.jobs.destination.sources import named
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import ShardManifest, ShardRef


def lines_of(given: str, name: str, src: str) -> list[str]:
    """The lines of the file `given`, else of the one called `name` beside the data; none where
    there is none."""
    from splatshard.pipeline.evaluation.class_texts import find, read_lines

    url = given or find(name, folders_of(src))
    return read_lines(url) if url else []


def folders_of(src: str) -> list[str]:
    """Where the texts of a dataset may be: with the shards, and with the images they are of."""
    from splatshard.pipeline.data.catalog import folder_and_files
    from splatshard.pipeline.evaluation.class_texts import beside
    from splatshard.pipeline.shards.markers import read_markers

    src, _ = folder_and_files(src)
    markers = (m for m in read_markers(src).values() if isinstance(m, ShardManifest))
    source = next((marker.source_url for marker in markers), "")
    if source and not named(src)(source):
        source = ""  # whoever wrote the markers could name any place
    is_file = source.endswith((".tar", ".parquet"))
    folders = [src, source.rpartition("/")[0] if is_file else source]
    return [place for folder in folders for place in beside(folder)]


def read_classes(place: str) -> tuple[str, ...]:
    """Classes in the order of their numbers: the lines of a file, or what the folder `place`, a
    DST, was numbered by. Raises UsageError where there are none, or several lists."""
    from splatshard.pipeline.evaluation.class_texts import CLASSNAMES, read_lines
    from splatshard.pipeline.storage.fs import absolute, exists, is_dir

    url = absolute(place).rstrip("/")
    if is_dir(url):
        found = planned_classes(read_plan(url))
        if len(found) > 1:
            raise UsageError(
                f"--classes {place}: its shards are numbered by {len(found)} lists of classes; "
                "give the one that you mean as a file"
            )
        if found:
            return found.pop()
        url = f"{url}/{CLASSNAMES}"
        if not exists(url):
            raise UsageError(f"--classes {place}: the shards there have no list of classes")
    if not exists(url):
        raise UsageError(
            f"--classes {place}: no such file or folder; give a text file with a class folder's "
            "name per line, or the DST of another split"
        )
    names = tuple(read_lines(url))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{url}: {twice[0]} is there twice, and the lines are numbered")
    return names


def planned_classes(shards: Mapping[str, PlannedShard]) -> set[tuple[str, ...]]:
    """The lists of classes by which the labels of `shards` are numbered."""
    return {shard.ref.labels for shard in shards.values() if shard.ref.labels}


def unlike(lines: Sequence[str], classes: Sequence[str]) -> str:
    """Why `lines` are not the names of `classes`, in their order; empty where they may be."""
    if len(lines) != len(classes):
        return f"has {count(len(lines), 'name')} for {len(classes):,} classes"
    number_of = {name: i for i, name in enumerate(classes)}
    moved = (i for i, line in enumerate(lines) if number_of.get(line, i) != i)
    if (i := next(moved, None)) is None:
        return ""
    return f"has {lines[i]} in line {i + 1}, and its label is {number_of[lines[i]]}"


def place_texts(refs: Sequence[ShardRef], dst: str) -> None:
    """Put the class names and prompts of the images `refs` beside their shards, and tell where
    numbers and names do not fit. Raises StorageError and UnavailableError."""
    from splatshard.pipeline.evaluation.class_texts import (
        CLASSNAMES,
        copy_texts,
        read_lines,
        write_names,
    )

    for url in copy_texts(refs, dst):
        say(f"copied for evaluation: {url}")
    lists = {ref.labels for ref in refs if ref.labels}
    if len(lists) != 1:  # several are told when SRC is listed
        return
    (classes,) = lists
    url = f"{dst}/{CLASSNAMES}"
    if write_names(classes, url):
        say(f"the classes' names, in the order of their numbers: {url}")
    elif why := unlike(read_lines(url, numbered=False), classes):
        log(
            "classes",
            f"warning: {url} {why}: delete it, the next convert writes it anew; or number the "
            "class folders by it with --classes",
            level="warning",
        )
    names = {ref.name for ref in refs}
    others = {name: shard for name, shard in read_plan(dst).items() if name not in names}
    if planned_classes(others) - {classes}:
        log(
            "classes",
            "warning: DST also holds shards whose labels are numbered by other classes, and "
            "readers will take both; choose another DST, or give both the same --classes",
            level="warning",
        )
