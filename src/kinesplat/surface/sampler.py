"""Link meshes to flat Gaussians bound to links.

Points are spread over the visual meshes in proportion to area; those that no outside camera sees in any of several
configurations are dropped; what is left of each link is cut into patches of about equal area, and each patch becomes
the Gaussian of its own mean and covariance. A patch ends at edges, so its Gaussian does not stick out over them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kinesplat.description import LinkMesh
from kinesplat.gaussians import PARAMETERS, Parameters
from kinesplat.kinematics import KinematicTree
from kinesplat.surface.meshes import sample_meshes
from kinesplat.surface.patches import (
    Members,
    cut_into_patches,
    headlight_shading,
    patches_to_parameters,
    share_among_links,
)
from kinesplat.surface.visibility import seen_from_outside

POINTS_PER_SPLAT = 16
LEAST_POINTS = 160_000
AREA_EXPONENT = 0.8
"""Below 1, small links (fingers, say) get finer splats than large ones."""


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
    counts = share_among_links(
        np.bincount(points.link, points.area, minlength=len(tree.link_names)) ** AREA_EXPONENT, n
    )
    parts = []
    for link in np.flatnonzero(counts):
        members, count = points.select(points.link == link), int(counts[link])
        radius = float(np.sqrt(members.area.sum() / (np.pi * count)))
        partition = cut_into_patches(members.positions, members.facing, radius, count, rng)
        shaded = Members(members.positions, members.facing, members.area, headlight_shading(members))
        parts.append(patches_to_parameters(shaded, partition))
    tensors = (torch.cat([getattr(p, name) for p in parts]) for name in PARAMETERS)
    parameters = Parameters(*tensors, sh_direction="axis")  # the headlight of the data sets shines along the view axis
    return parameters, torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
