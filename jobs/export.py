"""The export job: one sample of DST as a picture (.png), for splat viewers (.ply), or for
`splatshard.load` (.safetensors).

    key or uid -> row -> splats -> our rendering as PNG, gsplat's PLY, or the numbers

The sample is looked for shard by shard, in order, and the first match is taken. All rows before it
are read: seconds for a shard, minutes for an ImageNet. An index would be faster, but this is for
looking at a few samples.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import tyro

from splatshard.jobs.cli.command import EXIT_OK, parse, run
from splatshard.jobs.cli.dataset import UNFINISHED, check_output, naming_repair, open_dataset
from splatshard.jobs.cli.options import DatasetOptions
from splatshard.jobs.cli.text import count, print_json, put, say
from splatshard.schemas.config import BackendName, DecodeConfig
from splatshard.schemas.errors import UsageError
from splatshard.schemas.plain import from_dict
from splatshard.schemas.shard import OK, ShardManifest
from splatshard.schemas.splats import metadata_of

SUFFIXES = (".png", ".ply", ".safetensors")
LISTED = 20
"""Samples of which keys are told where none is given."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(DatasetOptions):
    """Write one sample: .png as splatshard renders it, .ply for viewers of Gaussian splats,
    .safetensors for splatshard.load. Without a key: list the first samples."""

    key: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[KEY]")] = ""
    """Key or uid of the sample."""
    output: Annotated[str, tyro.conf.arg(metavar="PATH")] = ""
    """File to write: .png, .ply or .safetensors."""
    backend: BackendName = "auto"
    """Kernel backend that renders the .png."""

    def __post_init__(self) -> None:
        if self.key and Path(self.output).suffix.lower() not in SUFFIXES:
            raise UsageError(f"--output {self.output}: end it in {', '.join(SUFFIXES)}")
        if self.output and not self.key:
            raise UsageError("KEY is missing: give a sample's; without --output they are told")


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard export argv`."""
    return run(lambda: export(parse(ExportOptions, "export", argv)))


def export(options: ExportOptions) -> int:
    """Write the file and print its path on standard output."""
    from splatshard.pipeline.codec.pack import unpack_row
    from splatshard.pipeline.picture import SplatImage
    from splatshard.pipeline.ply import ply_bytes
    from splatshard.pipeline.shards.commit import storage_errors

    if not options.key:
        return list_samples(open_dataset(options), options.json)
    check_output(options.output)
    dst = open_dataset(options)
    manifest, row = find(dst, options.key)
    if row["status"] != OK:
        raise UsageError(
            f"sample {options.key} of shard {manifest.name} was skipped as {row['status']}, so it "
            f"has no splats: {row['error']}"
        )
    recipe = manifest.inputs["recipe"]
    height, width = row["height"], row["width"]
    with naming_repair(dst, manifest):
        splats = unpack_row(row, metadata_of(recipe))
    decode = from_dict(DecodeConfig, recipe["decode"])
    image = SplatImage(splats, height, width, recipe["fit"]["cutoff"], decode)
    suffix = Path(options.output).suffix.lower()
    if suffix == ".ply":
        data = ply_bytes(splats, height, width)
        say(
            "note: viewers composite by alpha, splatshard sums: the .ply will not look like the "
            "rendering (export a .png for that)"
        )
    elif suffix == ".safetensors":
        data = image.to_bytes()
    else:
        data = image.to_png(options.backend)
    with storage_errors(options.output):
        Path(options.output).write_bytes(data)
    say(
        f"{row['key']} of shard {manifest.name}: {row['num_gaussians']:,} Gaussians, "
        f"{width}x{height} px, {row['psnr']:.2f} dB"
    )
    put(options.output)
    if options.json:
        figures = {name: row[name] for name in ("key", "num_gaussians", "width", "height", "psnr")}
        print_json({"output": options.output, "shard": manifest.name, **figures})
    return EXIT_OK


def list_samples(dst: str, as_json: bool) -> int:
    """Tell the first samples on standard output: key, size, Gaussians and PSNR, or why there are
    none."""
    from splatshard.pipeline.shards.rows import read_rows

    keys: list[str] = []
    done = finished(dst)
    for manifest in done:
        with naming_repair(dst, manifest):
            rows = read_rows(f"{dst}/{manifest.data_file}", manifest.format)
            for row in islice(rows, LISTED - len(keys)):
                what = row["status"]
                if what == OK:
                    size = f"{row['width']}x{row['height']} px"
                    what = f"{size}  {row['num_gaussians']:,} Gaussians  {row['psnr']:.2f} dB"
                if not as_json:
                    put(f"{row['key']}  {what}")
                keys.append(row["key"])
        if len(keys) == LISTED:
            break
    samples = sum(manifest.samples for manifest in done)
    say(f"{count(samples, 'sample')}; one of them: splatshard export {dst} KEY --output a.png")
    if as_json:
        print_json({"samples": samples, "keys": keys})
    return EXIT_OK


def finished(dst: str) -> list[ShardManifest]:
    """The done markers. Raises UsageError where there are none."""
    from splatshard.pipeline.shards.markers import read_markers

    done = [m for m in read_markers(dst).values() if isinstance(m, ShardManifest)]
    if not done:
        raise UsageError(f"{dst} {UNFINISHED}")
    return done


def find(dst: str, key: str) -> tuple[ShardManifest, dict[str, Any]]:
    """The first row whose key or uid is `key`, and its shard. Raises UsageError without one, and
    CorruptShardError for a damaged shard before it."""
    from splatshard.pipeline.shards.rows import read_rows

    done = finished(dst)
    samples = 0
    for manifest in done:
        with naming_repair(dst, manifest):
            for row in read_rows(f"{dst}/{manifest.data_file}", manifest.format):
                samples += 1
                if key in (row["key"], row["uid"]):
                    return manifest, row
    raise UsageError(
        f"no sample of {dst} has the key or uid {key!r} ({samples:,} samples in {len(done):,} "
        f"finished shards; `splatshard export {dst}` lists the first keys)"
    )


if __name__ == "__main__":
    sys.exit(main())
