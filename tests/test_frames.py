"""Frames: rows of images that keep together, and the lights they were taken under."""

import math

import pytest
import torch

pytest.importorskip("mujoco_warp", reason="needs mujoco_warp (pip install kinesplat[render])")

import mujoco

from kinesplat.camera import Camera
from kinesplat.dataset.capture import Capture, capture_frames
from kinesplat.dataset.frames import Frames
from kinesplat.dataset.lights import WORLD_LIGHT, draw_lights
from kinesplat.dataset.sampling import random_configurations
from kinesplat.description import Robot, load_description, robot_from_model
from kinesplat.errors import InputError

# A large plate above a small one: under a light from straight above, the small one lies in shadow.
PLATES = """<mujoco><worldbody><body name="plates"><freejoint/>
  <geom group="2" type="box" size="0.4 0.4 0.01" pos="0 0 0.5" rgba="0.9 0.6 0.3 1"/>
  <geom group="2" type="box" size="0.2 0.2 0.01" rgba="0.8 0.4 0.2 1"/></body></worldbody></mujoco>"""
ALBEDO = torch.tensor([0.8, 0.4, 0.2])


@pytest.fixture(scope="module")
def robot() -> Robot:
    return load_description("kinearm")


@pytest.fixture(scope="module")
def frames(robot: Robot) -> Frames:
    generator = torch.Generator().manual_seed(1)
    q = random_configurations(robot.tree, 3, generator)
    eyes = torch.tensor([[1.0, 0.2, 0.5], [-0.2, 1.1, 0.5], [-1.0, 0.2, 0.9]], dtype=torch.float64)
    camera = Camera.look_at(eyes, (0.0, 0.0, 0.2), width=48, height=40)
    return capture_frames(Capture(robot, samples=4), q, camera)


@pytest.fixture(scope="module")
def plates() -> Capture:
    robot = robot_from_model(mujoco.MjModel.from_xml_string(PLATES), "plates", "test", "none")
    return Capture(robot, samples=1, light="world")


def seen_small_plate(capture: Capture, light: tuple[float, ...]) -> torch.Tensor:
    """Colour in the middle of the small plate, seen from above at 45 degrees and below the large one."""
    camera = Camera.look_at((1.0, 0.0, 0.2), (0.0, 0.0, 0.01), width=33, height=33, fov_y=0.1)
    out = capture.render(torch.zeros(0), camera, torch.eye(4), light=torch.tensor(light))
    assert out.rgb is not None
    return out.rgb[16, 16]


def test_frames_hold_what_the_capture_renders(robot: Robot, frames: Frames) -> None:
    out = Capture(robot, samples=4).render(frames.q, frames.camera)
    assert frames.rgb.dtype == frames.alpha.dtype == torch.uint8
    assert frames.q.dtype == frames.camera.K.dtype == frames.camera.T_cam_world.dtype == torch.float64
    assert (frames.rgb / 255.0 - out.rgb).abs().max() <= 0.5 / 255 + 1e-6
    assert (frames.alpha / 255.0 - out.alpha).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(frames.depth, out.depth)
    assert torch.equal(frames.link_id.long(), out.link_id)
    assert frames.light is None


def test_rows_keep_together(frames: Frames) -> None:
    again = Frames.concatenate([frames.select([2]), frames.select(slice(0, 2)), frames.select(torch.arange(3) == 1)])
    assert len(again) == 4
    for row, source in enumerate([2, 0, 1, 1]):
        assert torch.equal(again.q[row], frames.q[source])
        assert torch.equal(again.rgb[row], frames.rgb[source])
        assert torch.equal(again.link_id[row], frames.link_id[source])
        assert torch.equal(again.camera.T_cam_world[row], frames.camera.T_cam_world[source])


def test_rows_that_do_not_match_are_refused(frames: Frames, unchecked_types: None) -> None:
    with pytest.raises(InputError, match="one row per image"):
        Frames(frames.q[:2], frames.camera, frames.rgb, frames.alpha)
    with pytest.raises(InputError, match=r"\(height, width\)"):
        Frames(frames.q, frames.camera, frames.rgb[:, :-1], frames.alpha[:, :-1])
    bare = Frames(frames.q, frames.camera, frames.rgb, frames.alpha)
    with pytest.raises(InputError, match="what they hold"):
        Frames.concatenate([frames, bare])
    with pytest.raises(InputError, match="no frames"):
        Frames.concatenate([])


def test_as_many_cameras_as_configurations(robot: Robot, frames: Frames) -> None:
    with pytest.raises(InputError, match="3 configurations need as many cameras"):
        capture_frames(robot, frames.q, frames.select([0]).camera)


def test_world_light_in_closed_form(plates: Capture) -> None:
    """ambient + diffuse cos + headlight cos, on a horizontal plate that the light reaches sideways."""
    direction = torch.nn.functional.normalize(torch.tensor([0.0, 2.0, -1.0]), dim=0).tolist()
    colour = seen_small_plate(plates, (*direction, 0.3, 0.5, 0.2, 1.0))
    to_camera = torch.nn.functional.normalize(torch.tensor([1.0, 0.0, 0.19]), dim=0)
    expected = ALBEDO * (0.3 - 0.5 * direction[2] + 0.2 * to_camera[2])
    assert (colour - expected).abs().max() < 0.006


def test_shadows_fall_where_the_light_is_blocked(plates: Capture) -> None:
    down, sideways = (0.0, 0.0, -1.0), (0.0, 0.0, -1.0, 0.3, 0.5, 0.0)
    assert (seen_small_plate(plates, (*down, 0.3, 0.5, 0.0, 1.0)) - 0.3 * ALBEDO).abs().max() < 0.006
    assert (seen_small_plate(plates, (*sideways, 0.0)) - 0.8 * ALBEDO).abs().max() < 0.006


def test_random_lights_differ_from_image_to_image_and_never_saturate() -> None:
    lights = draw_lights("random", 200, torch.Generator().manual_seed(0))
    assert len(torch.unique(lights, dim=0)) == 200
    assert torch.allclose(lights[:, :3].norm(dim=-1), torch.ones(200, dtype=torch.float64))
    assert (lights[:, 2] < -math.sin(math.radians(19.9))).all()
    assert torch.allclose(lights[:, 3:6].sum(-1), torch.ones(200, dtype=torch.float64))
    assert (lights[:, 3:6] > 0.05).all()


def test_random_lights_reach_the_frames(robot: Robot, frames: Frames) -> None:
    capture = Capture(robot, samples=1, light="random", seed=5)
    a, b = (capture_frames(capture, frames.q, frames.camera) for _ in range(2))
    assert not torch.equal(a.light, b.light)
    assert torch.equal(a.alpha, b.alpha)
    assert not torch.equal(a.rgb, b.rgb)
    assert torch.equal(capture_frames(capture, frames.q, frames.camera, light=a.light).rgb, a.rgb)


def test_world_light_is_one_for_all(robot: Robot, frames: Frames) -> None:
    light = capture_frames(Capture(robot, samples=1, light="world"), frames.q, frames.camera).light
    assert torch.equal(light, torch.tensor(WORLD_LIGHT, dtype=torch.float64).expand(3, 7))


def test_lights_that_make_no_sense_are_refused(robot: Robot, frames: Frames, unchecked_types: None) -> None:
    with pytest.raises(InputError, match="unknown light 'sun'"):
        Capture(robot, light="sun")
    with pytest.raises(InputError, match="given to a headlight"):
        Capture(robot).render(frames.q[0], frames.select([0]).camera, light=torch.tensor(WORLD_LIGHT))
