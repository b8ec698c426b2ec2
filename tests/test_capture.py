"""Ground-truth images: against a sphere in closed form, against MuJoCo's own rays, and against the kinematic tree."""

import math

import mujoco
import numpy as np
import pytest
import torch

pytest.importorskip("mujoco_warp", reason="needs mujoco_warp (pip install kinesplat[render])")

from kinesplat.camera import Camera
from kinesplat.dataset.capture import Capture
from kinesplat.dataset.sampling import random_cameras, random_configurations
from kinesplat.description import Robot, load_description, mujoco_qpos, robot_from_model
from kinesplat.errors import InputError

RADIUS = 0.3
BALL = f"""<mujoco><worldbody><light pos="0 0 3" diffuse="1 1 1"/><geom type="plane" size="5 5 1" group="2"/>
  <body name="ball"><freejoint/><geom group="2" type="sphere" size="{RADIUS}" rgba="0.8 0.4 0.2 1"/>
  <geom group="3" type="box" size="1 1 1"/></body></worldbody></mujoco>"""


def robot_of(xml: str) -> Robot:
    return robot_from_model(mujoco.MjModel.from_xml_string(xml), "test", "test", "none")


@pytest.fixture(scope="module")
def ball() -> Capture:
    return Capture(robot_of(BALL), samples=16)


@pytest.fixture(scope="module")
def kinearm() -> Robot:
    return load_description("kinearm")


def off_centre_camera() -> Camera:
    K = torch.tensor([[90.0, 2.0, 21.3], [0.0, 70.0, 30.6], [0.0, 0.0, 1.0]])
    camera = Camera.look_at((1.5, 0.4, 0.3), (0.05, 0.0, -0.1), width=64, height=48)
    return Camera(K, camera.T_cam_world, 64, 48)


def sphere_seen_by(camera: Camera, samples: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Closed form: alpha, mean depth and mean headlight cosine per pixel of the sphere at the origin."""
    grid = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    v, u = torch.meshgrid(torch.arange(camera.height), torch.arange(camera.width), indexing="ij")
    y, x = (
        (v[..., None, None] + grid[:, None]).expand(-1, -1, -1, samples),
        (u[..., None, None] + grid).expand(-1, -1, samples, -1),
    )
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ torch.linalg.inv(camera.K.double()).T
    centre = camera.T_cam_world.double()[:3, 3]
    a, b, c = rays.square().sum(-1), rays @ centre, centre @ centre - RADIUS**2
    discriminant = b**2 - a * c
    hit = discriminant > 0
    z = (b - discriminant.clamp(min=0).sqrt()) / a
    cosine = -((z[..., None] * rays - centre) / RADIUS)[..., 2].clamp(max=0.0)
    count = hit.sum((-1, -2)).clamp(min=1)
    mean = [torch.where(hit, value, 0.0).sum((-1, -2)) / count for value in (z, cosine)]
    return hit.double().mean((-1, -2)), *mean


def test_sphere_in_closed_form(ball: Capture) -> None:
    camera = off_centre_camera()
    out = ball.render(torch.zeros(0), camera, T_world_base=torch.eye(4))
    alpha, depth, cosine = sphere_seen_by(camera)
    full = (alpha == 1.0) & (out.alpha == 1.0)
    assert full.sum() > 200
    assert (out.alpha - alpha).abs().max() < 0.15
    assert (out.alpha - alpha).abs().mean() < 2e-3
    assert (out.depth - depth)[full].abs().max() < 5e-3  # at the limb the sample patterns matter
    assert (out.depth - depth)[full].abs().median() < 2e-4
    colour = torch.tensor([0.8, 0.4, 0.2]) * (0.5 + 0.5 * cosine[..., None])
    assert (out.rgb - colour)[full].abs().max() < 6e-3
    assert torch.equal(out.link_id == 0, out.alpha >= 0.5)


def test_background_is_white_and_nothing_else_is_drawn(ball: Capture) -> None:
    out = ball.render(torch.zeros(0), Camera.look_at((3.0, 0.0, 1.5), (0.0, 0.0, 0.0), width=40, height=30))
    empty = out.alpha == 0.0
    assert empty.float().mean() > 0.7
    assert (out.rgb[empty] == 1.0).all()
    assert (out.depth[empty] == 0.0).all()
    assert (out.link_id[empty] == -1).all()


def test_base_moves_the_picture(ball: Capture) -> None:
    camera = off_centre_camera()
    T = torch.eye(4)
    T[:3, 3] = torch.tensor([0.2, -0.3, 0.1])
    moved = Camera(camera.K, camera.T_cam_world @ torch.linalg.inv(T), 64, 48)
    a = ball.render(torch.zeros(0), camera)
    b = ball.render(torch.zeros(0), moved, T_world_base=T)
    assert (a.rgb - b.rgb).abs().max() < 0.05
    assert (a.depth - b.depth).abs().mean() < 1e-4


def test_fixed_base_moves_with_the_base_too(kinearm: Robot) -> None:
    capture = Capture(kinearm)
    q = kinearm.tree.q_canonical
    T = torch.eye(4, dtype=torch.float64)
    T[:3, :3] = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    T[:3, 3] = torch.tensor([0.4, 0.1, 0.2])
    camera = Camera.look_at((1.2, 0.3, 0.6), (0.0, 0.0, 0.25), width=80, height=60)
    moved = Camera(camera.K, (camera.T_cam_world.double() @ torch.linalg.inv(T)).float(), 80, 60)
    a, b = capture.render(q, camera), capture.render(q, moved, T_world_base=T)
    assert (a.link_id != b.link_id).float().mean() < 0.002
    assert (a.rgb - b.rgb).abs().mean() < 1e-3


def test_depth_and_links_agree_with_mujoco_rays(kinearm: Robot) -> None:
    generator = torch.Generator().manual_seed(3)
    q = random_configurations(kinearm.tree, 1, generator)[0]
    camera = Camera.look_at((0.9, -0.5, 0.6), (0.0, 0.0, 0.3), width=48, height=48)
    out = Capture(kinearm, samples=1).render(q, camera)
    model, data = kinearm.mj_model, mujoco.MjData(kinearm.mj_model)
    data.qpos[:] = mujoco_qpos(kinearm, q)
    mujoco.mj_kinematics(model, data)
    T_world_cam = camera.T_world_cam.double().numpy()
    groups = np.array([0, 0, 1, 0, 0, 0], dtype=np.uint8)
    geom = np.zeros(1, dtype=np.int32)
    wrong = 0
    for v in range(1, 48, 3):
        for u in range(1, 48, 3):
            ray = torch.linalg.inv(camera.K.double()).numpy() @ np.array([u + 0.5, v + 0.5, 1.0])
            unit = T_world_cam[:3, :3] @ ray / np.linalg.norm(ray)
            distance = mujoco.mj_ray(model, data, T_world_cam[:3, 3], unit, groups, 1, -1, geom, None)
            hit = distance >= 0.0
            link = int(model.geom_bodyid[geom[0]]) - 1 if hit else -1
            z = distance / np.linalg.norm(ray) if hit else 0.0
            wrong += link != int(out.link_id[v, u]) or abs(z - float(out.depth[v, u])) > 1e-4
    assert (out.link_id >= 0).sum() > 100
    assert wrong <= 2  # rays that graze an edge


def test_batches_broadcast_like_torch(kinearm: Robot) -> None:
    capture = Capture(kinearm, samples=2)
    q = random_configurations(kinearm.tree, 2, torch.Generator().manual_seed(0))
    cameras = Camera.look_at(
        torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.1, 0.5], [-1.0, 0.2, 0.9]]), (0.0, 0.0, 0.2), width=24, height=20
    )
    out = capture.render(q[:, None], cameras)
    assert out.rgb.shape == (2, 3, 20, 24, 3)
    single = capture.render(q[1], Camera(cameras.K[2], cameras.T_cam_world[2], 24, 20))
    assert torch.equal(single.rgb, out.rgb[1, 2])
    assert torch.equal(single.link_id, out.link_id[1, 2])


def test_random_cameras_see_the_whole_robot_large(kinearm: Robot) -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(50, 200, 3, generator=generator) * torch.tensor([0.1, 0.2, 0.5])
    camera = random_cameras(points, generator, size=128)
    pixels, depth = camera.project(points)
    span = (pixels / 64.0 - 1.0).abs().amax((-1, -2))
    assert (depth > 0).all()
    assert (span < 1.1).all()
    assert (span > 0.4).all()
    assert math.isclose(2.0 * math.atan(64.0 / float(camera.K[0, 0, 0])), math.radians(45.0), rel_tol=1e-5)
    directions = camera.T_world_cam[:, :3, 3] - points.mean(1)
    assert directions[:, 0].min() < 0 < directions[:, 0].max()


def test_configurations_keep_within_limits(kinearm: Robot) -> None:
    q = random_configurations(kinearm.tree, 500, torch.Generator().manual_seed(2))
    assert (q >= kinearm.tree.q_lower).all()
    assert (q <= kinearm.tree.q_upper).all()
    covered = (q.amax(0) - q.amin(0)) / (kinearm.tree.q_upper - kinearm.tree.q_lower)
    assert (covered > 0.97).all()


def test_robot_without_surface_is_refused() -> None:
    bare = robot_of(
        "<mujoco><worldbody><body><inertial mass='1' pos='0 0 0' diaginertia='1 1 1'/></body></worldbody></mujoco>"
    )
    with pytest.raises(InputError, match="no visual geom"):
        Capture(bare)


def test_samples_must_be_positive(kinearm: Robot) -> None:
    with pytest.raises(InputError, match="samples is 0"):
        Capture(kinearm, samples=0)


@pytest.mark.parametrize(("samples", "light"), [(1, "headlight"), (4, "headlight"), (5, "world")])
def test_averages_on_the_device_are_those_on_the_cpu(kinearm: Robot, samples: int, light: str) -> None:
    """What a GPU's tensors go through, on the CPU's."""
    capture = Capture(kinearm, samples=samples, light=light, device="cpu")
    tree = kinearm.tree
    q = random_configurations(tree, 2, torch.Generator().manual_seed(3))
    camera = Camera.look_at((0.5, 0.35, 0.4), (0.05, 0.0, 0.2), width=40, height=32)
    here = capture.render(q, camera)
    capture._averages_there = True
    there = capture.render(q, camera)
    for name in ("rgb", "alpha", "depth"):
        assert torch.allclose(getattr(there, name), getattr(here, name), rtol=1e-6, atol=1e-6), name
    assert torch.equal(there.link_id, here.link_id)
    assert there.link_id.dtype == here.link_id.dtype
    assert len(here.link_id.unique()) > 3
