"""Reading, and the models, where there are no fcntl, user ids and folder descriptors."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.splat_shards import keys_of, make_dataset
from tests.windows import ABSENT, LACKING

ROOT = Path(__file__).parents[2]
IMPORTED = (
    *("pipeline.data", "pipeline.shards.rows", "pipeline.evaluation.samples", "pipeline.ply"),
    *(f"pipeline.models.{name}" for name in ("encoder", "classifier", "clip", "gvit", "export")),
    *("pipeline.train.trained", "pipeline.source.listing", "jobs.status", "jobs.verify"),
)


def on_windows(call: str) -> None:
    """Run a function of this file there."""
    script = (
        "from tests.windows import become_windows; become_windows()\n"
        f"from pathlib import Path; from tests.unit import test_windows as t; t.{call}"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_reading_and_models_work(tmp_path: Path) -> None:
    make_dataset(f"{tmp_path}/parquet", [5, 4])
    make_dataset(f"{tmp_path}/webdataset", [5, 4], "webdataset", "balanced")
    on_windows(f"imports(); t.reads(Path({str(tmp_path)!r}))")


def imports() -> None:
    """Nothing asks for what Windows lacks, and it is really gone."""
    for name in IMPORTED:
        importlib.import_module(f"splatshard.{name}")
    for name in ABSENT:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    assert not any(hasattr(module, name) for module, names in LACKING.items() for name in names)


def reads(folder: Path) -> None:
    import fsspec

    from splatshard.pipeline.data import SplatDataset
    from splatshard.pipeline.models.encoder import SplatEncoder
    from splatshard.schemas.model import EncoderConfig

    remote = fsspec.filesystem("memory")
    for name in ("parquet", "webdataset"):
        for path in filter(Path.is_file, (folder / name).iterdir()):
            remote.pipe(f"/bucket/{name}/{path.name}", path.read_bytes())
        found = []
        for src in (f"{folder}/{name}", f"memory://bucket/{name}", f"memory://bucket/{name}/*"):
            for _ in range(2):  # fetched, then from the cache, which has room for one tar
                dataset = SplatDataset(
                    src, batch_size=3, drop_last=False, shuffle=False,
                    cache_dir=folder / "cache", cache_bytes=50_000, filter=[("width", ">", 0)],
                )  # fmt: skip
                found.append(keys_of(dataset))
        assert found[0] == sorted(found[0])
        assert len(found[0]) == 7
        assert all(keys == found[0] for keys in found)
        model = SplatEncoder(EncoderConfig(width=16, layers=1, heads=2, tokens=4))
        batch = next(iter(dataset))
        vectors = model(batch.splats, batch.heights, batch.widths)
        assert vectors.shape == (3, 16)


def test_locks_exclude(tmp_path: Path) -> None:
    on_windows(f"locks(Path({str(tmp_path)!r}))")


def locks(folder: Path) -> None:
    """A byte of the file, which others wait for."""
    from splatshard.pipeline.storage.lock import lock, unlock

    path, events = folder / "lock", []
    with path.open("ab") as mine, path.open("ab") as other:
        lock(mine.fileno(), wait=True)
        with pytest.raises(BlockingIOError):
            lock(other.fileno(), wait=False)

        def take() -> None:
            lock(other.fileno(), wait=True)
            events.append("taken")
            unlock(other.fileno())

        thread = threading.Thread(target=take)
        thread.start()
        thread.join(0.1)
        events.append("given")
        unlock(mine.fileno())
        thread.join()
        assert events == ["given", "taken"]
        lock(mine.fileno(), wait=False)


def test_staged_files_are_private_and_swept_by_age(tmp_path: Path) -> None:
    on_windows(f"stages(Path({str(tmp_path)!r}))")


def stages(folder: Path) -> None:
    """Whose process lives cannot be asked, and a link is entered nowhere."""
    from splatshard.pipeline.storage.staging import STAGING, staged, sweep
    from splatshard.schemas.errors import StorageError

    with staged(folder, "a") as path:
        path.write_bytes(b"a")
        old = path.with_name("b@host-12345678-1-12345678")
        old.touch()
        os.utime(str(old), (1, 1))
        sweep(folder)
        assert path.exists()
        assert not old.exists()
    assert not (folder / STAGING).exists()
    (folder / "theirs").mkdir()
    (folder / STAGING).symlink_to(folder / "theirs")
    for use in (lambda: staged(folder, "a").__enter__(), lambda: sweep(folder)):
        with pytest.raises(StorageError, match="delete it"):
            use()


def test_writing_is_refused_in_words() -> None:
    on_windows("writes()")


def writes() -> None:
    from splatshard.pipeline.shards.commit import check_destination
    from splatshard.schemas.errors import UsageError

    with pytest.raises(UsageError, match=r"on Windows shards are read, not written.*WSL"):
        check_destination("splats")
