"""Every error a user can meet.

    SplatshardError
    ├── UsageError            the command or its options are wrong                      exit code 1
    │   ├── StaleShardError   DST holds shards of another configuration or source
    │   └── FormatVersionError  DST was written by a newer format version
    ├── SourceError           a whole source shard cannot be read (truncated tar, bad Parquet)
    ├── StorageError          DST cannot be written or read (disk full, permissions)
    ├── UnavailableError      a store does not answer (network, throttling): worth trying again
    ├── CorruptShardError     a committed shard does not hold what its marker promises
    ├── BackendError          a kernel backend cannot run on this machine
    └── SampleError           one sample is bad: becomes a row with a status, never stops a shard

Messages name the thing, the value and the remedy.
"""

from __future__ import annotations


class SplatshardError(Exception):
    """Base of all errors raised on purpose."""


class UsageError(SplatshardError, ValueError):
    """The command, an option or a path is wrong; nothing was done."""


class StaleShardError(UsageError):
    """DST holds shards made by another configuration, code version or source."""


class FormatVersionError(UsageError):
    """A shard or marker was written by a format version this build does not know."""


class SourceError(SplatshardError):
    """A source shard cannot be read to its end; it is marked failed, nothing of it is committed."""


class StorageError(SplatshardError):
    """The destination cannot be written or read."""


class UnavailableError(SplatshardError):
    """A store does not answer (connection cut, time-out, 5xx, throttling); trying again may help.

    Raised for sources and destinations alike, after the driver's own quick retries.
    """


class CorruptShardError(SplatshardError):
    """A committed shard is missing, damaged, or not what its marker says."""


class BackendError(SplatshardError):
    """A kernel backend was asked for by name and cannot run here."""


class SampleError(SplatshardError):
    """One sample cannot be converted.

    `status` is one of `schemas.shard.SKIP_STATUSES`; the message goes into the row's `error`
    column.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (self.status, str(self))  # Exception's own pickling knows one argument
