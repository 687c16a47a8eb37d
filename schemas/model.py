"""Configuration of the models: the splat encoder, its RGB twin, the text tower.

Frozen keyword-only dataclasses, checked at construction; plain.py brings them to the `config.json`
of checkpoints and exports and back. The defaults are the published size (arXiv
2509.22615): open_clip's ViT-M-16 with a stem and a resampler in place of the patch embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from splatshard.schemas.errors import UsageError
from splatshard.schemas.plain import chosen

Activation = Literal["gelu", "quick_gelu"]
DeviceName = Literal["auto", "cpu", "cuda"]
WeightsName = Literal["auto", "model", "ema"]
"""Of a checkpoint: the model's, or their average."""


def _check(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise UsageError(f"model config: {name} = {value}: {remedy}")


def _check_choices(config: object, group: str) -> None:
    for name, value, choices in chosen(config):
        _check(value in choices, f"{group}.{name}", value, f"choose one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class StemConfig:
    """One Gaussian's parameters to one token. Constants bring the inputs near mean 0, deviation
    1; they belong to the weights."""

    bands: int = 8
    """Fourier bands of the positions: sin and cos of pi 2^k x for k below this, x in [-1, 1]."""
    hidden: int = 512
    """Width of the layer between features and tokens; 0 for a single linear projection, which
    cannot multiply positions by colours."""
    log_scale_mean: float = -3.6
    """Of the natural logarithm of a Gaussian's standard deviations over the image's side."""
    log_scale_std: float = 0.8
    """As log_scale_mean: its deviation."""
    angle: Literal["unit", "weighted"] = "unit"
    """unit: (sin 2a, cos 2a) of the larger axis' angle, which jumps about as a Gaussian becomes
    round. weighted: that times (s1^2 - s2^2) / (s1^2 + s2^2), which is 0 then: smooth, for models
    whose Gaussians are learned (GViT)."""
    color_mean: tuple[float, float, float] = (0.25, 0.25, 0.25)
    """Of the Gaussians' colours (white is 1)."""
    color_std: tuple[float, float, float] = (0.35, 0.35, 0.35)
    """As color_mean: their deviation."""

    @classmethod
    def for_gvit(cls, gaussians: int, hidden: int = 512) -> StemConfig:
        """For so many Gaussians as GViT predicts: near their even start, in weak colours, and with
        an angle that is smooth, since gradients go through it.

        On 64 predicted Gaussians (predictor frozen, Tiny-ImageNet, 20 classes, 6 epochs, one seed)
        a classifier reaches 26 % with constants near these and 19 % with those of fits.
        """
        return cls(
            bands=4,
            hidden=hidden,
            angle="weighted",
            log_scale_mean=math.log(0.5 / math.sqrt(gaussians)),
            log_scale_std=0.3,
            color_mean=(0.35, 0.35, 0.35),
            color_std=(0.18, 0.18, 0.18),
        )

    def __post_init__(self) -> None:
        _check_choices(self, "stem")
        _check(0 <= self.bands <= 16, "stem.bands", self.bands, "choose 0 to 16")
        _check(self.hidden >= 0, "stem.hidden", self.hidden, "must not be negative")
        _check(self.log_scale_std > 0, "stem.log_scale_std", self.log_scale_std, "must be positive")
        _check(min(self.color_std) > 0, "stem.color_std", self.color_std, "must be positive")


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """N tokens of Gaussians to a fixed number of tokens, by cross-attention from latents."""

    layers: int = 1
    """Cross-attention layers."""
    heads: int = 8
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the layers' MLPs over the width; 0 for none."""
    bias: Literal["none", "distance", "overlap"] = "distance"
    """Added to attention from where a latent's anchor is. none: the published resampler. distance:
    minus the squared distance to the Gaussian's mean. overlap: minus the squared Mahalanobis
    distance under the Gaussian's covariance widened by the anchor spacing."""
    neighbours: int = 16
    """Gaussians of which a latent's local token is made (pipeline/models/local.py); 0 for none."""
    frequencies: int = 4
    """Waves on each axis in the local tokens, the slowest twice as long as the anchor spacing."""

    def __post_init__(self) -> None:
        _check_choices(self, "resampler")
        _check(self.layers >= 1, "resampler.layers", self.layers, "must be positive")
        _check(self.heads >= 1, "resampler.heads", self.heads, "must be positive")
        _check(self.mlp_ratio >= 0, "resampler.mlp_ratio", self.mlp_ratio, "must not be negative")
        _check(
            self.neighbours >= 0, "resampler.neighbours", self.neighbours, "must not be negative"
        )
        _check(
            0 <= self.frequencies <= 16,
            "resampler.frequencies",
            self.frequencies,
            "choose 0 to 16",
        )


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A vision encoder: the blocks of transformers' CLIP behind splats or patches."""

    input: Literal["splats", "patches"] = "splats"
    """What it reads: Gaussians, or the patches of an RGB image."""
    width: int = 512
    """Length of a token."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 8
    """Attention heads of a block; they divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the blocks' MLPs over the width."""
    activation: Activation = "gelu"
    """Of the blocks' MLPs; OpenAI's weights want quick_gelu."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in the norms."""
    tokens: int = 196
    """Tokens without CLS. Of a splat encoder: its latents; of patches: (image_size /
    patch_size)^2. Without a resampler there are as many as Gaussians."""
    patch_size: int = 16
    """Side of a patch in px; patches only."""
    image_size: int = 224
    """Side of the image in px; patches only."""
    stem: StemConfig = field(default_factory=StemConfig)
    """Splats only."""
    resampler: ResamplerConfig | None = field(default_factory=ResamplerConfig)
    """Splats only; None: the blocks get one token per Gaussian."""
    gradient_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them."""

    def __post_init__(self) -> None:
        _check_choices(self, "encoder")
        for name in ("width", "layers", "heads", "tokens", "patch_size", "image_size"):
            value = getattr(self, name)
            _check(value >= 1, f"encoder.{name}", value, "must be positive")
        _check(
            self.width % self.heads == 0,
            "encoder.width",
            self.width,
            f"must be a multiple of {self.heads} heads",
        )
        if self.input == "splats" and self.resampler is not None:
            _check(
                self.width % self.resampler.heads == 0,
                "encoder.width",
                self.width,
                f"must be a multiple of the resampler's {self.resampler.heads} heads",
            )
        if self.input == "patches":
            side = self.image_size // self.patch_size
            _check(
                self.tokens == side * side,
                "encoder.tokens",
                self.tokens,
                f"{self.image_size} px in patches of {self.patch_size} px are {side * side} tokens",
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """CLIP's text tower."""

    width: int = 512
    """Length of a token."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 8
    """Attention heads of a block; they divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the blocks' MLPs over the width."""
    activation: Activation = "gelu"
    """Of the blocks' MLPs; OpenAI's weights want quick_gelu."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in the norms."""
    vocab_size: int = 49408
    """Tokens that the tokenizer knows."""
    context_length: int = 77
    """Tokens of a text; longer ones are cut."""
    eos_token_id: int = -1
    """The token whose place holds the text's embedding; -1 for the vocabulary's last one."""
    tokenizer: str = "openai/clip-vit-base-patch32"
    """Name on the Hugging Face hub, or a local folder with the tokenizer's files."""

    def __post_init__(self) -> None:
        _check_choices(self, "text")
        for name in ("width", "layers", "heads", "vocab_size", "context_length"):
            value = getattr(self, name)
            _check(value >= 1, f"text.{name}", value, "must be positive")
        _check(
            self.width % self.heads == 0,
            "text.width",
            self.width,
            f"must be a multiple of {self.heads} heads",
        )
        _check(
            -1 <= self.eos_token_id < self.vocab_size,
            "text.eos_token_id",
            self.eos_token_id,
            f"must be below the vocabulary's {self.vocab_size}",
        )

    @property
    def eos(self) -> int:
        """The end-of-text token."""
        return self.vocab_size - 1 if self.eos_token_id < 0 else self.eos_token_id


@dataclass(frozen=True, kw_only=True)
class GViTConfig:
    """What predicts Gaussians from pixels, and what they are (arXiv 2506.23532); the model's
    `encoder` reads them."""

    gaussians: int = 196
    """k, of each image. With a random start a model takes any other number at run time."""
    start: Literal["image", "random", "learned"] = "image"
    """What the predictor moves. random: Gaussians drawn anew for each sample. image: these, in the
    colours of the image under them. learned: the same k Gaussians for all images, which are
    weights."""
    predictor: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(input="patches", layers=6)
    )
    """Patch embedding and blocks; patches and Gaussians are its tokens."""
    bands: int = 6
    """Fourier bands of the positions in the embedding of Gaussians, as StemConfig.bands."""
    bias: Literal["none", "distance"] = "distance"
    """Added to the attention of Gaussians. distance: minus the squared distance between where they
    start and what they look at, times a factor of each head."""
    residual: float = 0.3
    """Factor of what the predictor adds to their start. With less they stay nearer to it, which a
    classifier beside a young predictor likes; few Gaussians, which must move far, want 1. 0: they
    stay where they are, a control."""
    renderer: Literal["sum", "alpha"] = "sum"
    """sum: the rendering of our shards, colours -1 to 1. alpha: composited, the first Gaussian in
    front, colours 0 to 1; fast on CUDA only, through gsplat."""
    cutoff: float = 3.0
    """Standard deviations beyond which a Gaussian is not rendered; sum only."""
    min_scale: float = 0.3
    """Smallest standard deviation, px. The largest is the image's side."""

    def __post_init__(self) -> None:
        _check_choices(self, "gvit")
        _check(self.gaussians >= 1, "gvit.gaussians", self.gaussians, "must be positive")
        _check(self.residual >= 0, "gvit.residual", self.residual, "must not be negative")
        _check(0 <= self.bands <= 16, "gvit.bands", self.bands, "choose 0 to 16")
        _check(0 < self.cutoff <= 6, "gvit.cutoff", self.cutoff, "choose up to 6")
        _check(self.min_scale > 0, "gvit.min_scale", self.min_scale, "must be positive")
        side, patch = self.predictor.image_size, self.predictor.patch_size
        kind = self.predictor.input
        _check(kind == "patches", "gvit.predictor.input", kind, "the predictor reads patches")
        _check(
            side % patch == 0,
            "gvit.predictor.image_size",
            side,
            f"must be a multiple of the patches' {patch} px: the rest would not be seen",
        )


@dataclass(frozen=True, kw_only=True)
class GViTLossConfig:
    """The loss of GViT, and how the classifier's gradient guides the Gaussians."""

    classification: float = 1.0
    """Weight of the cross-entropy."""
    reconstruction: float = 10.0
    """Weight of (1 - dssim) L1 + dssim (1 - SSIM), which is of the order of 0.1, while the
    cross-entropy is of the order of 1."""
    dssim: float = 0.2
    """Share of 1 - SSIM in it, as is usual for Gaussians (arXiv 2308.04079)."""
    perceptual: float = 0.0
    """Weight of the distance between the features of a CLIP's tokens; 0 for none."""
    tower: str = ""
    """That CLIP: a local folder, an open_clip checkpoint or a name that transformers knows. It is
    no part of the model, and not loaded where `perceptual` is 0."""
    gamma: float = 1.0
    """Factor of the cross-entropy's gradient with respect to the Gaussians once the ramp is over;
    0: unguided."""
    ramp: tuple[float, float] = (0.05, 0.2)
    """Shares of the run between which gamma rises from 0, linearly."""
    clip: float = 3.0
    """Largest entry of that gradient, in units of the root mean square of its sample's entries."""

    def __post_init__(self) -> None:
        for name in ("classification", "reconstruction", "perceptual", "gamma"):
            value = getattr(self, name)
            _check(value >= 0, f"gvit.{name}", value, "must not be negative")
        _check(0 <= self.dssim <= 1, "gvit.dssim", self.dssim, "choose 0 to 1")
        in_order = 0 <= self.ramp[0] <= self.ramp[1] <= 1
        _check(in_order, "gvit.ramp", self.ramp, "choose 0 <= begin <= end <= 1")
        _check(self.clip > 0, "gvit.clip", self.clip, "must be positive")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A CLIP (vision and text towers to one space) or a classifier (vision tower, linear head)."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    text: TextConfig | None = None
    """None: no text tower; with `num_classes` also None, the vision side alone (stage 1)."""
    embed_dim: int = 512
    """Of the space shared by images and texts."""
    num_classes: int | None = None
    """Set: a classifier."""
    gvit: GViTConfig | None = None
    """Set: a classifier of pixels by way of Gaussians that it predicts."""

    def __post_init__(self) -> None:
        _check(self.embed_dim >= 1, "embed_dim", self.embed_dim, "must be positive")
        if self.num_classes is not None:
            _check(self.num_classes >= 2, "num_classes", self.num_classes, "must be at least 2")
            _check(
                self.text is None, "num_classes", self.num_classes, "a classifier has no text tower"
            )
        if self.gvit is not None:
            _check(bool(self.num_classes), "num_classes", self.num_classes, "GViT is a classifier")
            kind = self.encoder.input
            _check(kind == "splats", "encoder.input", kind, "GViT's encoder reads splats")
