"""What the places of tracks in one frame say of the joints: together they have the robot's outline."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.inverse.attempts import Problem, planned
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.reconstruct import answers_of
from kinesplat.inverse.search import joint_scale
from kinesplat.self_model import SelfModel

OUTLINE_PX = 96
NEIGHBOUR, MOST_LONELY = 4, 0.8
SHRUNK = 0.6
STARTS = 48
COLOUR_WEIGHT = 1e-3
INK = 0.2
APART = 0.02


def outline(points: Float[Tensor, "n 2"], camera: Camera) -> tuple[Float[Tensor, "height width"], Camera]:
    """A mask of what points cover that are spread over a robot, and the camera of its size.

    Discs that reach from point to point, and their union shrunk by nearly as much.

    Args:
        points: [px of `camera`].
        camera: batch ``()``.
    """
    shrink = min(1.0, OUTLINE_PX / max(camera.width, camera.height))
    small = camera.resized(*(max(8, round(shrink * side)) for side in (camera.width, camera.height)))
    p = points * torch.tensor([small.width / camera.width, small.height / camera.height])
    reach = float(torch.cdist(p, p).kthvalue(min(NEIGHBOUR, len(p)), dim=1).values.quantile(MOST_LONELY))
    y, x = torch.meshgrid(torch.arange(small.height) + 0.5, torch.arange(small.width) + 0.5, indexing="ij")
    away = torch.cdist(torch.stack([x, y], dim=-1).reshape(-1, 2), p).amin(dim=1)
    grown = np.pad((away < max(reach, 1.0)).reshape(small.height, small.width).numpy(), 1, mode="edge")
    inside = np.asarray(distance_transform_edt(grown))[1:-1, 1:-1] > SHRUNK * reach
    return torch.from_numpy(inside).float(), small


@torch.no_grad()
def outlined(
    model: SelfModel, points: Float[Tensor, "n 2"], camera: Camera, count: int, seed: int
) -> Float[Tensor, "k dof"]:
    """At most `count` configurations that fill the outline of points, best first: one search without colours.

    Args:
        model: self-model of the robot.
        points: places of tracks in one frame [px].
        camera: of that frame, batch ``()``.
        count: of configurations.
        seed: of the random starts.
    """
    mask, small = outline(points, camera)
    if not bool((mask > 0.5).any()):
        return torch.zeros(0, model.tree.dof)
    drawn = (1.0 - (1.0 - INK) * mask)[..., None].expand(-1, -1, 3)
    observation = Observation.create(drawn, mask, replace(small, K=small.K.float()))
    problem = Problem(model, observation, None, seed, False, True, None, COLOUR_WEIGHT)
    fit = next(iter(answers_of(problem, planned(None, STARTS, False))))
    found: list[Tensor] = []
    for hypothesis in fit.hypotheses:
        away = [((hypothesis.q - q).abs() / joint_scale(model.tree)).mean() for q in found]
        if len(found) < count and all(a > APART for a in away):
            found.append(hypothesis.q)
    return torch.stack(found)
