"""Random scenes for the rasteriser's tests, and the pixels of a scene that lie near a threshold."""

import math

import torch
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer.projection import project, quats_to_rotations
from kinesplat.rasterizer.reference import ALPHA_MAX, ALPHA_MIN, TRANSMITTANCE_MIN

FIELDS = ("means", "quats", "scales", "opacities", "sh")


def random_gaussians(
    n: int,
    *,
    batch: tuple[int, ...] = (),
    coefficients: int = 9,
    size: float = 0.06,
    dtype: torch.dtype = torch.float64,
) -> Gaussians:
    """Splats around the origin, about `size` metres large, rounded to float32 so that both precisions see the same."""
    values = (
        0.3 * torch.randn(*batch, n, 3),
        torch.randn(*batch, n, 4),
        size * torch.exp(0.5 * torch.randn(*batch, n, 3)),
        0.05 + 0.9 * torch.rand(*batch, n),
        0.3 * torch.randn(*batch, n, coefficients, 3),
    )
    return Gaussians(*(v.to(dtype) for v in values))


def random_transforms(*batch: int, spread: float = 0.1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rigid transforms, rounded to float32."""
    T = torch.eye(4).repeat(*batch, 1, 1)
    T[..., :3, :3] = quats_to_rotations(torch.randn(*batch, 4))
    T[..., :3, 3] = spread * torch.randn(*batch, 3)
    return T.to(dtype)


def look(width: int = 40, height: int = 36, distance: float = 2.0, dtype: torch.dtype = torch.float64) -> Camera:
    """A camera that sees the origin, rounded to float32."""
    eye = torch.randn(3)
    camera = Camera.look_at(distance * eye / eye.norm(), (0.0, 0.0, 0.0), width=width, height=height)
    return camera.to(dtype=dtype)


def in_dtype(gaussians: Gaussians, dtype: torch.dtype, requires_grad: bool = True) -> Gaussians:
    """Fresh leaves of another dtype."""
    leaves = {f: getattr(gaussians, f).detach().to(dtype).clone() for f in FIELDS}
    return Gaussians(**{f: v.requires_grad_(requires_grad) for f, v in leaves.items()})


def away_from_thresholds(gaussians: Gaussians, camera: Camera, eps2d: float = 0.3, margin: float = 1e-4) -> Tensor:
    """1.0 at pixels where no alpha or transmittance lies within the relative `margin` of a threshold, else 0.0."""
    with torch.no_grad():
        size = camera.width, camera.height
        T = camera.T_cam_world.expand(len(gaussians), 4, 4)
        kept = torch.nonzero(project(gaussians, T, camera.K, size, eps2d).depths >= 0.01)[:, 0]
        kept_gaussians = Gaussians(**{f: getattr(gaussians, f)[kept] for f in FIELDS})
        splats = project(kept_gaussians, T[kept], camera.K, size, eps2d)
        order = torch.argsort(splats.depths, stable=True)
        x = torch.arange(camera.width, dtype=torch.float64) + 0.5
        y = torch.arange(camera.height, dtype=torch.float64) + 0.5
        d = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None] - splats.means[order, None, None]
        S = splats.covariances[order]
        d0, d1 = d[..., 0], d[..., 1]
        a, b, c = (S[:, i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
        sigma = 0.5 * (c * d0 * d0 - 2 * b * d0 * d1 + a * d1 * d1) / (a * c - b * b)
        raw = kept_gaussians.opacities[order, None, None] * torch.exp(-sigma)
        near = ((raw / ALPHA_MIN - 1).abs() < margin) | ((raw / ALPHA_MAX - 1).abs() < margin)
        alpha = torch.where(raw >= ALPHA_MIN, raw.clamp(max=ALPHA_MAX), 0.0)
        after = torch.cumprod(1 - alpha, 0)
        near |= (after / TRANSMITTANCE_MIN - 1).abs() < 100 * margin
        return (~near.any(0)).to(torch.float64)


def relative_error(value: Tensor | None, truth: Tensor | None) -> float:
    """Norm of the difference over the norm of the truth."""
    assert value is not None
    assert truth is not None
    assert torch.isfinite(value).all()
    scale = float(truth.norm())
    difference = float((value.double() - truth.double()).norm())
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
