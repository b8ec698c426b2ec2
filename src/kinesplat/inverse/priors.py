"""Soft terms beside the pixels, on request: links that would pass through each other, joints close to their limits."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.inverse.levenberg_marquardt import Linearization
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel

PER_LINK = 6
FULL = 0.9
UNIT_M = 0.01
OUTER = 0.05


@dataclass(frozen=True)
class Priors:
    """Costs that are added to the loss of a fit, in its units (a good fit leaves about 1e-3).

    Every link is stood for by a few balls in its middle; pairs of balls of links that are no neighbours, and that are
    apart in the canonical configuration, must not overlap.

    Attributes:
        self_collision: cost of two balls that overlap by 1 cm; it grows with the square.
        limits: cost of a joint at its limit; it begins 5 % of the range before and grows with the square.
        links: ``(balls,)`` the link of every ball.
        centres: ``(balls, 3)`` in the frame of the link [m].
        radii: ``(balls,)`` [m].
        pairs: ``(pairs, 2)`` balls that must keep apart.
    """

    self_collision: float
    limits: float
    links: Int[Tensor, " balls"]
    centres: Float[Tensor, "balls 3"]
    radii: Float[Tensor, " balls"]
    pairs: Int[Tensor, "pairs 2"]

    @classmethod
    def of(cls, model: SelfModel, self_collision: float = 0.0, limits: float = 0.0) -> "Priors":
        """Balls from the model's splats.

        Args:
            model: of the robot that is fitted.
            self_collision: see the class; 1e-4 is a firm hint.
            limits: see the class; 1e-5 is a hint.

        Raises:
            InputError: a weight is negative or not finite.
        """
        for name, weight in (("self_collision", self_collision), ("limits", limits)):
            if not 0.0 <= weight < float("inf"):
                raise InputError(f"{name} is {weight}; expected 0 or more")
        model = model.to("cpu")
        links, centres, radii = _balls(model)
        return cls(self_collision, limits, links, centres, radii, _pairs(model.tree, links, centres, radii))

    def added_to(self, pixels: Linearization, tree: KinematicTree, q: Float[Tensor, "batch dof"]) -> Linearization:
        """The linearization of the pixels and of these terms together; free cameras are no part of the terms."""
        both = zip(self._overlaps(tree, q), self._edges(tree, q), strict=True)
        residual, jacobian = (torch.cat(parts, dim=1) for parts in both)
        jacobian = torch.nn.functional.pad(jacobian, (0, pixels.gradient.shape[1] - tree.dof))
        return Linearization(
            pixels.loss + residual.square().sum(dim=1),
            pixels.gradient + torch.einsum("brp,br->bp", jacobian, residual),
            pixels.hessian + jacobian.mT @ jacobian,
        )

    def _overlaps(self, tree: KinematicTree, q: Tensor) -> tuple[Float[Tensor, "batch r"], Float[Tensor, "batch r p"]]:
        Ts, twists = tree.forward_kinematics(q)[:, self.links], tree.link_jacobian(q)[:, self.links]
        places = (Ts[..., :3, :3] @ self.centres[:, :, None].to(q))[..., 0] + Ts[..., :3, 3]
        moved = twists[..., :3, :] + torch.linalg.cross(
            twists[..., 3:, :], places[..., None].expand_as(twists[..., 3:, :]), dim=-2
        )
        first, second = self.pairs.unbind(-1)
        between = places[:, first] - places[:, second]
        distance = between.norm(dim=-1).clamp(min=1e-6)
        scale = self.self_collision**0.5 / UNIT_M
        depth = (self.radii[first] + self.radii[second]).to(q) - distance
        slope = -torch.einsum("bri,brip->brp", between / distance[..., None], moved[:, first] - moved[:, second])
        return scale * depth.clamp(min=0.0), scale * torch.where(depth[..., None] > 0.0, slope, 0.0)

    def _edges(self, tree: KinematicTree, q: Tensor) -> tuple[Float[Tensor, "batch r"], Float[Tensor, "batch r p"]]:
        lower, upper = tree.q_lower.to(q), tree.q_upper.to(q)
        width = OUTER * (upper - lower).clamp(min=1e-9)
        scale = self.limits**0.5 * tree.q_limited.to(q) / width
        beyond = (q - (upper - width)).clamp(min=0.0) - ((lower + width) - q).clamp(min=0.0)
        slope = torch.diag_embed(scale * (beyond != 0.0).to(q))
        return scale * beyond, slope


def _balls(model: SelfModel) -> tuple[Int[Tensor, " balls"], Float[Tensor, "balls 3"], Float[Tensor, " balls"]]:
    """Splats of every link gathered around a few that are far apart; a ball is smaller than their mean distance."""
    links, centres, radii = [], [], []
    for link in model.link_index.unique().tolist():
        own = model.parameters.means[model.link_index == link]
        seeds = [int((own - own.mean(dim=0)).norm(dim=-1).argmax())]
        for _ in range(min(PER_LINK, len(own)) - 1):
            seeds.append(int(torch.cdist(own, own[seeds]).amin(dim=1).argmax()))
        nearest = torch.cdist(own, own[seeds]).argmin(dim=1)
        for ball in range(len(seeds)):
            group = own[nearest == ball]
            centre = group.mean(dim=0)
            links.append(link)
            centres.append(centre)
            radii.append(FULL * (group - centre).norm(dim=-1).mean())
    return torch.tensor(links), torch.stack(centres), torch.stack(radii)


def _pairs(
    tree: KinematicTree, links: Int[Tensor, " balls"], centres: Float[Tensor, "balls 3"], radii: Float[Tensor, " balls"]
) -> Int[Tensor, "pairs 2"]:
    """Balls of links that are neither the same nor neighbours, and that are apart in the canonical configuration."""
    Ts = tree.forward_kinematics(tree.q_canonical)[links].to(centres)
    places = (Ts[:, :3, :3] @ centres[:, :, None])[..., 0] + Ts[:, :3, 3]
    parents = tree.parents[links]
    near = (links[:, None] == links) | (parents[:, None] == links) | (links[:, None] == parents)
    near = near | (parents[:, None] == parents)
    apart = torch.cdist(places, places) > radii[:, None] + radii
    return torch.nonzero(torch.triu(apart & ~near, diagonal=1))
