"""Where a model spends its splats: away from where nobody sees them, to where the pictures are wrong."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kinesplat.dataset.frames import Frames
from kinesplat.gaussians import PARAMETERS, Parameters
from kinesplat.rasterizer import rasterize_links
from kinesplat.rasterizer.projection import quats_to_rotations
from kinesplat.rasterizer.spherical_harmonics import SH_C0

SHRINK = 1.6
"""A halved splat's scale along the axis that is cut, over that of its parent's."""
APART = 0.5
"""Distance of a half from the middle of its parent, in the parent's standard deviations."""


@dataclass(frozen=True)
class Worth:
    """What each splat is worth, over a number of pictures.

    Attributes:
        contribution: ``(n,)`` most pixels that it fills in one picture [px].
        error: ``(n,)`` absolute error of the pictures, each pixel's shared among its splats by blending weight [px].
    """

    contribution: Float[Tensor, " n"]
    error: Float[Tensor, " n"]


def worth_of(
    parameters: Parameters,
    link_index: Int[Tensor, " n"],
    Ts_world_link: Float[Tensor, "m links 4 4"],
    frames: Frames,
    eps2d: float,
) -> Worth:
    """Measure every splat on all of `frames`.

    The error that falls to a splat, sum over pixels of weight times error, is the gradient of the error-weighted
    picture with respect to the splat's colour: one backward pass of a model with plain colours.
    """
    device = parameters.means.device
    contribution, error = (torch.zeros(len(parameters), device=device) for _ in range(2))
    gaussians = replace(parameters, **{k: v.detach() for k, v in parameters.tensors().items()}).activate()
    for row in range(len(frames)):
        picture = frames.select([row])
        camera, Ts = picture.camera.to(device), Ts_world_link[row : row + 1]
        with torch.no_grad():
            rgb = rasterize_links(gaussians, link_index, Ts, camera, eps2d=eps2d, outputs=("rgb",)).rgb
        assert rgb is not None
        wrong = (rgb.clamp(0.0, 1.0) - picture.rgb.to(device) / 255.0).abs().mean(-1)
        colours = torch.zeros(len(parameters), 1, 3, requires_grad=True, device=device)
        plain = replace(gaussians, sh=colours)
        out = rasterize_links(plain, link_index, Ts, camera, eps2d=eps2d, outputs=("rgb", "contribution"))
        assert out.rgb is not None
        assert out.contribution is not None
        (gradient,) = torch.autograd.grad((out.rgb[..., 0] * wrong).sum(), colours)
        error += gradient[:, 0, 0] / SH_C0
        contribution = torch.maximum(contribution, out.contribution[0])
    return Worth(contribution, error)


def choose(
    worth: Worth, wanted: int, least_contribution: float, most_share: float
) -> tuple[Bool[Tensor, " n"], Int[Tensor, " m"]]:
    """Which splats to keep, and which of those to cut in two so that about `wanted` are there afterwards.

    Args:
        worth: of every splat.
        wanted: number of splats afterwards.
        least_contribution: splats that never fill as much are dropped [px].
        most_share: of the splats that may be cut at a time.

    Returns:
        mask of those to keep, and indices of those to cut, by falling error.
    """
    keep = worth.contribution >= least_contribution
    room = max(0, min(wanted - int(keep.sum()), int(most_share * len(keep))))
    ranked = torch.where(keep, worth.error, -1.0).argsort(descending=True, stable=True)[:room]
    return keep, ranked[worth.error[ranked] > 0.0]


def halves(parents: Parameters) -> Parameters:
    """Two splats for each parent, side by side along its longest axis: first all of one side, then all of the other."""
    gaussians = parents.activate()
    longest = gaussians.scales.argmax(-1, keepdim=True)
    R = quats_to_rotations(gaussians.quats)
    axis = torch.take_along_dim(R, longest[..., None, :], dim=-1)[..., 0]
    offset = APART * gaussians.scales.take_along_dim(longest, -1) * axis
    log_scales = parents.log_scales.scatter_add(
        -1, longest, torch.full_like(longest, -math.log(SHRINK), dtype=offset.dtype)
    )
    sides = [replace(parents, means=parents.means + side * offset, log_scales=log_scales) for side in (1.0, -1.0)]
    return joined(sides)


def joined(parts: list[Parameters]) -> Parameters:
    """All rows of `parts`, in order."""
    return replace(parts[0], **{name: torch.cat([getattr(p, name).detach() for p in parts]) for name in PARAMETERS})
