"""docs/training.md: its Python runs as it stands, its commands have flags and files that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from splatshard.jobs import convert, embed, evaluate, explain, train
from splatshard.jobs.cli.command import parse
from splatshard.jobs.cli.recipe import load_recipe
from splatshard.pipeline.train.loop import train as run_training
from tests.training import make_shards, toy_config

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "training.md"
TEXT = PAGE.read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
COMMANDS = [
    line.partition("#")[0].strip()
    for line in re.findall(r"^    (splatshard .*|torchrun .*|ray job submit .*)$", TEXT, re.M)
]


def parsed(command: str) -> Any:
    """The options of the job that `command` starts."""
    words = shlex.split(command)
    if words[0] == "splatshard":
        job, words = words[1], words[2:]
    else:
        job, words = "train", words[words.index("-m") + 2 :]
    words = [word for word in words if word != "..."]
    if job == "convert":
        return convert.parse_options(words)
    options = {
        "embed": embed.EmbedOptions,
        "evaluate": evaluate.EvaluateOptions,
        "explain": explain.ExplainOptions,
        "train": train.TrainOptions,
    }
    return parse(options[job], job, words)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_flags_that_exist(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And recipes that do, with fields that do."""
    monkeypatch.chdir(ROOT)
    options = parsed(command.replace("--set ... ", "").removesuffix("--set ..."))
    if isinstance(options, train.TrainOptions) and options.recipe != "RECIPE":
        load_recipe(options.recipe, options.set)


def test_the_page_names_every_recipe() -> None:
    names = {path.name for path in (ROOT / "jobs/recipes").glob("*_*.py")} - {"__init__.py"}
    assert names == set(re.findall(r"\w+_\w+\.py", TEXT))


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(tmp_path / "toy", count=20)
    run_training(toy_config(shards, tmp_path / "run2", "contrast", steps=1, optim__ema=0.9))
    (tmp_path / "splats").mkdir()
    (shards / "splats").rename(tmp_path / "splats/val")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for code in BLOCKS:
        exec(compile(code, PAGE.name, "exec"), names)
    assert names["vectors"].shape == (8, 16)
    assert names["embed"].trained.url.endswith("run2/checkpoints/00000001")
    assert (tmp_path / "my-encoder/config.json").exists()
    stage2 = load_recipe(str(ROOT / "jobs/recipes/contrast_stage2.py")).optim
    assert (names["optim"].trainable, names["optim"].later) == (stage2.trainable, stage2.later)
