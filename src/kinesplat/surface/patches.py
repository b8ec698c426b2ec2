"""Cut a link's surface into patches of about equal area and give each patch the Gaussian of its own moments."""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from kinesplat.gaussians import Parameters
from kinesplat.rasterizer.spherical_harmonics import SH_C0, sh_basis
from kinesplat.surface.points import SurfacePoints

OPACITY = 0.98
SPREAD = 1.9
"""Standard deviation of a splat over that of its patch: half opacity at the rim of a disc needs 1.7."""
NORMAL_SPREAD = 1.0
THICKNESS = 0.1
"""Least standard deviation along the normal, in patch radii."""
NORMAL_WEIGHT = 1.0
"""Distance between opposite normals in the metric of the partition, in patch radii."""
LLOYD_ITERATIONS = 3
START_CANDIDATES = 5
PRIOR_POINTS = 2.0
AMBIENT, DIFFUSE = 0.5, 0.5
"""The headlight of the data sets."""


def cut_into_patches(
    points: SurfacePoints, count: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " n"], float]:
    """Label each point of one link with one of `count` patches; also the radius of a patch [m].

    A centroidal Voronoi partition in position and normal (Lloyd from farthest points), so that a patch reaches neither
    over a sharp edge nor through a thin plate.
    """
    radius = float(np.sqrt(points.area.sum() / (np.pi * count)))
    features = np.concatenate([points.positions, 0.5 * NORMAL_WEIGHT * radius * points.facing], axis=1)
    centres = _farthest_points(features, count, rng)
    for _ in range(LLOYD_ITERATIONS):
        label = cKDTree(centres).query(features, workers=-1)[1]
        mass = np.bincount(label, minlength=count)
        means = _group_sums(features, label, count) / np.maximum(mass, 1)[:, None]
        centres = np.where(mass[:, None] > 0, means, centres)
    return cKDTree(centres).query(features, workers=-1)[1], radius


def _farthest_points(
    features: Float[np.ndarray, "n d"], count: int, rng: np.random.Generator
) -> Float[np.ndarray, "count d"]:
    """Greedy farthest-point choice out of a random subset (Gonzalez 1985)."""
    pool = features[rng.permutation(len(features))[: START_CANDIDATES * count]]
    if len(pool) <= count:
        return pool[np.arange(count) % len(pool)]
    squared = np.einsum("nd,nd->n", pool, pool)
    chosen = np.zeros(count, dtype=int)
    distance = np.full(len(pool), np.inf)
    for i in range(count):
        chosen[i] = 0 if i == 0 else distance.argmax()
        new = squared - 2.0 * (pool @ pool[chosen[i]]) + squared[chosen[i]]
        np.minimum(distance, new, out=distance)
    return pool[chosen]


def patches_to_parameters(
    points: SurfacePoints, label: Int[np.ndarray, " n"], count: int, radius: float
) -> Parameters:
    """Gaussians with the means and (widened) covariances of the patches, and the mean of their shading.

    Args:
        points: of one link.
        label: ``(n,)`` patch of each point.
        count: number of patches; one without a point becomes a transparent dot on the first point.
        radius: of a patch, the scale of small regularisers [m].
    """
    mass = np.bincount(label, minlength=count).astype(float)
    weight = 1.0 / np.maximum(mass, 1.0)
    means = _group_sums(points.positions, label, count) * weight[:, None]
    means[mass == 0] = points.positions[0]
    offsets = points.positions - means[label]
    covariance = _group_sums(_outer(offsets), label, count) * weight[:, None, None]
    spread_of_normals = _group_sums(_outer(points.facing), label, count) * weight[:, None, None]
    axes = _patch_axes(covariance, spread_of_normals, radius)
    variance = np.maximum(np.einsum("nij,nik,nkj->nj", axes, covariance, axes), 0.0)
    flat = np.array([0.25, 0.25, 0.0]) * radius**2  # a disc of that radius, for patches of very few points
    variance = (mass[:, None] * variance + PRIOR_POINTS * flat) / (mass[:, None] + PRIOR_POINTS)
    scales = np.array([SPREAD, SPREAD, NORMAL_SPREAD]) * np.sqrt(variance)
    scales[:, 2] = np.maximum(scales[:, 2], THICKNESS * radius)
    opacity = np.where(mass > 0, OPACITY, 1e-3)
    quats = Rotation.from_matrix(axes).as_quat(scalar_first=True)
    sh = _group_sums(headlight_shading(points), label, count) * weight[:, None, None]
    sh[:, 0] -= 0.5 / SH_C0
    tensors = (means, quats, np.log(scales), np.log(opacity / (1.0 - opacity)), sh)
    return Parameters(*(torch.from_numpy(np.ascontiguousarray(t)).float() for t in tensors))


def headlight_shading(points: SurfacePoints) -> Float[np.ndarray, "n 9 3"]:
    """Spherical harmonics (degree 2, without the 0.5 offset) of what a camera with a headlight sees of each point.

    With t the cosine between the normal and the direction to the camera, the colour is albedo times
    ``AMBIENT + DIFFUSE max(0, t)``. Over the visible half that is linear in t. A function of t alone is zonal: by the
    addition theorem the coefficient of ``P_l(t)`` times ``4 pi / (2 l + 1) Y_lm(normal)`` are its coefficients.
    """
    a, b, c = _shading_polynomial()
    zonal = np.array([a + c / 3.0] + [-b] * 3 + [2.0 * c / 3.0] * 5)  # -b: the basis takes directions to the point
    zonal *= 4.0 * np.pi / np.array([1.0] + [3.0] * 3 + [5.0] * 5)
    basis = sh_basis(torch.from_numpy(points.normals), degree=2).numpy()
    return (zonal * basis)[:, :, None] * points.albedo[:, None, :]


def _shading_polynomial() -> tuple[float, float, float]:
    """a + b t + c t^2 nearest to the shading over t in [-0.3, 1]: splats at a limb are seen slightly from behind."""
    t = np.linspace(-0.3, 1.0, 131)
    target = AMBIENT + DIFFUSE * np.maximum(0.0, t)
    weight = np.where(t > 0.0, 1.0, 0.2)
    design = np.stack([np.ones_like(t), t, t * t], axis=-1)
    a, b, c = np.linalg.lstsq(design * weight[:, None], target * weight, rcond=None)[0]
    return float(a), float(b), float(c)


def _patch_axes(
    covariance: Float[np.ndarray, "n 3 3"], spread_of_normals: Float[np.ndarray, "n 3 3"], radius: float
) -> Float[np.ndarray, "n 3 3"]:
    """Right-handed axes in columns, the patch normal (of either sign) last, the tangents along the patch's own axes."""
    normal = np.linalg.eigh(spread_of_normals - covariance / radius**2)[1][:, :, 2]
    # Push the normal direction far below the tangential ones, so that eigh returns it first.
    flattened = covariance - (np.trace(covariance, axis1=1, axis2=2) + radius**2)[:, None, None] * _outer(normal)
    vectors = np.linalg.eigh(flattened)[1]
    first, second = vectors[:, :, 2], vectors[:, :, 1]
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def _outer(vectors: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3 3"]:
    return vectors[:, :, None] * vectors[:, None, :]


def _group_sums(
    values: Float[np.ndarray, "n *rest"], label: Int[np.ndarray, " n"], count: int
) -> Float[np.ndarray, "count *rest"]:
    flat = values.reshape(len(values), -1)
    sums = np.stack([np.bincount(label, weights=column, minlength=count) for column in flat.T], axis=-1)
    return sums.reshape(count, *values.shape[1:])
