"""Merge the splats of a model into fewer, larger ones."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from kinesplat.gaussians import PARAMETERS, Parameters
from kinesplat.rasterizer.spherical_harmonics import SH_C0
from kinesplat.surface.patches import (
    NORMAL_SPREAD,
    OVERLAP,
    Members,
    cut_into_patches,
    patches_to_parameters,
    share_among_links,
)


def merge_splats(
    parameters: Parameters, link_index: Int[Tensor, " m"], links: int, n: int, seed: int = 0
) -> tuple[Parameters, Int[Tensor, " n"]]:
    """Cut the splats of each link into patches of neighbours and give each patch one splat of the same moments.

    Args:
        parameters: in link frames.
        link_index: ``(m,)`` link of each splat.
        links: number of links.
        n: number of splats to keep, shared among the links as the splats are.
        seed: of the partition.

    Raises:
        InputError: fewer splats than links that carry any.
    """
    rng = np.random.default_rng(seed)
    link = link_index.cpu().numpy()
    counts = share_among_links(np.bincount(link, minlength=links).astype(float), n)
    with torch.no_grad():
        parts = [
            _merge(parameters.select(torch.eq(link_index, int(i))).to("cpu", torch.float64), int(counts[i]), rng)
            for i in np.flatnonzero(counts)
        ]
    counts[np.flatnonzero(counts)] = [len(part) for part in parts]  # a link may have fewer splats than its share
    merged = replace(parameters, **{name: torch.cat([getattr(p, name) for p in parts]) for name in PARAMETERS})
    device, dtype = parameters.means.device, parameters.means.dtype
    return merged.to(device, dtype), torch.from_numpy(np.repeat(np.arange(links), counts)).to(link_index)


def nearest_splats(
    means: Float[Tensor, "m 3"],
    link_index: Int[Tensor, " m"],
    merged: Float[Tensor, "n 3"],
    merged_link_index: Int[Tensor, " n"],
) -> Int[Tensor, " n"]:
    """For each merged splat the nearest of the original ones on its link."""
    nearest = torch.zeros(len(merged), dtype=torch.long)
    for link in merged_link_index.unique():
        of_link = torch.nonzero(link_index == link)[:, 0].cpu()
        rows = torch.nonzero(merged_link_index == link)[:, 0].cpu()
        tree = KDTree(means.detach().cpu()[of_link].numpy())
        nearest[rows] = of_link[torch.from_numpy(tree.query(merged.detach().cpu()[rows].numpy())[1])]
    return nearest.to(means.device)


def _merge(splats: Parameters, count: int, rng: np.random.Generator) -> Parameters:
    if count >= len(splats):
        return splats
    gaussians = splats.activate()
    means, scales, opacities = (t.numpy() for t in (gaussians.means, gaussians.scales, gaussians.opacities))
    axes = Rotation.from_quat(gaussians.quats.numpy(), scalar_first=True).as_matrix()
    areas = np.pi * (2.0 / OVERLAP) ** 2 * scales[:, 0] * scales[:, 1]
    radius = float(np.sqrt(areas.sum() / (np.pi * count)))
    partition = cut_into_patches(means, axes[:, :, 2], radius, count, rng)
    flat = scales / np.array([OVERLAP, OVERLAP, NORMAL_SPREAD])
    covariances = np.einsum("nij,nj,nkj->nik", axes, flat**2, axes)
    sh = gaussians.sh.numpy().copy()
    sh[:, 0] += 0.5 / SH_C0
    members = Members(means, axes[:, :, 2], areas * opacities, sh, covariances)
    return patches_to_parameters(members, partition).to(dtype=torch.float64)
