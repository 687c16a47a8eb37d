"""Where compiled kernels are kept when neither the package nor the home can be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import pytest
from numba.core import caching

from splatshard.pipeline.kernels.compiled import compiled, private_folder


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """numba finds no place of its own; the folder is TMPDIR."""
    for locator in (caching.InTreeCacheLocator, caching.UserWideCacheLocator):
        monkeypatch.setattr(locator, "from_function", lambda *_: None)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def doubled(x):
    return 2 * x


def test_without_a_place_numba_refuses(nowhere: Path) -> None:
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(doubled)


def test_below_tmpdir_where_there_is_no_other_place(nowhere: Path) -> None:
    assert compiled()(doubled)(3) == 6
    (folder,) = nowhere.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.rglob("*.nbc"))
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder)
    assert compiled()(doubled)(4) == 8


@pytest.mark.parametrize("kind", ["open to all", "a link", "a file"])
def test_a_folder_that_others_could_fill_is_not_used(nowhere: Path, kind: str) -> None:
    folder = private_folder()
    assert folder is not None
    folder.rmdir()
    if kind == "open to all":
        folder.mkdir()
        folder.chmod(0o777)
    elif kind == "a link":
        (nowhere / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(nowhere / "elsewhere")
    else:
        folder.touch(mode=0o700)
    assert private_folder() is None
    assert compiled()(doubled)(3) == 6
    assert not list(nowhere.rglob("*.nbc"))


def test_no_tmpdir_either(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(nowhere / "gone"))
    assert compiled()(doubled)(3) == 6


def test_other_troubles_of_numba_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("cannot cache function: another reason")

    monkeypatch.setattr(caching.FunctionCache, "__init__", refuse)
    with pytest.raises(RuntimeError, match="another reason"):
        compiled()(doubled)


# A machine as it is in containers

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/data/golden/v2-balanced-parquet"
READ = f"""
from splatshard.jobs.__main__ import main
from splatshard.pipeline.data import SplatDataset
(batch,) = SplatDataset({str(GOLDEN)!r}, batch_size=2, num_gaussians=16)
print(batch.splats.means.shape[0], "read")
raise SystemExit(main(["status", {str(GOLDEN)!r}]))
"""
CANNOT_MOUNT = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0


@pytest.mark.integration
@pytest.mark.skipif(CANNOT_MOUNT, reason="only root may mount")
def test_reading_from_a_package_on_a_read_only_disk_without_a_home(tmp_path: Path) -> None:
    read_only = f"mount --bind {ROOT} {ROOT} && mount -o remount,bind,ro {ROOT}"
    script = f'{read_only} && ! touch {ROOT}/x && exec {sys.executable} -c "$READ"'
    environment = os.environ | {
        "HOME": "/proc/nowhere",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "READ": READ,
    }
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        env={name: v for name, v in environment.items() if name != "NUMBA_CACHE_DIR"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 read" in done.stdout
    assert f"splatshard-numba-{os.getuid()}" in [path.name for path in tmp_path.iterdir()]
