"""GViT: Gaussians learned together with the classifier that reads them.

    B images, P patches, k Gaussians, T = 1 + P + k tokens, F features, D width of the predictor,
    C classes; M and N places

    pixels [B, 3, H, W] -> patch embeddings [B, 1 + P, D] (as in PatchEncoder, CLS included)
    g0 [B, k, 9], drawn, in the pixels' colours -> features [B, k, F] -> Gaussian tokens [B, k, D]
    both, concatenated  -> blocks -> the k last tokens -> MLP -> delta [B, k, 9]
    g = g0 + r delta    -> Splats -> SplatEncoder, one token each -> logits [B, C]
    g                   -> Splats -> render -> [B, 3, H, W]

After arXiv 2506.23532; gaussian_space.py says what the nine numbers are. Two losses meet in g: the
rendering's distance from the image, and the cross-entropy of the classifier. The second one is the
guidance: on its way from the classifier to g its gradient is clipped, and multiplied by gamma,
which is 0 until a ramp begins. The classifier's own weights always get their whole gradient.

Not published, and so ours:
- The maps from g to Gaussians, and the draw of g0.
- Clipping is relative, to `clip` times the root mean square of the sample's own gradient. An
  absolute range would depend on batch size, micro-batches, the scale of fp16 and how far training
  has come. In the space of g the nine numbers can share one.
- The last layer starts near zero: the first picture is that of g0.
- Gaussians attend by distance from where they start. Without it attention has to learn first which
  patch is where: on digits (k = 24, 200 steps, one seed) 13.2 dB against 17.6. The bias is a tensor
  [B, heads, T, T], the price of blocks that are transformers' own.
- A Gaussian's token has no embedding of its place in the list; it is known by its numbers. So a
  model takes any number of Gaussians, and their order means nothing (but for alpha's front).
- At evaluation all images start from the same draw, seed 0.
- Drawn Gaussians take the colour of the image under them. From grey ones a predictor has to learn
  first what an image is; until then more Gaussians are more that overlap and mean little each. On
  20 classes of Tiny-ImageNet (benchmarks/gvit.py, guided, k = 64 and 128) a classifier reaches 15.2
  and 10.7 % from grey, 23.0 and 23.1 % from the image's colours.

With `start` random they are grey: the paper's draws know nothing of the image, either. With `start`
learned, g0 is a weight, the same for all images: the ablation's learned queries.

Left out: several rounds of denoising, and the classifier's gradient as a step at evaluation, which
would need labels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splatshard.pipeline.models.encoder import SplatEncoder, run_blocks
from splatshard.pipeline.models.gaussian_space import (
    MARGIN,
    NUMBERS,
    colored,
    drawn,
    grid,
    splats_from_parameters,
)
from splatshard.pipeline.models.patches import PatchEncoder, normalised
from splatshard.pipeline.models.reconstruct import perceptual_loss, reconstruction_loss
from splatshard.pipeline.models.stem import wavenumbers
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.splats import Splats
from splatshard.schemas.errors import UsageError
from splatshard.schemas.model import EncoderConfig, GViTConfig, GViTLossConfig, ModelConfig

LAST_LAYER_STD = 1e-3
STEEPEST, FLATTEST = 1.3, 0.04
"""Slope of the first head's distance bias, and of the last head's as a share of it."""


class Guidance(NamedTuple):
    """How much of the classifier's gradient reaches g, as in `guided`."""

    gamma: float
    clip: float


UNGUIDED = Guidance(0.0, math.inf)


class Output(NamedTuple):
    """logits [B, C]; splats, those of g, with the gradient of whatever is made of them; g
    [B, k, 9], see gaussian_space.py."""

    logits: Tensor
    splats: Splats
    g: Tensor


class GViT(nn.Module):
    """Pixels to Gaussians to classes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.gvit is not None, "GViT's config has gvit"
        assert config.num_classes is not None, "a classifier's config has num_classes"
        self.config, self.space = config, config.gvit
        self.predictor = GaussianPredictor(config.gvit)
        self.encoder = SplatEncoder(config.encoder)
        self.head = nn.Linear(config.encoder.width, config.num_classes)
        nn.init.zeros_(self.head.weight)  # the loss starts at log C
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        pixels: Tensor,
        seeds: Tensor | None = None,
        gamma: float = 0.0,
        clip: float = math.inf,
        count: int | None = None,
    ) -> Output:
        """Pixels [B, 3, H, W], 0 to 1, H and W the predictor's image_size; `seeds` int64 [B] of the
        samples' draws, None at evaluation; `gamma` and `clip` as in `guided`; `count`: another
        number of Gaussians than the config's."""
        height, width = pixels.shape[2:]
        g = self.predictor(pixels, seeds, count)
        logits = self.classify(guided(g, gamma, clip), height, width)
        return Output(logits, splats_from_parameters(g, height, width, self.space), g)

    def classify(self, g: Tensor, height: int, width: int) -> Tensor:
        """Logits [B, C] of g [B, k, 9] on images of this size."""
        return self.head(self.read(g, height, width))

    def read(self, g: Tensor, height: int, width: int) -> Tensor:
        """The encoder's CLS token [B, D] of g [B, k, 9] on images of this size."""
        heights, widths = (torch.full((len(g),), n, device=g.device) for n in (height, width))
        return self.encoder(splats_from_parameters(g, height, width, self.space), heights, widths)


class GaussianPredictor(nn.Module):
    """Pixels to g [B, k, 9]. The tower's weights are named as PatchEncoder's, and fit those of an
    RGB model."""

    def __init__(self, config: GViTConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.predictor.width, config.predictor.image_size
        features = NUMBERS + 1 + 4 * config.bands
        self.embedding = nn.Sequential(
            nn.Linear(features, width), nn.GELU(), nn.Linear(width, width)
        )
        self.tower = PatchEncoder(config.predictor)
        last = nn.Linear(width, NUMBERS)
        nn.init.normal_(last.weight, std=LAST_LAYER_STD)
        nn.init.zeros_(last.bias)
        self.residual = nn.Sequential(nn.Linear(width, width), nn.GELU(), last)
        self.start: nn.Parameter | None = None
        if config.start == "learned":
            seed = torch.zeros(1, dtype=torch.int64)
            self.start = nn.Parameter(drawn(seed, config.gaussians, side, side, config)[0])

    def forward(
        self, pixels: Tensor, seeds: Tensor | None = None, count: int | None = None
    ) -> Tensor:
        """Pixels [B, 3, H, W] to g [B, k, 9], float32 whatever autocast says; the arguments are
        GViT's."""
        g0 = self.g0(pixels, seeds, count)
        bias = None
        with torch.autocast(pixels.device.type, enabled=False):
            features_BkF = self._features(g0)
            if self.config.bias == "distance":
                bias = distance_bias(g0, self.config.predictor)
        patches = self.tower.embeddings(normalised(pixels))  # [B, 1 + P, D]
        tokens_BkD = self.embedding(features_BkF)
        if bias is not None:  # autocast would cast it in every block, and keep each copy
            bias = bias.to(tokens_BkD.dtype)
        x_BTD = torch.cat((patches, tokens_BkD.to(patches.dtype)), 1)
        checkpointed = self.config.predictor.gradient_checkpointing
        x_BTD = run_blocks(self.tower, x_BTD, checkpointed, bias)
        x_BkD = cast(nn.Module, self.tower.post_layernorm)(x_BTD[:, -g0.shape[1] :])
        return g0 + self.config.residual * self.residual(x_BkD).float()

    def g0(self, pixels: Tensor, seeds: Tensor | None = None, count: int | None = None) -> Tensor:
        """What is moved, float32 [B, k, 9], for pixels [B, 3, H, W] and seeds int64 [B]. Raises
        UsageError for another k than there are learned Gaussians."""
        batch, _, height, width = pixels.shape
        count = count or self.config.gaussians
        if self.start is not None:
            if count != len(self.start):
                raise UsageError(
                    f"{count} Gaussians: this model has learned {len(self.start)}; "
                    "only drawn starts (image, random) take another number"
                )
            return self.start.float().expand(batch, -1, -1)
        if seeds is None:
            seeds = torch.zeros(1, dtype=torch.int64)
        g = drawn(seeds.to(pixels.device), count, height, width, self.config)
        g = g.expand(batch, -1, -1)
        return colored(g, pixels, self.config) if self.config.start == "image" else g

    def _features(self, g: Tensor) -> Tensor:
        """[B, k, 9] to [B, k, F]: numbers, waves of the positions, the angle's two."""
        places_Bk2 = 2 * g[..., :2].sigmoid() - 1
        waves = places_Bk2[..., None] * wavenumbers(self.config.bands, g)
        angle = 2 * g[..., 4:5]
        return torch.cat(
            (
                places_Bk2,
                waves.sin().flatten(2),
                waves.cos().flatten(2),
                g[..., 2:4],
                angle.sin(),
                angle.cos(),
                g[..., 5:],
            ),
            -1,
        )


@torch.no_grad()
def distance_bias(g0: Tensor, config: EncoderConfig) -> Tensor:
    """What is added to the attention's logits of Gaussians g0 [B, k, 9], float32 [B, heads, T, T]
    with T = 1 + P + k: in the rows of Gaussians minus the squared distance to patches and
    Gaussians, in patches, times the head's slope. Nothing for CLS."""
    side = config.image_size // config.patch_size
    patches_P2, _ = grid(config.tokens, side, side, g0.device)
    places_Bk2 = (1 + 2 * MARGIN) * g0[..., :2].sigmoid() - MARGIN
    seen_BM2 = torch.cat((patches_P2.expand(len(g0), -1, -1), places_Bk2), 1)
    distances_BkM = squared_distances(side * places_Bk2, side * seen_BM2)
    heads = torch.arange(config.heads, device=g0.device)
    slopes = STEEPEST * FLATTEST ** (heads / max(1, config.heads - 1))
    first, tokens = 1 + config.tokens, 1 + seen_BM2.shape[1]
    bias = g0.new_zeros(len(g0), config.heads, tokens, tokens)
    bias[:, :, first:, 1:] = -slopes[:, None, None] * distances_BkM[:, None]
    return bias


def squared_distances(a_BM2: Tensor, b_BN2: Tensor) -> Tensor:
    """|a - b|^2 [B, M, N], as one matrix product."""
    products = a_BM2 @ b_BN2.mT
    return a_BM2.square().sum(-1, True) + b_BN2.square().sum(-1)[:, None] - 2 * products


# Guidance


def guided(g: Tensor, gamma: float, clip: float = math.inf) -> Tensor:
    """g [B, k, 9] itself. Its gradient is clipped sample by sample, each entry to `clip` times the
    root mean square of all the sample's entries, and multiplied by `gamma`; 0 stops it."""
    return g.detach() if gamma == 0 else cast(Tensor, _Guided.apply(g, gamma, clip))


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, gamma: float, clip: float) -> Tensor:
        ctx.gamma, ctx.clip = gamma, clip
        return g.view_as(g)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        if math.isfinite(ctx.clip):
            sizes = gradient.flatten(1).norm(dim=1) / math.sqrt(max(1, gradient[0].numel()))
            limit = ctx.clip * sizes[:, None, None]
            gradient = gradient.clamp(-limit, limit)
        return ctx.gamma * gradient, None, None


def gamma_at(step: int, steps: int, config: GViTLossConfig) -> float:
    """Gamma of step `step` (from 0) of `steps`: 0 until the ramp begins, then linear up to the
    config's, which it keeps."""
    begin, end = (share * steps for share in config.ramp)
    if step < begin:
        return 0.0
    return config.gamma * (1.0 if step >= end else (step - begin) / (end - begin))


def guidance_at(step: int, steps: int, config: GViTLossConfig | None) -> Guidance:
    """Of step `step` (from 0) of `steps`; a run without such a loss has none."""
    return UNGUIDED if config is None else Guidance(gamma_at(step, steps, config), config.clip)


def gvit_loss(
    logits: Tensor,
    labels: Tensor,
    rendered: Tensor,
    pixels: Tensor,
    config: GViTLossConfig,
    tower: PatchEncoder | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over logits [B, C], labels int64 [B], and pictures [B, 3, H, W], and its parts.

    `tower`: from `reconstruct.load_tower`, where the config weighs the perceptual loss.
    """
    entropy = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    distance = reconstruction_loss(rendered, pixels, config.dssim)
    loss = config.classification * entropy + config.reconstruction * distance
    with torch.no_grad():
        metrics = {
            "accuracy": (logits.argmax(1) == labels).float().mean(),
            "entropy": entropy,
            "reconstruction": distance,
            "psnr": psnr(rendered, pixels).clamp(max=100).mean().float(),  # of a black image, say
        }
    if config.perceptual:
        assert tower is not None, "a perceptual loss has a tower"
        features = perceptual_loss(tower, rendered, pixels)
        loss = loss + config.perceptual * features
        metrics["perceptual"] = features
    return loss, {name: value.detach() for name, value in metrics.items()}
