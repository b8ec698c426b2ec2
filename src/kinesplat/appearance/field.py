"""Appearance as a field of position and configuration (Liu et al. 2024, eq. 5).

It is what the paper needs because its spherical harmonics stay in the world's frame while splats turn. Ours live in
link frames and turn along, so our own recipe does without.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.fourier_mlp import FREQUENCIES, LAYERS, WIDTH, FourierMlp
from kinesplat.gaussians import Gaussians
from kinesplat.kinematics import KinematicTree
from kinesplat.quaternions import quat_product

_FIXED = 8  # 4 of rotation, 3 of scale, 1 of opacity; spherical harmonics follow


class AppearanceField(torch.nn.Module):
    """``(dR, dS, do, dc) = X(mu, q)``: changes of a splat's look in configuration q; none before it is trained.

    Attributes:
        centre: ``(3,)`` of the robot in its canonical configuration [m].
        radius: from there to its farthest point [m].
        q_middle: ``(dof,)`` middle of the joint ranges [rad or m].
        q_half: ``(dof,)`` half of the joint ranges [rad or m].
    """

    centre: Float[Tensor, "3"]
    radius: Float[Tensor, ""]
    q_middle: Float[Tensor, " dof"]
    q_half: Float[Tensor, " dof"]

    def __init__(self, dof: int, k: int, network: FourierMlp | None = None, *, seed: int = 0) -> None:
        """A field that changes nothing.

        Args:
            dof: entries of q.
            k: spherical-harmonic coefficients per colour.
            network: maps canonical and deformed position ``(n, 6)`` and q to ``(n, 8 + 3 k)``; four layers of 256 on
                Fourier features of the positions by default.
            seed: of the network.
        """
        super().__init__()
        self.network = network or FourierMlp(6, dof, _FIXED + 3 * k, bandwidth=1.0, seed=seed)
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("radius", torch.ones(()))
        self.register_buffer("q_middle", torch.zeros(dof))
        self.register_buffer("q_half", torch.ones(dof))

    @classmethod
    def around(
        cls,
        points: Float[Tensor, "n 3"],
        tree: KinematicTree,
        k: int,
        *,
        layers: int = LAYERS,
        width: int = WIDTH,
        frequencies: int = FREQUENCIES,
        bandwidth: float = 1.0,
        seed: int = 0,
    ) -> "AppearanceField":
        """A field scaled to the canonical cloud `points` [m] and the joint limits; arguments as in `FourierMlp`."""
        network = FourierMlp(
            6,
            tree.dof,
            _FIXED + 3 * k,
            layers=layers,
            width=width,
            frequencies=frequencies,
            bandwidth=bandwidth,
            seed=seed,
        )
        field = cls(tree.dof, k, network).to(points.device)
        low, high = points.amin(dim=0), points.amax(dim=0)
        field.centre.copy_(0.5 * (low + high))
        field.radius.copy_((points - field.centre).norm(dim=-1).amax())
        field.q_middle.copy_(0.5 * (tree.q_lower + tree.q_upper))
        field.q_half.copy_((0.5 * (tree.q_upper - tree.q_lower)).clamp(min=1e-6))
        return field

    def forward(self, posed: Gaussians, canonical: Float[Tensor, "n 3"], q: Float[Tensor, "*batch dof"]) -> Gaussians:
        """Eq. 5 and its use in eq. 6: posed splats with the changes of configuration q applied.

        Rotations are multiplied by the unit quaternion of ``(1, 0, 0, 0) + dR``, scales by ``exp(dS)``; do is added to
        the logit of the opacity, dc to the spherical harmonics.

        Args:
            posed: splats of configuration q, batch ``*batch``.
            canonical: ``(n, 3)`` their canonical means [m].
            q: ``(*batch, dof)`` joint values [rad or m].
        """
        dR, dS, do, dc = self.changes(posed.means, canonical, q)
        one = dR.new_tensor([1.0, 0.0, 0.0, 0.0])
        return replace(
            posed,
            quats=quat_product(posed.quats, torch.nn.functional.normalize(one + dR, dim=-1)),
            scales=posed.scales * dS.exp(),
            opacities=(posed.opacities.logit(1e-6) + do).sigmoid(),
            sh=posed.sh + dc,
        )

    def changes(
        self, deformed: Float[Tensor, "*batch n 3"], canonical: Float[Tensor, "n 3"], q: Float[Tensor, "*batch dof"]
    ) -> tuple[
        Float[Tensor, "*batch n 4"],
        Float[Tensor, "*batch n 3"],
        Float[Tensor, "*batch n"],
        Float[Tensor, "*batch n k 3"],
    ]:
        """``X(mu, D(mu, q), q)``: changes of quaternion, log scale, logit of the opacity and spherical harmonics."""
        places = (torch.cat([canonical.expand_as(deformed), deformed], dim=-1) - self.centre.repeat(2)) / self.radius
        joints = ((q.to(places) - self.q_middle) / self.q_half)[..., None, :]
        joints = joints.expand(*places.shape[:-1], joints.shape[-1])
        dR, dS, do, dc = self.network(places, joints).split([4, 3, 1, self.network.last.out_features - _FIXED], dim=-1)
        return dR, dS, do[..., 0], dc.unflatten(-1, (-1, 3))

    @classmethod
    def like(cls, state: dict[str, Tensor]) -> "AppearanceField":
        """The field of a saved ``state_dict()``.

        Raises:
            KeyError: an array is missing.
            RuntimeError: their sizes contradict each other.
        """
        network = FourierMlp.like(state, "network.")
        field = cls(len(state["q_middle"]), (network.last.out_features - _FIXED) // 3, network)
        field.load_state_dict(state)
        return field
