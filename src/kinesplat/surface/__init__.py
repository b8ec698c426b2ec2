"""Robot surfaces to flat Gaussians bound to links.

Points are spread over the visual meshes in proportion to area; those that no outside camera sees in any of several
configurations are dropped; what is left of each link is cut into patches of about equal area, and each patch becomes
the Gaussian of its own mean and covariance. A patch ends at edges, so its Gaussian does not stick out over them.
"""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.description import LinkMesh
from kinesplat.errors import InputError
from kinesplat.gaussians import Parameters
from kinesplat.kinematics import KinematicTree
from kinesplat.surface.patches import cut_into_patches, patches_to_parameters
from kinesplat.surface.points import SurfacePoints, sample_meshes
from kinesplat.surface.visibility import seen_from_outside

__all__ = ["SurfacePoints", "sample_surface", "splats_per_link"]

POINTS_PER_SPLAT = 24
LEAST_POINTS = 200_000
AREA_EXPONENT = 0.8


def sample_surface(
    link_meshes: Sequence[LinkMesh], tree: KinematicTree, n: int, seed: int = 0
) -> tuple[Parameters, Int[Tensor, " n"]]:
    """Flat Gaussians over the visible surface of a robot, coloured as under a headlight.

    Args:
        link_meshes: visual surface, in link frames.
        tree: kinematics; visibility is judged in the canonical and a few random configurations.
        n: number of Gaussians.
        seed: of the points and configurations.

    Returns:
        Parameters in link frames with spherical harmonics of degree 2, and the link of each Gaussian ``(n,)``.

    Raises:
        InputError: no surface at all, or fewer Gaussians than links that can be seen.
    """
    rng = np.random.default_rng(seed)
    points = sample_meshes(link_meshes, max(LEAST_POINTS, POINTS_PER_SPLAT * n), rng)
    points = points.select(seen_from_outside(points, tree, rng))
    counts = splats_per_link(np.bincount(points.link, points.area, minlength=len(tree.link_names)), n)
    parts = []
    for link in np.flatnonzero(counts):
        members, count = points.select(points.link == link), int(counts[link])
        label, radius = cut_into_patches(members, count, rng)
        parts.append(patches_to_parameters(members, label, count, radius))
    parameters = Parameters(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Parameters)))
    return parameters, torch.from_numpy(np.repeat(np.arange(len(counts)), counts))


def splats_per_link(area: Float[np.ndarray, " links"], n: int) -> Int[np.ndarray, " links"]:
    """Share `n` splats in proportion to ``area ** 0.8``, at least one where there is area (largest remainder).

    The exponent below 1 gives small links, fingers say, finer splats than large ones.

    Raises:
        InputError: fewer splats than links with area.
    """
    weight = np.where(area > 0.0, area, 0.0) ** AREA_EXPONENT
    shown = weight > 0.0
    if n < max(int(shown.sum()), 1):
        raise InputError(f"n is {n}; expected at least one Gaussian for each of the {int(shown.sum())} visible links")
    spare = n - int(shown.sum())
    exact = spare * weight / weight.sum()
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: spare - int(counts.sum())]] += 1
    return counts + shown
