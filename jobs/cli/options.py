"""The options that commands share, each declared once: types for single ones, classes for groups.

A command's options are a dataclass; a field is a flag, in the order of the fields. Where a command
means something narrower it gives the type another help: `Annotated[Json, tyro.conf.arg(help=...)]`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from splatshard.jobs.cli.log import Format, configure
from splatshard.pipeline.storage.fs import use_options
from splatshard.schemas.config import BackendName
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import DeviceName, WeightsName

# Single options

Switch = tyro.conf.FlagCreatePairsOff[bool]
"""A flag that only turns something on: `--json`, but no `--no-json`."""

StorageOptions = Annotated[
    str,
    tyro.conf.arg(metavar="JSON", help="Options of the remote store, as for splatshard convert."),
]
USUAL_ENVIRONMENT = tyro.conf.arg(help_behavior_hint="(default: the usual environment)")

LogFormat = Annotated[
    Format,
    tyro.conf.arg(help="json: every line on standard error is one JSON object."),
]
Json = Annotated[Switch, tyro.conf.arg(help="End standard output with one JSON line.")]
Debug = Annotated[Switch, tyro.conf.arg(help="Show tracebacks.")]
DebugRay = Annotated[Debug, tyro.conf.arg(help="Show tracebacks and Ray's log.")]

Device = Annotated[DeviceName, tyro.conf.arg(help="auto is cuda where there is one.")]
Checkpoint = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(
        metavar="CKPT",
        help="dst of a splatshard train, for its newest checkpoint, or the folder of one "
        "checkpoint.",
    ),
]
Weights = Annotated[
    WeightsName,
    tyro.conf.arg(help="auto: the average of the weights where there is one."),
]
Named = Annotated[
    str,
    tyro.conf.arg(
        metavar="SRC",
        help_behavior_hint="(default: as convert was told here)",
        help="What may be read of the sources that DST names: a folder, or SRC as for convert. "
        "What this user gave to convert for this DST on this machine needs no mention.",
    ),
]
Number = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
"""A number that may be left out."""


def parse_storage_options(text: str) -> dict[str, Any]:
    """`--storage-options`, or the environment's. Raises UsageError, which does not repeat them:
    there are secrets in them."""
    text = text or os.environ.get("SPLATSHARD_STORAGE_OPTIONS", "")
    try:
        options = json.loads(text or "{}")
    except ValueError as e:
        raise UsageError(
            f"--storage-options is not JSON (character {getattr(e, 'pos', 0)}); write "
            """'{"anon": true}'"""
        ) from None
    if not isinstance(options, dict):
        raise UsageError("--storage-options must be a JSON object, such as '{\"anon\": true}'")
    return options


def use_storage_options(text: str) -> dict[str, Any]:
    """Put `--storage-options` in force in this process; returns them. Raises UsageError."""
    options = parse_storage_options(text)
    use_options(options)
    return options


def torch_device(name: str) -> Any:
    """The torch device of `--device`. Raises UsageError for cuda where there is none."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device here; choose auto or cpu")
    cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


# Groups


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Options of a command that reads DST."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """Folder given to splatshard convert, local or s3://."""
    storage_options: Annotated[StorageOptions, USUAL_ENVIRONMENT] = ""
    json: Json = False
    debug: Debug = False


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a command that converts: how it runs, whatever it converts."""

    workers: Annotated[
        int | Literal["auto"], tyro.conf.arg(metavar="N|auto", help_behavior_hint="(default: auto)")
    ] = "auto"
    """Worker processes. auto: one per GPU, or per core without GPUs, following the cluster as nodes
    come and go."""
    sample_timeout: Annotated[float, tyro.conf.arg(metavar="S")] = 300.0
    """Seconds that one sample may keep a worker busy before it is taken for hung."""
    storage_options: Annotated[
        StorageOptions,
        USUAL_ENVIRONMENT,
        tyro.conf.arg(
            help="""Options of the remote store, such as '{"anon": true}', as fsspec's driver """
            "takes them;\nSPLATSHARD_STORAGE_OPTIONS does the same and shows in no process list."
        ),
    ] = ""
    log_format: LogFormat = "text"
    json: Json = False
    debug: DebugRay = False

    def __post_init__(self) -> None:
        if self.workers != "auto" and self.workers < 1:
            raise UsageError(f"--workers {self.workers}: must be auto or at least 1")
        if self.sample_timeout <= 0:
            raise UsageError(f"--sample-timeout {self.sample_timeout}: must be above 0")
        parse_storage_options(self.storage_options)


@dataclass(frozen=True, kw_only=True)
class RedoOptions(RunOptions):
    """Options of a command that redoes shards of DST."""

    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")]
    """Folder given to splatshard convert."""
    src: Named = ""
    backend: BackendName = "auto"
    """Kernel backend; auto is triton on CUDA and cpu elsewhere."""


def prepare(options: RunOptions) -> None:
    """What every command that converts does first: its log and its storage options."""
    configure(options.log_format)
    use_storage_options(options.storage_options)
