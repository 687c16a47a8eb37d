"""Chromium without a window, for tests: a page is opened, clicked, typed into and looked at.

It is driven by its DevTools protocol over two pipes, JSON messages that end with a zero byte; no
package and no port is needed. What the page complains about is collected.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

BINARIES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 60.0
"""After so long without what is waited for a test fails."""

KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Escape": 27, "Enter": 13}


def chromium() -> str:
    """A Chromium on this machine; empty without one."""
    return next((found for name in BINARIES if (found := shutil.which(name))), "")


class Page:
    """One tab; `complaints` are errors and warnings of its console, and what it could not load."""

    def __init__(self, to: int, answers: BinaryIO) -> None:
        self._to, self._answers = to, answers
        self._sent, self._session = 0, ""
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        asked: dict[str, Any] = {"id": self._sent, "method": method, "params": params}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._sent:
                assert "error" not in found, found
                return found["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            text += byte
        found = json.loads(text)
        told = found.get("params", {})
        if found.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"]))
        elif found.get("method") == "Log.entryAdded" and told["entry"]["level"] != "info":
            self.complaints.append(told["entry"]["text"])
        elif found.get("method") == "Runtime.consoleAPICalled" and told["type"] != "log":
            self.complaints.append(json.dumps(told["args"]))
        return found

    def close(self) -> None:
        """And all of Chromium."""
        self._session = ""
        self.call("Browser.close")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def js(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of `expression`, as soon as it is true."""
        until = time.monotonic() + PATIENCE_S
        while True:
            if found := self.js(f"(() => {{ try {{ return {expression} }} catch {{}} }})()"):
                return found
            assert time.monotonic() < until, (expression, self.js("document.body.innerText"))
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({json.dumps(selector)}).textContent")

    def click(self, selector: str) -> None:
        """In the middle of the first element that is meant, by the mouse."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{element}.scrollIntoView({{block: 'center'}})")
        box = f"(({element}).getBoundingClientRect())"
        x, y = self.js(f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str) -> None:
        code = KEYS.get(name, ord(name[0].upper()))
        text = {} if name in KEYS else {"text": name}
        about = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


def high_pipe() -> tuple[int, int]:
    """Two ends above those that Chromium wants to have the numbers of."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A tab of a new Chromium that keeps its files in `folder`."""
    (asked, to), (answers, told) = high_pipe(), high_pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{asked} 4>&{told}', "-", chromium(), *options],
        pass_fds=(asked, told),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(asked)
    os.close(told)
    try:
        with os.fdopen(answers, "rb") as stream:
            page = Page(to, stream)
            yield page
            page.close()
            process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        os.close(to)
