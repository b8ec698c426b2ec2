"""Tracks of the robot's own surface, straight from kinematics: where its points appear, how joints move them.

This is what a perfect tracker would say of a rendered video, without rendering or tracking.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.spatial import KDTree
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.robust import geman_mcclure
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel
from kinesplat.twists import adjoint
from kinesplat.vision.point_tracks import PointTracks

DEPTH_PX = 160
HIDDEN_SHARE = 0.02
EDGE_ON = 0.1
NEAREST_M = 0.02
NEIGHBOURS, ALONE = 5, 2.0
SLIDE_SHARE = 0.25
LEAP_SHARE = 0.5


@dataclass(frozen=True)
class SurfaceTracks:
    """Points spread over a robot's surface, and the camera that looks at them.

    Attributes:
        model: whose surface; it hides the points behind it.
        camera: batch ``()`` or ``(frames,)``.
        links: ``(n,)`` the link that carries each point.
        points: ``(n, 3)`` in the frame of the link [m].
        normals: ``(n, 3)`` outward, in the frame of the link.
        tolerance: how far from the rendered surface a point may lie and still be seen [m].
    """

    model: SelfModel
    camera: Camera
    links: Int[Tensor, " n"]
    points: Float[Tensor, "n 3"]
    normals: Float[Tensor, "n 3"]
    tolerance: float

    @classmethod
    def on(cls, model: SelfModel, camera: Camera, n: int) -> "SurfaceTracks":
        """`n` splats that are far apart in the canonical configuration (farthest-point sampling), or all.

        Raises:
            InputError: the model's splats are not bound to links.
        """
        if model.skinning is not None:
            raise InputError("point tracks need a model whose splats are bound to links; this one has a skinning field")
        with torch.no_grad():
            posed = model.posed(model.tree.q_canonical.float())
        size = (posed.means.amax(dim=0) - posed.means.amin(dim=0)).norm().item()
        sound = torch.nonzero(in_company(posed.means) & (posed.opacities > 0.5))[:, 0]
        chosen = sound[farthest_points(posed.means[sound], n)]
        w, x, y, z = torch.nn.functional.normalize(model.parameters.quats.detach()[chosen], dim=-1).unbind(-1)
        normals = torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], dim=-1)
        points = model.parameters.means.detach()[chosen]
        return cls(model, camera, model.link_index[chosen], points, normals, HIDDEN_SHARE * size)

    @property
    def tree(self) -> KinematicTree:
        """The robot's kinematics."""
        return self.model.tree

    def select(self, which: Tensor) -> "SurfaceTracks":
        """Some of the points, by index or mask."""
        return replace(self, links=self.links[which], points=self.points[which], normals=self.normals[which])

    def in_camera(self, q: Float[Tensor, "frames dof"]) -> Float[Tensor, "frames n 3"]:
        """The points in the camera frames [m]; differentiable in q."""
        Ts = self._Ts_cam_world(q)[:, None] @ self.tree.forward_kinematics(q)
        T = Ts[:, self.links]
        return (T[..., :3, :3] @ self.points[:, :, None].to(q))[..., 0] + T[..., :3, 3]

    def pixels(self, p_cam: Float[Tensor, "frames n 3"]) -> Float[Tensor, "frames n 2"]:
        """Where points in the camera frames appear [px]."""
        K = self.camera.K.to(p_cam)
        image = p_cam[..., :2] / p_cam[..., 2:].clamp(min=NEAREST_M)
        return image @ K[..., :2, :2].mT + K[..., None, :2, 2]

    @torch.no_grad()
    def visible(self, q: Float[Tensor, "frames dof"]) -> Bool[Tensor, "frames n"]:
        """Which points face the camera, lie in the picture, and lie on the surface that is rendered."""
        p_cam = self.in_camera(q)
        pixels = self.pixels(p_cam)
        shrink = min(1.0, DEPTH_PX / max(self.camera.width, self.camera.height))
        size = [max(1, round(shrink * side)) for side in (self.camera.width, self.camera.height)]
        out = self.model.render(q.float(), self.camera.resized(*size), outputs=("alpha", "depth"))
        assert out.depth is not None
        assert out.alpha is not None
        cells = (
            (pixels * torch.tensor([size[0] / self.camera.width, size[1] / self.camera.height]).to(q)).floor().long()
        )
        inside = ((cells >= 0) & (cells < torch.tensor(size))).all(dim=-1)
        x, y = cells.clamp(min=0).minimum(torch.tensor(size) - 1).unbind(-1)
        rows = torch.arange(len(q))[:, None]
        surface = torch.where(out.alpha > 0.5, out.depth, torch.inf)[rows, y, x]
        Ts = self._Ts_cam_world(q)[:, None] @ self.tree.forward_kinematics(q)
        normals = (Ts[:, self.links, :3, :3] @ self.normals[:, :, None].to(q))[..., 0]
        facing = -(normals * p_cam).sum(dim=-1) > EDGE_ON * p_cam.norm(dim=-1)
        return inside & facing & ((p_cam[..., 2] - surface).abs() < self.tolerance) & (p_cam[..., 2] > NEAREST_M)

    @torch.no_grad()
    def tracks(self, q: Float[Tensor, "frames dof"]) -> PointTracks:
        """The tracks of all points through a motion, as a perfect tracker would give them."""
        return PointTracks(self.pixels(self.in_camera(q)), self.visible(q))

    def pixel_jacobian(
        self, q: Float[Tensor, "frames dof"], frame: Int[Tensor, " k"], point: Int[Tensor, " k"]
    ) -> tuple[Float[Tensor, "k 2"], Float[Tensor, "k 2 dof"]]:
        """Pixels of single points in single frames, and how they move with that frame's joints [px/rad or px/m]."""
        p_cam = self.in_camera(q)[frame, point]
        twists = adjoint(self._Ts_cam_world(q))[:, None] @ self.tree.link_jacobian(q)
        moving = twists[frame, self.links[point]]
        moved = moving[:, :3] + torch.linalg.cross(moving[:, 3:], p_cam[..., None].expand(-1, -1, q.shape[-1]), dim=1)
        K = self.camera.K.to(q).expand(len(q), 3, 3)[frame]
        image = (p_cam[:, :2] / p_cam[:, 2:].clamp(min=NEAREST_M))[:, None] @ K[:, :2, :2].mT
        return image[:, 0] + K[:, :2, 2], self._slope(p_cam, K) @ moved

    @torch.no_grad()
    def under(
        self, q: Float[Tensor, " dof"], places: Float[Tensor, "n 2"]
    ) -> "tuple[SurfaceTracks, Float[Tensor, ' n']]":
        """The surface at places in the picture of one configuration, and how far our nearest visible point is [px].

        A place's line of sight meets the tangent plane of that point.

        Args:
            q: the joints; the camera is that of one frame.
            places: [px].
        """
        seen = self.select(self.visible(q[None])[0])
        if not len(seen.links):
            return self.select(torch.zeros(len(places), dtype=torch.long)), torch.full((len(places),), torch.inf)
        p_cam = seen.in_camera(q[None])[0]
        exact = "donot_use_mm_for_euclid_dist"
        miss, index = torch.cdist(places, seen.pixels(p_cam[None])[0], compute_mode=exact).min(dim=1)
        met, p = seen.select(index), p_cam[index]
        T = (self._Ts_cam_world(q[None])[0] @ self.tree.forward_kinematics(q))[met.links]
        normals = (T[:, :3, :3] @ met.normals[:, :, None].to(q))[..., 0]
        K = self.camera.K.to(q).reshape(-1, 3, 3)[0]
        rays = torch.nn.functional.pad((places - K[:2, 2]) @ torch.linalg.inv(K[:2, :2]).T, (0, 1), value=1.0)
        depth = (normals * p).sum(dim=-1) / (normals * rays).sum(dim=-1)
        step = rays * depth[:, None] - p
        step = step * (self.tolerance * LEAP_SHARE / step.norm(dim=-1, keepdim=True).clamp(min=1e-9)).clamp(max=1.0)
        moved = (T[:, :3, :3].mT @ step[..., None])[..., 0]
        return replace(met, points=met.points + moved), miss

    @torch.no_grad()
    def slid(self, q: Float[Tensor, "frames dof"], shown: PointTracks, robust: float) -> "SurfaceTracks":
        """The points slid along the surface to where they explain the tracks of the same index best in all frames.

        One Gauss-Newton step in the tangent plane of each, with a pull towards where it was: our points lie some
        millimetres apart, the true one is somewhere in between.

        Args:
            q: the motion.
            shown: as many tracks as there are points [px].
            robust: distance beyond which a frame counts less [px].
        """
        reach = SLIDE_SHARE * self.tolerance
        axis = torch.eye(3)[self.normals.abs().argmin(dim=-1)]
        first = torch.nn.functional.normalize(torch.linalg.cross(self.normals, axis), dim=-1)
        tangents = torch.stack([first, torch.linalg.cross(self.normals, first)], dim=-1)
        p_cam = self.in_camera(q)
        R = (self._Ts_cam_world(q)[:, None] @ self.tree.forward_kinematics(q))[:, self.links, :3, :3]
        slope = self._slope(p_cam, self.camera.K.to(q).expand(len(q), 3, 3)[:, None])
        A = slope @ R @ tangents.to(q)
        away = torch.where(shown.visible[..., None], shown.points.to(q) - self.pixels(p_cam), 0.0)
        _, trust = geman_mcclure(away.square().sum(dim=-1), robust)
        weight = (trust * shown.visible)[..., None, None]
        ridge = (weight.sum(dim=0).clamp(min=1.0) / reach**2) * torch.eye(2)
        step = torch.linalg.solve((weight * A.mT @ A).sum(dim=0) + ridge, (weight * A.mT @ away[..., None]).sum(dim=0))
        step = step[..., 0] * (2.0 * reach / step[..., 0].norm(dim=-1, keepdim=True).clamp(min=1e-9)).clamp(max=1.0)
        return replace(self, points=self.points + (tangents @ step[..., None])[..., 0])

    @staticmethod
    def _slope(p_cam: Float[Tensor, "*b 3"], K: Float[Tensor, "*#b 3 3"]) -> Float[Tensor, "*b 2 3"]:
        """Derivative of pixels by points in the camera frame [px/m]."""
        depth = p_cam[..., 2].clamp(min=NEAREST_M)
        slope = torch.zeros(*p_cam.shape[:-1], 2, 3).to(p_cam)
        slope[..., 0, 0] = slope[..., 1, 1] = 1.0 / depth
        slope[..., :, 2] = -p_cam[..., :2] / depth[..., None] ** 2
        return K[..., :2, :2] @ slope

    def _Ts_cam_world(self, q: Tensor) -> Float[Tensor, "frames 4 4"]:
        return self.camera.T_cam_world.to(q).expand(len(q), 4, 4)


def in_company(points: Float[Tensor, "m 3"]) -> Bool[Tensor, " m"]:
    """Which points have their neighbours about as near as most have; training leaves some splats off the surface."""
    near = KDTree(points.numpy()).query(points.numpy(), k=min(NEIGHBOURS + 1, len(points)))[0][:, 1:].mean(axis=1)
    return torch.from_numpy(near <= ALONE * np.median(near))


def farthest_points(points: Float[Tensor, "m 3"], n: int) -> Int[Tensor, " n"]:
    """Indices of `n` points that are far apart, or of all; begins with the one farthest from the middle."""
    if n >= len(points):
        return torch.arange(len(points))
    chosen = [int((points - points.mean(dim=0)).square().sum(dim=-1).argmax())]
    distance = torch.full((len(points),), torch.inf)
    while len(chosen) < n:
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(dim=-1))
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)
