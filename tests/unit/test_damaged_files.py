"""Small JSON files beside the shards, damaged: every command names the file and what to do, or does
not need it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs import convert, export, repair, report, retry_failed, status, verify
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.shards.commit import mark_failed
from splatshard.pipeline.source.listing import list_shards
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
from splatshard.schemas.errors import SplatshardError
from tests.make import datacomp_sample, write_tar

CONFIG = ConvertConfig(decode=DecodeConfig(image_size=24), fit=FitConfig(num_gaussians=9, steps=3))
FLAGS = ["--image-size", "24", "--num-gaussians", "9", "--steps", "3"]
RUN = {
    "backend": "cpu", "images_per_s": 4.5, "left_out": {"other": {"md": 1}}, "ok": 4,
    "time_to_first_shard_s": 3.5, "wall_s": 60.5, "workers": 2,
}  # fmt: skip
PROGRESS = {
    "state": "running", "updated": "2026-01-02T03:04:05+00:00", "shards": 3, "shards_done": 1,
    "shards_failed": 0, "images_per_s": 2.5, "eta_s": 12.5, "workers": 2,
}  # fmt: skip
DONE, FAILED = "00000000.json", "00000002.failed.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SRC in `in`, DST in `out`: two done shards, one that failed, all files beside them."""
    folder = tmp_path_factory.mktemp("damaged")
    for shard in range(3):
        members = [m for i in range(2) for m in datacomp_sample(2 * shard + i)]
        write_tar(folder / "in" / f"{shard:08d}.tar", members)
    out = folder / "out"
    out.mkdir()
    *good, bad = list_shards(str(folder / "in"))
    for ref in good:
        convert_shard(ref, CONFIG, str(out), select_backend("cpu"))
    assert convert.main([f"{folder}/in/0000000{{0..1}}.tar", str(out), *FLAGS]) == 0
    (out / "_run.json").write_text(json.dumps(RUN))
    (out / "_progress.json").write_text(json.dumps(PROGRESS))
    mark_failed(str(out), bad, CONFIG, "SourceError", "cut off")
    return folder


DAMAGES: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "not-utf8": lambda text: text.encode().replace(b'"', b'"\xff', 1),
    "half-a-character": lambda text: text.replace('"', '"\\ud800', 1),
    "zeros": lambda text: b"\0" * 64,
    "null": lambda text: "null",
    "list": lambda text: "[]",
    "open": lambda text: '{"a":' * 100_000,
    "deep": lambda text: '{"recipe":' * 900 + "1" + "}" * 900,
}


def dataset(dst: str) -> int:
    try:
        return 0 * len(list(SplatDataset(dst, batch_size=2)))
    except SplatshardError as e:
        print(e)
        return 1


COMMANDS: dict[str, Callable[[Path], int]] = {
    "status": lambda out: status.main([str(out), "--json"]),
    "verify": lambda out: verify.main([str(out)]),
    "report": lambda out: report.main([str(out), "--samples", "2"]),
    "export": lambda out: export.main([str(out), "000000000002", f"--output={out}/x.png"]),
    "repair": lambda out: repair.main([str(out), "--quick"]),
    "retry-failed": lambda out: retry_failed.main([str(out)]),
    "convert": lambda out: convert.main([f"{out}/../in/0000000{{0..1}}.tar", str(out), *FLAGS]),
    "dataset": lambda out: dataset(str(out)),
}
WHOLE = {
    "status": 0, "verify": 1, "report": 0, "export": 0,
    "repair": 3, "retry-failed": 3, "convert": 0, "dataset": 0,
}  # fmt: skip
"""Exit codes where nothing is damaged; a shard has failed."""

TOLD: dict[str, dict[str, int]] = {
    "_plan.json": {
        "status": 1, "verify": 1, "report": 0, "repair": 1, "retry-failed": 1, "convert": 1,
    },
    "_run.json": {"status": 0, "report": 0, "convert": 0},
    "_progress.json": {"status": 0},
    "_manifest.json": {"verify": 1},
    DONE: {"status": 0, "verify": 1, "report": 0, "repair": 3, "convert": 1, "dataset": 1},
    FAILED: {"status": 0, "verify": 1, "report": 0, "repair": 3, "dataset": 1},
}  # fmt: skip
"""Exit codes of the commands that name the file; all others do as if nothing were damaged."""


@pytest.fixture
def out(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of DST; nothing is redone."""
    (tmp_path / "in").symlink_to(whole / "in")
    monkeypatch.setattr(repair, "redo", lambda *args: 0)
    monkeypatch.setattr(retry_failed, "redo", lambda *args: 0)
    return Path(shutil.copytree(whole / "out", tmp_path / "out"))


def told(command: str, out: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and all that the command says."""
    capfd.readouterr()
    code = COMMANDS[command](out)
    page = out / "report.html"
    said = "".join(capfd.readouterr())
    if command == "report" and code == 0:
        said += page.read_text()
    assert "internal error" not in said
    return code, said


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", TOLD)
def test_a_damaged_file_is_named_where_it_is_needed(
    out: Path, file: str, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = DAMAGES[damage]((out / file).read_text())
    for command, code in (WHOLE | TOLD[file]).items():
        (out / file).write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        found, said = told(command, out, capfd)
        if (file, command) == (FAILED, "retry-failed"):
            assert found == 0  # which shard had failed is in the file
            continue
        assert found == code, command
        lines = [line for line in said.splitlines() if f"{out}/{file}" in line]
        assert bool(lines) == (command in TOLD[file]), command
        assert all("delete it" in line for line in lines)


@pytest.mark.parametrize("value", ["x", 7, []])
@pytest.mark.parametrize("file", TOLD)
def test_fields_of_another_type_are_no_internal_error(
    out: Path, file: str, value: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """All fields at one depth; test_fuzz_markers.py has each alone."""

    def replaced(found: Any, depth: int) -> Any:
        if isinstance(found, dict) and depth:
            return {name: replaced(inner, depth - 1) for name, inner in found.items()}
        return found if depth else value

    text = (out / file).read_text()
    for depth in (1, 2, 3):
        damaged = json.dumps(replaced(json.loads(text), depth))
        for command in COMMANDS:
            (out / file).write_text(damaged)
            assert told(command, out, capfd)[0] in (0, 1, 3)


def test_nothing_damaged(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command, code in WHOLE.items():
        found, said = told(command, out, capfd)
        assert found == code
        assert "delete it" not in said
