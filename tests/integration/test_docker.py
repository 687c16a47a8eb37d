"""docker/prove.sh: the CPU image built by buildah on a bare Debian, and a conversion in it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("buildah", "debootstrap")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, TOOLS)),
        reason="needs root, buildah and debootstrap",
    ),
]


def test_the_cpu_image_converts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    work = tmp_path / "work"
    work.mkdir()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [ROOT / "docker/prove.sh"],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "TMPDIR": str(work)},
            start_new_session=True,
        )
        try:
            process.wait(1800)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
    text = log.read_text(errors="replace")
    assert process.returncode == 0, text[-4000:]
    assert text.count("2 samples read back as their markers say") == 2
    assert text.count("everything is already done") == 2
    assert not list(work.iterdir())  # its storage ends with it
