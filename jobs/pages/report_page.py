"""The report's HTML: pure functions from `ReportData` to one string.

No script, no network, no font: pictures are data URIs, charts are inline SVG. Everything that came
from a dataset (captions, keys, messages, paths) is escaped. Colours follow the reader's light or
dark setting; pictures are shown at their own pixels, enlarged without smoothing only by the
browser.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import Any

from splatshard.jobs.cli.text import count, duration, size
from splatshard.jobs.destination.plan import Status
from splatshard.schemas.shard import OK

MAX_ELLIPSES = 1600
"""Drawn per picture, the largest colours first; more are a grey carpet and megabytes of SVG."""

MAX_SHARD_ROWS = 200
CAPTION_CHARS = 160


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A gallery entry. Images are file bytes; ellipses are tuples (x, y, major, minor in px, angle
    in degrees, r, g, b with white = 1, signed)."""

    shard: str
    key: str
    caption: str
    psnr: float
    num_gaussians: int
    payload_bytes: int
    width: int
    height: int
    original: bytes | None
    reconstruction: bytes
    backdrop: bytes
    ellipses: Sequence[tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A skipped sample."""

    shard: str
    key: str
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class JpegFigures:
    """The same crops as JPEG: means over `images` of them."""

    images: int
    quality: int
    bytes_mean: float
    psnr_mean: float
    raw_bytes: float


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that the page shows; `psnrs` (sorted) and `payload_sizes` are of the surveyed shards,
    `changed` the shards whose source is another one than was converted."""

    dst: str
    figures: dict[str, Any]
    status: Status
    surveyed: int
    psnrs: list[float]
    payload_sizes: list[int]
    skips: list[Skip]
    skipped: dict[str, int]
    pictures: list[Picture]
    changed: list[str] = field(default_factory=list)
    jpeg: JpegFigures | None
    recipe: dict[str, Any]
    recipes: int
    run: dict[str, Any] = field(default_factory=dict)


def page(data: ReportData) -> str:
    """The whole document."""
    name = escape(data.dst.rstrip("/").rsplit("/", 1)[-1] or data.dst)
    style = resources.files("splatshard.jobs.pages").joinpath("report.css").read_text()
    sections = (
        header(data, name),
        sizes(data),
        gallery(data.pictures, data.changed),
        histograms(data),
        shard_table(data),
        skip_table(data),
        recipe_table(data),
    )
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} – splatshard report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def header(data: ReportData, name: str) -> str:
    """Title and key figures."""
    f = data.figures
    skipped = sum(f["skipped"].values())
    tiles = [("samples", f"{f['samples']:,}", count(len(data.status.done), "shard"))]
    share = f"{100 * f['ok'] / f['samples']:.1f} %" if f["samples"] else ""
    tiles.append(("ok", f"{f['ok']:,}", share))
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in f["skipped"].items())
    tiles.append(("skipped", f"{skipped:,}", reasons or "none"))
    if f["ok"]:
        median = statistics.median(data.psnrs) if data.psnrs else f["psnr_mean"]
        tiles.append(("mean PSNR", f"{f['psnr_mean']:.2f} dB", f"median {median:.2f} dB"))
        gaussians = f"{f['num_gaussians_mean']:,.0f} Gaussians"
        tiles.append(("per image", size(f["bytes_per_image"]), gaussians))
    run = data.run
    if run.get("images_per_s"):
        first = run.get("time_to_first_shard_s")
        note = f"{count(run.get('workers') or 0, 'worker')}, backend {run.get('backend')}"
        tiles.append(("images/s", f"{run['images_per_s']:.1f}", note))
        note = f"first shard after {duration(first)}" if first is not None else "start included"
        tiles.append(("last run", duration(run.get("wall_s") or 0.0), note))
    cells = "".join(
        f'<div class="tile"><dt>{escape(label)}</dt><dd>{escape(value)}</dd>'
        f"<small>{escape(note)}</small></div>"
        for label, value, note in tiles
    )
    return (
        f'<header><p class="brand">splatshard report</p><h1>{name}</h1>'
        f'<p class="path">{escape(data.dst)}</p>{attention(data.status)}'
        f'<dl class="tiles">{cells}</dl></header>'
    )


def attention(status: Status) -> str:
    """A line for what keeps the dataset from being whole, empty when it is."""
    kinds = ("failed", "missing", "stale", "corrupt")
    found = [f"{len(getattr(status, k)):,} {k}" for k in kinds if getattr(status, k)]
    return f'<p class="warning">Not complete: shards {", ".join(found)}.</p>' if found else ""


def sizes(data: ReportData) -> str:
    """Bytes per image beside raw pixels and JPEG, with the PSNR of each."""
    f, jpeg = data.figures, data.jpeg
    if not f["ok"]:
        return ""
    if jpeg is None:
        note = "No source image was read that fits a JPEG, so JPEG sizes cannot be measured."
        if data.changed:
            note = "The source images have changed since, so JPEG sizes cannot be measured."
        return f'<section><h2>Size</h2><p class="note">{note}</p></section>'
    rows = [
        ("raw pixels", jpeg.raw_bytes, "exact", "plain"),
        (f"JPEG q{jpeg.quality}", jpeg.bytes_mean, f"{jpeg.psnr_mean:.1f} dB", "plain"),
        ("splats", f["bytes_per_image"], f"{f['psnr_mean']:.1f} dB", "accent"),
    ]
    bars = "".join(
        f'<div class="bar"><span>{label}</span><div class="track">'
        f'<i class="{kind}" style="width:{100 * value / jpeg.raw_bytes:.2f}%"></i></div>'
        f"<b>{value:,.0f} B</b><small>{quality}</small></div>"
        for label, value, quality, kind in rows
    )
    note = (
        f"Bytes and PSNR per image. JPEG is measured on {count(jpeg.images, 'fitted crop')}; "
        "splats are what their payloads take in the file (in format version 1: before compression)."
    )
    return (
        f'<section><h2>Size</h2><div class="bars">{bars}</div><p class="note">{note}</p></section>'
    )


def gallery(pictures: Sequence[Picture], changed: Sequence[str] = ()) -> str:
    """Cards of original, reconstruction and ellipses, best PSNR first; without the originals of the
    shards `changed`."""
    if not pictures:
        return ""
    cards = "".join(card(p, p.shard in changed) for p in reversed(pictures))
    gone = sum(p.original is None and p.shard not in changed for p in pictures)
    others = sum(p.shard in changed for p in pictures)
    note = "Evenly spread over the quantiles of PSNR, from the best to the worst."
    if gone:
        note += f" {count(gone, 'original')} could not be read from the source any more."
    if others:
        note += f" {count(others, 'original')} left out: the source has changed since."
    return (
        f'<section><h2>Pictures</h2><p class="note">{note}</p>'
        f'<div class="gallery">{cards}</div></section>'
    )


def card(p: Picture, changed: bool) -> str:
    """One gallery entry, of a source that may be another one by now."""
    if p.original is not None:
        original = image(p.original, "png", f"original of {p.key}", p)
    else:
        original = f'<div class="gone">source {"changed" if changed else "gone"}</div>'
    reconstruction = image(p.reconstruction, "png", f"reconstruction of {p.key}", p)
    caption = p.caption if len(p.caption) <= CAPTION_CHARS else p.caption[:CAPTION_CHARS] + "…"
    return (
        '<article class="card"><div class="triple">'
        f"<figure>{original}<figcaption>original</figcaption></figure>"
        f"<figure>{reconstruction}<figcaption>splats</figcaption></figure>"
        f"<figure>{overlay(p)}<figcaption>1σ ellipses</figcaption></figure></div>"
        f'<p class="caption">{escape(caption) or "&nbsp;"}</p>'
        f'<p class="facts"><b>{p.psnr:.2f} dB</b><span>{p.num_gaussians:,} Gaussians</span>'
        f"<span>{size(p.payload_bytes)}</span>"
        f"<code>{escape(p.shard)} / {escape(p.key)}</code></p></article>"
    )


def image(data: bytes, kind: str, alt: str, p: Picture) -> str:
    """An <img> with its file inside."""
    return (
        f'<img src="{data_uri(data, kind)}" width="{p.width}" height="{p.height}" '
        f'alt="{escape(alt)}">'
    )


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def overlay(p: Picture) -> str:
    """1-sigma ellipses in their own colours over the dimmed picture; dashed where the colour is
    mostly negative (it darkens)."""
    negative = ' class="neg"'
    drawn = sorted(p.ellipses, key=lambda e: -sum(abs(c) for c in e[5:]))[:MAX_ELLIPSES]
    shapes = "".join(
        f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{major:.2f}" ry="{minor:.2f}" '
        f'transform="rotate({angle:.0f} {x:.1f} {y:.1f})" stroke="{stroke(r, g, b)}"'
        f"{negative if r + g + b < 0 else ''}/>"
        for x, y, major, minor, angle, r, g, b in drawn
    )
    width = 1.1 * max(p.width, p.height) / 224
    return (
        f'<svg viewBox="0 0 {p.width} {p.height}" role="img" aria-label="ellipses of '
        f'{escape(p.key)}"><image href="{data_uri(p.backdrop, "jpeg")}" width="{p.width}" '
        f'height="{p.height}"/><g fill="none" stroke-width="{width:.2f}" '
        f'stroke-opacity=".85">{shapes}</g></svg>'
    )


def stroke(r: float, g: float, b: float) -> str:
    """The Gaussian's hue, bright enough to be seen on the dimmed picture."""
    channels = [abs(c) for c in (r, g, b)]
    top = max(channels) or 1.0
    lift = max(top, 0.7) / top if top < 1 else 1 / top
    return "#" + "".join(f"{round(255 * min(1.0, c * lift)):02x}" for c in channels)


def histograms(data: ReportData) -> str:
    """PSNR, bytes per image, and skipped samples by reason."""
    charts = []
    if data.psnrs:
        charts.append(chart("PSNR", "dB", data.psnrs, "{:.1f}"))
        charts.append(chart("Payload per image", "bytes", data.payload_sizes, "{:,.0f}"))
    charts.append(reasons(data.skipped))
    total = len(data.status.done)
    note = (
        f"From all rows of {data.surveyed:,} of {total:,} shards." if data.surveyed < total else ""
    )
    return (
        f'<section><h2>Distributions</h2><div class="charts">{"".join(charts)}</div>'
        + (f'<p class="note">{note}</p>' if note else "")
        + "</section>"
    )


def chart(title: str, unit: str, values: Sequence[float], form: str, bins: int = 24) -> str:
    """A histogram as SVG, or one sentence when all values are equal."""
    low, high = min(values), max(values)
    head = f"<h3>{title} <small>{unit}</small></h3>"
    if high - low < 1e-6:
        return (
            f'<figure class="chart">{head}<p class="single"><b>{form.format(low)}</b> {unit} '
            f"for {count(len(values), 'image')}, every one</p></figure>"
        )
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    top, step = max(counts), 480 / bins
    bars = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{118 - 106 * n / top:.1f}" width="{step - 2:.1f}" '
        f'height="{106 * n / top + 2:.1f}" rx="2"><title>{count(n, "image")}</title></rect>'
        for i, n in enumerate(counts)
        if n
    )
    middle = statistics.median(values)
    x = 480 * (middle - low) / (high - low)
    anchor = "start" if x < 60 else "end" if x > 420 else "middle"
    return (
        f'<figure class="chart">{head}<svg viewBox="0 0 480 150" role="img" '
        f'aria-label="histogram of {title}"><g class="bars-g">{bars}</g>'
        f'<line class="axis" x1="0" y1="120.5" x2="480" y2="120.5"/>'
        f'<line class="median" x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="124"/>'
        f'<text x="0" y="142">{form.format(low)}</text>'
        f'<text class="mid" x="{x:.1f}" y="142" text-anchor="{anchor}">median '
        f"{form.format(middle)}</text>"
        f'<text x="480" y="142" text-anchor="end">{form.format(high)}</text></svg></figure>'
    )


def reasons(skipped: dict[str, int]) -> str:
    """Skipped samples by reason as bars."""
    head = "<h3>Skipped samples <small>by reason</small></h3>"
    if not skipped:
        return f'<figure class="chart">{head}<p class="single"><b>0</b> skipped</p></figure>'
    top = max(skipped.values())
    bars = "".join(
        f'<div class="bar"><span>{escape(reason)}</span><div class="track">'
        f'<i class="bad" style="width:{100 * n / top:.1f}%"></i></div><b>{n:,}</b></div>'
        for reason, n in skipped.items()
    )
    return f'<figure class="chart">{head}<div class="bars narrow">{bars}</div></figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table in a frame that scrolls sideways; cells are escaped here."""

    def cell(tag: str, i: int, text: str) -> str:
        return f"<{tag}{' class=n' if i in numeric else ''}>{escape(text)}</{tag}>"

    top = "".join(cell("th", i, text) for i, text in enumerate(head))
    body = "".join(
        f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def shard_table(data: ReportData) -> str:
    """All shards with their figures, those that need attention first."""
    rows: list[list[str]] = []
    for failed in data.status.failed:
        rows.append([failed.name, f"failed: {failed.error}: {failed.message}", *[""] * 5])
    for name, message in data.status.corrupt:
        rows.append([name, f"corrupt: {message}", *[""] * 5])
    for stale in data.status.stale:
        rows.append([stale.name, f"stale: {'; '.join(stale.differences)}", *[""] * 5])
    rows += [[name, "missing", *[""] * 5] for name in data.status.missing]
    for m in data.status.done:
        ok, s = m.counts.get(OK, 0), m.statistics
        means = [f"{s['psnr_mean']:.2f}", f"{s['num_gaussians_mean']:,.0f}"] if ok else ["–", "–"]
        skipped = m.samples - ok
        rows.append([m.name, "done", f"{ok:,}", f"{skipped:,}", *means, size(m.size_bytes)])
    head = ("shard", "state", "ok", "skipped", "mean PSNR (dB)", "Gaussians", "file")
    note = f"The first {MAX_SHARD_ROWS} of {len(rows):,}." if len(rows) > MAX_SHARD_ROWS else ""
    return (
        f"<section><h2>Shards</h2>{table(head, rows[:MAX_SHARD_ROWS], range(2, 7))}"
        + (f'<p class="note">{note}</p>' if note else "")
        + "</section>"
    )


def skip_table(data: ReportData) -> str:
    """Skipped samples with their reasons; empty without any."""
    if not data.skips:
        return ""
    total = sum(data.skipped.values())
    rows = [[s.shard, s.key, s.reason, s.message] for s in data.skips]
    note = f"The first {len(rows):,} of {total:,}." if total > len(rows) else ""
    return (
        f"<section><h2>Skipped samples</h2>{table(('shard', 'key', 'reason', 'message'), rows)}"
        + (f'<p class="note">{note}</p>' if note else "")
        + "</section>"
    )


def recipe_table(data: ReportData) -> str:
    """The recipe that made the shards, stage by stage."""
    blocks = []
    for stage, values in data.recipe.items():
        if isinstance(values, dict):
            cells = "".join(
                f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
                for name, value in values.items()
            )
            blocks.append(f"<div><h3>{escape(stage)}</h3><dl>{cells}</dl></div>")
    versions = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in data.recipe.items()
        if not isinstance(value, dict)
    )
    several = f" (of the first shard; {data.recipes} recipes in all)" if data.recipes > 1 else ""
    return (
        f'<section><h2>Recipe</h2><p class="note">{escape(versions + several)}</p>'
        f'<div class="recipe">{"".join(blocks)}</div></section>'
    )
