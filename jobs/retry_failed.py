"""The retry-failed job: redo shards that failed, and those with samples worth a second try.

Most reasons for which a sample is skipped lie in its bytes, and another try would find the same. A
quarantined sample killed its worker, which a bug or full memory may have done; a diverged fit
depends on the machine. Their shards are redone as a whole, by the recipe they were made with; all
others stay as they are.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from splatshard.jobs.cli.command import EXIT_FAILED_SHARDS, EXIT_OK, parse, run
from splatshard.jobs.cli.dataset import require_dataset, require_shards
from splatshard.jobs.cli.options import RedoOptions, prepare
from splatshard.jobs.cli.text import count, print_json, say
from splatshard.jobs.destination.plan import Marker, status
from splatshard.jobs.destination.plan_file import read_plan
from splatshard.jobs.driver.redo import redo
from splatshard.schemas.shard import FailedShard, ShardManifest, SkipStatus


@dataclass(frozen=True, kw_only=True)
class RetryOptions(RedoOptions):
    """Redo the failed shards of DST, and those with samples that were skipped for some reasons.

    Exit codes: 0 none is failed now, 1 usage, configuration or storage, 3 some failed again.
    """

    status: tuple[SkipStatus, ...] = ("quarantined", "fit_diverged")
    """Redo shards that hold such samples. The other reasons lie in the source's bytes."""


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard retry-failed argv`."""
    started = time.monotonic()
    return run(lambda: retry(parse(RetryOptions, "retry-failed", argv), started))


def retry(options: RetryOptions, started: float) -> int:
    """The whole job; returns the exit code."""
    from splatshard.pipeline.shards.commit import check_destination
    from splatshard.pipeline.shards.markers import read_markers

    prepare(options)
    dst = require_dataset(options.dst)
    check_destination(dst)
    shards = read_plan(dst)
    markers = read_markers(dst)
    require_shards(dst, shards, markers)
    stale = {shard.name for shard in status(shards, markers).stale}
    wanted = worth_retrying(markers, options.status)
    names = wanted & shards.keys() - stale
    if wanted - names:
        say(
            f"{count(len(wanted - names), 'shard')} left alone, stale or not in the plan "
            f"({min(wanted - names)}, ...): run convert"
        )
    code = EXIT_OK
    if names:
        before = failure_counts(markers, names, options.status)
        say(f"{count(len(names), 'shard')} to redo: {before}")
        code = redo(dst, names, shards, options, started)
        after = read_markers(dst)
        say(f"still there: {failure_counts(after, names, options.status)}")
    else:
        after = markers
        say(f"nothing to retry: no failed shard and no sample {' or '.join(options.status)}")
    failed = sorted(name for name, m in after.items() if isinstance(m, FailedShard))
    if options.json:
        print_json(
            {
                "redone": sorted(names - set(failed)),
                "failed": failed,
                "before": dict(samples(markers, names, options.status)),
                "after": dict(samples(after, names, options.status)),
            }
        )
    return code or (EXIT_FAILED_SHARDS if failed else EXIT_OK)


def worth_retrying(markers: Mapping[str, Marker], statuses: Collection[str]) -> set[str]:
    """Names of the failed shards, and of those that hold rows of one of `statuses`."""
    return {
        name
        for name, marker in markers.items()
        if isinstance(marker, FailedShard)
        or (isinstance(marker, ShardManifest) and any(marker.counts.get(s) for s in statuses))
    }


def samples(
    markers: Mapping[str, Marker], names: Collection[str], statuses: Collection[str]
) -> Counter[str]:
    """Rows of the shards `names` by those of `statuses` that occur."""
    found: Counter[str] = Counter()
    for name in names:
        marker = markers.get(name)
        if isinstance(marker, ShardManifest):
            found.update({s: marker.counts[s] for s in statuses if marker.counts.get(s)})
    return found


def failure_counts(
    markers: Mapping[str, Marker], names: Collection[str], statuses: Collection[str]
) -> str:
    """`2 failed shards, 1 quarantined sample`."""
    failed = sum(isinstance(markers.get(name), FailedShard) for name in names)
    parts = [count(failed, "failed shard")] if failed else []
    parts += [count(n, f"{s} sample") for s, n in samples(markers, names, statuses).items()]
    return ", ".join(parts) or "nothing"


if __name__ == "__main__":
    sys.exit(main())
