"""Which tests run in one process of pytest-xdist: those that share a Ray, and what they prepare.

The groups come first and the single tests fill what is left, so all processes end together. Known
by file, since the process that hands out tests has no more than their names; and not by xdist's
own marks, which pytest 9.2 hides from it (findings/pytest_xdist_groups.sh).
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

GROUPS = {
    "a Ray of many nodes": (
        *("test_chaos_disk", "test_chaos_kills", "test_chaos_races", "test_chaos_s3"),
    ),
    "Rays of their own": ("test_cluster", "test_metrics", "test_ray_start", "test_resume"),
    "a shared Ray": (
        *("test_bad_input", "test_class_texts", "test_convert", "test_embed", "test_left_out"),
        *("test_poison", "test_repair", "test_train_processes", "test_train_signals"),
    ),
}
"""Files of tests/integration."""


def group_of(nodeid: str) -> str:
    """The group of the test with this name; empty where it is in none."""
    folder, _, name = nodeid.partition("::")[0].rpartition("/")
    if not folder.endswith("tests/integration"):
        return ""
    stem = name.removesuffix(".py")
    return next((group for group, files in GROUPS.items() if stem in files), "")


class Groups(LoadScopeScheduling):
    """Groups whole, all other tests one by one."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid) or nodeid
