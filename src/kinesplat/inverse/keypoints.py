"""Points fixed on links and where they appear in a picture: joints and camera by kinematics alone, nothing rendered.

A keypoint has one or two places in the picture with a probability and a spread each. The robust cost of a keypoint is
that of the place that suits it best (max-mixture: Olson & Agarwal 2013, "Inference on networks of mixtures"), under a
Cauchy loss, so that a wrong place pulls little.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.inverse.levenberg_marquardt import Linearization
from kinesplat.inverse.objective import Configurations
from kinesplat.self_model import SelfModel
from kinesplat.twists import adjoint

PER_LINK = 3
COUNT = 33
CAUCHY = 2.0
NEAREST_M = 0.02
PRIOR = 1e-4


@dataclass(frozen=True)
class Keypoints:
    """Points on a robot's surface.

    Attributes:
        links: ``(k,)`` the link that carries each.
        points: ``(k, 3)`` in the frame of the link [m].
    """

    links: Int[Tensor, " k"]
    points: Float[Tensor, "k 3"]

    @classmethod
    def on(cls, model: SelfModel) -> "Keypoints":
        """Up to three points far apart on every visible link (farthest-point sampling of its splats)."""
        seen = model.link_index.unique()
        each = max(1, min(PER_LINK, COUNT // len(seen)))
        links, points = [], []
        for link in seen.tolist():
            own = model.parameters.means[model.link_index == link]
            chosen = [int((own - own.mean(dim=0)).norm(dim=-1).argmax())]
            for _ in range(min(each, len(own)) - 1):
                chosen.append(int(torch.cdist(own, own[chosen]).amin(dim=1).argmax()))
            links += [link] * len(chosen)
            points.append(own[chosen])
        return cls(torch.tensor(links), torch.cat(points))

    def in_world(self, Ts_world_link: Float[Tensor, "*b links 4 4"]) -> Float[Tensor, "*b k 3"]:
        """The points in the world [m]."""
        Ts = Ts_world_link[..., self.links, :, :]
        return (Ts[..., :3, :3] @ self.points[:, :, None].to(Ts))[..., 0] + Ts[..., :3, 3]


@dataclass(frozen=True)
class KeypointObjective:
    """Robust distance between projected keypoints and their places in the pictures.

    Attributes:
        keypoints: the points.
        K: ``(views, 3, 3)`` intrinsics onto the units of `places`.
        places: ``(views, k, modes, 2)``.
        spreads: ``(views, k, modes)`` standard deviation of each place.
        shares: ``(views, k, modes)`` probability of each place, at most 1 in sum.
    """

    keypoints: Keypoints
    K: Float[Tensor, "views 3 3"]
    places: Float[Tensor, "views k modes 2"]
    spreads: Float[Tensor, "views k modes"]
    shares: Float[Tensor, "views k modes"]

    def losses(self, at: Configurations) -> Float[Tensor, " batch"]:
        """The cost of every configuration."""
        _, pixels = self._projected(at, at.tree.forward_kinematics(at.q))
        return self._robust(pixels)[0].sum(dim=(1, 2))

    def linearize(self, at: Configurations) -> Linearization:
        """Cost, gradient and Gauss-Newton Hessian in joints and, where they are free, cameras.

        A weak pull towards no change at all keeps variables still that no keypoint sees.
        """
        Ts = at.tree.forward_kinematics(at.q)
        p_cam, pixels = self._projected(at, Ts)
        cost, weighted, weight = self._robust(pixels)
        moved = self._point_jacobian(at, p_cam)
        depth = p_cam[..., 2].clamp(min=NEAREST_M)
        slope = p_cam.new_zeros(*p_cam.shape[:-1], 2, 3)
        slope[..., 0, 0] = slope[..., 1, 1] = 1.0 / depth
        slope[..., :, 2] = -p_cam[..., :2] / depth[..., None] ** 2
        J = self.K[:, None, :2, :2] @ slope @ moved
        gradient = torch.einsum("bvkip,bvki->bp", J, weighted)
        hessian = torch.einsum("bvkip,bvk,bvkiq->bpq", J, weight, J)
        return Linearization(cost.sum(dim=(1, 2)), gradient, hessian + PRIOR * torch.eye(J.shape[-1]).to(J))

    def _projected(self, at: Configurations, Ts: Tensor) -> tuple[Tensor, Tensor]:
        """Keypoints in the camera frames ``(batch, views, k, 3)`` [m] and in the units of `places`."""
        p_world = self.keypoints.in_world(Ts)[:, None]
        T = at.T_cam_world
        p_cam = p_world @ T[..., :3, :3].mT + T[..., None, :3, 3]
        image = p_cam[..., :2] / p_cam[..., 2:].clamp(min=NEAREST_M)
        return p_cam, image @ self.K[:, :2, :2].mT + self.K[:, None, :2, 2]

    def _robust(self, pixels: Float[Tensor, "b views k 2"]) -> tuple[Tensor, Tensor, Tensor]:
        """Cost per keypoint, weight times residual, and weight, for the place that suits best."""
        away = pixels[..., None, :] - self.places
        squared = away.square().sum(dim=-1) / self.spreads.square()
        rho = CAUCHY**2 * torch.log1p(squared / CAUCHY**2) - 2.0 * self.shares.clamp(min=1e-6).log()
        best = rho.argmin(dim=-1, keepdim=True)
        rho, squared = rho.gather(-1, best)[..., 0], squared.gather(-1, best)[..., 0]
        residual = away.gather(-2, best[..., None].expand(*best.shape, 2))[..., 0, :]
        spread = self.spreads.expand(*best.shape[:-1], -1).gather(-1, best)[..., 0]
        trust = self.shares.sum(dim=-1).expand_as(spread)
        weight = trust / spread.square() / (1.0 + squared / CAUCHY**2)
        return trust * rho, weight[..., None] * residual, weight

    def _point_jacobian(self, at: Configurations, p_cam: Tensor) -> Float[Tensor, "batch views k 3 p"]:
        """Derivative of the points in the camera frames by the variables."""
        twists = adjoint(at.T_cam_world)[:, :, None] @ at.tree.link_jacobian(at.q)[:, None]
        twists = twists[:, :, self.keypoints.links]
        batch, views, k = p_cam.shape[:3]
        if at.camera_free:
            own = p_cam.new_zeros(views, 1, 6, views, 6)
            own[torch.arange(views), 0, :, torch.arange(views)] = torch.eye(6).to(p_cam)
            twists = torch.cat([twists, own.flatten(3).expand(batch, views, k, 6, 6 * views)], dim=-1)
        v, w = twists[..., :3, :], twists[..., 3:, :]
        return v + torch.linalg.cross(w, p_cam[..., None].expand_as(w), dim=-2)
