"""A plan carried out and its result told: what `convert`, `repair` and `retry-failed` share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from splatshard.jobs.cli.command import EXIT_FAILED_SHARDS, EXIT_OK, Interrupted
from splatshard.jobs.cli.log import log
from splatshard.jobs.cli.options import RunOptions, parse_storage_options
from splatshard.jobs.cli.signals import StopSignals
from splatshard.jobs.cli.text import count, duration, print_json, say, size
from splatshard.jobs.destination.class_texts import place_texts
from splatshard.jobs.destination.figures import codec_line, copies_line, left_out_of, total_ok
from splatshard.jobs.destination.manifest import Catalog
from splatshard.jobs.destination.plan import Plan, mixed, planned
from splatshard.jobs.destination.plan_file import RUN_FILE, read_record, write_plan, write_text
from splatshard.jobs.driver.progress import Progress, run_summary
from splatshard.pipeline.source.left_out import left_out_line
from splatshard.pipeline.source.sample import NOTHING_SAID
from splatshard.schemas.config import ConvertConfig
from splatshard.schemas.errors import StorageError, UnavailableError
from splatshard.schemas.shard import ShardRef


def execute(
    plan: Plan,
    refs: Sequence[ShardRef],
    config: ConvertConfig,
    dst: str,
    options: RunOptions,
    started: float,
    left_out: Mapping[str, Mapping[str, int]] | None = None,
) -> int:
    """Convert what is left to do of `plan`, tell the result; returns the exit code. `left_out` are
    files of SRC that are not converted, as `Listing` has them; None where SRC was not listed: as
    the last run had them, and class names are left as they are."""
    from splatshard.pipeline.shards.commit import clean_staging, remove

    say(describe(plan))
    if left_out is not None and (line := beside(plan)):
        say(line)
    if warning := mixed(plan, config):
        log("mixed", f"warning: {warning}", level="warning")
    write_plan(dst, planned(refs, plan, config), plan.folders)
    if left_out is not None:
        place_texts(refs, dst)
    clean_staging(dst)
    progress = Progress(plan.work, plan.done, started, dst)
    catalog = Catalog(dst, [*plan.done, *plan.others])  # what is replaced stays until it is
    try:
        workers = drive(plan, config, dst, options, progress, catalog) if plan.work else 0
    finally:
        clean_staging(dst)  # of workers that died
    if plan.gone and not progress.failures:  # whose samples may be nowhere else
        catalog.forget(removed := remove(dst, plan.gone))
        say(f"{count(len(removed), 'shard')} deleted that SRC no longer has")
    catalog.write()
    summary = run_summary(progress, plan.done, started, workers)
    last = read_record(dst, RUN_FILE)
    summary["left_out"] = left_out_of(last) if left_out is None else left_out
    run = summary if plan.work else last | {"left_out": summary["left_out"]}
    if run != last and (plan.work or last):
        write_text(dst, RUN_FILE, json.dumps(run, sort_keys=True, indent=2) + "\n")
    tell_summary(summary, progress, dst)
    if copies := copies_line([*plan.done, *progress.manifests]):
        say(f"warning: {copies}")
    if options.json:
        print_json(summary)
    return EXIT_FAILED_SHARDS if progress.failures or not summary["ok"] else EXIT_OK


def drive(
    plan: Plan,
    config: ConvertConfig,
    dst: str,
    options: RunOptions,
    progress: Progress,
    catalog: Catalog,
) -> int:
    """Start Ray, convert what is left to do; returns the number of workers."""
    from splatshard.jobs.driver.driver import Driver
    from splatshard.jobs.driver.session import is_own, ray_session, submission_id
    from splatshard.pipeline.compile_ahead import compiled_ahead
    from splatshard.pipeline.shards.commit import clean_attempts

    ahead = compiled_ahead(config) if is_own() else nullcontext()
    with ahead, ray_session(options.workers), StopSignals() as signals:
        driver = Driver(
            plan,
            config,
            dst,
            workers=options.workers,
            sample_timeout=options.sample_timeout,
            storage_options=parse_storage_options(options.storage_options),
            progress=progress,
            catalog=catalog,
            signals=signals,
        )
        job = submission_id()
        stop = f"ray job stop {job}" if job else "Ctrl-C"
        say(f"converting; {stop} stops, the same command continues")
        try:
            with progress:
                return driver.run()
        except Interrupted as e:
            kept = count(len(plan.done) + len(progress.manifests), "finished shard")
            raise Interrupted(e.code, f"{e} ({kept} kept)") from None
        finally:
            try:
                old = [marker for marker in plan.others if marker.name in plan.replaces]
                clean_attempts(dst, driver.schedule.job, progress.manifests, old)
            except (StorageError, UnavailableError) as e:
                say(f"some of this job's own leftovers stay in {dst}: {e}")


def describe(plan: Plan) -> str:
    """`4 shards: 1 done, 1 to retry, 2 to convert`."""
    total = len(plan.done) + len(plan.work)
    parts = [
        (len(plan.done), "done"),
        (len(plan.todo), "to convert"),
        (len(plan.failed), "failed before, to retry"),
        (len(plan.stale), "stale, to redo"),
        (len(plan.corrupt), "with a broken marker, to redo"),
        (len(plan.gone), "gone from SRC, to delete at the end"),
    ]
    return f"{count(total, 'shard')}: " + ", ".join(f"{n:,} {what}" for n, what in parts if n)


def beside(plan: Plan) -> str:
    """What stays in DST that SRC does not name: of a folder that was renamed, say; "" for none."""
    going = plan.replaces.keys() | {marker.name for marker in plan.gone}
    stay = [marker.name for marker in plan.others if marker.name not in going]
    if not stay:
        return ""
    some = ", ".join(stay[:3]) + ", ..." * (len(stay) > 3)
    number = count(len(stay), "shard")
    return f"DST also holds {number} that SRC does not name, and readers take them, too: {some}"


def tell_summary(summary: dict[str, Any], progress: Progress, dst: str) -> None:
    """A few readable lines on stderr: what there is now, what failed, where to look next."""
    if not summary["shards_done"] and not summary["shards_failed"]:
        say("everything is already done")
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in summary["skipped"].items())
    say(
        f"{count(summary['samples'], 'sample')}: {summary['ok']:,} ok"
        + (f", skipped: {skipped}" if skipped else "")
    )
    if left_out := left_out_line(left_out_of(summary)):
        say(f"  {left_out}")
    if unused := summary["unused"]:
        most = Counter(unused).most_common(10)
        some = ", ".join(f"{name} of {count(n, 'sample')}" for name, n in most)
        more = f", ... ({RUN_FILE} names all {len(unused)})" if len(unused) > len(most) else ""
        say(f"  not used: {some}{more}")
    for shard, sample in progress.skipped:
        say(f"  {sample.key} in shard {shard}: {sample.status}: {sample.error}")
    if sum(summary["skipped"].values()) > len(progress.skipped):
        what = "... the others" if progress.skipped else "which"
        say(f"  {what}: splatshard report {dst}")
    if bare := sorted(m.name for m in progress.manifests if not total_ok([m])):
        some = ", ".join(bare[:3]) + (", ..." if len(bare) > 3 else "")
        hollow = sum(not m.samples for m in progress.manifests)
        empty = f", {hollow:,} of them from a file that holds no sample at all" if hollow else ""
        say(f"  without any ok sample: {count(len(bare), 'shard')}: {some}{empty}")
    if not summary["ok"]:
        say("no sample of SRC has splats: what the lines above name is to be mended first")
    else:
        say(
            f"  PSNR {summary['psnr_mean']:.2f} dB   "
            f"{summary['num_gaussians_mean']:,.0f} Gaussians and "
            f"{size(summary['bytes_per_image'])} per image"
        )
        if coarse := codec_line(progress.manifests):
            say(f"  {coarse}")
    if summary["images_converted"] and not any(summary["fields"].values()):
        say(f"  {NOTHING_SAID}")
    if summary["images_per_s"]:
        say(
            f"  {summary['images_per_s']:.1f} images/s over {duration(summary['wall_s'])}, start "
            f"included; first shard after {duration(summary['time_to_first_shard_s'])}"
        )
    if progress.failures:
        say(f"{count(len(progress.failures), 'shard')} failed; the same command retries them:")
        for name in sorted(progress.failures)[:10]:
            outcome = progress.failures[name]
            say(f"  {name}: {outcome.error}: {outcome.message}")
        if len(progress.failures) > 10:
            say(f"  ... all of them: splatshard status {dst}")
    say(f"next: splatshard verify {dst}    splatshard report {dst}    splatshard view {dst}")
