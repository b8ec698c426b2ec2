"""Calibration by contours alone, the whole way."""

import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from test_contours import clutter, scene_of

import kinesplat as ks
from kinesplat.inverse.camera_search import angles_between
from kinesplat.twists import exp_twist


def test_camera_of_pictures_without_masks_from_a_guess(kinearm: ks.SelfModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Place and direction; the last level stays small."""
    contours = import_module("kinesplat.inverse.contour_calibration")
    monkeypatch.setattr(contours, "FINE", contours.FINE[:-1])
    monkeypatch.setattr(contours, "NEIGHBOURS", 128)
    q, camera, first = scene_of(kinearm, 256, 192)
    other = kinearm.tree.clamp(q + 0.5)
    out = kinearm.render(other, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    second = (out.rgb - (1.0 - out.alpha[..., None]) * (1.0 - clutter(192, 256, 0))).clamp(0, 1)
    off = exp_twist(torch.tensor([0.01, -0.01, 0.01, 0.02, -0.02, 0.02]))
    T_world_base = kinearm.tree.forward_kinematics(kinearm.tree.q_canonical)[0].float()
    guess = off @ camera.T_cam_world @ T_world_base
    found = ks.calibrate(
        kinearm, torch.stack([first, second]), torch.stack([q, other]), camera.K, T_cam_base_init=guess
    )
    assert found.verdict != "failed"
    assert angles_between(found.camera.T_cam_world, camera.T_cam_world) < 0.02
    centres = [torch.linalg.inv(T)[:3, 3] for T in (found.camera.T_cam_world, camera.T_cam_world)]
    assert 1000.0 * (centres[0] - centres[1]).norm() < 3.0 * found.position_std_mm[0]
    assert (centres[0] - centres[1]).norm() < 0.03 * found.distance_m[0]  # depth is weak in two small pictures
    points = kinearm.posed(q).means
    views = [
        replace(camera, T_cam_world=T) for T in (camera.T_cam_world, found.camera.T_cam_world, off @ camera.T_cam_world)
    ]
    right, answer, start = (view.project(points)[0] for view in views)
    assert (answer - right).norm(dim=-1).mean() < 0.25 * (start - right).norm(dim=-1).mean()
    assert math.isnan(found.images[0].iou)
    assert "IoU" not in found.report()
