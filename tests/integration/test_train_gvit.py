"""The stage gvit in two processes is that of one: draws, guidance, clipping and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splatshard.jobs.recipes.toys import shapes, write_tars
from splatshard.pipeline.train.loop import train
from splatshard.schemas.train import AugmentConfig
from tests.integration.test_train_processes import ONCE, close, run_script, write_recipe
from tests.training import curve, weights_of
from tests.unit.test_train_gvit import gvit_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


def test_two_processes_are_one(tmp_path: Path) -> None:
    """In parts of 3 of 8 samples, too. Through the ramp into the second epoch."""
    write_tars(tmp_path / "images", list(shapes(90, 0)), 40)
    fields = {"steps": 7, "augment": AugmentConfig(height=32, width=32, rotation=15, shift=0.1)}
    whole = train(gvit_config(tmp_path, tmp_path / "whole", **fields))
    config = gvit_config(tmp_path, tmp_path / "two", micro_batch=3, **fields)
    recipe = write_recipe(tmp_path / "recipe.py", config)
    (tmp_path / "once.py").write_text(ONCE)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_script(*launcher, f"{tmp_path}/once.py", recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("loss", "entropy", "reconstruction", "psnr", "grad_norm"):
        assert close(curve(tmp_path / "two", name), curve(tmp_path / "whole", name)), name
    gammas = [curve(tmp_path / name, "gamma") for name in ("two", "whole")]
    assert gammas[0] == pytest.approx(gammas[1])
    ours, theirs = weights_of(f"{tmp_path}/two/checkpoints/00000007"), weights_of(whole.checkpoint)
    for key in theirs:
        assert torch.allclose(ours[key], theirs[key], atol=2e-4), key
