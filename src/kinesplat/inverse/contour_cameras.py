"""Where a camera stands, from contours of known configurations before anything: templates, slid over the photographs.

The robot is rendered from directions all around and in several sizes. A small turn of the camera shifts its picture, so
correlation of its contours with the edges of the photographs tries all places in the picture at once.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.inverse.calibration import Rig
from kinesplat.inverse.contours import COVERED, TONE, contour_pixels, grown
from kinesplat.inverse.edges import EdgePictures
from kinesplat.self_model import SelfModel

CANVAS = 1.5
SPACING_RAD = 0.3
LOWEST, HIGHEST = -0.35, 1.2
ROLLS = (-0.15, 0.0, 0.15)
SMALLEST, LARGEST, RATIO = 0.2, 1.3, 1.25
TOGETHER = 8
PEAKS = 2
CHANCE = 0.75


@dataclass(frozen=True)
class Templates:
    """Cameras that look at the middle of the robot.

    Attributes:
        T_cam_mount: ``(n, 4, 4)``.
        camera: intrinsics, and size, of a canvas larger than the photographs, with the middle in its centre.
    """

    T_cam_mount: Float[Tensor, "n 4 4"]
    camera: Camera

    @classmethod
    def around(
        cls, pivot: Float[Tensor, "3"], radius: float, K: Float[Tensor, "3 3"], size: tuple[int, int]
    ) -> "Templates":
        """Level cameras in directions about 0.3 rad apart and in sizes a quarter apart.

        They are level within 0.15 rad, the z axis up, and look up by 0.35 rad and down by 1.2 rad at most.

        Args:
            pivot: the middle of the robot in the frame of what carries the camera [m].
            radius: of the robot around it [m].
            K: intrinsics at the photographs' size.
            size: width and height of the photographs [px].
        """
        width, height = (math.ceil(CANVAS * s) for s in size)
        count = math.ceil(math.log(LARGEST / SMALLEST) / math.log(RATIO)) + 1
        spans = SMALLEST * RATIO ** torch.arange(count)
        distances = K[0, 0] * 2.0 * radius / (spans * max(size))
        eyes, rolls = sphere(SPACING_RAD, LOWEST, HIGHEST), torch.tensor(ROLLS)
        level = Camera.look_at(eyes, torch.zeros(3), width=1, height=1).T_cam_world[:, :3, :3]
        turn = torch.zeros(len(rolls), 3, 3)
        turn[:, 0, 0] = turn[:, 1, 1] = rolls.cos()
        turn[:, 1, 0], turn[:, 0, 1], turn[:, 2, 2] = rolls.sin(), -rolls.sin(), 1.0
        R = (turn[None] @ level[:, None]).flatten(0, 1)
        T = torch.eye(4).repeat(len(R), len(distances), 1, 1)
        T[..., :3, :3] = R[:, None]
        T[..., :3, 3] = -(R @ pivot)[:, None]
        T[..., 2, 3] += distances
        centred = torch.tensor([[K[0, 0], 0.0, 0.5 * width], [0.0, K[1, 1], 0.5 * height], [0.0, 0.0, 1.0]])
        return cls(T.flatten(0, 1), Camera(centred, torch.eye(4), width, height))


def sphere(spacing: float, lowest: float, highest: float) -> Float[Tensor, "n 3"]:
    """Unit vectors about `spacing` [rad] apart whose elevation lies between bounds [rad]: rings of even steps."""
    rows = []
    rings = max(1, round((highest - lowest) / spacing))
    for ring in range(rings):
        elevation = lowest + (ring + 0.5) * (highest - lowest) / rings
        count = max(1, round(2.0 * math.pi * math.cos(elevation) / spacing))
        azimuth = torch.arange(count) * 2.0 * math.pi / count
        flat = math.cos(elevation) * torch.stack([azimuth.cos(), azimuth.sin()], dim=-1)
        rows.append(torch.cat([flat, torch.full((count, 1), math.sin(elevation))], dim=-1))
    return torch.cat(rows)


def slid_cameras(
    model: SelfModel, rig: Rig, pictures: EdgePictures, templates: Templates, count: int
) -> Float[Tensor, "count 4 4"]:
    """The `count` best of all templates in all places, as ``T_cam_mount``, best first.

    Args:
        model: small; the pictures are small as well.
        rig: of the pictures, one camera.
        pictures: photographs of one camera.
        templates: as `Templates.around` makes them.
        count: how many to return.
    """
    canvas, (height, width) = templates.camera, pictures.rgb.shape[1:3]
    size = canvas.height + height, canvas.width + width
    photo = torch.fft.rfft2(photo_planes(pictures), s=size)
    T_mount_world = torch.linalg.inv(rig.Ts_world_mount)
    scores, places = [], []
    for T in templates.T_cam_mount.split(TOGETHER):
        camera = Camera(canvas.K, T[:, None] @ T_mount_world, canvas.width, canvas.height)
        planes = template_planes(model, rig.q, camera)
        product = torch.fft.rfft2(planes, s=size).conj() * photo
        maps = torch.fft.irfft2(product.sum(dim=(1, 2)), s=size).flatten(1)
        top = maps.topk(PEAKS, dim=1)
        scores.append(top.values)
        places.append(top.indices)
    best = torch.cat(scores).flatten().topk(min(count, PEAKS * len(templates.T_cam_mount))).indices
    place = torch.cat(places).flatten()[best]
    y, x = place // size[1], place % size[1]
    shift = torch.stack([x - (x > width) * size[1], y - (y > height) * size[0]], dim=-1)
    middle = shift + 0.5 * torch.tensor([canvas.width, canvas.height])
    return turned(templates.T_cam_mount[best // PEAKS], middle, pictures.camera.K[0])


def photo_planes(pictures: EdgePictures) -> Float[Tensor, "views 5 height width"]:
    """What contours and the inside of a robot are correlated with: edges by direction, their mean, clear edges."""
    oriented = 0.5 * pictures.oriented
    chance = CHANCE * oriented[:, 0].mean(dim=(1, 2), keepdim=True).expand_as(oriented[:, 0])
    return torch.cat([oriented, chance[:, None], pictures.clear[:, None]], dim=1)


def template_planes(
    model: SelfModel, q: Float[Tensor, "views dof"], camera: Camera
) -> Float[Tensor, "batch views 5 height width"]:
    """Contours by direction, all contours negative, the inside negative."""
    out = model.render(q, camera, outputs=("rgb", "alpha", "depth", "link_id"))
    assert out.rgb is not None
    assert out.alpha is not None
    assert out.depth is not None
    assert out.link_id is not None
    alpha, depth, link = (t.flatten(0, 1) for t in (out.alpha, out.depth, out.link_id))
    inside, tone = alpha > COVERED, out.rgb.flatten(0, 1) @ torch.tensor(TONE).to(alpha)
    occluding, seam = contour_pixels(torch.where(inside, depth, torch.inf), link, tone)
    nearness = torch.where(inside, 1.0 / depth.clamp(min=1e-3), 0.0)
    dx, dy = (torch.zeros_like(nearness) for _ in range(2))
    dx[:, :, 1:-1] = nearness[:, :, 2:] - nearness[:, :, :-2]
    dy[:, 1:-1] = nearness[:, 2:] - nearness[:, :-2]
    squared = (dx.square() + dy.square()).clamp(min=1e-12)
    line = occluding.to(alpha)
    double = [line * (dx.square() - dy.square()) / squared, line * 2.0 * dx * dy / squared]
    inner = (inside & ~grown(occluding | seam)).to(alpha)
    return torch.stack([line, *double, -line, -inner], dim=1).unflatten(0, out.alpha.shape[:2])


def turned(T: Float[Tensor, "n 4 4"], middle: Float[Tensor, "n 2"], K: Float[Tensor, "3 3"]) -> Float[Tensor, "n 4 4"]:
    """Cameras turned so that what lay on the optical axis comes to `middle` [px]."""
    ray = torch.cat([middle, torch.ones_like(middle[:, :1])], dim=-1) @ torch.linalg.inv(K).mT
    z = torch.nn.functional.normalize(ray, dim=-1)
    x = torch.nn.functional.normalize(torch.tensor([1.0, 0.0, 0.0]) - z[:, :1] * z, dim=-1)
    R = torch.stack([x, torch.linalg.cross(z, x), z], dim=-1)
    moved = T.clone()
    moved[:, :3] = R @ T[:, :3]
    return moved
