"""Skinning weights as a field: implicit linear blend skinning (Liu et al. 2024, eq. 3 and 4).

Splats live in the canonical configuration, in the world. `T_j(q)` is always link j's motion since then,
``T_world_link(q) T_world_link(q_canonical)^-1``, and the canonical configuration is the tree's own `q_canonical`
everywhere: where splats are learnt, where weights are learnt, and where they are used.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kinesplat.fourier_mlp import FREQUENCIES, LAYERS, WIDTH, FourierMlp
from kinesplat.gaussians import Gaussians
from kinesplat.kinematics import KinematicTree
from kinesplat.quaternions import quat_product, rotations_to_quats
from kinesplat.rasterizer.projection import quats_to_rotations
from kinesplat.rasterizer.spherical_harmonics import sh_degree
from kinesplat.skinning.links import sh_rotation


class SkinningField(torch.nn.Module):
    """Weights ``W(mu) in R^J`` of a canonical position: positive, their sum one (eq. 3).

    Attributes:
        centre: ``(3,)`` of the robot in its canonical configuration [m].
        radius: from there to its farthest point [m].
        turns_harmonics: whether spherical harmonics turn with the splat; else they stay in the world's frame, as in
            the paper.
    """

    centre: Float[Tensor, "3"]
    radius: Float[Tensor, ""]
    turns_harmonics: Bool[Tensor, ""]

    def __init__(self, links: int, network: FourierMlp | None = None, *, seed: int = 0) -> None:
        """A field that gives all links the same weight, for a robot within a metre of the origin.

        Args:
            links: number of links J.
            network: maps ``(n, 3)`` to ``(n, links)``; four layers of 256 on Fourier features by default.
            seed: of the network.
        """
        super().__init__()
        self.network = network or FourierMlp(3, 0, links, bandwidth=2.0, seed=seed)
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("radius", torch.ones(()))
        self.register_buffer("turns_harmonics", torch.tensor(False))

    @classmethod
    def around(
        cls,
        points: Float[Tensor, "n 3"],
        links: int,
        *,
        turns_harmonics: bool = False,
        layers: int = LAYERS,
        width: int = WIDTH,
        frequencies: int = FREQUENCIES,
        bandwidth: float = 2.0,
        seed: int = 0,
    ) -> "SkinningField":
        """A field scaled to the canonical cloud `points` [m]; arguments as in `FourierMlp`."""
        network = FourierMlp(
            3, 0, links, layers=layers, width=width, frequencies=frequencies, bandwidth=bandwidth, seed=seed
        )
        field = cls(links, network).to(points.device)
        low, high = points.amin(dim=0), points.amax(dim=0)
        field.centre.copy_(0.5 * (low + high))
        field.radius.copy_((points - field.centre).norm(dim=-1).amax())
        field.turns_harmonics.fill_(turns_harmonics)
        return field

    def logits(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch links"]:
        """Logarithm of the weights at canonical positions [m], up to a constant per position."""
        return self.network((points - self.centre) / self.radius)

    def forward(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch links"]:
        """Weights at canonical positions [m]: eq. 3, ``W(mu) = softmax(MLP(features(mu)))``."""
        return self.logits(points).softmax(dim=-1)

    @classmethod
    def like(cls, state: dict[str, Tensor]) -> "SkinningField":
        """The field of a saved ``state_dict()``.

        Raises:
            KeyError: an array is missing.
            RuntimeError: their sizes contradict each other.
        """
        network = FourierMlp.like(state, "network.")
        field = cls(network.last.out_features, network)
        field.load_state_dict(state)
        return field


def link_motions(
    tree: KinematicTree, q: Float[Tensor, "*#batch dof"], T_world_base: Float[Tensor, "*#batch 4 4"] | None = None
) -> Float[Tensor, "*b links 4 4"]:
    """``T_j(q)`` of eq. 2 and 4: what moves link j from the canonical configuration to `q`, in the world [m]."""
    canonical = tree.forward_kinematics(tree.q_canonical.to(q))
    return tree.forward_kinematics(q, T_world_base) @ torch.linalg.inv(canonical)


def blend_points(
    points: Float[Tensor, "n 3"], weights: Float[Tensor, "n links"], motions: Float[Tensor, "*batch links 4 4"]
) -> Float[Tensor, "*batch n 3"]:
    """Eq. 4: ``D(mu, q) = sum_j W(mu)_j T_j(q) mu``."""
    blended = _blended(weights, motions[..., :3, :].flatten(-2)).unflatten(-1, (3, 4))
    return (blended[..., :3] @ points[..., None])[..., 0] + blended[..., 3]


def blend_gaussians(
    gaussians: Gaussians,
    weights: Float[Tensor, "n links"],
    motions: Float[Tensor, "*batch links 4 4"],
    turns_harmonics: bool,
) -> Gaussians:
    """Splats of the canonical configuration, moved by their blended links: means by eq. 4.

    Rotations: the unit quaternions of the links are averaged with the same weights, each with the sign that brings
    it nearest to that of the heaviest link, and normalised. For two links this is the interpolated rotation; it is
    always a rotation, so a splat keeps its scales where the blended matrix of eq. 4 would shrink it.

    Args:
        gaussians: ``(n, ...)``.
        weights: ``(n, links)``, each row sums to one.
        motions: ``(*batch, links, 4, 4)`` from `link_motions`.
        turns_harmonics: whether spherical harmonics turn with the splat.

    Returns:
        Gaussians of batch ``*batch``; scales and opacities are expanded, not copied. Differentiable in everything.
    """
    batch = motions.shape[:-3]
    quats = rotations_to_quats(motions[..., :3, :3])
    towards = (quats @ quats.mT)[..., weights.argmax(dim=-1), :]
    signed = torch.where(towards < 0.0, -weights, weights)
    turns = torch.nn.functional.normalize(_blended(signed, quats), dim=-1)
    sh = gaussians.sh.expand(*batch, *gaussians.sh.shape)
    if turns_harmonics:
        sh = sh_rotation(quats_to_rotations(turns), sh_degree(sh.shape[-2])) @ gaussians.sh
    return Gaussians(
        means=blend_points(gaussians.means, weights, motions),
        quats=quat_product(turns, gaussians.quats),
        scales=gaussians.scales.expand(*batch, *gaussians.scales.shape),
        opacities=gaussians.opacities.expand(*batch, len(gaussians)),
        sh=sh,
        sh_direction=gaussians.sh_direction,
    )


def _blended(
    weights: Float[Tensor, "*#batch n links"], values: Float[Tensor, "*#batch links c"]
) -> Float[Tensor, "*b n c"]:
    return weights @ values
