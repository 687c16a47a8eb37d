"""One picture as Gaussians, and what can be done with them: the library's front door.

    picture -> pixels -> fit -> SplatImage -> render, psnr, plot, augment, save, to_ply

Nothing is new here: a fit is the one that convert makes of the same pixels, before it prunes and
packs them, bit for bit.

A saved file is safetensors: `means` [N, 2], `cholesky` [N, 3] and `colors` [N, 3], float32 as in
Splats, and in its metadata `splatshard`, JSON of what they are drawn with.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real
from typing import cast, overload

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from splatshard.pipeline.data import augment as augment_module
from splatshard.pipeline.fitting.recipe import fit_images
from splatshard.pipeline.kernels.backend import Backend
from splatshard.pipeline.kernels.select import select_backend
from splatshard.pipeline.ply import ply_bytes
from splatshard.pipeline.psnr import psnr
from splatshard.pipeline.source.pixels import Picture, pixels_of, several
from splatshard.pipeline.splats import Splats, ellipses
from splatshard.pipeline.storage import fs
from splatshard.schemas.config import BackendName, DecodeConfig, FitConfig
from splatshard.schemas.errors import FormatVersionError, UsageError
from splatshard.schemas.plain import from_dict, to_dict
from splatshard.schemas.train import AugmentConfig

SUFFIX = ".safetensors"
FILE_VERSION = 1
PANEL_PX = 512
"""The longer side of each picture of a plot."""
GAP_PX = 8
DIM = 0.4
"""Of the rendering below ellipses."""
LARGEST_PX = 1 << 27
"""Of a rendering."""
WHOLE = DecodeConfig(resize="none")
"""A picture as it is."""


@dataclass(frozen=True, eq=False)
class SplatImage:
    """One picture of N Gaussians.

    splats         Splats [1, N] in main memory, none of them padding; px of height x width
    height, width  px
    cutoff         standard deviations, up to which a Gaussian is drawn
    decode         what was done to the picture before the fit; of an augmented one nothing is
                   known, and pictures are compared as they are
    """

    splats: Splats
    height: int
    width: int
    cutoff: float = 3.0
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    @property
    def num_gaussians(self) -> int:
        return self.splats.mask.shape[1]

    @property
    def means(self) -> Tensor:
        """[N, 2] x, y in px."""
        return self.splats.means[0]

    @property
    def cholesky(self) -> Tensor:
        """[N, 3] l11, l21, l22 in px, see Splats."""
        return self.splats.cholesky[0]

    @property
    def colors(self) -> Tensor:
        """[N, 3] RGB, signed; 1 is white."""
        return self.splats.colors[0]

    def __repr__(self) -> str:
        number = self.num_gaussians
        noun = "Gaussian" if number == 1 else "Gaussians"
        return f"SplatImage({number:,} {noun}, {self.width}x{self.height} px)"

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return self.to_png()

    def to_png(self, backend: BackendName = "auto") -> bytes:
        """As `render`, a PNG file."""
        stream = io.BytesIO()
        pillow(self.render(backend=backend)).save(stream, "PNG")
        return stream.getvalue()

    def render(
        self, height: int | None = None, width: int | None = None, *, backend: BackendName = "auto"
    ) -> Tensor:
        """The picture, float32 [3, height, width], 0 to 1, in main memory. At any size: Gaussians
        are drawn anew, not pixels resized (smaller ones alias: resize a picture of its own size).
        Without a size its own; with one side the other follows.

        Raises UsageError for a size that is none.
        """
        height, width = self._size(height, width)
        shown = self._resized(height, width)
        chosen = select_backend(backend)
        with torch.no_grad():
            image = chosen.render(shown.to(chosen.device), height, width, self.cutoff)[0]
        return image.clamp(0, 1).cpu()

    def to_pil(self, height: int | None = None, width: int | None = None) -> Image.Image:
        """As `render`, for Pillow, 8 bits."""
        return pillow(self.render(height, width))

    def psnr(self, picture: Picture) -> float:
        """dB against `picture`, which is cut and resized as the one that was fitted.

        Raises UsageError where it is of another size even so.
        """
        pixels = pixels_of(picture, self.decode)
        height, width = pixels.shape[1:]
        if (height, width) != (self.height, self.width):
            raise UsageError(
                f"the picture is of {width}x{height} px, these Gaussians of "
                f"{self.width}x{self.height}: resize one, as render({height}, {width}) does"
            )
        return float(psnr(self.render()[None], pixels[None]))

    def plot(self, picture: Picture | None = None, side: int = PANEL_PX) -> Image.Image:
        """The rendering and its Gaussians, as ellipses of one standard deviation over it, beside
        each other; before them `picture`, if given. The longer side of each is `side` px.

        Raises UsageError for a picture of another shape: it would be stretched.
        """
        check_whole(side=side)
        if side < 1:
            raise UsageError(f"side is {side}: choose 1 px or more")
        scale = side / max(self.height, self.width)
        height, width = (max(1, round(scale * x)) for x in (self.height, self.width))
        # not drawn smaller than it is: thin Gaussians would be hit by a pixel's centre or not
        own = self.to_pil(max(height, self.height), max(width, self.width))
        rendering = own.resize((width, height), Image.Resampling.BICUBIC)
        panels = [rendering, self._outlined(rendering)]
        if picture is not None:
            original = pillow(pixels_of(picture, self.decode))
            apart = abs(original.width * self.height - original.height * self.width)
            if apart > max(*original.size, self.height, self.width):  # more than a rounded side
                raise UsageError(
                    f"the picture is of {original.width}x{original.height} px, these Gaussians of "
                    f"{self.width}x{self.height}, another shape: give the one that they show"
                )
            panels.insert(0, original.resize((width, height), Image.Resampling.BICUBIC))
        whole = Image.new("RGB", (len(panels) * (width + GAP_PX) - GAP_PX, height), "white")
        for i, panel in enumerate(panels):
            whole.paste(panel, (i * (width + GAP_PX), 0))
        return whole

    def augment(
        self, config: AugmentConfig | None = None, *, seed: int | None = None
    ) -> SplatImage:
        """What training does to its samples, once: another picture of other Gaussians, of the
        configuration's size. Nothing is rendered. A seed gives the same every time. Raises
        UsageError for another configuration."""
        config = config or AugmentConfig(height=self.height, width=self.width)
        if not isinstance(config, AugmentConfig):
            raise UsageError(f"{config!r} is no AugmentConfig: make one (splatshard.schemas.train)")
        check_whole(seed=seed)
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        height, width = torch.tensor([self.height]), torch.tensor([self.width])
        found = augment_module.augment(self.splats, height, width, config, generator, self.cutoff)
        visible = found.map(lambda x: x[:, found.mask[0]].contiguous())
        return SplatImage(visible, config.height, config.width, self.cutoff, WHOLE)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file, for `load`: 32 bytes per Gaussian, nothing rounded. Raises
        UsageError for another suffix, StorageError and UnavailableError."""
        url = _checked_suffix(path, SUFFIX)
        fs.write_bytes(fs.absolute(url), self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        from safetensors.torch import save

        told = {
            "version": FILE_VERSION,
            "height": self.height,
            "width": self.width,
            "cutoff": self.cutoff,
            "decode": to_dict(self.decode),
        }
        tensors = {
            "means": self.means.contiguous(),
            "cholesky": self.cholesky.contiguous(),
            "colors": self.colors.contiguous(),
        }
        return save(tensors, {"splatshard": json.dumps(told)})

    def to_ply(self, path: str | os.PathLike[str]) -> None:
        """Write a .ply file for viewers of 3D Gaussians, which composite by alpha where this is a
        sum: it does not look the same (pipeline/ply.py). Raises UsageError for another suffix,
        BackendError without gsplat, StorageError and UnavailableError."""
        url = _checked_suffix(path, ".ply")
        fs.write_bytes(fs.absolute(url), ply_bytes(self.splats, self.height, self.width))

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Of a rendering, px."""
        check_whole(height=height, width=width)
        ratio = self.width / self.height
        if height is None:
            height = self.height if width is None else max(1, round(width / ratio))
        if width is None:
            width = max(1, round(height * ratio))
        if min(height, width) < 1 or height * width > LARGEST_PX:
            raise UsageError(
                f"a rendering of {width}x{height} px: choose sides of 1 px or more, and at most "
                f"{LARGEST_PX:,} px in all"
            )
        return height, width

    def _resized(self, height: int, width: int) -> Splats:
        """The same picture, stretched to `height` x `width` px."""
        x, y = width / self.width, height / self.height
        means, cholesky, colors, mask = self.splats.fields
        return Splats(
            means * means.new_tensor([x, y]),
            cholesky * cholesky.new_tensor([x, y, y]),  # diag(x, y) L stays lower triangular
            colors,
            mask,
        )

    def _outlined(self, rendering: Image.Image) -> Image.Image:
        """`rendering`, dimmed, and an ellipse in the colour of each Gaussian, faint ones below."""
        splats = self._resized(rendering.height, rendering.width)
        strength = splats.colors[0].abs().amax(1)
        tints = splats.colors[0].abs() / strength.clamp(min=1e-6)[:, None]
        points = (2 * ellipses(splats)[0]).tolist()  # drawn large: Pillow's lines are jagged
        base = rendering.point(lambda value: value * DIM).resize(
            (2 * rendering.width, 2 * rendering.height), Image.Resampling.BICUBIC
        )
        draw = ImageDraw.Draw(base)
        for i in strength.argsort().tolist():
            color = tuple(round(255 * c) for c in tints[i].tolist())
            for begin, end in pairwise(points[i]):
                draw.line([*begin, *end], fill=color, width=2)
        return base.resize(rendering.size, Image.Resampling.LANCZOS)


@overload
def fit(
    picture: Picture,
    num_gaussians: int | None = None,
    *,
    gaussians_per_megapixel: float | None = None,
    max_gaussians: int | None = None,
    steps: int = 150,
    target_psnr: float | None = None,
    image_size: int | None = None,
    backend: BackendName = "auto",
) -> SplatImage: ...
@overload
def fit(
    picture: Sequence[Picture],
    num_gaussians: int | None = None,
    *,
    gaussians_per_megapixel: float | None = None,
    max_gaussians: int | None = None,
    steps: int = 150,
    target_psnr: float | None = None,
    image_size: int | None = None,
    backend: BackendName = "auto",
) -> list[SplatImage]: ...
def fit(
    picture: Picture | Sequence[Picture],
    num_gaussians: int | None = None,
    *,
    gaussians_per_megapixel: float | None = None,
    max_gaussians: int | None = None,
    steps: int = 150,
    target_psnr: float | None = None,
    image_size: int | None = None,
    backend: BackendName = "auto",
) -> SplatImage | list[SplatImage]:
    """Gaussians of a picture, or of each of several, which may be of several sizes.

    num_gaussians  how many; 400 where nothing is said
    gaussians_per_megapixel  as many per 10^6 px of the fitted picture, in place of num_gaussians
    steps          of the optimisation, at most
    target_psnr    dB at which it ends earlier
    max_gaussians  a picture that misses target_psnr gets more Gaussians, where its error is, up to
                   so many
    image_size     px of the centred square to which the picture is cut and resized, as convert does
                   it; None: the whole picture at its own size
    backend        auto, cpu, triton or reference

    Raises UsageError for what is no picture, or may mean more than one, and for other arguments;
    SourceError and UnavailableError for a file that cannot be read, BackendError for a backend.
    """
    check_whole(num_gaussians=num_gaussians, max_gaussians=max_gaussians)
    check_whole(steps=steps, image_size=image_size)
    for name, value in (
        ("gaussians_per_megapixel", gaussians_per_megapixel),
        ("target_psnr", target_psnr),
    ):
        if value is not None and not isinstance(value, Real):
            raise UsageError(f"{name} is {value!r}: it must be a number")
    if None not in (num_gaussians, gaussians_per_megapixel):
        raise UsageError(
            f"num_gaussians={num_gaussians} does not go with gaussians_per_megapixel="
            f"{gaussians_per_megapixel}, which stands for it: leave one of them out"
        )
    config = FitConfig(
        num_gaussians=400 if num_gaussians is None else num_gaussians,
        gaussians_per_megapixel=gaussians_per_megapixel,
        max_gaussians=max_gaussians,
        steps=steps,
        target_psnr=target_psnr,
    )
    decode = WHOLE if image_size is None else DecodeConfig(image_size=image_size)
    chosen = select_backend(backend)
    if not several(picture):
        return fit_with(cast(Picture, picture), config, decode, chosen)
    return [fit_with(each, config, decode, chosen) for each in picture]


def fit_with(
    picture: Picture, config: FitConfig, decode: DecodeConfig, backend: Backend
) -> SplatImage:
    """As `fit`, with all that can be chosen of a conversion."""
    target = pixels_of(picture, decode)[None].to(backend.device)
    splats, _ = fit_images(target, config, backend)
    height, width = target.shape[2:]
    return SplatImage(splats.to(torch.device("cpu")), height, width, config.cutoff, decode)


def load(path: str | os.PathLike[str]) -> SplatImage:
    """What `SplatImage.save` wrote, bit for bit. Nothing in the file is executed.

    Raises UsageError for another file or a damaged one, SourceError where there is none, and
    UnavailableError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as tensors_in

    url = _checked_suffix(path, SUFFIX)
    with fs.open_read(fs.absolute(url)) as stream:
        data = stream.read()
    try:
        tensors = tensors_in(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        told = json.loads(header["__metadata__"]["splatshard"])
        if told["version"] > FILE_VERSION:
            raise FormatVersionError(f"{url} has version {told['version']}: update splatshard")
        means, cholesky, colors = (tensors[n][None] for n in ("means", "cholesky", "colors"))
        splats = Splats(means, cholesky, colors, torch.ones(means.shape[:2], dtype=torch.bool))
        decode = from_dict(DecodeConfig, told["decode"])
        image = SplatImage(splats, told["height"], told["width"], told["cutoff"], decode)
        _check_loaded(image)
    except (SafetensorError, LookupError, TypeError, AssertionError, ValueError) as e:
        if isinstance(e, FormatVersionError):
            raise
        raise UsageError(
            f"{url} is damaged, or no file that SplatImage.save wrote ({e}): save it again"
        ) from e
    return image


def _check_loaded(image: SplatImage) -> None:
    for values, width in ((image.means, 2), (image.cholesky, 3), (image.colors, 3)):
        assert values.shape == (image.num_gaussians, width), "its shapes"
        assert values.dtype == torch.float32, "its types"
        assert bool(values.isfinite().all()), "its values"
    assert bool((image.cholesky[:, ::2] > 0).all()), "its factors"
    sides = (image.height, image.width)
    assert all(isinstance(side, int) and 1 <= side <= LARGEST_PX for side in sides), "its size"
    FitConfig(cutoff=image.cutoff)


def check_whole(**values: object) -> None:
    """Raises UsageError unless each is a whole number, of 64 bits, or None."""
    for name, value in values.items():
        number = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (number and abs(int(cast(int, value))) < 1 << 63):
            raise UsageError(f"{name} is {value!r}: it must be a whole number")


def _checked_suffix(given: str | os.PathLike[str], suffix: str) -> str:
    path = os.fsdecode(given)
    if not path.lower().endswith(suffix):
        raise UsageError(f"{path}: end it in {suffix}")
    return path


def pillow(pixels: Tensor) -> Image.Image:
    """[3, H, W], 0 to 1, as 8 bits."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
