"""One image's splats as a PLY file of 3D Gaussians, for splat viewers; written by gsplat.

The picture lies in the plane z = 0, centred, its longer side 2 units, x right and y down (viewers
follow cameras, whose y points down). Every Gaussian becomes a thin disc.

Viewers composite by alpha; our rendering is a sum without opacities. So it cannot look the same,
least of all where many Gaussians overlap or colours are negative (viewers show those as black).
The opacity is the colour's largest magnitude, at most 0.99, and the colour is divided by it: a
Gaussian alone on black looks right, and a faint one hides little of what is behind it.

Left out: gsplat's compressed PLY, which divides by the picture's extent in z, and its .splat
format, whose colours are 8 bits without sign.
"""

from __future__ import annotations

import torch

from splatshard.pipeline.splats import Splats, scales_and_angles
from splatshard.schemas.errors import BackendError

SIDE = 2.0
THICKNESS = 1e-4
MIN_OPACITY, MAX_OPACITY = 1e-4, 0.99
SH_BAND_0 = 0.28209479177387814  # the constant spherical harmonic, 1 / (2 sqrt(pi))
FURTHER_BANDS = 15  # coefficients of degrees 1 to 3, all zero: viewers expect their columns


def ply_bytes(splats: Splats, height: int, width: int) -> bytes:
    """The PLY file of `splats` [1, N], pixel units of an image of `height` x `width` px.

    Masked Gaussians are left out. Raises BackendError where gsplat is not installed; its exporter
    needs no CUDA.
    """
    try:
        from gsplat.exporter import export_splats
    except Exception as e:
        raise BackendError(
            f"a .ply is written by gsplat, which cannot be imported ({e}): pip install gsplat"
        ) from e
    assert len(splats) == 1
    mask = splats.mask[0].cpu()
    means, cholesky, colors = (
        x[0].detach().cpu().float()[mask] for x in (splats.means, splats.cholesky, splats.colors)
    )
    count = len(means)
    unit = SIDE / max(height, width)
    centred = (means - torch.tensor([width / 2, height / 2])) * unit
    scales, angles = scales_and_angles(cholesky)
    thin = torch.full((count, 1), THICKNESS)
    opacities = colors.abs().amax(1).clamp(MIN_OPACITY, MAX_OPACITY)
    zero = torch.zeros(count)
    return export_splats(
        means=torch.cat((centred, torch.zeros(count, 1)), 1),
        scales=torch.cat((scales * unit, thin), 1).log(),
        quats=torch.stack(((angles / 2).cos(), zero, zero, (angles / 2).sin()), 1),
        opacities=opacities.logit(),
        sh0=((colors / opacities[:, None] - 0.5) / SH_BAND_0)[:, None],
        shN=torch.zeros(count, FURTHER_BANDS, 3),
        format="ply",
    )
