"""`_card.md`: what a dataset of splats holds and how good it is, for the people who will use it.

From the markers alone, so it costs nothing. It ends with the things only its owner knows. The next
job writes it anew: whoever adds to it keeps a copy.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from splatshard.jobs.cli.text import size
from splatshard.schemas.manifest import MANIFEST_FILE
from splatshard.schemas.shard import OK, ShardManifest

CARD_FILE = "_card.md"
MAX_PLACES = 10

JPEG = "`splatshard report` sets JPEG files of the same pictures beside it."


def card(dst: str, head: Mapping[str, Any], manifests: Sequence[ShardManifest]) -> str:
    """The page; `head` is that of the manifest."""
    one_of_each = {id(m.inputs["recipe"]): m.inputs["recipe"] for m in manifests}.values()
    recipes = {json.dumps(recipe, indent=2, sort_keys=True): recipe for recipe in one_of_each}
    parts = [
        f"# {dst.rpartition('/')[2]}",
        "Images as 2D Gaussians, made by splatshard "
        f"{head['provenance']['versions']['splatshard']}.",
        table(facts(head["totals"], recipes.values())),
        *quality(head["totals"], recipes.values()),
        "## Source",
        places(manifests),
        "Last written by",
        block(shlex.join(head["provenance"]["command"])),
        "with the recipe" if len(recipes) == 1 else f"with {len(recipes)} recipes",
        *(block(recipe, "json") for recipe in recipes),
        f"Dataset fingerprint: `{head['fingerprint']}`",
        "## Load",
        *loading({recipe["pack"]["format"] for recipe in recipes.values()}),
        "## Licence",
        "That of the images; to be filled in by whoever passes this dataset on.",
    ]
    return "\n\n".join(parts) + "\n"


def facts(totals: Mapping[str, Any], recipes: Any) -> list[tuple[str, str]]:
    """What the first table says."""
    sizes = sorted({image_sizes(r["decode"]) for r in recipes})
    forms = sorted({f"{r['pack']['codec']} in {r['pack']['format']}" for r in recipes})
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in totals["skipped"].items())
    found = [
        ("shards", f"{totals['shards']:,}"),
        ("samples", f"{totals['samples']:,}"),
        ("with splats", f"{totals['ok']:,}"),
        ("skipped, as rows with a reason", skipped or "0"),
        ("size on disk", size(totals["shard_bytes"])),
        ("images", "; ".join(sizes)),
        ("payload", ", ".join(forms)),
    ]
    if totals["ok"]:
        found.append(("Gaussians per image, mean", f"{totals['num_gaussians_mean']:,.1f}"))
        found.append(("bytes per image, mean", f"{totals['bytes_per_image']:,.0f}"))
    return found


def image_sizes(decode: Mapping[str, Any]) -> str:
    """What a recipe makes of images, in words."""
    side, resize = decode["image_size"], decode.get("resize", "square")
    if resize == "none":
        return "as large as in the source"
    if resize == "square":
        return f"squares of {side} px, raw {3 * side**2:,} B"
    return f"{resize} side {side} px"


def quality(totals: Mapping[str, Any], recipes: Any) -> list[str]:
    """PSNR, and where to see what other ways to store the pictures take."""
    if not totals["ok"]:
        return []
    lines = ["## Quality"]
    quantiles = totals["psnr_quantiles"] or {}
    cells = [("mean", f"{totals['psnr_mean']:.2f}")]
    cells += [(f"{name[1:]} % below", f"{value:.2f}") for name, value in quantiles.items()]
    lines.append("PSNR in dB, of the stored bytes as rendered against the images that were fitted:")
    lines.append(table(cells))
    lines.append(JPEG)
    return lines


def places(manifests: Sequence[ShardManifest]) -> str:
    """The folders that the samples came from, with their numbers of shards."""
    found = Counter(m.source_url.rpartition("/")[0] or m.source_url for m in manifests)
    lines = [f"- `{place}` ({n:,})" for place, n in sorted(found.items())[:MAX_PLACES]]
    if len(found) > MAX_PLACES:
        lines.append(f"- and {len(found) - MAX_PLACES:,} more, see `{MANIFEST_FILE}`")
    return "\n".join(lines) or "None yet."


def loading(formats: set[str]) -> list[str]:
    """How to read it, in a few lines."""
    begin = (
        "import json, pathlib\n"
        f'text = pathlib.Path("{MANIFEST_FILE}").read_text()\n'
        'shards = json.loads(text)["shards"].values()\n'
    )
    status = f'Rows whose `status` is not "{OK}" have no splats. FORMAT.md specifies the payload.'
    return [
        *(block(f"{begin}{files(name)}\n{READERS[name]}", "python") for name in sorted(formats)),
        status,
    ]


def files(format: str) -> str:
    return f'files = [s["data_file"] for s in shards if s["format"] == "{format}"]'


READERS = {
    "parquet": "import pyarrow.dataset\nrows = pyarrow.dataset.dataset(files).to_table()",
    "webdataset": "import webdataset\nrows = webdataset.WebDataset(files, shardshuffle=False)",
}


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns of Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def block(text: str, language: str = "") -> str:
    """Text as it is."""
    return f"```{language}\n{text}\n```"
