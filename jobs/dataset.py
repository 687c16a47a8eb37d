"""What jobs that only read DST share: their options, and the way to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.cli import Switch
from jobs.convert import storage_options
from jobs.files import require_dataset
from pipeline.storage import use_options


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Options of a job that reads DST."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """Folder given to splatshard convert, local or s3://."""
    storage_options: Annotated[
        str, tyro.conf.arg(metavar="JSON", help_behavior_hint="(default: the usual environment)")
    ] = ""
    """Options of the remote store, as for splatshard convert."""
    json: Switch = False
    """End standard output with one JSON line."""


def open_dataset(options: DatasetOptions) -> str:
    """DST as an absolute address. Raises UsageError when nothing is there."""
    use_options(storage_options(options.storage_options))
    return require_dataset(options.dst)
