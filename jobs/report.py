"""The report job: one self-contained HTML page about DST, with pictures.

    markers + rows -> pick samples -> render splats, re-read originals -> page

Key figures come from all markers. Distributions come from the rows of at most MAX_SHARDS shards,
evenly spread, so that a report over ImageNet does not take an hour; the page says so. Samples are
picked at even quantiles of PSNR, best and worst included, so that the gallery neither flatters nor
scares. JPEG sizes and PSNR are measured on the very crops that were fitted. Originals are read
again from the source; where it is gone, or another one by now, the page says so and shows the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import webbrowser
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from splatshard.jobs.cli.command import EXIT_OK, parse, run
from splatshard.jobs.cli.dataset import UNFINISHED, check_output, naming_repair, open_dataset
from splatshard.jobs.cli.options import DatasetOptions, Named, Switch
from splatshard.jobs.cli.text import count, print_json, put, say
from splatshard.jobs.destination.figures import dataset_figures
from splatshard.jobs.destination.plan import PlannedShard, status
from splatshard.jobs.destination.plan_file import (
    REPORT_FILE,
    RUN_FILE,
    read_plan,
    read_record,
    write_text,
)
from splatshard.jobs.pages.report_page import JpegFigures, Picture, ReportData, Skip, page
from splatshard.pipeline.storage.fs import is_local
from splatshard.schemas.config import BackendName, DecodeConfig
from splatshard.schemas.errors import CorruptShardError, SplatshardError, UsageError
from splatshard.schemas.plain import from_dict
from splatshard.schemas.shard import OK, ShardManifest
from splatshard.schemas.splats import metadata_of, payload_bytes

MAX_SHARDS = 16
MAX_SKIPS = 500
JPEG_SAMPLES = 64
JPEG_QUALITY = 75
JPEG_SIDE = 65_500
"""px that a JPEG has at most on a side, by libjpeg."""
SHOWN_PX = 1024
"""Longer side at which larger pictures are put into the page; figures are of all their pixels."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions(DatasetOptions):
    """Write one self-contained HTML page about DST: pictures, key figures, histograms."""

    samples: Annotated[int, tyro.conf.arg(metavar="N")] = 12
    """Pictures in the gallery, from the best PSNR to the worst."""
    output: Annotated[
        str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: DST/report.html)")
    ] = None
    """Where to write the page."""
    open: Switch = False
    """Open the page in the browser."""
    src: Named = ""
    backend: BackendName = "auto"
    """Kernel backend that renders the reconstructions."""

    def __post_init__(self) -> None:
        if not 0 <= self.samples <= 1000:
            raise UsageError(f"--samples {self.samples}: choose 0 to 1000")
        if self.open and not (self.output or is_local(self.dst)):
            raise UsageError(f"--open: a browser cannot read {self.dst}; say --output PATH, too")


@dataclass(kw_only=True)
class Entry:
    """What the first pass keeps of an ok row; `index` is its row, and its place in the source."""

    shard: ShardManifest
    index: int
    psnr: float
    payload_bytes: int


class AsJpeg(NamedTuple):
    """A fitted crop as JPEG: bytes, PSNR in dB, and bytes of the crop itself."""

    bytes: int
    psnr: float
    raw_bytes: int


class Original(NamedTuple):
    """A fitted crop as it is shown, uint8 [H, W, 3], and as JPEG, where it can be one."""

    shown: Any
    jpeg: AsJpeg | None


def main(argv: list[str] | None = None) -> int:
    """Exit code of `splatshard report argv`."""
    return run(lambda: report(parse(ReportOptions, "report", argv)))


def report(options: ReportOptions) -> int:
    """Write the page and print its path on standard output."""
    from splatshard.pipeline.shards.commit import storage_errors

    if options.output:
        check_output(options.output)
    dst = open_dataset(options)
    data = gather(dst, options)
    path = options.output or f"{dst}/{REPORT_FILE}"
    if options.output:
        with storage_errors(path):
            Path(path).write_text(page(data), encoding="utf-8")
    else:
        write_text(dst, REPORT_FILE, page(data))
    put(path)
    if options.json:
        known = {"output": path, "pictures": len(data.pictures), "changed_sources": data.changed}
        print_json({**known, **data.figures})
    say(f"next: splatshard view {dst}    splatshard train RECIPE --set data.src={dst}")
    if options.open:
        webbrowser.open(Path(path).absolute().as_uri())
    return EXIT_OK


def gather(dst: str, options: ReportOptions) -> ReportData:
    """Everything the page shows. Raises UsageError when DST holds no finished shard."""
    from splatshard.pipeline.shards.markers import read_markers

    shards: dict[str, PlannedShard] = {}
    try:
        shards = read_plan(dst)
    except CorruptShardError as e:
        say(f"without originals, and what is missing or stale is unknown: {e}")
    state = status(shards, read_markers(dst))
    if not state.done:
        raise UsageError(f"{dst} {UNFINISHED}")
    surveyed = spread(state.done, MAX_SHARDS)
    entries, skips, skipped = survey(dst, surveyed)
    entries.sort(key=lambda e: (e.psnr, e.shard.name, e.index))
    chosen = spread(entries, options.samples)
    compared = spread(entries, JPEG_SAMPLES)
    say(f"report over {count(len(state.done), 'shard')}, {count(len(chosen), 'picture')}")
    shown = [*chosen, *compared]
    originals, changed = reread(readable(dst, shards, shown, options.src), shown)
    return ReportData(
        dst=dst,
        figures=dataset_figures(state.done),
        status=state,
        surveyed=len(surveyed),
        psnrs=[e.psnr for e in entries],
        payload_sizes=[e.payload_bytes for e in entries],
        skips=skips,
        skipped=skipped,
        pictures=pictures(dst, chosen, originals, options.backend),
        changed=changed,
        jpeg=jpeg_figures([originals[k].jpeg for k in map(place, compared) if k in originals]),
        recipe=state.done[0].inputs["recipe"],
        recipes=len({json.dumps(m.inputs["recipe"], sort_keys=True) for m in state.done}),
        run=read_record(dst, RUN_FILE),
    )


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """At most `number` of `items`, evenly spread, first and last included."""
    if number >= len(items):
        return list(items)
    if number <= 1:
        return list(items[:number])
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


def survey(
    dst: str, manifests: Sequence[ShardManifest]
) -> tuple[list[Entry], list[Skip], dict[str, int]]:
    """One pass over the rows: the ok ones in brief, the first MAX_SKIPS skipped, all by reason.

    Raises CorruptShardError for a damaged shard.
    """
    from splatshard.pipeline.shards.rows import read_rows

    entries: list[Entry] = []
    skips: list[Skip] = []
    skipped: Counter[str] = Counter()
    for manifest in manifests:
        first = len(entries)
        with naming_repair(dst, manifest):
            for index, row in enumerate(read_rows(f"{dst}/{manifest.data_file}", manifest.format)):
                if row["status"] == OK:
                    size = payload_bytes(row)
                    entries.append(
                        Entry(shard=manifest, index=index, psnr=row["psnr"], payload_bytes=size)
                    )
                    continue
                skipped[row["status"]] += 1
                if len(skips) < MAX_SKIPS:
                    skips.append(
                        Skip(
                            shard=manifest.name,
                            key=row["key"],
                            reason=row["status"],
                            message=row["error"] or "",
                        )
                    )
        share_out(manifest, entries[first:])
    return entries, skips, dict(skipped.most_common())


def share_out(manifest: ShardManifest, entries: Sequence[Entry]) -> None:
    """Scale the entries' payload sizes, so that they add up to what the shard stores."""
    whole = sum(entry.payload_bytes for entry in entries)
    for entry in entries:
        stored = entry.payload_bytes * manifest.statistics["payload_bytes"]
        entry.payload_bytes = round(stored / whole) if whole else 0


def place(entry: Entry) -> tuple[str, int]:
    return entry.shard.name, entry.index


def by_shard(entries: Sequence[Entry]) -> dict[str, dict[int, Entry]]:
    """Entries by shard name and row."""
    grouped: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.shard.name, {})[entry.index] = entry
    return grouped


def readable(
    dst: str, shards: Mapping[str, PlannedShard], entries: Sequence[Entry], src: str
) -> dict[str, PlannedShard]:
    """The shards of `entries` whose sources the user has named, here or with `src`, and that can be
    read without what was secret in their addresses."""
    from splatshard.jobs.destination.sources import explain, outside
    from splatshard.pipeline.storage.options import is_redacted

    wanted = {name: shards[name] for name in by_shard(entries) if name in shards}
    if signed := [name for name, s in wanted.items() if any(map(is_redacted, s.ref.urls))]:
        say(
            f"without originals of {count(len(signed), 'shard')} ({signed[0]}): the signature or "
            "password of the address is not kept in _plan.json"
        )
    wanted = {name: shard for name, shard in wanted.items() if name not in signed}
    if refused := outside((shard.ref for shard in wanted.values()), dst, src):
        reason = explain(refused, dst, src, "--src")
        say(f"without originals of {count(len(refused), 'shard')}: {reason}")
    return {name: shard for name, shard in wanted.items() if name not in refused}


def reread(
    shards: dict[str, PlannedShard], entries: Sequence[Entry]
) -> tuple[dict[tuple[str, int], Original], list[str]]:
    """The fitted crops of `entries`, as far as the source is still there and the one that was
    converted; and the shards whose source is another one."""
    from splatshard.pipeline.source.decode import decode
    from splatshard.pipeline.source.listing import is_source_of
    from splatshard.pipeline.source.read import read

    found: dict[tuple[str, int], Original] = {}
    changed: list[str] = []
    for name, wanted in by_shard(entries).items():
        if name not in shards:
            continue
        manifest = next(iter(wanted.values())).shard
        try:
            if not is_source_of(shards[name].ref, manifest):
                changed.append(name)
                say(
                    f"the source of {name} has changed since it was converted "
                    f"({shards[name].ref.urls[0]}): its originals are left out"
                )
                continue
            config = from_dict(DecodeConfig, manifest.inputs["recipe"]["decode"])
            for index, sample in enumerate(read(shards[name].ref, hashlib.sha256())):
                if index in wanted and not sample.error:
                    image = decode(sample.image, sample.image_name, config)
                    found[name, index] = Original(shown(image.pixels), as_jpeg(image.pixels))
                if index >= max(wanted):
                    break
        except (SplatshardError, OSError) as e:
            say(f"originals of {name} cannot be read: {e}")
    return found, changed


def pictures(
    dst: str,
    entries: Sequence[Entry],
    originals: dict[tuple[str, int], Original],
    backend_name: str,
) -> list[Picture]:
    """Reconstruction and ellipses of `entries`, in their order."""
    from splatshard.pipeline.kernels.select import select_backend
    from splatshard.pipeline.shards.rows import read_rows

    backend = select_backend(backend_name)
    done: dict[tuple[str, int], Picture] = {}
    for wanted in by_shard(entries).values():
        manifest = next(iter(wanted.values())).shard
        with naming_repair(dst, manifest):
            for index, row in enumerate(read_rows(f"{dst}/{manifest.data_file}", manifest.format)):
                if index in wanted:
                    key = manifest.name, index
                    done[key] = picture(wanted[index], row, originals.get(key), backend)
                if index >= max(wanted):
                    break
    return [done[place(entry)] for entry in entries]


def picture(entry: Entry, row: dict[str, Any], original: Original | None, backend: Any) -> Picture:
    """One gallery entry: pixels as PNG, ellipses as numbers."""
    import numpy as np
    import torch

    from splatshard.pipeline.codec.pack import unpack_row
    from splatshard.pipeline.splats import scales_and_angles

    recipe = entry.shard.inputs["recipe"]
    width, height = row["width"], row["height"]
    splats = unpack_row(row, metadata_of(recipe)).to(backend.device)
    image = backend.render(splats, height, width, recipe["fit"]["cutoff"])[0]
    pixels = shown((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    scales, angles = scales_and_angles(splats.cholesky[0])
    columns = (splats.means[0], scales, angles.rad2deg()[:, None], splats.colors[0])
    backdrop = original.shown if original else pixels
    label = row.get("label")
    return Picture(
        shard=entry.shard.name,
        key=row["key"],
        caption=row.get("caption") or (f"label {label}" if label is not None else ""),
        psnr=row["psnr"],
        num_gaussians=row["num_gaussians"],
        payload_bytes=entry.payload_bytes,
        width=width,
        height=height,
        original=encode(original.shown, "PNG") if original else None,
        reconstruction=encode(pixels, "PNG"),
        backdrop=encode((backdrop * 0.22).astype(np.uint8), "JPEG", quality=60),
        ellipses=[tuple(values) for values in torch.cat(columns, 1).tolist()],
    )


def encode(pixels: Any, format: str, **options: Any) -> bytes:
    """A uint8 [H, W, 3] array as an image file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def shown(pixels: Any) -> Any:
    """A uint8 [H, W, 3] array, its longer side at most SHOWN_PX."""
    import numpy as np
    from PIL import Image

    height, width = pixels.shape[:2]
    scale = SHOWN_PX / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def as_jpeg(pixels: Any) -> AsJpeg | None:
    """What a JPEG file of a fitted crop, uint8 [H, W, 3], takes and loses; None for a crop that is
    too long for one."""
    import numpy as np
    from PIL import Image

    if max(pixels.shape) > JPEG_SIDE:
        return None
    data = encode(pixels, "JPEG", quality=JPEG_QUALITY)
    again = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)
    error = np.mean((again - pixels) ** 2)
    return AsJpeg(len(data), float(10 * np.log10(255**2 / max(error, 1e-5))), pixels.size)


def jpeg_figures(crops: Sequence[AsJpeg | None]) -> JpegFigures | None:
    """Mean bytes and PSNR of crops as JPEG; None without any."""
    files = [crop for crop in crops if crop]
    if not files:
        return None
    size, quality, raw = (sum(values) / len(files) for values in zip(*files, strict=True))
    return JpegFigures(
        images=len(files),
        quality=JPEG_QUALITY,
        bytes_mean=size,
        psnr_mean=quality,
        raw_bytes=raw,
    )


if __name__ == "__main__":
    sys.exit(main())
