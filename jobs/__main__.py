"""`splatshard JOB ...`: picks the job by name, imports it only then; so `--help` is instant."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

from splatshard.jobs.cli.text import put

JOBS = {
    "convert": "image dataset SRC to shards of 2D Gaussians in DST",
    "status": "what is done, failed, missing and stale in DST; reads the markers alone",
    "verify": "re-read everything in DST: checksums, counts, payloads",
    "repair": "verify DST, then redo its bad, missing and failed shards",
    "retry-failed": "redo failed shards, and those with samples worth a second try",
    "report": "one self-contained HTML page about DST, with pictures",
    "view": "look through DST in a browser: originals, renderings, ellipses, residuals",
    "embed": "add a teacher's embeddings to finished shards",
    "train": "train a model on splat shards, as a recipe says",
    "evaluate": "zero-shot, retrieval, linear probe, top-1 of a checkpoint on shards",
    "explain": "what a classifier of splats looks at in images, Gaussian by Gaussian",
    "export": "one sample as .png, as .ply for viewers of Gaussian splats, or as .safetensors",
    "demo": "photographs of scikit-image converted, verified and reported, in a minute",
}

HELP = """\
usage: splatshard JOB [OPTIONS] ...

Turns image datasets into shards of 2D Gaussians, and trains on them.

jobs:
{jobs}

  splatshard JOB --help     the options of one job
  splatshard --version      the version

examples:
  splatshard convert 'data/{{00000000..00000003}}.tar' splats/ --num-gaussians 400
  splatshard verify splats/
  splatshard view splats/
  splatshard export splats/ 000000000042 --output sample.png
"""


def main(argv: list[str] | None = None) -> int:
    """Exit code of the job named by the first argument."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        table = "\n".join(f"  {name:14}{what}" for name, what in JOBS.items())
        if args:
            put(HELP.format(jobs=table).rstrip())
            return 0
        print(HELP.format(jobs=table), end="", file=sys.stderr)
        return 1
    if args[0] in ("-V", "--version"):
        put(f"splatshard {version('splatshard')}")
        return 0
    if args[0] not in JOBS:
        print(
            f"splatshard: error: no job {args[0]!r}; choose {', '.join(JOBS)} "
            "(see splatshard --help)",
            file=sys.stderr,
        )
        return 1
    return importlib.import_module(f"splatshard.jobs.{args[0].replace('-', '_')}").main(args[1:])


if __name__ == "__main__":
    sys.exit(main())
