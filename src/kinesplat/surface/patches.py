"""Cut a link's surface into patches of about equal area and give each patch a Gaussian of moments."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

from kinesplat.errors import InputError
from kinesplat.gaussians import Parameters
from kinesplat.rasterizer.spherical_harmonics import SH_C0, sh_basis
from kinesplat.surface.points import SurfacePoints

OPACITY = 0.999
REACH = 2.8
"""Radius of the neighbourhood whose moments a splat takes, in patch radii."""
SPREAD = 0.82
"""Standard deviation of a splat over that of its neighbourhood."""
OVERLAP = SPREAD * REACH
"""The same over that of the patch alone, away from edges."""
INSET = 0.15
"""How far a splat lies below the surface, in its own standard deviations: layers of splats fatten the silhouette."""
NORMAL_SPREAD = 0.7
"""Standard deviation along the normal over that of the patch."""
THICKNESS = 0.05
"""Least standard deviation along the normal, in patch radii."""
NORMAL_WEIGHT = 1.0
"""Distance between opposite normals in the metric of the partition, in patch radii."""
LLOYD_ITERATIONS = 3
FEW_DISTANCES, FEW_QUERIES = 1_000_000, 10_000
START_CANDIDATES = 5
NEIGHBOURS = 10
LEAST_ALIKE = 0.5
"""Cosine between normals below which a member does not count as near a patch."""
PRIOR_MEMBERS = 2.0
AMBIENT, DIFFUSE = 0.5, 0.5
"""The headlight of the data sets."""
BACK_WEIGHT = 0.15


@dataclass(frozen=True)
class Partition:
    """Patches of a link, and who is near them.

    Attributes:
        count: number of patches.
        radius: typical radius of a patch [m].
        label: ``(m,)`` patch of each member.
        near_member: ``(p,)`` and ...
        near_patch: ``(p,)`` all pairs of a member and a patch within `REACH` radii and of similar normals.
    """

    count: int
    radius: float
    label: Int[np.ndarray, " m"]
    near_member: Int[np.ndarray, " p"]
    near_patch: Int[np.ndarray, " p"]


def share_among_links(weight: Float[np.ndarray, " links"], n: int) -> Int[np.ndarray, " links"]:
    """Share `n` splats in proportion to `weight`, at least one where it is positive (largest remainder).

    Raises:
        InputError: fewer splats than links of positive weight.
    """
    shown = weight > 0.0
    spare = n - int(shown.sum())
    if spare < 0 or n < 1:
        raise InputError(f"n is {n}; expected at least one Gaussian for each of the {int(shown.sum())} visible links")
    exact = spare * weight / weight.sum()
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: spare - int(counts.sum())]] += 1
    return counts + shown


def cut_into_patches(
    positions: Float[np.ndarray, "m 3"],
    facing: Float[np.ndarray, "m 3"],
    radius: float,
    count: int,
    rng: np.random.Generator,
) -> Partition:
    """Cut members of one link into `count` patches of about `radius` [m].

    A centroidal Voronoi partition in position and normal (Lloyd from farthest points), so that a patch, and its
    neighbourhood, reach neither over a sharp edge nor through a thin plate.
    """
    features = np.concatenate([positions, 0.5 * NORMAL_WEIGHT * radius * facing], axis=1)
    centres = _farthest_points(features, count, rng)
    for _ in range(LLOYD_ITERATIONS):
        label = _nearest(centres, features)
        mass = np.bincount(label, minlength=count)
        sums = np.stack([np.bincount(label, column, minlength=count) for column in features.T], axis=-1)
        centres = np.where(mass[:, None] > 0, sums / np.maximum(mass, 1)[:, None], centres)
    number = min(NEIGHBOURS, count)
    distance, patch = (np.reshape(a, (-1, number)) for a in _tree_query(centres, features, number))
    normal = centres[:, 3:] / np.maximum(np.linalg.norm(centres[:, 3:], axis=-1, keepdims=True), 1e-30)
    alike = np.einsum("mi,mki->mk", facing, normal[patch]) > LEAST_ALIKE
    member, rank = np.nonzero(((distance < REACH * radius) & alike) | (np.arange(number) == 0))
    return Partition(count, radius, patch[:, 0], member, patch[member, rank])


def _nearest(centres: Float[np.ndarray, "count d"], features: Float[np.ndarray, "m d"]) -> Int[np.ndarray, " m"]:
    """Index of the centre nearest to each feature; where there are few, all distances are faster than a tree."""
    if len(centres) * len(features) > FEW_DISTANCES:
        return _tree_query(centres, features, 1)[1]
    return (np.einsum("cd,cd->c", centres, centres) - 2.0 * (features @ centres.T)).argmin(axis=1)


def _tree_query(points: np.ndarray, at: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices of the `k` nearest points; threads cost more than they save where there are few."""
    distances, indices = KDTree(points).query(at, k=k, workers=-1 if len(at) > FEW_QUERIES else 1)
    return np.asarray(distances), np.asarray(indices)


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


@dataclass(frozen=True)
class Members:
    """What patches are made of: points, or smaller splats.

    Attributes:
        positions: ``(m, 3)`` [m].
        facing: ``(m, 3)`` unit outward normals.
        areas: ``(m,)`` weights [m^2].
        sh: ``(m, 9, 3)`` spherical harmonics without the 0.5 offset.
        covariances: ``(m, 3, 3)`` of each member's own surface, or None for points [m^2].
    """

    positions: Float[np.ndarray, "m 3"]
    facing: Float[np.ndarray, "m 3"]
    areas: Float[np.ndarray, " m"]
    sh: Float[np.ndarray, "m k 3"]
    covariances: Float[np.ndarray, "m 3 3"] | None = None


def patches_to_parameters(members: Members, partition: Partition) -> Parameters:
    """One Gaussian a patch: shape from the moments of the patch's neighbourhood, colour and normal from the patch.

    A neighbourhood is clipped where the surface ends or turns, so near an edge its mean moves inwards and its
    covariance shrinks across the edge: the Gaussian hardly sticks out. A patch without a member becomes a transparent
    dot on the first member.
    """
    own = _Average(partition.label, members.areas, partition.count)
    near = _Average(partition.near_patch, members.areas[partition.near_member], partition.count)
    empty = np.bincount(partition.label, minlength=partition.count) == 0
    means = near(members.positions[partition.near_member])
    spread = _outer(members.positions[partition.near_member] - means[partition.near_patch])
    if members.covariances is not None:
        spread += members.covariances[partition.near_member]
    covariance = near(spread)
    axes = _patch_axes(covariance, own(_outer(members.facing)), own(members.facing), partition.radius)
    height = np.einsum(
        "mi,mi->m", members.positions - own(members.positions)[partition.label], axes[partition.label, :, 2]
    )
    scales = _patch_scales(covariance, axes, own(height**2), partition)
    sunk = np.minimum(INSET * scales[:, :2].mean(axis=1), 0.25 * _thickness(means, axes[:, :, 2]))
    means -= sunk[:, None] * axes[:, :, 2]
    means[empty] = members.positions[0]
    sh = own(members.sh)
    sh[:, 0] -= 0.5 / SH_C0
    opacity = np.where(empty, 1e-3, OPACITY)
    quats = Rotation.from_matrix(axes).as_quat(scalar_first=True)
    tensors = (means, quats, np.log(scales), np.log(opacity / (1.0 - opacity)), sh)
    return Parameters(*(torch.from_numpy(np.ascontiguousarray(t)).float() for t in tensors))


def _thickness(means: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
    """Distance down to a patch nearby that faces the other way, infinite where there is none [m]."""
    number = min(2 * NEIGHBOURS, len(means))
    near = np.reshape(_tree_query(means, means, number)[1], (-1, number))
    opposite = np.einsum("ni,nki->nk", normals, normals[near]) < -0.5
    depth = np.einsum("ni,nki->nk", normals, means[:, None] - means[near])
    return np.where(opposite, np.maximum(depth, 0.0), np.inf).min(axis=1)


@dataclass(frozen=True)
class _Average:
    """Weighted mean of rows by group; zero for an empty group."""

    group: Int[np.ndarray, " m"]
    weights: Float[np.ndarray, " m"]
    count: int

    def __call__(self, values: Float[np.ndarray, "m *rest"]) -> Float[np.ndarray, "count *rest"]:
        mass = np.maximum(np.bincount(self.group, self.weights, minlength=self.count), 1e-30)
        columns = values.reshape(len(values), -1).T
        sums = np.stack([np.bincount(self.group, self.weights * c, minlength=self.count) for c in columns], axis=-1)
        return (sums / mass[:, None]).reshape(self.count, *values.shape[1:])


def _patch_scales(
    covariance: Float[np.ndarray, "n 3 3"],
    axes: Float[np.ndarray, "n 3 3"],
    height_variance: Float[np.ndarray, " n"],
    partition: Partition,
) -> Float[np.ndarray, "n 3"]:
    """Standard deviations along the axes; neighbourhoods of few members lean towards a disc of the usual size."""
    variance = np.einsum("nij,nik,nkj->nj", axes[:, :, :2], covariance, axes[:, :, :2])
    number = np.bincount(partition.near_patch, minlength=partition.count)[:, None]
    disc = (0.5 * REACH * partition.radius) ** 2
    variance = (number * np.maximum(variance, 0.0) + PRIOR_MEMBERS * disc) / (number + PRIOR_MEMBERS)
    normal = np.maximum(NORMAL_SPREAD * np.sqrt(height_variance), THICKNESS * partition.radius)
    return np.concatenate([SPREAD * np.sqrt(variance), normal[:, None]], axis=1)


def headlight_shading(points: SurfacePoints) -> Float[np.ndarray, "n 9 3"]:
    """Spherical harmonics (degree 2, without the 0.5 offset) of what a camera with a headlight sees of each point.

    With t the cosine between the normal and the direction to the camera, the colour is albedo times
    ``AMBIENT + DIFFUSE t`` on the visible side. A function of t alone is zonal: by the addition theorem, the
    coefficient of ``P_l(t)`` times ``4 pi / (2 l + 1) Y_lm(normal)`` are its coefficients.
    """
    a, b, c = shading_polynomial()
    zonal = np.array([a + c / 3.0] + [-b] * 3 + [2.0 * c / 3.0] * 5)  # -b: the basis takes directions to the point
    zonal *= 4.0 * np.pi / np.array([1.0] + [3.0] * 3 + [5.0] * 5)
    basis = sh_basis(torch.from_numpy(points.normals), degree=2).numpy()
    return (zonal * basis)[:, :, None] * points.albedo[:, None, :]


def shading_polynomial() -> tuple[float, float, float]:
    """a + b t + c t^2 nearest to the shading of the visible side, with a little weight on its mirror image behind.

    The back of a splat shows through the gaps between the splats in front of it; there it should look like them (the
    straight line alone would make it black, which costs 1 dB).
    """
    t = np.linspace(-1.0, 1.0, 201)
    weight = np.where(t > 0.0, 1.0, BACK_WEIGHT)
    design = np.stack([np.ones_like(t), t, t * t], axis=-1)
    target = AMBIENT + DIFFUSE * np.abs(t)
    a, b, c = np.linalg.lstsq(design * weight[:, None], target * weight, rcond=None)[0]
    return float(a), float(b), float(c)


def _patch_axes(
    covariance: Float[np.ndarray, "n 3 3"],
    spread_of_normals: Float[np.ndarray, "n 3 3"],
    outward: Float[np.ndarray, "n 3"],
    radius: float,
) -> Float[np.ndarray, "n 3 3"]:
    """Right-handed axes in columns, the patch normal last and outward, the tangents along the patch's own axes."""
    normal = np.linalg.eigh(spread_of_normals - covariance / radius**2)[1][:, :, 2]
    # Push the normal direction far below the tangential ones, so that eigh returns it first.
    flattened = covariance - (np.trace(covariance, axis1=1, axis2=2) + radius**2)[:, None, None] * _outer(normal)
    vectors = np.linalg.eigh(flattened)[1]
    first, second = vectors[:, :, 2], vectors[:, :, 1]
    inward = np.einsum("ni,ni->n", np.cross(first, second), outward) < 0.0
    second = np.where(inward[:, None], -second, second)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def _outer(vectors: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3 3"]:
    return vectors[:, :, None] * vectors[:, None, :]
