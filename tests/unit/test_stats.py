"""Figures of a job in work: totals, rates, busy shares, the remaining time."""

from __future__ import annotations

import random

import pytest

from splatshard.jobs.driver.stats import RECENT_S, ROUNDS, Snapshot, Stats
from tests.unit.progressing import folder, manifest, state, tar


def test_totals_are_those_of_finished_shards_and_shards_in_work() -> None:
    refs = [tar(i) for i in range(4)]
    stats = Stats(refs, [])
    stats.worker_ready(0.0)
    stats.finished(refs[0], manifest(refs[0], ok=8, corrupt=2))
    stats.finished(refs[1], None)
    stats.update([state((refs[2], 4)), state()], 5.0)
    s = stats.snapshot(5.0, workers=2, backend="cpu")
    assert (s.shards, s.shards_done, s.shards_failed, s.shards_in_work) == (4, 1, 1, 1)
    assert (s.images, s.ok, s.images_committed) == (14, 12, 10)
    assert (s.payload_bytes, s.skipped) == (8 * 256, {"corrupt_image": 2})
    assert s.psnr_mean == pytest.approx((8 * 30 + 4 * 20) / 12)
    assert (s.images_per_s, s.images_per_s_mean) == (None, 14 / 5)
    assert (s.workers, s.backend) == (2, "cpu")


def test_before_the_first_worker_nothing_is_known() -> None:
    assert Stats([tar(0)], []).snapshot(5.0, 0, "") == Snapshot(shards=1)


def test_a_shard_between_its_last_poll_and_its_result_stays_counted() -> None:
    ref, other = tar(0), tar(1)
    stats = Stats([ref, other], [])
    stats.worker_ready(0.0)
    stats.update([state((ref, 9))], 1.0)
    stats.update([state()], 2.0)
    assert stats.snapshot(2.0, 1, "cpu").images == 9
    stats.finished(ref, manifest(ref, ok=10))
    stats.update([state((ref, 9))], 3.0)  # an answer that was under way
    s = stats.snapshot(3.0, 1, "cpu")
    assert (s.images, s.shards_in_work) == (10, 0)
    assert s.images_per_s == 0.5  # one more in the two seconds since the first batch


def test_lost_work_leaves_the_totals_and_never_makes_a_negative_rate() -> None:
    ref = tar(0)
    stats = Stats([ref], [])
    stats.worker_ready(0.0)
    stats.update([state((ref, 9))], 1.0)
    stats.retried("oom", ref.name)
    stats.update([], 2.0)
    s = stats.snapshot(2.0, 0, "cpu")
    assert (s.images, s.psnr_mean, s.retries) == (0, None, {"oom": 1})
    stats.update([state((ref, 3))], 3.0)
    assert stats.snapshot(3.0, 1, "cpu").images_per_s == 1.5


def test_the_rate_is_of_the_last_while_and_the_mean_of_all() -> None:
    refs = [tar(i) for i in range(1000)]
    stats = Stats(refs, [])
    stats.worker_ready(0.0)
    for second, ref in enumerate(refs[:200], 1):
        stats.finished(ref, manifest(ref, ok=1 if second <= 100 else 10))
        stats.update([state()], second)
    s = stats.snapshot(200.0, 1, "cpu")
    assert s.images_per_s == 10.0
    assert s.images_per_s_mean == (100 + 1000) / 200
    stats.update([state()], 200.0 + RECENT_S)  # nothing since: the last ROUNDS batches, too late
    expected = 10 * ROUNDS / (ROUNDS + RECENT_S - 1)
    assert stats.snapshot(200.0 + RECENT_S, 1, "cpu").images_per_s == pytest.approx(expected)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_a_slow_machine_has_a_steady_rate(workers: int) -> None:
    """Batches of 16 that take 36 to 44 s, after a first one that compiles for a minute more."""
    chance = random.Random(workers)
    refs = [folder(i, 400) for i in range(workers)]
    done, due = [0] * workers, [100.0 + chance.uniform(0, 3) for _ in refs]
    stats = Stats(refs, [])
    stats.worker_ready(0.0)
    told: list[Snapshot] = []
    for tick in range(2 * 900):
        now = tick / 2
        for i in range(workers):
            if now >= due[i]:
                done[i], due[i] = done[i] + 16, now + chance.uniform(36, 44)
        stats.update([state((ref, n)) for ref, n in zip(refs, done, strict=True)], now)
        told.append(stats.snapshot(now, workers, "cpu"))
    truth = workers * 16 / 40
    rates = [s.images_per_s for s in told if s.images_per_s is not None]
    assert len(rates) > 2 * 700
    assert all(0.75 * truth < rate < 1.35 * truth for rate in rates)
    known = [(i / 2, s.eta_s) for i, s in enumerate(told) if s.eta_s is not None]
    assert len(known) == len(rates)
    whole = 100 + 400 / 16 * 40  # the seconds that it all takes
    assert all(abs(now + eta_s - whole) < 0.35 * whole for now, eta_s in known)


def test_busy_shares_are_means_over_workers_and_survive_one_that_leaves() -> None:
    stats = Stats([tar(0)], [])
    stats.worker_ready(0.0)
    stats.update([state(), state()], 0.0)
    stats.update([state(up_s=10, fit_s=9, queued=2), state(up_s=10, fit_s=6, queued=1)], 10.0)
    s = stats.snapshot(10.0, 2, "cpu")
    assert s.busy == {"fit": pytest.approx(0.75)}
    assert s.queued == {"fit": 3}
    stats.update([state(up_s=11, fit_s=10)], 11.0)  # one left: its clock says nothing
    assert stats.snapshot(11.0, 1, "cpu").busy == {"fit": pytest.approx(0.75)}
    stats.update([state(up_s=31, fit_s=30)], 31.0)
    assert stats.snapshot(31.0, 1, "cpu").busy == {"fit": pytest.approx(35 / 40)}
    stats.update([state(up_s=71, fit_s=30)], 71.0)
    assert stats.snapshot(71.0, 1, "cpu").busy == {"fit": 0.0}


# The remaining time


def test_a_folder_has_a_remaining_time_before_its_first_shard_is_done() -> None:
    refs = [folder(0, 10), folder(1, 10)]
    stats = Stats(refs, [])
    stats.worker_ready(0.0)
    stats.update([state((refs[0], 2))], 5.0)
    s = stats.snapshot(5.0, 1, "cpu")
    assert (s.fraction, s.images_per_s, s.eta_s) == (0.1, None, None)  # of one batch nothing
    stats.update([state((refs[0], 5))], 8.0)
    s = stats.snapshot(8.0, 1, "cpu")
    assert (s.fraction, s.eta_s) == (0.25, 15.0)


def test_of_tars_the_remaining_time_is_known_after_the_first_from_source_bytes() -> None:
    refs = [tar(0, 1000), tar(1, 3000), tar(2, 9999, limit=6)]
    stats = Stats(refs, [])
    stats.worker_ready(0.0)
    stats.update([state((refs[0], 5))], 5.0)
    s = stats.snapshot(5.0, 1, "cpu")
    assert (s.fraction, s.eta_s) == (None, None)
    stats.finished(refs[0], manifest(refs[0], ok=8, corrupt=2))
    stats.update([state((refs[1], 6))], 8.0)
    s = stats.snapshot(8.0, 1, "cpu")
    assert s.fraction == pytest.approx(16 / (10 + 30 + 6))
    assert s.eta_s == pytest.approx((46 - 16) / (11 / 3))


def test_shards_of_an_earlier_run_tell_how_long_tars_take() -> None:
    before = [manifest(tar(8, 1000), ok=10), manifest(tar(9, 1000, limit=1), ok=1)]
    stats = Stats([tar(0, 2000)], before)
    stats.worker_ready(0.0)
    stats.update([state((tar(0, 2000), 1))], 10.0)
    stats.update([state((tar(0, 2000), 5))], 20.0)
    s = stats.snapshot(20.0, 1, "cpu")
    assert (s.fraction, s.eta_s) == (0.25, 15 / 0.4)


def test_of_tars_of_unknown_size_no_remaining_time_is_known() -> None:
    """Web servers that do not say how long a file is: two of three shards are still to come."""
    refs = [tar(i, 0) for i in range(3)]
    stats = Stats(refs, [])
    stats.worker_ready(0.0)
    stats.finished(refs[0], manifest(refs[0], ok=10))
    stats.update([state((refs[1], 5))], 5.0)
    s = stats.snapshot(5.0, 1, "cpu")
    assert (s.fraction, s.eta_s) == (None, None)


def test_failed_shards_are_no_work_that_is_left() -> None:
    refs = [folder(0, 10), folder(1, 10)]
    stats = Stats(refs, [])
    stats.worker_ready(0.0)
    stats.finished(refs[0], None)
    stats.update([state((refs[1], 5))], 5.0)
    assert stats.snapshot(5.0, 1, "cpu").fraction == 0.5


def test_a_snapshot_does_not_depend_on_how_many_shards_are_done() -> None:
    """Neither update nor snapshot walks over what is finished."""
    refs = [tar(i) for i in range(300)]
    stats = Stats(refs, [])
    stats.worker_ready(0.0)
    for ref in refs:
        stats.update([state((ref, 1))], 1.0)
        stats.finished(ref, manifest(ref))
    held = [v for v in vars(stats).values() if isinstance(v, list | dict)]
    assert all(len(v) < 20 for v in held)
