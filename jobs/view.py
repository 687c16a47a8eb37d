"""The view job: a page on this machine to look through DST.

    markers -> shards -> lists of samples -> original, rendering, ellipses, residual by budget

The page is served on 127.0.0.1 until Ctrl-C; nothing is written. jobs/pages/view_server.py says
what it answers, view_data.py and view_sample.py with what.
"""

from __future__ import annotations

import os
import sys
import webbrowser
from dataclasses import dataclass
from typing import Annotated

import tyro

from splatshard.jobs.cli.command import EXIT_OK, parse, run
from splatshard.jobs.cli.dataset import open_dataset
from splatshard.jobs.cli.options import DatasetOptions, Named, Switch
from splatshard.jobs.cli.text import count, print_json, put, say
from splatshard.schemas.config import BackendName
from splatshard.schemas.errors import UsageError

PORT = 8765


@dataclass(frozen=True, kw_only=True)
class ViewOptions(DatasetOptions):
    """Look through DST in a browser: samples by shard, PSNR, status and caption, each beside its
    original, ellipses and residual. Serves one page on this machine until Ctrl-C."""

    port: Annotated[int, tyro.conf.arg(metavar="N")] = PORT
    """Port on 127.0.0.1; 0 for any that is free."""
    src: Named = ""
    no_browser: Switch = False
    """Only print the address."""
    backend: BackendName = "auto"
    """Kernel backend that renders."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"--port {self.port}: choose 0 to 65535")


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard view argv`."""
    return run(lambda: view(parse(ViewOptions, "view", argv)))


def view(options: ViewOptions) -> int:
    """Serve the page until Ctrl-C, after its address went to standard output."""
    from splatshard.jobs.destination.sources import named
    from splatshard.jobs.pages.view_data import View
    from splatshard.jobs.pages.view_server import HOST, open_server

    dst = open_dataset(options)
    named(dst, options.src)  # is --src understood?
    found = View(dst, options.src, options.backend)
    with open_server(found, options.port) as server:
        url = f"http://{HOST}:{server.server_port}/"
        say(f"{count(len(found.shards), 'shard')} to look at; Ctrl-C ends it")
        put(url)
        if options.json:
            print_json({"url": url, "dst": dst, "shards": len(found.shards)})
        if not options.no_browser and has_browser():
            webbrowser.open(url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")
    return EXIT_OK


def has_browser() -> bool:
    """Whether one can show a window here; a browser in the terminal would be in the way."""
    if sys.platform.startswith("linux"):
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True


if __name__ == "__main__":
    sys.exit(main())
