"""The page of `splatshard view` in a Chromium without a window, used as a person would.

Debian's chromium-headless-shell is enough (.ci/run installs it); skipped where there is none.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from splatshard.jobs.pages.view_data import View
from tests.browser import BINARIES, Page, browser, chromium
from tests.viewing import BUDGETS, HOSTILE, convert, make_source, serving

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dst(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, beside their source `in`."""
    folder = tmp_path_factory.mktemp("viewed")
    make_source(folder / "in")
    convert(folder / "in", folder / "out")
    return folder / "out"


@pytest.fixture
def page(dst: Path, tmp_path: Path) -> Iterator[Page]:
    """The page, open, wide; it must not have complained in the end."""
    if not chromium():
        pytest.skip(f"none of {', '.join(BINARIES)} is here")
    view = View(str(dst), str(dst.parent / "in"), "cpu")
    with serving(view) as port, browser(tmp_path / "profile") as page:
        page.resize(1300, 900)
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("document.querySelectorAll('#list li').length == 2")
        yield page
        assert page.complaints == []


def shown(page: Page, shard: str, row: int, budget: int, gain: int = 8) -> None:
    """Wait until all four pictures of a sample are there."""
    wanted = f"{shard}/{row}/{budget}/{gain}"
    page.wait(f"document.querySelector('#sample').dataset.shown == {json.dumps(wanted)}")
    for name in ("original", "rendering", "residual"):
        page.wait(f"document.querySelector('#{name} img').naturalWidth > 0")


def pictures(page: Page) -> dict[str, str]:
    """Digests of what is seen in the four panels."""
    script = """(async () => {
      const found = {};
      await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
      for (const name of ["original", "rendering", "ellipses", "residual"]) {
        const seen = document.querySelector(`#${name} img, #${name} canvas`);
        const copy = Object.assign(document.createElement("canvas"), {width: 200, height: 200});
        copy.getContext("2d").drawImage(seen, 0, 0, 200, 200);
        const data = new TextEncoder().encode(copy.toDataURL());
        found[name] = [...new Uint8Array(await crypto.subtle.digest("SHA-256", data))].join();
      }
      return found;
    })()"""
    return page.js(script)


def different(first: dict[str, str], second: dict[str, str]) -> set[str]:
    return {name for name in first if first[name] != second[name]}


def test_from_the_shards_to_a_sample_its_budgets_and_the_next_one(page: Page) -> None:
    assert page.text("#overview h1") == "out"
    page.click("#list a")
    page.wait("document.querySelector('#overview h1').textContent == 'a'")
    page.wait("document.querySelectorAll('#list li').length == 5")
    page.click("#list li:nth-child(2) a")
    shown(page, "a", 1, BUDGETS[-1])
    assert page.text("#key") == "a1"
    whole = pictures(page)
    page.js("document.querySelector('#budget').focus()")
    page.key("ArrowLeft")  # moves the slider, not to another sample
    shown(page, "a", 1, BUDGETS[1])
    assert page.text("#figures").startswith("12 of 24 Gaussians · ")
    fewer = pictures(page)
    assert different(whole, fewer) == {"rendering", "ellipses", "residual"}
    page.key("Home")
    shown(page, "a", 1, BUDGETS[0])
    page.js("document.activeElement.blur()")
    page.key("ArrowRight")
    shown(page, "a", 2, BUDGETS[-1])
    assert page.text("#key") == "a2"
    assert page.text("#list [aria-current] b") == "a2"
    page.click("#next")
    page.wait("document.querySelector('#key').textContent == 'a3'")
    assert "Skipped as not_an_image: " in page.text("#skipped")
    assert page.js("document.querySelector('#looks').hidden")
    page.key("ArrowLeft")
    shown(page, "a", 2, BUDGETS[-1])
    page.key("Escape")
    page.wait("!document.querySelector('#overview').hidden")
    page.js("history.back()")
    page.wait("document.querySelector('#overview').hidden")


def test_residual_and_zoom(page: Page) -> None:
    page.js("location.hash = '#shard=b&at=b&row=4'")
    shown(page, "b", 4, BUDGETS[-1])
    before = pictures(page)
    page.js("document.querySelector('#gain').value = '1'")
    page.js("document.querySelector('#gain').dispatchEvent(new Event('change'))")
    shown(page, "b", 4, BUDGETS[-1], gain=1)
    after = pictures(page)
    assert different(before, after) == {"residual"}
    page.click("#in")
    page.wait("document.querySelector('#rendering img').style.transform.endsWith('scale(1.5)')")
    assert different(after, pictures(page)) == {"ellipses"}  # drawn anew; the others are stretched
    same = "[...document.querySelectorAll('.box img')].map((img) => img.style.transform)"
    assert len(set(page.js(same))) == 1
    page.key("0")
    page.wait("document.querySelector('#rendering img').style.transform.endsWith('scale(1)')")


def test_a_search_for_a_hostile_caption_shows_text(page: Page) -> None:
    page.click("#text")
    page.type("ONERROR")
    page.wait("document.querySelector('#told').textContent == '2 found in 2 of 2 shards'")
    assert page.js("[...document.querySelectorAll('#list b')].map((b) => b.textContent)") == [
        "a0",
        "b0",
    ]
    assert page.text("#list span") == HOSTILE
    page.click("#list li:nth-child(2) a")
    shown(page, "b", 0, BUDGETS[-1])
    assert page.text("#caption") == HOSTILE
    assert page.js("document.title") == "b0 – splatshard view"
    assert page.js("document.querySelectorAll('#caption *, #list span *').length") == 0
    page.js("document.activeElement.blur()")
    page.key("ArrowLeft")
    shown(page, "a", 0, BUDGETS[-1])
    page.key("/")
    page.js("document.querySelector('#text').value = ''")
    page.type("no such caption")
    page.key("Enter")
    page.wait("document.querySelector('#told').textContent == '0 found in 2 of 2 shards'")


def test_psnr_and_status_choose_samples(page: Page) -> None:
    page.click("#overview .reasons a")
    page.wait("document.querySelector('#told').textContent == '2 found in 2 of 2 shards'")
    assert page.text("#list .bad") == "not_an_image"
    page.js("location.hash = ''")
    page.wait("!document.querySelector('.histogram a').href.includes('status')")  # that of all
    wanted = page.js("document.querySelector('.histogram a').title").split()[0]
    page.click(".histogram a")
    page.wait(f"document.querySelector('#told').textContent == '{wanted} found in 2 of 2 shards'")
    page.wait("document.querySelector('#list img').naturalWidth > 0")


def test_a_narrow_window_shows_the_list_or_the_sample(page: Page) -> None:
    page.resize(400, 800, dark=True)
    page.js("location.hash = '#shard=a&at=a&row=1'")
    shown(page, "a", 1, BUDGETS[-1])
    assert page.js("getComputedStyle(document.querySelector('aside')).display") == "none"
    assert page.js("document.documentElement.scrollWidth") <= 400
    page.js("document.querySelector('#caption').textContent = 'שלום '.repeat(5000)")
    assert page.js("getComputedStyle(document.querySelector('#caption')).direction") == "rtl"
    assert page.js("document.querySelector('.panels').getBoundingClientRect().top") < 800
    page.click("#back")
    page.wait("getComputedStyle(document.querySelector('aside')).display != 'none'")
    assert page.js("document.documentElement.scrollWidth") <= 400


def test_the_command_serves_until_it_is_interrupted(dst: Path) -> None:
    command = [sys.executable, "-m", "jobs.view", str(dst), "--port=0", "--no-browser", "--json"]
    # in the background of a shell SIGINT is ignored, and children would inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        try:
            assert select.select([process.stdout], [], [], 60)[0], "no address after a minute"
            url = process.stdout.readline().decode().strip()
            with urllib.request.urlopen(f"{url}api/overview", timeout=30) as answer:
                assert json.load(answer)["dst"] == str(dst)
            assert json.loads(process.stdout.readline())["url"] == url
            os.kill(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert err.decode().splitlines()[-1] == "ended"
