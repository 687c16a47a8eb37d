"""Configuration: frozen keyword-only dataclasses, checked at construction; the CLI is derived from
them.

`output_config(config)` is the part that changes output bytes; `fingerprint` hashes it together with
a source's identity.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from splatshard.schemas.errors import UsageError
from splatshard.schemas.plain import chosen, from_dict
from splatshard.schemas.shard import ShardRef
from splatshard.schemas.splats import FORMAT_VERSION, CodecName, FormatName, canonical_json

STAGES_VERSION = 9
"""Raised whenever decode, fit, prune, pack or write change the bytes they produce for the same
input."""

MAX_FITTED_GAUSSIANS = 65536
"""With which one image may be fitted; a reader takes MAX_PAYLOAD_GAUSSIANS (schemas/splats.py)."""

MAX_FITTED_PIXELS = 4096**2
"""Of one fitted image, whatever --resize makes of it; a CPU's worker has 1.7 GB then."""

ResizeName = Literal["square", "shortest", "longest", "none"]

BackendName = Literal["auto", "cpu", "triton", "reference"]
BACKENDS = get_args(BackendName)

CPU_BACKENDS = ("cpu", "reference")
"""Backends that never use a GPU."""

ENCODER = "encoder:"
"""Begins the name of a start that a trained model predicts; see
pipeline/fitting/encoder_start.py."""


def _check(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise UsageError(f"--{name.replace('_', '-')} {value}: {remedy}")


def _check_range(config: object, name: str, low: int, high: int, unit: str = "") -> None:
    value, default = getattr(config, name), getattr(type(config), name)  # which may be None
    ok = value is default or low <= value <= high
    _check(ok, name, value, f"choose {low} to {high}{unit}")


def _check_choices(config: object) -> None:
    for name, value, choices in chosen(config):
        _check(value in choices, name, value, f"choose one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Image bytes to RGB pixels."""

    image_size: int = 224
    """Side in px to which images are resized (antialiased bicubic), smaller ones enlarged;
    --resize says which side."""
    resize: ResizeName = "square"
    """square: the shorter side, then the centred square is cut out. shortest, longest: that side,
    the aspect is kept. none: images stay as they are."""
    max_image_pixels: int = 128_000_000
    """Images whose header promises more pixels are skipped as too_large before any pixel is
    decoded."""

    def __post_init__(self) -> None:
        _check_range(self, "image_size", 8, 4096, " px")
        pixels = self.max_image_pixels
        _check(pixels >= 1, "max_image_pixels", pixels, "must be positive")
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Start and optimisation of the Gaussians. The defaults are the project's recipe; see
    pipeline/fitting/fit.py."""

    num_gaussians: int = 400
    """Gaussians per image."""
    gaussians_per_megapixel: float | None = None
    """Gaussians per 10^6 px of the fitted image, at most 65536. Instead of --num-gaussians."""
    nested: str = ""
    """Budgets, as in 400,900,1600,3136: the first 400 Gaussians of each sample are a good image by
    themselves, and so on; a reader takes any of them. Instead of --num-gaussians."""
    steps: int = 150
    """Optimisation steps per image. One costs as much as the rows that it looks at."""
    row_stride: int | None = None
    """A step looks at one row in so many of the picture, the next step at others; 1: at all. None
    follows the spacing of the Gaussians: 4 for 400 at 224 px, 3 for 1600, 2 for 3136."""
    init: str = "adaptive"
    """Where Gaussians start: adaptive (density from image gradients), grid (the published one),
    random, or encoder:CHECKPOINT (what a trained GViT predicts; ahead at 0 to 3 steps only)."""
    target_psnr: float | None = None
    """Stop an image early once it reaches this PSNR in dB (checked every 10 steps); None: never."""
    max_gaussians: int | None = None
    """Images that miss --target-psnr get more Gaussians, where their error is, up to so many."""
    cutoff: float = 3.0
    """Standard deviations beyond which a Gaussian is exactly zero; part of the shard format."""
    lr_means: float = 0.18
    """Step size of the positions; in standard deviations when whitened, in px otherwise."""
    lr_shape: float = 0.135
    """Step size of the Cholesky factors; relative when whitened, in px otherwise."""
    lr_colors: float = 0.05
    """Step size of the colours (image range 0 to 1)."""
    beta1: float | None = None
    """Adam's first decay; None follows the budget: 1 - 1.4 / sqrt(steps), at most 0.95."""
    beta2: float = 0.9
    """Adam's second decay."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the step size falls to 1 %: linear holds it for the first half, cosine is the published
    one."""
    whitened: bool = True
    """Optimise position and shape in each Gaussian's own frame (mu += L d, L <- L (I + T))."""
    relocate: bool = True
    """Move the least useful Gaussians to where the error is, during the first two thirds."""
    l1_colors: float = 0.0
    """Weight of the L1 penalty on colours (published: 1e-6); makes luminosity pruning effective."""
    seed: int = 0
    """Seeds the random start; the other starts do not use chance."""

    @property
    def budgets(self) -> tuple[int, ...]:
        """The nested budgets, smallest first; none for a plain fit."""
        return tuple(int(budget) for budget in self.nested.split(",") if budget)

    def __post_init__(self) -> None:
        if self.nested:
            self._check_nested()
            object.__setattr__(self, "num_gaussians", self.budgets[-1])
        self._check_numbers()
        _check_choices(self)
        _check_range(self, "steps", 0, 1_000_000)
        _check_range(self, "row_stride", 1, 4, " rows")
        encoder = self.init.startswith(ENCODER) and self.init != ENCODER
        _check(
            encoder or self.init in ("adaptive", "grid", "random"),
            "init",
            self.init,
            "choose adaptive, grid, random, or encoder: and the dst of a run of the stage gvit",
        )
        _check(
            self.target_psnr is None or 0 < self.target_psnr < 100,
            "target_psnr",
            self.target_psnr,
            "choose a value between 0 and 100 dB",
        )
        _check_range(self, "cutoff", 1, 6, " standard deviations")
        for name in ("lr_means", "lr_shape", "lr_colors"):
            value = getattr(self, name)
            _check(0 < value <= 10, name, value, "choose a value above 0, up to 10")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check(value is None or 0 <= value < 1, name, value, "choose 0 <= beta < 1")
        _check(self.l1_colors >= 0, "l1_colors", self.l1_colors, "must not be negative")

    def sized(self, height: int, width: int) -> FitConfig:
        """This for an image of `height` x `width` px: with its `num_gaussians`."""
        if self.gaussians_per_megapixel is None:
            return self
        count = self.count(height * width)
        return replace(self, num_gaussians=count, gaussians_per_megapixel=None)

    def count(self, pixels: int) -> int:
        """Gaussians that the fit of an image of so many pixels begins with."""
        if self.gaussians_per_megapixel is None:
            return self.num_gaussians
        wanted = round(self.gaussians_per_megapixel * pixels / 1e6)
        return max(1, min(wanted, self.max_gaussians or MAX_FITTED_GAUSSIANS))

    def _check_numbers(self) -> None:
        most, dense = self.max_gaussians, self.gaussians_per_megapixel
        _check_range(self, "num_gaussians", 1, MAX_FITTED_GAUSSIANS)
        _check_range(self, "max_gaussians", 1, MAX_FITTED_GAUSSIANS)
        _check(
            dense is None or 0 < dense <= 1e6,
            "gaussians_per_megapixel",
            dense,
            "choose a number above 0, up to one per pixel, 1000000",
        )
        _check(
            dense is None or not (self.nested or self.init.startswith(ENCODER)),
            "gaussians_per_megapixel",
            dense,
            "does not go with --nested or an encoder's start, whose numbers are fixed",
        )
        _check(
            most is None or self.target_psnr is not None,
            "max_gaussians",
            most,
            "is for images that miss --target-psnr: give that too, or --num-gaussians instead",
        )
        _check(
            most is None or dense is not None or most >= self.num_gaussians,
            "max_gaussians",
            most,
            f"choose at least the {self.num_gaussians} of --num-gaussians, with which fits begin",
        )

    def _check_nested(self) -> None:
        numbers = re.fullmatch("[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})+", self.nested)
        rising = numbers and all(
            a < b for a, b in zip(self.budgets, self.budgets[1:], strict=False)
        )
        remedy = "choose rising numbers of Gaussians, as in 400,900,1600,3136"
        _check(bool(rising), "nested", self.nested, remedy)
        _check(
            self.target_psnr is None,
            "target_psnr",
            self.target_psnr,
            "does not go with --nested, whose numbers of Gaussians and steps are fixed",
        )


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Which Gaussians to drop after the fit."""

    prune: Literal["none", "luminosity", "energy"] = "none"
    """none; luminosity (published: drop |0.2126 R| + |0.7152 G| + |0.0722 B| below
    --prune-threshold); energy (drop the --prune-share with the least sum(w^2) |c|^2, then
    refit)."""
    prune_threshold: float = 0.05
    """Luminosity below which a Gaussian is dropped (published tau)."""
    prune_share: float = 0.25
    """Share of Gaussians the energy rule drops."""
    refit_steps: int = 20
    """Steps of refit after the energy rule."""

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("prune_threshold", "refit_steps"):
            value = getattr(self, name)
            _check(value >= 0, name, value, "must not be negative")
        _check(0 <= self.prune_share < 1, "prune_share", self.prune_share, "choose 0 <= share < 1")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """The bytes of a shard."""

    format: FormatName = "parquet"
    """parquet (fastest to read) or webdataset (tar)."""
    codec: CodecName = "balanced"
    """balanced: 5 to 6 bytes per Gaussian, at most 0.2 dB lost. compact: 4 to 5, at most 1 dB.
    Fits beyond 60 dB may lose what 60 dB may. fp16: 16 bytes, halves as in the paper."""

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The RGB model whose embeddings of the images are stored, as it was found by
    `pipeline.models.teacher.resolve_teacher`: not options, so that shards of other weights are
    other shards."""

    model: str
    """Name or folder, as it was given."""
    weights: str
    """SHA-256 of the vision tower's parameters and sizes."""
    dim: int
    """Length of the embedding."""
    image_size: int
    """Side in px to which the crop, of one that is no square its centre, is resized for it."""
    mean: tuple[float, float, float]
    """Subtracted from the colours, 0 to 1."""
    std: tuple[float, float, float]
    """Then they are divided by this."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Everything that decides what a conversion writes, and how it runs."""

    decode: DecodeConfig = field(default_factory=DecodeConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    teacher: TeacherConfig | None = None
    backend: BackendName = "auto"
    """Kernel backend; auto is triton on CUDA and cpu elsewhere. A named one never falls back."""
    batch_size: int | None = None
    """Images fitted together, at most; does not change the result beyond rounding. None: on a GPU
    as many as its free memory holds, up to 512; 16 on a CPU."""

    def __post_init__(self) -> None:
        if (rule := self.prune.prune) != "none":
            exact = "does not go with --nested, whose budgets are exact"
            _check(not self.fit.nested, "prune", rule, exact)
            exact = "does not go with --max-gaussians, which bring an image to its PSNR"
            _check(self.fit.max_gaussians is None, "prune", rule, exact)
        _check_choices(self)
        _check_range(self, "batch_size", 1, 65536)


PresetName = Literal["default", "paper"]
PRESETS: dict[PresetName, ConvertConfig] = {
    "default": ConvertConfig(),
    "paper": ConvertConfig(
        fit=FitConfig(
            init="grid",
            steps=3000,
            lr_means=1.2,
            lr_shape=0.8,
            lr_colors=0.04,
            beta1=0.9,
            beta2=0.999,
            schedule="cosine",
            whitened=False,
            row_stride=1,
            relocate=False,
            l1_colors=1e-6,
        ),
        prune=PruneConfig(prune="luminosity"),
    ),
}
"""Starting points of the command line. `paper`: the published recipe (arXiv 2509.22615); its
learning rates are not published and were tuned here, on raw parameters in px, for its best."""


STAGES = ("decode", "fit", "prune", "pack")


def output_config(config: ConvertConfig) -> dict[str, Any]:
    """What changes the output bytes: the stages' configurations, and the versions of format and
    stages."""
    stages: dict[str, Any] = {name: dataclasses.asdict(getattr(config, name)) for name in STAGES}
    if config.teacher:  # no entry without one, as in recipes that know no teachers
        values = dataclasses.asdict(config.teacher)
        lists = {name: list(values[name]) for name in ("mean", "std")}  # as JSON has them
        stages["teacher"] = values | lists
    return {**stages, "format_version": FORMAT_VERSION, "stages_version": STAGES_VERSION}


def config_from_output(recipe_of_shards: dict[str, Any]) -> ConvertConfig:
    """The configuration whose `output_config` this is, to redo shards as they were.

    Raises UsageError for a recipe of other stages or another format, which this build would not
    turn into the same bytes, and for one that it does not understand.
    """
    versions = {"format_version": FORMAT_VERSION, "stages_version": STAGES_VERSION}
    for name, version in versions.items():
        if recipe_of_shards.get(name) != version:
            raise UsageError(
                f"the shards were made with {name} {recipe_of_shards.get(name)}, this build has "
                f"{version}: redo them all with convert --overwrite-stale, or use that version"
            )
    stages = {name: value for name, value in recipe_of_shards.items() if name not in versions}
    try:
        config = from_dict(ConvertConfig, stages)
    except UsageError as e:
        raise UsageError(f"{_UNKNOWN_RECIPE} ({e})") from e
    if canonical_json(output_config(config)) != canonical_json(recipe_of_shards):
        different = describe_difference(recipe_of_shards, output_config(config))
        raise UsageError(f"{_UNKNOWN_RECIPE} ({'; '.join(different)})")
    return config


_UNKNOWN_RECIPE = (
    "the recipe of the shards is not of this version: redo them all with convert --overwrite-stale"
)


def recipe_digest(recipe_of_shards: dict[str, Any]) -> str:
    """16 hex digits that stand for a recipe in files that store it once."""
    return hashlib.sha256(canonical_json(recipe_of_shards).encode()).hexdigest()[:16]


def inputs(config: ConvertConfig, ref: ShardRef) -> dict[str, Any]:
    """All that a shard's bytes depend on: the recipe, and the source's size, etag and sample limit.

    Labels are numbers of classes, of a folder's all class directories, also those of other shards,
    so a digest of the classes' names is part of the source.
    """
    return {"recipe": output_config(config), "source": source_of(ref)}


def source_of(ref: ShardRef) -> dict[str, Any]:
    """The source's part of `inputs`."""
    source = {"size_bytes": ref.size_bytes, "etag": ref.etag, "limit": ref.limit}
    if ref.labels:
        source["labels"] = class_list(ref.labels)
    return source


def class_list(classes: tuple[str, ...]) -> str:
    """SHA-256 (hex) of the classes by which labels are numbered: what markers keep of them."""
    return hashlib.sha256(canonical_json(classes).encode()).hexdigest()


def fingerprint(shard_inputs: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of `inputs(...)`."""
    return hashlib.sha256(canonical_json(shard_inputs).encode()).hexdigest()


def identities(config: ConvertConfig) -> Callable[[ShardRef], tuple[dict[str, Any], str]]:
    """A function from a shard to its `inputs` and their `fingerprint`, for many shards.

    All the inputs share one recipe, which is serialised once; that is most of the work and of the
    memory.
    """
    shared = output_config(config)
    begin = f'{{"recipe":{canonical_json(shared)},"source":'

    def identity(ref: ShardRef) -> tuple[dict[str, Any], str]:
        source = source_of(ref)
        text = f"{begin}{canonical_json(source)}}}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"recipe": shared, "source": source}, digest

    return identity


def describe_difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line per differing leaf, such as `recipe.fit.steps: 100 -> 300`."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += describe_difference(
                cast("dict[str, Any]", a), cast("dict[str, Any]", b), f"{prefix}{key}."
            )
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines
