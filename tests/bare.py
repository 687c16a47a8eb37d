"""A bare GPU machine, for tests: Python, torch, Triton and a few more packages, not ours.

    subprocess.run([sys.executable, ...], env=bare_environment(tmp_path), cwd=...)

In that process and all that it starts the packages of ABSENT are not installed: neither import,
`find_spec` nor `importlib.metadata` finds them. This file is copied as `sitecustomize.py`, which
Python runs first.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from shutil import copyfile
from types import ModuleType

ABSENT = (
    *("ray", "tyro", "braceexpand", "s3fs", "webdataset", "gsplat", "hypothesis"),
    *("simplejpeg", "tensorboard", "moto", "duckdb", "xdist", "pytest-xdist"),
    *("aiobotocore", "aiohttp", "boto3", "botocore", "datasets", "polars", "torchdata"),
    *("skimage", "scikit-image", "sklearn", "scikit-learn", "imagecodecs", "tifffile"),
)
"""Names for import, and for pip where that is another."""


def bare_environment(folder: Path) -> dict[str, str]:
    """This process's environment, but without ABSENT; `folder` is an empty one that stays."""
    copyfile(__file__, folder / "sitecustomize.py")
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def hide() -> None:
    """Hide ABSENT from this process; an editable install of ours is taken out of its path."""
    find_spec, find_distributions = PathFinder.find_spec, PathFinder.find_distributions

    def spec_of_present(_, name, *args, **kwargs):
        return None if name.partition(".")[0] in ABSENT else find_spec(name, *args, **kwargs)

    def present_distributions(_, *args, **kwargs):
        hidden = (*ABSENT, "splatshard")  # ours is the working directory, not installed
        return (d for d in find_distributions(*args, **kwargs) if d.name.lower() not in hidden)

    PathFinder.find_spec = classmethod(spec_of_present)
    PathFinder.find_distributions = classmethod(present_distributions)
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]


def without_hypothesis() -> dict[str, ModuleType]:
    """Modules that stand in for hypothesis where there is none: tests that `given` makes are
    skipped, and the others of their files run."""
    from unittest.mock import MagicMock

    import pytest

    package, strategies = ModuleType("hypothesis"), MagicMock(name="hypothesis.strategies")
    package.__spec__ = ModuleSpec("hypothesis", None)  # torch looks at it
    package.given = lambda *_, **__: pytest.mark.skip(reason="hypothesis is not installed")
    package.settings = package.example = lambda *_, **__: lambda test: test
    package.HealthCheck, package.strategies = MagicMock(), strategies
    return {"hypothesis": package, "hypothesis.strategies": strategies}


if __name__ == "sitecustomize":
    hide()
