"""The texts: what they name exists, their tables are the code's and the measurements', their lines
are short."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import signal
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs.cli import command
from splatshard.schemas import errors
from splatshard.schemas.config import STAGES_VERSION
from splatshard.schemas.shard import OK, SKIP_STATUSES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
HOUSE = ("pipeline", "jobs", "schemas", "benchmarks", "docs", "findings")
LONGEST = 160


def pages() -> list[str]:
    """All texts but the changelog, whose entries are as they were."""
    folders = (ROOT, DOCS, ROOT / "schemas", ROOT / "benchmarks" / "notes")
    found = [path for folder in folders for path in sorted(folder.glob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in found if path.name != "CHANGELOG.md"]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def table_after(name: str, heading: str) -> list[list[str]]:
    """The cells of the first table after `heading`, without its header."""
    found = re.search(r"(?:^\|.*\n)+", text_of(name).split(f"\n{heading}\n", 1)[1], re.M)
    assert found is not None, heading
    return [[c.strip() for c in row.split("|")[1:-1]] for row in found[0].splitlines()[2:]]


# All pages


@pytest.mark.parametrize("name", pages())
def test_lines_are_short(name: str) -> None:
    lines = enumerate(text_of(name).splitlines(), 1)
    assert [f"{name}:{n}" for n, line in lines if len(line) > LONGEST] == []


@pytest.mark.parametrize("name", pages())
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{name}: {link}"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", pages())
def test_files_that_are_named_exist(name: str) -> None:
    """`pipeline/fitting/fit.py`; what stands in the user's own folders has no such first part."""
    tops = "|".join((*HOUSE, "docker", "tests"))
    named = re.findall(rf"(?<![\w/.:-])((?:{tops})/[\w./-]*\w\.\w+)", text_of(name))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", pages())
def test_modules_that_are_named_exist(name: str) -> None:
    """Of `splatshard.a.b.c`, `python -m jobs.x` and imports, also what is imported."""
    text = text_of(name)
    for module in re.findall(r"\bsplatshard(?:\.[a-z]\w*)+", text):
        assert found_in(module), f"{name}: {module}"
    for module in re.findall(r"-m ((?:jobs|benchmarks)(?:\.[a-z]\w*)+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{name}: {module}"
    for module, names in re.findall(r"^\s*from (splatshard\S*) import ([\w, ]+)$", text, re.M):
        for imported in names.split(", "):
            assert found_in(f"{module}.{imported}"), f"{name}: {module} has no {imported}"


def found_in(dotted: str) -> bool:
    """Whether `dotted` is a module, or something in one."""
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return bool(module) and hasattr(importlib.import_module(module), name)
    return True


def test_the_map_has_every_page() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)\)", text_of("docs/README.md")))
    assert linked == {path.name for path in DOCS.glob("*.md")} - {"README.md"}


# The tree in CONTRIBUTING.md


def tree() -> Iterator[str]:
    """The paths that the tree names, folders with a slash at the end."""
    text = text_of("CONTRIBUTING.md").split("\n## The house, file by file\n", 1)[1]
    folders: list[str] = []
    for indent, name in re.findall(r"^ {4}((?:  )*)(\S+)", text, re.M):
        depth = len(indent) // 2
        if depth > len(folders):
            continue  # an entry's second line
        del folders[depth:]
        path = "".join(folders) + name
        yield path
        if name.endswith("/"):
            folders.append(name)


def test_the_tree_is_the_real_one() -> None:
    named = list(tree())
    assert sorted(named) == sorted(set(named)), "something is named twice"
    assert [path for path in named if not (ROOT / path).exists()] == [], "no such file"
    there = {
        str(path.relative_to(ROOT))
        for folder in HOUSE
        for kind in ("*.py", "*.sh")
        for path in (ROOT / folder).rglob(kind)
        if path.name != "__init__.py"
    }
    assert there - set(named) == set(), "not in the tree"


# Generated, and compared


def test_options_are_current() -> None:
    """`make docs` writes them anew."""
    made = runpy.run_path(str(DOCS / "make_options.py"))
    assert text_of("docs/options.md") == made["page"]()


def test_every_option_and_field_says_what_it_is() -> None:
    lines = text_of("docs/options.md").splitlines()
    assert [line for line in lines if re.fullmatch(r"- `.*`:?", line)] == []
    mute = [line for line in lines if re.fullmatch(r"- `.*` \(.*\):?", line)]
    assert [line for line in mute if "Config" not in line] == []  # a group has its own section


def test_statuses_are_the_codes() -> None:
    rows = table_after("docs/errors.md", "## Statuses of samples")
    assert [row[0].strip("`") for row in rows] == [OK, *SKIP_STATUSES]


def test_exit_codes_are_the_codes() -> None:
    known = {value for name, value in vars(command).items() if name.startswith("EXIT_")}
    stopped = {128 + signal.SIGINT, 128 + signal.SIGTERM}
    rows = table_after("docs/errors.md", "## Exit codes")
    assert [int(row[0]) for row in rows] == sorted(known | stopped)


def test_error_classes_are_the_codes() -> None:
    classes = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SplatshardError)
    ]
    rows = table_after("docs/errors.md", "## Errors")
    assert [row[0].strip("`") for row in rows] == classes


# Measurements


def measured(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def test_bytes_and_psnr_by_codec_are_the_measured_ones() -> None:
    found = {
        (row["num_gaussians"], row["codec"]): f"{row['bytes']:,.0f} B, {row['psnr']:.2f} dB"
        for row in measured("codec")
        if row["set"] == "datacomp" and row["format"] == "parquet"
    }
    for n, *cells in table_after("docs/choosing.md", "## N and codec"):
        assert cells == [found[int(n), codec] for codec in ("fp16", "balanced", "compact")]


def test_reading_speeds_are_the_measured_ones() -> None:
    found = {
        (row["n"], row["codec"]): f"{row['warm']:,.0f}"
        for row in measured("read")["rows"]
        if row["reader"] == "SplatDataset parquet"
    }
    begin = next(
        line
        for line in text_of("docs/choosing.md").splitlines()
        if line[:18] == "Samples per second"
    )
    for n, *cells in table_after("docs/choosing.md", begin):
        assert cells == [found[int(n), codec] for codec in ("fp16", "balanced", "compact")]


def test_psnr_by_steps_is_the_measured_one() -> None:
    found = {
        (row["num_gaussians"], row["steps"]): f"{row['psnr']:.2f} dB, {row['s_per_image']:.3f} s"
        for row in measured("fit_quality_shard0")["rows"]
        if row["preset"] == "default"
    }
    for n, *cells in table_after("docs/choosing.md", "## Steps"):
        assert cells == [found[int(n), steps] for steps in (15, 50, 150, 450)]


def test_nested_budgets_are_the_measured_ones() -> None:
    (run,) = [r for r in measured("nested")["rows"] if (r["set"], r["steps"]) == ("datacomp", 150)]
    rows = table_after("docs/choosing.md", "## Nested budgets")
    for (n, *cells), budget in zip(rows, run["budgets"], strict=True):
        assert int(n) == budget["num_gaussians"]
        gain = f"{budget['difference']:+.2f} dB".replace("+0.00", "0.00")
        both = (budget["psnr_nested"], budget["psnr_separate"])
        assert cells == [*(f"{psnr:.2f} dB" for psnr in both), gain]
    share = run["bytes_nested"] / run["bytes_separate"]
    page = text_of("docs/choosing.md")
    assert f"in {run['time_of_separate']:.2f} of their time" in page
    assert f"({run['s_per_image']['nested']:.3f} s per image" in page
    assert f"{share:.2f} of their bytes" in page


def test_growing_fits_are_the_measured_ones() -> None:
    rows = table_after("docs/choosing.md", "## A number for each image")
    for cells, row in zip(rows, measured("any_size_growing")["growing"], strict=False):
        numbers = f"{row['gaussians']:,.0f}"
        if row["target"]:
            numbers += ", {:,} to {:,}".format(*row["gaussians_from_to"])
        assert cells == [
            f"{row.get('begin', round(row['gaussians'])):,}",
            str(row["target"] or ""),
            numbers,
            f"{row['psnr']:.2f}, {row['psnr_least']:.2f} dB",
            f"{row['bytes']:,.0f}",
            f"{row['s_per_image']:.3f}",
        ]
    assert len(rows) == 6


def test_whole_photographs_are_the_measured_ones() -> None:
    rows = [row for name in ("any_size", "any_size_450") for row in measured(name)["fixed"]]
    rows.append(measured("any_size_growing")["growing"][-1])
    table = table_after("docs/measured.md", "## Whole photographs")
    for (_, *cells), row in zip(table, rows, strict=True):
        assert cells == [
            f"{row['gaussians']:,.0f}",
            f"{row['psnr_fit']:.2f} dB",
            f"{row['psnr']:.2f} dB",
            f"{row['bytes']:,.0f}",
            f"{row['fp16_loss']:.2f} dB",
            f"{row['s_per_image']:.2f}",
        ]


# The picture


def test_the_picture_of_the_line() -> None:
    """It can be parsed, and the files in it exist."""
    root = ElementTree.parse(DOCS / "line.svg").getroot()
    words = " ".join(text.strip() for text in root.itertext())
    named = re.findall(r"\b[\w/]+(?:\.py|/(?= ))", words)
    assert len(named) > 10
    for path in named:
        assert (ROOT / "pipeline" / path).exists() or (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["README.md", "docs/measured.md"])
def test_figures_say_of_which_stages_they_are(name: str) -> None:
    """Whoever raises STAGES_VERSION says there what is older, or measures it again."""
    assert f"`STAGES_VERSION` {STAGES_VERSION}" in (ROOT / name).read_text()
