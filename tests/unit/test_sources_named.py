"""Sources that DST names are read only where this user has named them, too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs import convert, embed, repair, report, retry_failed
from splatshard.jobs.destination.plan import make_plan, planned
from splatshard.jobs.destination.plan_file import read_plan, write_plan
from splatshard.jobs.destination.sources import named, outside, remember, remembered
from splatshard.jobs.driver import redo as redo_module
from splatshard.pipeline.convert import convert_shard
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.source.listing import list_shards
from splatshard.schemas.config import ConvertConfig, DecodeConfig, FitConfig
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import ShardRef
from tests.make import datacomp_tar, image_folder

CONFIG = ConvertConfig(decode=DecodeConfig(image_size=24), fit=FitConfig(num_gaussians=9, steps=3))
FLAGS = ["--image-size", "24", "--num-gaussians", "9", "--steps", "3"]
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "splatshard"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`ours` is what the user names, `private` what nobody did; both have a tar and a picture."""
    for name in ("ours", "private"):
        datacomp_tar(tmp_path / name / "a.tar", 1)
        (tmp_path / name / "p.jpg").write_bytes(b"")
    (tmp_path / "ours" / "out.tar").symlink_to(tmp_path / "private" / "a.tar")
    (tmp_path / "ours" / "in.tar").symlink_to("a.tar")
    (tmp_path / "ours" / "way").symlink_to(tmp_path / "private")
    (tmp_path / "list.txt").write_text("ours/a.tar\n")
    (tmp_path / "by-link").symlink_to("ours")
    return tmp_path


def test_a_source_is_named_by_whatever_convert_takes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    tar = f"{place}/ours/a.tar"
    ways = ["ours", "ours/", "ours/a.tar", "ours/*.tar", "o*/*.tar", "ours/{a,b}.tar", "list.txt"]
    for src in [*ways, f"{place}/ours", "by-link", "by-link/*.tar", "elsewhere::ours", ".", "/"]:
        assert named("out", src)(tar), src
        assert named("out", src)(f"file://{tar}"), src
    for src in ("", "private", "ours/b.tar", "ours/{b,c}.tar", "ours/*.parquet", "our", "*.tar"):
        assert not named("out", src)(tar), src
    s3 = named("out", "s3://bucket/in/")
    assert s3("s3://bucket/in/a/b.tar")
    assert named("out", "s3://bucket")("s3://bucket/in/a.tar")
    assert named("out", "https://host/a.tar?sig=1")("https://host/a.tar?***")
    for url in ("s3://bucket/inner/a.tar", "s3://other/in/a.tar", "/bucket/in/a.tar", tar):
        assert not s3(url), url
    web = named("out", "https://host/data")
    for url in ("https://host/data/../a.tar", "https://host/data/%2e%2e/a.tar", "https://host/a"):
        assert not web(url), url


def test_nothing_leads_out_of_what_was_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place / "private"))
    monkeypatch.chdir(place / "private")
    ours = f"{place}/ours"
    for src in (ours, f"{ours}/*", f"{ours}/**", f"{ours}/out.tar/x"):
        for url in (
            f"{ours}/out.tar",
            f"{ours}/way/a.tar",
            f"{ours}/../private/a.tar",
            f"{ours}/./way/../private/a.tar",
            f"{ours}/..",
            "a.tar",
            "~/a.tar",
            f"file://{ours}/out.tar",
            f"local://{ours}/out.tar",
        ):
            assert not named("out", src)(url), (src, url)
    assert named("out", ours)(f"{ours}/in.tar")
    assert named("out", f"{ours}/out.tar")(f"{ours}/out.tar")  # it was named itself
    ref = ShardRef(
        name="p-0", kind="folder", urls=(f"{ours}/p.jpg",), size_bytes=0, etag="", root=ours
    )
    moved = ShardRef(
        name="p-1", kind="folder", urls=ref.urls, size_bytes=0, etag="", root=f"{place}/private"
    )
    assert outside([ref, moved], "out", ours) == {"p-1": f"{place}/private"}


def test_with_an_image_its_caption_is_named_and_nothing_else(place: Path) -> None:
    """The folder of all of them is in the plan, and only there."""
    ours = place / "ours"
    for name in ("p.jpg", "q.jpg", "p.txt", "q.txt"):
        (ours / name).write_text(name)
    (ours / "p.cls").symlink_to(place / "private" / "a.tar")

    def found(*names: str, root: Path = ours) -> dict[str, str]:
        urls = tuple(f"{ours}/{name}" for name in names)
        ref = ShardRef(name="p-0", kind="folder", urls=urls, size_bytes=0, etag="", root=str(root))
        return outside([ref], "out", f"{ours}/p.jpg")

    assert found("p.jpg", "p.txt") == {}
    assert found("p.jpg", "q.txt") == {"p-0": f"{ours}/q.txt"}
    assert found("p.jpg", "q.jpg", "q.txt") == {"p-0": f"{ours}/q.jpg"}
    assert found("p.jpg", "p.cls") == {"p-0": f"{ours}/p.cls"}  # a link leads out
    assert found("p.jpg", root=place) == {"p-0": str(place)}
    assert list(found("p.jpg", "../private/p.txt")) == ["p-0"]


def test_what_is_remembered_is_this_users_alone(
    place: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst, src = f"{place}/out", f"{place}/ours::https://me:hunter2@host/a.tar?sig=hunter2"
    remember(dst, src)
    remember(dst, src)
    remember(dst, f"{place}/private")
    kept = [f"{place}/ours::https://***@host/a.tar?***", f"{place}/private"]
    assert remembered(dst) == remembered(f"file://{dst}") == kept
    assert remembered(f"{place}/other") == []
    (file,) = state.glob("*.json")
    assert state.stat().st_mode & 0o777 == 0o700
    assert "hunter2" not in file.read_text()
    for damaged in ("", "[]", '{"sources": 7}', '{"sources": [7]}'):
        file.write_text(damaged)
        assert remembered(dst) == []
    remember(dst, f"{place}/ours")
    state.chmod(0o777)
    assert remembered(dst) == []
    state.chmod(0o700)
    assert remembered(dst) == [f"{place}/ours"]
    state.rename(place / "elsewhere")
    state.symlink_to(place / "elsewhere")
    assert remembered(dst) == []


def test_where_nothing_can_be_written_nothing_is_remembered(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "file"))
    remember(f"{place}/out", f"{place}/ours")
    assert remembered(f"{place}/out") == []
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(place))
    remember(f"{place}/out", f"{place}/ours")
    assert list((place / ".local" / "state" / "splatshard").glob("*.json"))


# The commands


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What redo would have converted."""
    found: list[str] = []

    def execute(plan: Any, refs: Any, *args: Any) -> int:
        found.extend(url for ref in refs for url in ref.urls)
        return 0

    monkeypatch.setattr(redo_module, "execute", execute)
    return found


def plan_of(dst: Path, src: object, *, done: bool = False) -> None:
    """A plan of the sources `src`, whose shards are missing, or `done`."""
    dst.mkdir(exist_ok=True)
    refs = list_shards(str(src))
    write_plan(str(dst), planned(refs, make_plan(refs, {}, CONFIG, str), CONFIG))
    for ref in refs if done else ():
        convert_shard(ref, CONFIG, str(dst), select_backend("cpu"))


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_repair_reads_no_file_that_only_the_plan_names(
    place: Path, kind: str, read: list[str], capsys: Capsys
) -> None:
    dst = place / "out"
    private = datacomp_tar(place / "secret" / "b.tar", 1)
    if kind == "folder":
        private = image_folder(place / "secret" / "b", per_class=1)
    plan_of(dst, private)
    before = sorted(dst.iterdir())
    assert repair.main([str(dst)]) == 1
    told = capsys.readouterr().err
    assert f"{dst} names {private}" in told
    assert f"--src {place}/secret" in told
    assert repair.main([str(dst), "--src", f"{place}/ours"]) == 1
    assert f"is not in {place}/ours" in capsys.readouterr().err
    assert (read, sorted(dst.iterdir())) == ([], before)
    assert repair.main([str(dst), "--src", str(private)]) == 3  # nothing was made here
    assert read == list(next(iter(read_plan(str(dst)).values())).ref.urls)


def test_repair_and_retry_need_no_src_where_convert_had_it(
    place: Path, read: list[str], capsys: Capsys
) -> None:
    dst, src = place / "out", f"{place}/ours/a.tar"
    plan_of(dst, src, done=True)
    assert convert.main([src, str(dst), *FLAGS]) == 0
    (dst / "a.json").unlink()
    assert repair.main([str(dst)]) == 3
    assert read == [src]
    (dst / "a.failed.json").write_text("{")
    assert retry_failed.main([str(dst)]) == 0
    assert "is not in" not in capsys.readouterr().err
    other = place / "by-hand"
    plan_of(other, src)
    assert repair.main([str(other)]) == 1  # another DST


def test_a_report_shows_no_file_that_only_the_plan_names(place: Path, capsys: Capsys) -> None:
    dst = place / "out"
    plan_of(dst, place / "private" / "a.tar", done=True)
    page = dst / "report.html"
    assert report.main([str(dst)]) == 0
    assert f"without originals of 1 shard: {dst} names" in capsys.readouterr().err
    without = page.read_text().count("<img")
    assert report.main([str(dst), "--src", f"{place}/private"]) == 0
    assert "without originals" not in capsys.readouterr().err
    assert page.read_text().count("<img") > without


def test_embed_asks_for_src(place: Path) -> None:
    dst = place / "out"
    plan_of(dst, place / "private" / "a.tar", done=True)
    done = embed.done_shards(str(dst))
    options = embed.EmbedOptions(dst=str(dst), teacher="")
    with pytest.raises(UsageError, match=rf"say so with SRC, such as SRC {place}/private$"):
        embed.sources_of(str(dst), done, options)
    given = embed.EmbedOptions(dst=str(dst), teacher="", src=f"{place}/private/a.tar")
    found = embed.sources_of(str(dst), done, given)
    assert embed.sources_of(str(dst), done, options) == found  # remembered


def test_a_plan_may_not_name_the_user_s_home(place: Path, read: list[str]) -> None:
    """The case of a shared DST whose owner adds a line to its plan."""
    dst = place / "out"
    plan_of(dst, f"{place}/ours/a.tar", done=True)
    assert convert.main([f"{place}/ours/a.tar", str(dst), *FLAGS]) == 0
    plan_of(dst, datacomp_tar(place / "private" / "b.tar", 1))
    assert set(read_plan(str(dst))) == {"a", "b"}
    assert repair.main([str(dst)]) == 1
    assert read == []
    assert os.listdir(dst).count("b.json") == 0
