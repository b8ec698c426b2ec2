"""SelfModel: posing and rendering agree, harmonics turn with their link, cameras inside are refused, coarser copies."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.description import Robot, load_description
from kinesplat.errors import InputError
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import rasterize
from kinesplat.rasterizer.projection import quats_to_rotations
from kinesplat.rasterizer.spherical_harmonics import sh_basis
from kinesplat.self_model import SelfModel
from kinesplat.skinning import pose_gaussians, sh_rotation


def random_rotations(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    count = math.prod(shape)
    return torch.from_numpy(Rotation.random(count, rng=1).as_matrix()).to(dtype).reshape(*shape, 3, 3)


def random_transforms(*shape: int) -> Tensor:
    T = torch.eye(4, dtype=torch.float64).repeat(*shape, 1, 1)
    T[..., :3, :3] = random_rotations(*shape)
    T[..., :3, 3] = torch.randn(*shape, 3, dtype=torch.float64)
    return T


@pytest.fixture(scope="module")
def robot() -> Robot:
    return load_description("kinearm")


@pytest.fixture(scope="module")
def model(robot: Robot) -> SelfModel:
    return SelfModel.from_description(robot, n=1500, seed=0)


@pytest.fixture
def camera() -> Camera:
    return Camera.look_at((0.9, -0.5, 0.6), (0.0, 0.0, 0.25), width=64, height=48)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_turned_harmonics_see_the_turned_direction(degree: int) -> None:
    R = random_rotations(4, 5)
    k = (degree + 1) ** 2
    sh = torch.randn(k, 3, dtype=torch.float64)
    directions = torch.nn.functional.normalize(torch.randn(50, 3, dtype=torch.float64), dim=-1)
    turned = sh_basis(directions, degree) @ (sh_rotation(R, degree) @ sh)
    expected = sh_basis(directions @ R, degree) @ sh
    assert (turned - expected).abs().max() < 1e-12


def test_turning_harmonics_is_a_group_and_orthogonal() -> None:
    a, b = random_rotations(6), random_rotations(12)[6:]
    D = sh_rotation(a @ b, 3)
    assert (D - sh_rotation(a, 3) @ sh_rotation(b, 3)).abs().max() < 1e-12
    assert (D @ D.mT - torch.eye(16, dtype=torch.float64)).abs().max() < 1e-12


def random_gaussians(n: int, k: int) -> Gaussians:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return Gaussians(
        normal(n, 3), normal(n, 4), 0.1 + normal(n, 3).abs(), torch.rand(n, dtype=torch.float64), normal(n, k, 3)
    )


@pytest.mark.parametrize("batch", [(), (3,), (2, 1)])
def test_posed_covariances_and_means_move_rigidly(batch: tuple[int, ...]) -> None:
    gaussians, link = random_gaussians(40, 9), torch.randint(0, 4, (40,))
    Ts = random_transforms(*batch, 4)
    posed = pose_gaussians(gaussians, link, Ts)
    R = Ts[..., link, :3, :3]
    means = torch.einsum("...ij,...j->...i", R, gaussians.means) + Ts[..., link, :3, 3]
    axes, turned = quats_to_rotations(gaussians.quats), quats_to_rotations(posed.quats)
    assert posed.batch_shape == batch
    assert posed.opacities.shape == (*batch, 40)
    assert (posed.means - means).abs().max() < 1e-12
    assert (turned - R @ axes).abs().max() < 1e-12


def test_half_turns_have_quaternions_too() -> None:
    turns = torch.stack(
        [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ((1, -1, -1), (-1, 1, -1), (-1, -1, 1))]
    )
    Ts = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    Ts[:, :3, :3] = turns
    gaussians = random_gaussians(3, 4)
    posed = pose_gaussians(gaussians, torch.arange(3), Ts)
    assert (quats_to_rotations(posed.quats) - turns @ quats_to_rotations(gaussians.quats)).abs().max() < 1e-12


def test_posing_is_differentiable() -> None:
    gaussians, link = random_gaussians(3, 4), torch.tensor([0, 1, 1])
    Ts = random_transforms(2).requires_grad_()

    def outputs(T: Tensor) -> tuple[Tensor, ...]:
        posed = pose_gaussians(gaussians, link, T)
        return posed.means, posed.quats, posed.sh

    assert torch.autograd.gradcheck(outputs, (Ts,))


def test_render_equals_rasterising_posed(model: SelfModel, camera: Camera) -> None:
    """In float64 through the reference, with a moved base and a batch of configurations."""
    exact = model.subsample(200).to(dtype=torch.float64)
    exact = replace(exact, parameters=replace(exact.parameters, sh=exact.parameters.sh + 0.1 * torch.randn(200, 9, 3)))
    tree = model.tree
    q = tree.q_lower + torch.rand(2, tree.dof, dtype=torch.float64) * (tree.q_upper - tree.q_lower)
    T = random_transforms(1)[0]
    T[:3, 3] *= 0.05
    small = camera.resized(32, 24)
    ours = exact.render(q, small, (0.2, 0.4, 0.6), T_world_base=T, backend="reference")
    gaussians = exact.posed(q, T_world_base=T)
    theirs = rasterize(gaussians, small, (0.2, 0.4, 0.6), eps2d=exact.eps2d, backend="reference")
    assert ours.rgb.shape == (2, 24, 32, 3)
    assert ours.alpha.max() > 0.9
    for name in ("rgb", "alpha", "depth"):
        assert (getattr(ours, name) - getattr(theirs, name)).abs().max() < 1e-7  # means pass through the world


def test_default_backend_agrees_with_the_reference(model: SelfModel, camera: Camera) -> None:
    q = model.tree.q_canonical.float()
    with torch.no_grad():
        fast = model.render(q, camera, outputs=("rgb", "alpha", "depth", "link_id"))
        slow = model.render(q, camera, outputs=("rgb", "alpha", "depth", "link_id"), backend="reference")
    assert (fast.rgb - slow.rgb).abs().mean() < 1e-4
    assert (fast.link_id != slow.link_id).float().mean() < 2e-3


def test_gradients_reach_joints_and_splats(model: SelfModel, camera: Camera) -> None:
    q = model.tree.q_canonical.float().requires_grad_()
    means = model.parameters.means.clone().requires_grad_()
    moving = replace(model, parameters=replace(model.parameters, means=means))
    moving.render(q, camera).rgb.sum().backward()
    assert q.grad is not None
    assert q.grad.abs().max() > 0.0
    assert means.grad is not None
    assert (means.grad.abs().amax(-1) > 0.0).sum() > 200


def test_batch_of_configurations_and_cameras(model: SelfModel) -> None:
    cameras = Camera.look_at(
        torch.tensor([[1.0, 0, 0.5], [0, 1.0, 0.5], [-0.9, 0, 0.4]]), (0.0, 0.0, 0.2), width=20, height=16
    )
    q = torch.stack([model.tree.q_canonical, 0.5 * model.tree.q_canonical]).float()
    with torch.no_grad():
        out = model.render(q[:, None], cameras)
        one = model.render(q[1], Camera(cameras.K[2], cameras.T_cam_world[2], 20, 16))
    assert out.rgb.shape == (2, 3, 16, 20, 3)
    assert torch.equal(out.rgb[1, 2], one.rgb)


def test_every_splat_rides_on_a_link_that_has_a_mesh(model: SelfModel, robot: Robot) -> None:
    assert set(model.link_index.tolist()) == {mesh.link for mesh in robot.link_meshes}
    assert model.provenance["robot"] == "kinearm"
    assert "Apache-2.0" in model.provenance["licence"]


def test_cameras_inside_the_robot_are_refused(model: SelfModel, camera: Camera) -> None:
    q = model.tree.q_canonical.float()
    model.check_camera(q, camera)
    Ts = model.tree.forward_kinematics(q)
    inside = model.parameters.means[model.link_index == 0].mean(0)
    eye = Ts[0, :3, :3] @ inside + Ts[0, :3, 3]
    with pytest.raises(InputError, match=r"the camera at .* is inside the robot"):
        model.check_camera(q, Camera.look_at(eye, (1.0, 0.0, 0.3)))
    both = Camera.look_at(torch.stack([torch.tensor([0.9, -0.5, 0.6]), eye]), (1.0, 0.1, 0.3))
    with pytest.raises(InputError, match=r"camera 1 at .* is inside the robot"):
        model.check_camera(q, both)


def test_cameras_on_the_surface_are_refused(model: SelfModel) -> None:
    q = model.tree.q_canonical.float()
    gaussians = model.posed(q)
    normals = quats_to_rotations(gaussians.quats)[..., 2]
    top = int(gaussians.means[:, 2].argmax())
    near = gaussians.means[top] + 0.004 * normals[top]
    with pytest.raises(InputError, match=r"mm from the robot|inside the robot"):
        model.check_camera(q, Camera.look_at(near, (1.0, 0.0, 0.3)))
    far = gaussians.means[top] + 0.05 * normals[top]
    model.check_camera(q, Camera.look_at(far, (1.0, 0.0, 0.3)))


def test_inside_is_told_from_outside_everywhere(model: SelfModel, robot: Robot) -> None:
    """Against MuJoCo-free geometry: points inside the base's own box of splats, and points beyond the robot."""
    q = model.tree.q_canonical.float()
    means = model.posed(q).means
    low, high = means.amin(0), means.amax(0)
    outside = torch.cat([high + 0.05 + torch.rand(20, 3), low - 0.05 - torch.rand(20, 3)])
    for eye in outside:
        model.check_camera(q, Camera.look_at(eye, (0.0, 0.0, 0.2)))


def test_subsample_is_coarser_but_looks_alike(robot: Robot, camera: Camera) -> None:
    fine = SelfModel.from_description(robot, n=6000)
    coarse = fine.subsample(1200)
    assert len(coarse.parameters) == len(coarse.link_index) == 1200
    assert fine.subsample(7000) is fine
    q = robot.tree.q_canonical.float()
    with torch.no_grad():
        a, b = (m.render(q, camera.resized(192, 144)) for m in (fine, coarse))
    mask_a, mask_b = a.alpha > 0.5, b.alpha > 0.5
    assert (mask_a & mask_b).sum() / (mask_a | mask_b).sum() > 0.93
    assert (a.rgb - b.rgb).abs().mean() < 0.01
    with pytest.raises(InputError, match="expected at least one Gaussian for each of the"):
        fine.subsample(2)


def test_bad_q_is_refused(model: SelfModel, camera: Camera, unchecked_types: None) -> None:
    q = model.tree.q_canonical.float()
    with pytest.raises(InputError, match="must hold the 7 joints"):
        model.render(q[:-1], camera)
    with pytest.raises(InputError, match="is nan"):
        model.render(q * float("nan"), camera)
    with pytest.raises(InputError, match="unknown output 'rbg': did you mean 'rgb'"):
        model.render(q, camera, outputs=("rbg",))


@pytest.mark.parametrize("name", ["franka_emika_panda", "shadow_hand", "unitree_go2"])
def test_silhouettes_of_real_robots(shared: Path, name: str) -> None:
    """A few images each; benchmarks/silhouettes.py measures all ten robots."""
    pytest.importorskip("mujoco_warp", reason="needs mujoco_warp (pip install kinesplat[render])")
    from kinesplat.dataset.capture import Capture
    from kinesplat.dataset.sampling import random_cameras, random_configurations

    file = {"franka_emika_panda": "panda.xml", "shadow_hand": "right_hand.xml", "unitree_go2": "go2.xml"}[name]
    robot = load_description(str(shared / "robots" / name / file))
    model = SelfModel.from_description(robot, n=10_000)
    generator = torch.Generator().manual_seed(5)
    q = random_configurations(robot.tree, 3, generator)
    with torch.no_grad():
        camera = random_cameras(model.posed(q.float()).means, generator)
        ours = model.render(q.float(), camera)
    truth = Capture(robot).render(q, camera)
    mask, true_mask = ours.alpha >= 0.5, truth.alpha >= 0.5
    both = mask & true_mask
    assert (both.sum((-1, -2)) / (mask | true_mask).sum((-1, -2))).min() > 0.95
    assert (ours.depth - truth.depth)[both].abs().median() < 4e-3
