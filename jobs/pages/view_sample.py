"""One sample of `splatshard view`: its facts, its pictures, its ellipses."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from splatshard.jobs.pages.report_page import stroke
from splatshard.jobs.pages.view_data import View
from splatshard.jobs.pages.view_originals import reason_of
from splatshard.schemas.errors import CorruptShardError, SplatshardError, UsageError
from splatshard.schemas.shard import OK
from splatshard.schemas.splats import metadata_of, payload_bytes, psnr_columns, splat_columns

if TYPE_CHECKING:
    from PIL import Image

    from splatshard.pipeline.picture import SplatImage

METADATA_CHARS = 20_000
SHOWN_PX = 4096
"""Longer side at which larger pictures are shown."""
THUMB_PX, ALIASING = 512, 4
"""A thumbnail is drawn at this size at most, and at so many times its own."""
ELLIPSES = 10_000
"""Sent to the page, the strongest; more are a carpet."""


def sample(view: View, name: str, number: int) -> dict[str, Any]:
    """All that is said of a sample in words and numbers; what takes long is asked for apart."""
    row, manifest = view.row(name, number), view.manifest(name)
    metadata = metadata_of(manifest.inputs["recipe"])
    told = ("key", "uid", "caption", "label", "status", "error", "width", "height", "psnr", "steps")
    told += ("original_width", "original_height", "num_gaussians", "psnr_loss", "members")
    planned = view.planned.get(name)
    classes = planned.ref.labels if planned else ()
    label, ok = row["label"], row["status"] == OK
    text = row["metadata"] or ""
    return {
        **{column: row.get(column) for column in told},
        "class": classes[label] if label is not None and 0 <= label < len(classes) else "",
        "metadata": text[:METADATA_CHARS] + "…" * (len(text) > METADATA_CHARS),
        "shard": name,
        "row": number,
        "rows": manifest.samples,
        "codec": metadata["codec"],
        "source": manifest.source_url,
        "budgets": budgets(row, metadata, view.shares(view.shard(manifest))) if ok else [],
    }


def budgets(
    row: dict[str, Any], metadata: dict[str, Any], shares: dict[str, float]
) -> list[dict[str, Any]]:
    """What each budget of a row holds; one where the shard is not nested. `bytes` are those of its
    payloads, `stored` what they take in a tar, or their share of the columns in a Parquet file."""
    nested = metadata["budgets"] or [row["num_gaussians"]]
    psnrs = [*(row[name] for name in psnr_columns(metadata["budgets"])), row["psnr"]]
    names = splat_columns(metadata["budgets"])
    sizes = [payload_bytes({name: row[name]}) for name in names]
    stored = [
        shares[n] * size if shares else member_bytes(row[n])
        for n, size in zip(names, sizes, strict=True)
    ]
    return [
        {
            "budget": budget,
            "gaussians": min(budget, row["num_gaussians"]),
            "psnr": psnrs[i],
            "bytes": sum(sizes[: i + 1]),
            "stored": round(sum(stored[: i + 1])),
        }
        for i, budget in enumerate(nested)
    ]


def member_bytes(payload: dict[str, bytes] | bytes) -> int:
    """What a payload takes in a tar."""
    from splatshard.pipeline.codec.planes import join

    return len(join(payload) if isinstance(payload, dict) else payload)


def picture(view: View, name: str, number: int, budget: int | None) -> SplatImage:
    """The Gaussians of a sample, or of one of its budgets, from the stored bytes. Raises UsageError
    where it has none, CorruptShardError for damaged ones."""
    from splatshard.pipeline.codec.pack import unpack_row
    from splatshard.pipeline.picture import SplatImage

    row, manifest = view.row(name, number), view.manifest(name)
    recipe = manifest.inputs["recipe"]
    metadata = metadata_of(recipe)
    if row["status"] != OK:
        raise UsageError(f"sample {row['key']} was skipped as {row['status']}: {row['error']}")
    if budget is not None and budget not in metadata["budgets"]:
        known = ", ".join(map(str, metadata["budgets"])) or "none: it is not nested"
        raise UsageError(f"shard {name} has no budget {budget}; its budgets: {known}")
    try:
        splats = unpack_row(row, metadata, budget)
    except CorruptShardError as e:
        shard = view.shard(manifest)
        raise CorruptShardError(f"{shard.url}: row {number}: {e}: {shard.remedy}") from e
    return SplatImage(splats, row["height"], row["width"], recipe["fit"]["cutoff"])


def ellipses(view: View, name: str, number: int, budget: int | None) -> dict[str, Any]:
    """One standard deviation of the strongest Gaussians: x, y, radii in px, angle in radians,
    colour, and whether it darkens."""
    from splatshard.pipeline.splats import scales_and_angles

    image = picture(view, name, number, budget)
    strongest = image.colors.abs().sum(1).argsort(descending=True, stable=True)[:ELLIPSES]
    scales, angles = scales_and_angles(image.cholesky[strongest])
    colors = image.colors[strongest].tolist()
    places = zip(image.means[strongest].tolist(), scales.tolist(), angles.tolist(), strict=True)
    shown = [
        [round(value, 3) for value in (*mean, *radii, angle)] + [stroke(*color), sum(color) < 0]
        for (mean, radii, angle), color in zip(places, colors, strict=True)
    ]
    size = {"width": image.width, "height": image.height}
    return {"ellipses": shown, "gaussians": image.num_gaussians, **size}


def rendering(view: View, name: str, number: int, budget: int | None, side: int) -> bytes:
    """A PNG of a sample as it is stored, its longer side at most `side` px."""
    image = picture(view, name, number, budget)
    own = max(image.width, image.height)
    drawn = min(own, max(THUMB_PX, ALIASING * side))
    height = max(1, round(image.height * drawn / own))
    with view.drawing:
        pixels = image.render(
            height, max(1, round(image.width * drawn / own)), backend=view.backend
        )
    return png(as_pillow(pixels), side)


def has_original(view: View, name: str, number: int) -> dict[str, str]:
    """Why a sample's original is not shown; empty where it is."""
    try:
        crop_of(view, name, number)
    except SplatshardError as e:
        return {"reason": reason_of(e)}
    return {"reason": ""}


def original(view: View, name: str, number: int) -> bytes:
    """A PNG of the crop that was fitted. Raises as `Originals.crop`."""
    from PIL import Image

    return png(Image.fromarray(crop_of(view, name, number)), SHOWN_PX)


def residual(view: View, name: str, number: int, budget: int | None, gain: int) -> bytes:
    """A PNG of the difference of original and rendering, `gain` times as strong."""
    from PIL import Image, ImageChops

    crop = crop_of(view, name, number)
    image = picture(view, name, number, budget)
    if crop.shape[:2] != (image.height, image.width):
        raise UsageError(
            f"the original is of {crop.shape[1]}x{crop.shape[0]} px, its Gaussians of "
            f"{image.width}x{image.height}: it was decoded otherwise"
        )
    with view.drawing:
        pixels = image.render(backend=view.backend)
    apart = ImageChops.difference(Image.fromarray(crop), as_pillow(pixels))
    return png(apart.point([min(255, gain * value) for value in range(256)] * 3), SHOWN_PX)


def crop_of(view: View, name: str, number: int) -> Any:
    row, manifest = view.row(name, number), view.manifest(name)
    if row["status"] != OK:
        raise UsageError(f"sample {row['key']} was skipped as {row['status']}")
    return view.originals.crop(view.planned.get(name), manifest, number, row["key"])


def as_pillow(pixels: Any) -> Image.Image:
    from splatshard.pipeline.picture import pillow

    return pillow(pixels)


def png(image: Image.Image, side: int) -> bytes:
    """A PNG file, of a longer side of at most `side` px."""
    from PIL import Image as pil

    scale = side / max(image.size)
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, pil.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
