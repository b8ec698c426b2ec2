"""Cameras whose direction is known: where they stand follows from the masks."""

import math

import pytest
import torch

from kinesplat.camera import Camera
from kinesplat.inverse import reconstruct
from kinesplat.inverse.alignment import MaskBoxes, random_views
from kinesplat.inverse.observation import Observation
from kinesplat.self_model import SelfModel


def seen(model: SelfModel, q: torch.Tensor, seed: int) -> tuple[Camera, torch.Tensor, torch.Tensor]:
    direction = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    camera = Camera.framing(model.posed(q).means, direction)
    out = model.render(q, camera)
    assert out.alpha is not None
    return camera, out.rgb, out.alpha


@pytest.mark.parametrize("seed", range(4))
def test_the_true_direction_gives_the_true_place(kinearm: SelfModel, seed: int) -> None:
    tree = kinearm.tree
    share = torch.rand(tree.dof, generator=torch.Generator().manual_seed(seed))
    q = (tree.q_lower + (tree.q_upper - tree.q_lower) * share).float()
    camera, rgb, alpha = seen(kinearm, q, seed)
    boxes = MaskBoxes.of(kinearm, Observation.create(rgb, alpha, camera))
    lost = camera.T_cam_world.clone()
    lost[:3, 3] = math.nan
    found = boxes.aligned(q[None], lost[None, None])[0, 0]
    assert torch.equal(found[:3, :3], camera.T_cam_world[:3, :3])
    away = (found[:3, 3] - camera.T_cam_world[:3, 3]).norm() / camera.T_cam_world[:3, 3].norm()
    assert away < 0.04  # the centres of the outermost splats lie within the outline


def test_candidates_fill_the_box(kinearm: SelfModel) -> None:
    tree, generator = kinearm.tree, torch.Generator().manual_seed(0)
    camera, rgb, alpha = seen(kinearm, tree.q_canonical.float(), 0)
    observation = Observation.create(rgb, alpha, camera)
    q = (tree.q_lower + (tree.q_upper - tree.q_lower) * torch.rand(20, tree.dof, generator=generator)).float()
    T = MaskBoxes.of(kinearm, observation).aligned(q, random_views(20, generator)[:, None])
    inside = torch.nonzero(alpha > 0.5)
    low, high = inside.amin(dim=0).flip(0), inside.amax(dim=0).flip(0) + 1
    pixels, _ = Camera(camera.K, T[:, 0], 256, 256).project(kinearm.posed(q).means)
    ends = pixels.amin(dim=1), pixels.amax(dim=1)
    shifted = ((ends[0] + ends[1]) / 2 - (low + high) / 2).abs().amax(dim=-1)
    grown = (ends[1] - ends[0]).norm(dim=-1) / (high - low).float().norm() - 1.0
    # arms that reach for the camera come to fill it slowly
    assert ((shifted < 6.0) & (grown.abs() < 0.05)).sum() >= 16


def test_views_are_rigid_and_come_from_all_round() -> None:
    T = random_views(2_000, torch.Generator().manual_seed(0))
    R = T[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(2_000, 3, 3), atol=1e-5, rtol=0)
    assert (torch.linalg.det(R) > 0.99).all()
    centres = -R[:, 2]  # seen from a point one metre in front
    assert (centres[:, :2].mean(dim=0).abs() < 0.1).all()
    assert 0.0 < centres[:, 2].mean() < 0.6
    upright = (R[:, 1, 2] < 0).float().mean()
    assert upright > 0.8


@pytest.mark.slow
def test_joints_and_camera_are_found_from_K_alone(kinearm: SelfModel) -> None:
    tree, solved = kinearm.tree, 0
    for seed in range(4):
        share = torch.rand(tree.dof, generator=torch.Generator().manual_seed(seed))
        q = (tree.q_lower + (tree.q_upper - tree.q_lower) * (0.2 + 0.6 * share)).float()
        camera = Camera.framing(kinearm.posed(q).means, (1.0, 0.4, 0.5))
        out = kinearm.render(q, camera)
        fit = reconstruct(kinearm, out.rgb, K=camera.K, masks=out.alpha, optimize_camera=True, seed=seed)
        points = [
            kinearm.posed(a).means @ c.T_cam_world[:3, :3].T + c.T_cam_world[:3, 3]
            for a, c in ((q, camera), (fit.q, fit.camera))
        ]
        solved += bool((points[0] - points[1]).norm(dim=-1).mean() < 0.01)
    assert solved >= 3
