"""Cameras: conventions by hand-made cases, projection against OpenCV's formula, files."""

import json
import math
from pathlib import Path

import pytest
import torch

from kinesplat.camera import Camera
from kinesplat.errors import InputError


def test_the_target_projects_onto_the_image_centre() -> None:
    eyes = torch.randn(20, 3, dtype=torch.float64) * 3
    target = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    camera = Camera.look_at(eyes, target, width=320, height=200)
    pixels, depth = camera.project(target.expand(20, 1, 3))
    torch.testing.assert_close(pixels, torch.tensor([160.0, 100.0], dtype=torch.float64).expand(20, 1, 2))
    torch.testing.assert_close(depth[:, 0], (eyes - target).norm(dim=-1))


def test_axes_are_opencv() -> None:
    camera = Camera.look_at((0.0, -2.0, 0.0), (0.0, 0.0, 0.0))
    right, up = camera.project(torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.0, 0.1]]))[0]
    torch.testing.assert_close(right, torch.tensor([128 + 0.05 * 309.19, 128.0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(up, torch.tensor([128.0, 128 - 0.05 * 309.19]), atol=1e-2, rtol=0)


def test_field_of_view_is_vertical() -> None:
    camera = Camera.look_at((1.0, 0.0, 0.0), (0.0, 0.0, 0.0), fov_y=0.9, width=400, height=300)
    edge = torch.tensor([[0.0, 0.0, math.tan(0.45)]])
    torch.testing.assert_close(camera.project(edge)[0][0, 1], torch.tensor(0.0), atol=1e-4, rtol=0)


def test_projection_is_k_times_the_normalised_point() -> None:
    camera = Camera.look_at(torch.randn(4, 1, 3, dtype=torch.float64) + 3, torch.zeros(5, 3, dtype=torch.float64))
    points = torch.randn(4, 5, 7, 3, dtype=torch.float64)
    pixels, depth = camera.project(points)
    assert camera.batch_shape == (4, 5)
    homogeneous = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    p_cam = torch.einsum("abij,abnj->abni", camera.T_cam_world, homogeneous)[..., :3]
    expected = torch.einsum("abij,abnj->abni", camera.K, p_cam / p_cam[..., 2:])[..., :2]
    torch.testing.assert_close(pixels, expected)
    torch.testing.assert_close(depth, p_cam[..., 2])


@pytest.mark.parametrize("up", [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0)])
def test_every_look_at_is_a_rigid_motion_even_straight_down(up: tuple[float, float, float]) -> None:
    eyes = torch.tensor(
        [[0.0, 0.0, 2.0], [0.0, 0.0, -2.0], [1e-9, 0.0, 2.0], [0.0, 2.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64
    )
    T = Camera.look_at(eyes, torch.zeros(3, dtype=torch.float64), up=up).T_cam_world
    R = T[..., :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3, dtype=torch.float64).expand(5, 3, 3))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(5, dtype=torch.float64))


def test_resizing_keeps_the_field_of_view() -> None:
    camera = Camera.look_at((2.0, 0.3, 0.5), (0.0, 0.0, 0.0), width=256, height=128)
    points = torch.randn(10, 3) * 0.2
    small = camera.resized(64, 32)
    torch.testing.assert_close(small.project(points)[0], camera.project(points)[0] / 4, atol=1e-4, rtol=1e-4)


def test_file_round_trip(tmp_path: Path) -> None:
    camera = Camera.look_at((2.0, 0.3, 0.5), (0.0, 0.0, 0.0), width=256, height=128)
    path = tmp_path / "camera.json"
    path.write_text(json.dumps(camera.to_json()))
    loaded = Camera.from_json(path)
    torch.testing.assert_close(loaded.T_cam_world, camera.T_cam_world)
    torch.testing.assert_close(loaded.K, camera.K)
    assert (loaded.width, loaded.height) == (256, 128)


def test_a_list_of_cameras_is_a_batch(tmp_path: Path) -> None:
    cameras = [Camera.look_at((2.0, y, 0.5), (0.0, 0.0, 0.0)) for y in (0.1, 0.4)]
    path = tmp_path / "cameras.json"
    path.write_text(json.dumps([camera.to_json() for camera in cameras]))
    loaded = Camera.from_json(path)
    assert loaded.batch_shape == (2,)
    torch.testing.assert_close(loaded.T_cam_world[1], cameras[1].T_cam_world)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ('{"K": [[1,0,0],[0,1,0],[0,0,1]], "width": 3, "height": 3}', "'T_cam_world' is missing"),
        ('{"K": [1, 2], "T_cam_world": [[1]], "width": 3, "height": 3}', "K has shape"),
        ('{"K": [["a"]], "T_cam_world": [[1]], "width": 3, "height": 3}', "camera.json"),
        ("[]", "camera.json"),
    ],
)
def test_broken_camera_files_are_named(unchecked_types: None, tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "camera.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=says):
        Camera.from_json(path)


def test_impossible_cameras_are_refused(unchecked_types: None) -> None:
    with pytest.raises(InputError, match="coincide"):
        Camera.look_at((1.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    with pytest.raises(InputError, match="fov_y"):
        Camera.look_at((1.0, 0.0, 0.0), (0.0, 0.0, 0.0), fov_y=4.0)
    good = Camera.look_at((1.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    with pytest.raises(InputError, match="NaN"):
        Camera(good.K * math.nan, good.T_cam_world, 4, 4)
    with pytest.raises(InputError, match="rigid"):
        Camera(good.K, good.T_cam_world * 0.5, 4, 4)
    with pytest.raises(InputError, match="image size"):
        Camera(good.K, good.T_cam_world, 0, 4)
    with pytest.raises(InputError, match="T_cam_world has shape"):
        Camera(good.K, good.T_cam_world[:3], 4, 4)


@pytest.mark.parametrize(("width", "height"), [(200, 200), (300, 200), (150, 200)])
def test_framing_shows_every_point_and_wastes_no_more_than_the_sphere_needs(width: int, height: int) -> None:
    points = torch.randn(6, 100, 3) * torch.tensor([0.2, 0.5, 0.4]) + torch.tensor([1.0, 2.0, 0.3])
    camera = Camera.framing(points, direction=(0.3, -1.0, 0.4), width=width, height=height)
    pixels, depth = camera.project(points)
    assert (depth > 0).all()
    assert (pixels >= 0).all()
    assert (pixels <= torch.tensor([width, height])).all()
    assert ((pixels - pixels.mean(dim=1, keepdim=True)).norm(dim=-1).amax(dim=1) > 0.3 * min(width, height)).all()
