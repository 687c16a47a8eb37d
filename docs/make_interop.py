"""docs/interop.md: which engines open our files, and what they change in them.

    python docs/make_interop.py [--folder FOLDER] [--only READER ...]

Converts twelve small pictures with the command, gives each engine a Python, or a folder of npm, of
its own with the versions below, has it open copies of the shards as its users would
(docs/interop/readers.py, readers.mjs), and compares every value. Needs a package index, npm, Java
for Spark, 20 GB of disk and half an hour, so it is no part of the tests; FOLDER keeps what was
installed. With --only the page is shown and not written.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGE = DOCS / "interop.md"
READERS = DOCS / "interop" / "readers.py"
READERS_JS = DOCS / "interop" / "readers.mjs"
NAMES = ("0001", "a/0002", "käse", "写真", "🐱", "x-5")
BROKEN, UNLABELLED, NO_CAPTION = 4, (1, 3, 5), 3
LABEL = 2**53 + 1
"""Of one sample; a double does not hold it."""

CONVERSIONS = {
    "fp16": "--codec fp16 --num-gaussians 24",
    "balanced, nested": "--codec balanced --nested 16,32",
    "compact": "--codec compact --num-gaussians 24",
}
DAMAGED = "fp16, damaged"
TARS = ("fp16", "balanced, nested")


class Engine(NamedTuple):
    """What is installed, with the engine itself first, and the function of the readers."""

    name: str
    reader: str
    packages: str
    how: str = ""
    """Beside the name, where an engine is there twice."""

    @property
    def version(self) -> str:
        return self.packages.split()[0].rpartition("==" if "==" in self.packages else "@")[2]

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}{', ' if self.how else ''}{self.how}"


ARROW = "pyarrow==26.0.1"
TORCH = "webdataset==1.0.2 torch==2.14.1"
RAY = f"ray[data]==2.60.0 {ARROW} webdataset==1.0.2 aiohttp==3.14.5"
"""Without aiohttp Ray Data fails by chance where its threads import fsspec's HTTP."""
HYPARQUET = "hyparquet@1.33.0 hyparquet-compressors@1.1.2"

PARQUET = (
    Engine("pyarrow", "pyarrow", ARROW),
    Engine("pyarrow", "pyarrow_checked", ARROW, "page_checksum_verification"),
    Engine("DuckDB", "duckdb", "duckdb==2.0.0"),
    Engine("Polars", "polars", "polars==2.1.0"),
    Engine("Hugging Face datasets", "datasets", f"datasets==5.2.0 {ARROW}"),
    Engine("pandas", "pandas", f"pandas==3.1.1 {ARROW}"),
    Engine("pandas", "pandas_arrow", f"pandas==3.1.1 {ARROW}", "Arrow's types"),
    Engine("Daft", "daft", "daft==0.7.26"),
    Engine("DataFusion", "datafusion", f"datafusion==55.0.0 {ARROW}"),
    Engine("Spark", "spark", "pyspark==4.3.0"),
    Engine("Spark", "spark_checked", "pyspark==4.3.0", "verify-checksum"),
    Engine("Ray Data", "ray_parquet", RAY),
    Engine("litdata", "litdata", "litdata==0.2.76 polars==2.1.0"),
    Engine("Lance", "lance", f"pylance==14.0.2 {ARROW}"),
    Engine("Vortex", "vortex", f"vortex-data==0.93.0 {ARROW}"),
    Engine("arro3 (Rust's parquet)", "arro3", f"arro3-io==0.9.1 arro3-core==0.9.1 {ARROW}"),
    Engine("chDB", "chdb", f"chdb==4.4.0 pandas==3.1.1 {ARROW}"),
    Engine("chDB", "chdb_arrow", f"chdb==4.4.0 pandas==3.1.1 {ARROW}", "strings as bytes"),
    Engine("fastparquet", "fastparquet", "fastparquet==2026.9.0 pandas==3.1.1"),
    Engine("parquet-wasm", "parquet_wasm", "parquet-wasm@0.8.0 apache-arrow@21.2.0"),
    Engine("hyparquet", "hyparquet", HYPARQUET),
    Engine("hyparquet", "hyparquet_bytes", HYPARQUET, "utf8: false"),
    Engine("parquetjs", "parquetjs", "@dsnp/parquetjs@1.8.8"),
)
TAR = (
    Engine("webdataset", "webdataset", "webdataset==1.0.2 numpy==2.4.6"),
    Engine("Hugging Face datasets", "datasets_tar", f"datasets==5.2.0 {ARROW}"),
    Engine("energon", "energon", f"megatron-energon==7.4.1 {TORCH}"),
    Engine("wids", "wids", f"wids==0.1.11 {TORCH}"),
    Engine("Ray Data", "ray_tar", RAY),
)
PLY = (
    Engine("plyfile", "plyfile", "plyfile==1.1.5"),
    Engine("splat-transform", "splat_transform", "@playcanvas/splat-transform@2.7.1"),
)

Rows = list[dict[str, Any]]

TOP = f"""
# Which engines open our files

Written by `python docs/make_interop.py`: do not edit. Each engine opened two shards of six samples,
as in the code below, and every value was compared with what pyarrow reads in the same files (of
tars: Python's tarfile, by each member's ending): keys, labels, statuses, captions, PSNR, metadata,
members, the payloads' bytes. Of six samples one is damaged, three have no label, one has no caption
and one a further member; keys and captions have letters beyond ASCII, one label is
{LABEL}. Nothing else was tried.

*all*: every value is the same. *a flipped bit*: in a payload of the codec fp16, which is not
compressed. Pages have checksums, but few engines look at them: *refused* is an error, *passed on*
are other bytes without a word. The SHA-256 in the marker finds it in any case.

What the bytes are: [FORMAT.md](../schemas/FORMAT.md); how to make Gaussians of them without this
package: [reading.md](reading.md#hugging-face-datasets-without-this-package).
"""


def sources(folder: Path) -> str:
    """Two tars of six samples, as a pattern."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i, name in enumerate(NAMES):
                key = f"{shard}-{name}" if "/" not in name else name.replace("/", f"{shard}/")
                for ending, data in members(10 * shard + i, i).items():
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / "{00000..00001}.tar")


def members(seed: int, i: int) -> dict[str, bytes]:
    found = {"png": b"\x89PNG\r\n\x1a\nbroken" if i == BROKEN else picture(seed)}
    fields = {"uid": f"{seed:032x}", "url": f"https://example.com/{i}", "score": i / 4}
    found["json"] = json.dumps(fields).encode()
    if i not in UNLABELLED:
        found["cls"] = str(LABEL if i == 2 else i).encode()
    if i != NO_CAPTION:
        found["txt"] = f"a cat, un café, 写真 {i}".encode()
    if i == 1:
        stream = io.BytesIO()
        np.save(stream, np.arange(128, 192, dtype=np.uint8))
        found["depth.npy"] = stream.getvalue()
    return found


def picture(seed: int) -> bytes:
    """A PNG of waves."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64] / 8
    waves = [np.sin(x * a + y * b + c) for a, b, c in random.uniform(0.5, 3, (3, 3))]
    stream = io.BytesIO()
    pixels = np.stack(waves, -1) * 100 + 128
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def convert(folder: Path) -> dict[str, Path]:
    """The folders of shards and of the PLY, by what the page calls them."""
    pattern = sources(folder)
    command = [sys.executable, "-m", "splatshard.jobs"]
    made: dict[str, Path] = {}
    for name, options in CONVERSIONS.items():
        for format in ("parquet", "webdataset") if name in TARS else ("parquet",):
            key = name if format == "parquet" else f"{name}, tar"
            made[key] = folder / key.replace(", ", "-")
            small = f"--steps 10 --image-size 32 --workers 1 --format {format} {options}".split()
            subprocess.run([*command, "convert", pattern, made[key], *small], check=True, cwd=ROOT)
    made[DAMAGED] = folder / "damaged"
    shutil.copytree(made["fp16"], made[DAMAGED])
    damage(next(made[DAMAGED].glob("00000-*.parquet")))
    made["ply"] = folder / "ply"
    made["ply"].mkdir()
    ply = ["--output", made["ply"] / "sample.ply"]
    subprocess.run([*command, "export", made["fp16"], "0-käse", *ply], check=True, cwd=ROOT)
    return made


def damage(path: Path) -> None:
    """Flips a bit of the first payload."""
    data = bytearray(path.read_bytes())
    payload: bytes = pq.read_table(path)["splats"][0].as_py()
    data[data.index(payload) + 100] ^= 1
    path.write_bytes(data)


def expected(folder: Path) -> Rows:
    """What is in the files: pyarrow's rows, members of tars by their endings, floats of the PLY."""
    if (folder / "sample.ply").exists():
        head, _, body = (folder / "sample.ply").read_bytes().partition(b"end_header\n")
        names = re.findall(r"property float (\w+)", head.decode())
        values = np.frombuffer(body, "<f4").reshape(-1, len(names))
        return [dict(zip(names, row, strict=True)) for row in values.tolist()]
    if files := [*folder.glob("*.parquet")]:
        return [plain(row) for row in pq.read_table(files).to_pylist()]
    samples: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers()[1:]:
                base, ending = re.fullmatch(r"((?:.*/)?[^.]*)\.(.*)", member.name).groups()  # type: ignore[union-attr]
                stream = tar.extractfile(member)
                assert stream is not None
                value = decoded(ending, stream.read())
                samples.setdefault(base, {"__key__": base})[ending] = value
    return list(samples.values())


def decoded(ending: str, data: bytes) -> Any:
    ways = {"json": json.loads, "txt": bytes.decode, "cls": int, "npy": array}
    way = ways.get(ending.rpartition(".")[2])
    return way(data) if way else {"bytes": data.hex()}


def array(data: bytes) -> Any:
    return np.load(io.BytesIO(data)).tolist()


def plain(value: Any) -> Any:
    """As the readers write it."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return {"bytes": value.hex()} if isinstance(value, bytes) else value


def read(engine: Engine, folders: list[Path], home: Path) -> list[Rows | str]:
    """What the engine gives for each folder: rows, or an error."""
    place = home / engine.reader.split("_")[0]
    place.mkdir(parents=True, exist_ok=True)
    python = "==" in engine.packages
    if python and not (place / "bin").exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet = ["--quiet", "--disable-pip-version-check"] if python else ["--silent", "--no-save"]
    install = [place / "bin" / "pip"] if python else ["npm"]
    subprocess.run(
        [*install, "install", *quiet, *engine.packages.split()], check=True, cwd=place, env=clean
    )
    script = READERS if python else Path(shutil.copy(READERS_JS, place))
    with tempfile.TemporaryDirectory() as copies:
        own = [shutil.copytree(folder, Path(copies, folder.name)) for folder in folders]
        output = Path(copies, "rows.json")
        command = [place / "bin" / "python" if python else "node", script, engine.reader]
        done = subprocess.run(
            [*command, *own, output], cwd=place, env=clean, capture_output=True, timeout=600
        )
        if not output.exists():
            raise SystemExit(f"{engine.title}: {done.stderr.decode()[-2000:]}")
        found = json.loads(output.read_text())
    return [each if isinstance(each, str) else [same_types(row) for row in each] for each in found]


def same_types(value: Any) -> Any:
    """JavaScript's big integers as integers, wids' names without the dot before them."""
    if isinstance(value, list):
        return [same_types(each) for each in value]
    if not isinstance(value, dict):
        return value
    if list(value) == ["int"]:
        return int(value["int"])
    return {name.removeprefix("."): same_types(each) for name, each in value.items()}


def changes(own: Rows, found: Rows) -> dict[str, list[str]]:
    """Which columns come otherwise, by how."""
    if len(own) != len(found):
        return {f"{len(found)} of {len(own)} rows": []}
    result: dict[str, list[str]] = {}
    names = dict.fromkeys(name for row in own for name in row)
    pairs = list(zip(*(sorted(rows, key=identity) for rows in (own, found)), strict=True))
    for name in names:
        if not any(name in row for row in found):
            result.setdefault("not there", []).append(name)
            continue
        kinds: dict[str, str] = {}
        for a, b in pairs:
            for how, example in change(a.get(name), b.get(name)):
                kinds.setdefault(how, example)
        if kinds:
            result.setdefault("; ".join(kinds.values()), []).append(name)
    return result


def identity(row: dict[str, Any]) -> str:
    """The row's key, wherever an engine leaves it; none in a PLY, whose order is kept."""
    document = row.get("splat.json")
    key = document.get("key") if isinstance(document, dict) else row.get("key", "")
    return bytes.fromhex(key["bytes"]).decode() if isinstance(key, dict) else key


def change(own: Any, found: Any) -> Iterator[tuple[str, str]]:
    """How `found` differs from `own`, and in words."""
    if kind(own) == kind(found) == "a struct" and own.keys() <= found.keys():
        for name, value in own.items():
            yield from change(value, found[name])
        if any(found[name] is not None for name in found.keys() - own.keys()):
            yield "more", "further fields"
    elif kind(own) == kind(found) == "a list" and len(own) == len(found):
        for a, b in zip(own, found, strict=True):
            yield from change(a, b)
    elif kind(own) == "a float" and kind(found) == "an integer" and own == found:
        return  # numbers of JavaScript, whose JSON has no 1.0
    elif (own != found or type(own) is not type(found)) and not kind(own) == kind(found) == "NaN":
        yield difference(own, found)


def difference(own: Any, found: Any) -> tuple[str, str]:
    how = f"{kind(own)} as {kind(found)}"
    if isinstance(found, dict) and found and not any(v is not None for v in found.values()):
        return how, f"{kind(own)} as a struct of nulls"
    if kind(own) == "an integer" and kind(found) == "a float" and own != int(found):
        return f"other {how}", f"{own} as {found:.1f}"
    if kind(own) == kind(found) != "bytes":
        return how, textwrap.shorten(f"{own} as {found}", 80)
    return how, "other bytes" if kind(own) == kind(found) else how


def kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "bytes" if "bytes" in value else value.get("other", "a struct")
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else "a float"
    names = {bool: "a bool", int: "an integer", str: "text", list: "a list"}
    return names[type(value)]


def verdict(own: Rows, found: Rows | str, copies: str) -> list[str]:
    """What is lost, in lines; none where all values are the same."""
    if isinstance(found, str):
        error = re.sub(r"\S*/\S*", "...", found.replace(copies, ""))
        return [f"not read: {textwrap.shorten(error, 110, placeholder=' ...')}"]
    by_columns: dict[str, list[str]] = {}
    for how, names in changes(own, found).items():
        by_columns.setdefault(", ".join(f"`{name}`" for name in names), []).append(how)
    return [
        f"{names}: {'; '.join(hows)}" if names else hows[0] for names, hows in by_columns.items()
    ]


def section(
    heading: str, engines: tuple[Engine, ...], made: dict[str, Path], home: Path
) -> list[str]:
    """A table, what the engines change, and the code that was run."""
    names = [name for name in made if name != DAMAGED]
    own = {name: expected(folder) for name, folder in made.items()}
    titles = [*names, "a flipped bit"] if DAMAGED in made else names
    table = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(made)}"]
    lost: list[str] = []
    for engine in engines:
        print(engine.title, flush=True)
        found = dict(zip(made, read(engine, list(made.values()), home), strict=True))
        lines = {name: verdict(own[name], found[name], str(made[name])) for name in names}
        cells = ["all" if not lines[name] else "below" for name in names]
        if DAMAGED in made:
            cells.append(of_damaged(found["fp16"], found[DAMAGED]))
        table.append(f"| {engine.title} | {' | '.join(cells)} |")
        if any(lines.values()):
            lost += [f"- **{engine.title}**", *losses(lines)]
    code = [f"# {engine.title}\n{code_of(engine.reader)}\n" for engine in engines]
    below = ["", "What changes:", "", *lost] if lost else []
    code = ["As it was opened:", "", "```", "\n".join(code).rstrip(), "```", ""]
    return [f"## {heading}", "", *table, *below, "", *code]


def of_damaged(whole: Rows | str, damaged: Rows | str) -> str:
    """Whether the engine tells of the flipped bit; errors about something else are shown."""
    if isinstance(whole, str):
        return ""
    if isinstance(damaged, str):
        return "refused" if re.search("crc|checksum", damaged, re.I) else damaged
    return "passed on" if changes(whole, damaged) else ""


def losses(lines: dict[str, list[str]]) -> Iterator[str]:
    """Lines that all files share once, others with the files' names."""
    for line in dict.fromkeys(line for found in lines.values() for line in found):
        files = [name for name, found in lines.items() if line in found]
        where = "" if len(files) == len(lines) else f"{' and '.join(files)}: "
        yield textwrap.fill(f"{where}{line}", 150, initial_indent="  - ", subsequent_indent="    ")


def code_of(reader: str) -> str:
    """A reader's lines, without its imports."""
    script = READERS_JS.read_text()
    if found := re.search(rf"^  {reader}: async folder => {{\n(.*?)\n  }},$", script, re.M | re.S):
        lines = textwrap.dedent(found[1]).splitlines()
        return "\n".join(line for line in lines if "await import" not in line)
    for node in ast.parse(READERS.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == reader:
            body = [line for line in node.body if not isinstance(line, ast.ImportFrom | ast.Import)]
            first = min(line.lineno for line in (body[0], *getattr(body[0], "decorator_list", ())))
            lines = READERS.read_text().splitlines()[first - 1 : body[-1].end_lineno]
            return textwrap.dedent("\n".join(lines))
    raise ValueError(reader)


def page(folder: Path, only: list[str]) -> str:
    shutil.rmtree(folder / "files", ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    made = convert(folder / "files")
    parts = [TOP.strip(), ""]
    for heading, engines, names in (
        ("Parquet", PARQUET, [*CONVERSIONS, DAMAGED]),
        ("WebDataset", TAR, [f"{name}, tar" for name in TARS]),
        ("PLY", PLY, ["ply"]),
    ):
        chosen = tuple(each for each in engines if not only or each.reader in only)
        if chosen:
            files = {name: made[name] for name in names}
            parts += section(heading, chosen, files, folder / "engines")
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = page((options.folder or Path(scratch)).absolute(), options.only)
    if options.only:
        print(text)
    else:
        PAGE.write_text(text)
        print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
