"""Contours of a rendered robot: where it hides what is behind it, where links meet, and where its colour changes.

White before white has no outline by colour, but these lines show in photographs all the same.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.inverse.lighting import albedo_of
from kinesplat.rasterizer import Render
from kinesplat.rasterizer.spherical_harmonics import SH_C0
from kinesplat.self_model import SelfModel

DEPTH_JUMP = 0.02
PATCH = 2
PATCH_SIGMA = 1.0
SEAM_WEIGHT = 0.5
TONE, TONE_STEP = (0.9, 0.6, -0.5), 0.15
COVERED = 0.5


@dataclass(frozen=True)
class Contours:
    """Points on the contours of a batch of pictures, the same number for each, padded by points of weight 0.

    Attributes:
        pixels: ``(batch, n, 2)`` where they are in the picture [px].
        normals: ``(batch, n, 2)`` unit vectors (x, y) across the contour, away from the surface in front.
        points: ``(batch, n, 3)`` the surface points in front, in the camera's frame [m].
        links: ``(batch, n)`` their links.
        weights: ``(batch, n)`` 1 on occluding contours, less on seams between links.
        length: ``(batch,)`` weighted number of contour pixels.
        lines: ``(batch, height, width)`` those pixels.
    """

    pixels: Float[Tensor, "batch n 2"]
    normals: Float[Tensor, "batch n 2"]
    points: Float[Tensor, "batch n 3"]
    links: Int64[Tensor, "batch n"]
    weights: Float[Tensor, "batch n"]
    length: Float[Tensor, " batch"]
    lines: Bool[Tensor, "batch height width"]

    @classmethod
    def of(cls, render: Render, camera: Camera, count: int) -> "Contours":
        """At most `count` points of every picture, spread evenly over its contours.

        Args:
            render: colours without shading (`unlit`), alpha, depth and link_id, batch ``(batch,)``.
            camera: of the pictures, batch ``(batch,)`` or ``()``.
        """
        alpha, depth, link = render.alpha, render.depth, render.link_id
        assert render.rgb is not None
        assert alpha is not None
        assert depth is not None
        assert link is not None
        inside = alpha > COVERED
        z = torch.where(inside, depth, torch.inf)
        tone = render.rgb @ torch.tensor(TONE).to(alpha)
        occluding, seam = contour_pixels(z, link, tone)
        lines = occluding | seam
        rows, valid = spread_choice(lines, count)
        batch, height, width = alpha.shape
        y, x = rows // width, rows % width
        b = torch.arange(batch)[:, None]
        front, jump = z[b, y, x], (1.0 + DEPTH_JUMP) * z[b, y, x]
        step = torch.arange(-PATCH, PATCH + 1)
        py = (y[..., None, None] + step[:, None]).clamp(0, height - 1)
        px = (x[..., None, None] + step[None]).clamp(0, width - 1)
        at = b[..., None, None]
        hidden = 1.0 - alpha[at, py, px]
        further = (inside[at, py, px] & (z[at, py, px] > jump[..., None, None])).to(hidden)
        differs = (tone[at, py, px] - tone[b, y, x][..., None, None]).abs() > TONE_STEP
        differs = differs | (link[at, py, px] != link[b, y, x][..., None, None])
        other = (inside[at, py, px] & differs).to(hidden)
        rim = occluding[b, y, x]
        behind = torch.where(rim[..., None, None], torch.maximum(hidden, further), torch.maximum(hidden, other))
        normals, shift = straight_edge(behind)
        valid = valid & (normals.norm(dim=-1) > 0.5)
        centres = torch.stack([x, y], dim=-1) + 0.5
        pixels = centres + shift[..., None] * normals
        K = camera.K.expand(batch, 3, 3)
        rays = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1) @ torch.linalg.inv(K).mT
        points = rays * torch.where(valid, front, 1.0)[..., None]
        weights = torch.where(rim, 1.0, SEAM_WEIGHT) * valid
        links = link[b, y, x].clamp(min=0).long()
        return cls(pixels, normals, points, links, weights, length_of(lines, occluding), lines)


def contour_pixels(
    z: Float[Tensor, "batch height width"],
    link: Integer[Tensor, "batch height width"],
    tone: Float[Tensor, "batch height width"],
) -> tuple[Bool[Tensor, "batch height width"], Bool[Tensor, "batch height width"]]:
    """Pixels on the near side of an occluding contour, and those on a seam between two links or colours.

    The border of the picture is no contour.

    Args:
        z: depth, infinite off the robot.
        link: of every pixel, -1 off the robot.
        tone: of its colour.
    """
    further = (1.0 + DEPTH_JUMP) * z
    occluding, seam = (torch.zeros(z.shape, dtype=torch.bool, device=z.device) for _ in range(2))
    for axis in (1, 2):
        size = z.shape[axis] - 1
        a, b = (slice_of(axis, start, size) for start in (0, 1))
        first, second = z[b] > further[a], z[a] > further[b]
        occluding[a] |= first
        occluding[b] |= second
        seam[a] |= ((link[a] != link[b]) | ((tone[a] - tone[b]).abs() > TONE_STEP)) & ~(first | second)
    return occluding, seam & ~occluding & torch.isfinite(z)


def length_of(
    lines: Bool[Tensor, "batch height width"], occluding: Bool[Tensor, "batch height width"]
) -> Float[Tensor, " batch"]:
    """Weighted number of contour pixels of every picture."""
    b, place = torch.nonzero(lines.flatten(1), as_tuple=True)
    weight = torch.where(occluding.flatten(1)[b, place], 1.0, SEAM_WEIGHT)
    return torch.bincount(b, weight, minlength=len(lines)).float()


def inner_choice(
    render: Render, lines: Bool[Tensor, "batch height width"], count: int
) -> tuple[Int64[Tensor, "batch count"], Bool[Tensor, "batch count"], Float[Tensor, " batch"]]:
    """At most `count` pixels of the robot that are not within two of its contours, and their whole number.

    Of every three rows and columns one is looked at.

    Returns:
        index of every pixel in the flat picture; which entries are real; number of such pixels in every picture.
    """
    assert render.alpha is not None
    sparse = (slice(None), slice(1, None, 3), slice(1, None, 3))
    inside = (render.alpha[sparse] > COVERED) & ~grown(grown(lines))[sparse]
    rows, real = spread_choice(inside, count)
    across, width = inside.shape[2], lines.shape[2]
    area = 9.0 * torch.bincount(torch.nonzero(inside.flatten(1))[:, 0], minlength=len(inside))
    return (3 * (rows // across) + 1) * width + 3 * (rows % across) + 1, real, area


def grown(mask: Bool[Tensor, "batch height width"]) -> Bool[Tensor, "batch height width"]:
    """The mask and its neighbours."""
    rows = mask.clone()
    rows[:, 1:] |= mask[:, :-1]
    rows[:, :-1] |= mask[:, 1:]
    both = rows.clone()
    both[:, :, 1:] |= rows[:, :, :-1]
    both[:, :, :-1] |= rows[:, :, 1:]
    return both


def slice_of(axis: int, start: int, size: int) -> tuple[slice, ...]:
    """Index of `size` entries along `axis` from `start` on."""
    return (*([slice(None)] * axis), slice(start, start + size))


def spread_choice(
    mask: Bool[Tensor, "batch height width"], count: int
) -> tuple[Int64[Tensor, "batch count"], Bool[Tensor, "batch count"]]:
    """At most `count` pixels of every mask at even steps from row to row, and which of the entries are real."""
    b, place = torch.nonzero(mask.flatten(1), as_tuple=True)
    total = torch.bincount(b, minlength=len(mask))
    rank = torch.arange(len(b)) - (total.cumsum(0) - total)[b]
    share = count / total.clamp(min=count).double()
    slot = (rank * share[b]).long()
    kept = slot > ((rank - 1) * share[b]).floor().long()
    rows = torch.zeros(len(mask), count, dtype=torch.long)
    rows[b[kept], slot[kept]] = place[kept]
    return rows, torch.arange(count) < total.clamp(max=count)[:, None]


def straight_edge(
    behind: Float[Tensor, "*batch s s"],
) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch"]]:
    """Normal (x, y) of a straight edge in patches that are 1 behind it, and its distance from the middle [px].

    Under a Gaussian window the share behind the edge is its normal distribution function; that is inverted. Patches
    without an edge have normal 0.
    """
    step = torch.arange(-PATCH, PATCH + 1).to(behind)
    window = torch.exp(-0.5 * (step[:, None] ** 2 + step[None] ** 2) / PATCH_SIGMA**2)
    window = window / window.sum()
    weighted = behind * window
    slope = torch.stack(
        [(weighted * step[None]).sum(dim=(-2, -1)), (weighted * step[:, None]).sum(dim=(-2, -1))], dim=-1
    )
    share = weighted.sum(dim=(-2, -1)).clamp(0.01, 0.99)
    size = slope.norm(dim=-1, keepdim=True)
    normals = torch.where(size > 0.02, slope / size.clamp(min=1e-9), 0.0)
    return normals, -PATCH_SIGMA * torch.special.ndtri(share)


def unlit(model: SelfModel) -> SelfModel:
    """The model with colours that no light shades: those which a headlight straight in front of them shows."""
    splats = model.parameters.activate()
    sh = ((albedo_of(splats) - 0.5) / SH_C0)[:, None]
    return replace(model, parameters=replace(model.parameters, sh=sh, sh_direction="splat"), shader=None)
