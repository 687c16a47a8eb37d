"""The originals that `splatshard view` shows beside their Gaussians: read again from the source.

Only sources that the user has named are read (jobs/destination/sources.py), and only those that
were converted: where the source is another one by now, or gone, the reason is told instead.
Sources are read from front to back, so one reader stays where it is: the next sample is at hand.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator
from typing import Any

from splatshard.jobs.destination.plan import PlannedShard
from splatshard.jobs.destination.sources import explain, outside
from splatshard.pipeline.source.listing import is_source_of
from splatshard.pipeline.source.read import read
from splatshard.pipeline.source.sample import RawSample
from splatshard.pipeline.storage.options import is_redacted
from splatshard.schemas.config import DecodeConfig
from splatshard.schemas.errors import SourceError, SplatshardError, UsageError
from splatshard.schemas.plain import from_dict
from splatshard.schemas.shard import ShardManifest, ShardRef

KEPT = 4
"""Decoded crops that stay in memory."""


class Originals:
    """The fitted crops of the sources that `dst` names, as far as `src` or what is remembered for
    this user has them."""

    def __init__(self, dst: str, src: str) -> None:
        self.dst, self.src = dst, src
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        self._crops: dict[tuple[str, int], Any] = {}
        self._at: tuple[ShardRef, int] | None = None
        self._samples: Generator[RawSample] | None = None

    def crop(
        self, planned: PlannedShard | None, manifest: ShardManifest, row: int, key: str
    ) -> Any:
        """The crop that row `row` of a shard is a fit of, uint8 [H, W, 3].

        Raises UsageError where the source may not be read, or is not the one that was converted,
        and SourceError and UnavailableError where it cannot be read.
        """
        with self._lock:
            place = manifest.fingerprint, row
            if place not in self._crops:
                if planned is None:
                    raise UsageError(f"no plan of {self.dst} says what {manifest.name} is made of")
                self._check(planned.ref, manifest)
                pixels = self._decoded(planned.ref, manifest, row, key)
                while len(self._crops) >= KEPT:
                    del self._crops[next(iter(self._crops))]
                self._crops[place] = pixels
            return self._crops[place]

    def _check(self, ref: ShardRef, manifest: ShardManifest) -> None:
        """Raises UsageError with the reason why a shard's source is not read, which is looked for
        once."""
        if manifest.fingerprint not in self._reasons:
            self._reasons[manifest.fingerprint] = self._reason(ref, manifest)
        if reason := self._reasons[manifest.fingerprint]:
            raise UsageError(reason)

    def _reason(self, ref: ShardRef, manifest: ShardManifest) -> str:
        if any(map(is_redacted, ref.urls)):
            return (
                f"the signature or password in the address of {ref.urls[0]} is not kept in "
                "_plan.json, so the original cannot be read"
            )
        if refused := outside([ref], self.dst, self.src):
            return explain(refused, self.dst, self.src, "--src")
        if not is_source_of(ref, manifest):
            return (
                f"the source of {manifest.name} has changed since it was converted ({ref.urls[0]})"
            )
        return ""

    def _decoded(self, ref: ShardRef, manifest: ShardManifest, row: int, key: str) -> Any:
        from splatshard.pipeline.source.decode import decode

        try:
            sample = self._sample(ref, row)
            if sample is None or sample.key != key or sample.error:
                raise UsageError(
                    f"{ref.urls[0]} has no sample {key} in place {row} any more: it has changed "
                    "since it was converted"
                )
            config = from_dict(DecodeConfig, manifest.inputs["recipe"]["decode"])
            return decode(sample.image, sample.image_name, config).pixels
        except BaseException:
            self._close()
            raise

    def _sample(self, ref: ShardRef, row: int) -> RawSample | None:
        """The sample in place `row`, on from the one read last if that was before."""
        if self._samples is None or self._at is None or self._at[0] != ref or self._at[1] > row:
            self._close()
            self._samples, self._at = read(ref, hashlib.sha256()), (ref, 0)
        for sample in self._samples:
            here = self._at[1]
            self._at = ref, here + 1
            if here == row:
                return sample
        return None

    def _close(self) -> None:
        if self._samples is not None:
            self._samples.close()
        self._samples = self._at = None


def reason_of(error: SplatshardError) -> str:
    """Why there is no original, for people."""
    return f"it cannot be read: {error}" if isinstance(error, SourceError) else str(error)
