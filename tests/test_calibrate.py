"""Calibration: its derivatives against finite differences, cameras found again from nothing, and bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kinesplat as ks
from kinesplat.commands.calibrate import read_cameras
from kinesplat.errors import InputError
from kinesplat.files import write_png
from kinesplat.inverse.backdrop import median_backdrop, moving_masks
from kinesplat.inverse.calibration import CalibrationObjective, CameraGuesses, Rig
from kinesplat.inverse.calibration_covariance import displaced_covariance
from kinesplat.inverse.camera_search import Boxes, angles_between, random_rotations, translated
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.robust import geman_mcclure
from kinesplat.twists import exp_twist


def configurations(tree: ks.KinematicTree, count: int, seed: int = 0) -> torch.Tensor:
    share = torch.rand(count, tree.dof, generator=torch.Generator().manual_seed(seed))
    return tree.q_lower.float() + (0.2 + 0.6 * share) * (tree.q_upper - tree.q_lower).float()


def pictures(model: ks.SelfModel, q: torch.Tensor, camera: ks.Camera) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.render(q, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    return out.rgb.clamp(0, 1), out.alpha.clamp(0, 1)


def view_of(
    model: ks.SelfModel, q: torch.Tensor, size: int, direction: tuple[float, ...] = (1.0, 0.7, 0.5)
) -> ks.Camera:
    return ks.Camera.framing(model.posed(q).means.flatten(0, 1), direction, width=size, height=size)


@pytest.mark.parametrize("mount", [None, 2])
def test_linearization_against_differences(kinearm: ks.SelfModel, mount: int | None) -> None:
    """Twists, joint offsets and focal lengths of two cameras: the model of the loss predicts its change."""
    model, tree = kinearm.subsample(150), kinearm.tree
    q, which = configurations(tree, 3), torch.tensor([0, 1, 0])
    first, second = view_of(model, q, 48), view_of(model, q, 48, (-0.4, 1.0, 0.3))
    rig = Rig(tree, q, which, mount, True, True, torch.tensor([0.1, 0.0, 0.3]))
    T = torch.stack([first.T_cam_world, second.T_cam_world])
    if mount is not None:
        T = T @ tree.forward_kinematics(q[0])[mount]
    guesses = CameraGuesses.start(rig, T[None], torch.stack([first.K, second.K]))
    camera = guesses.camera(first, 48, 48)
    rgb, alpha = pictures(model, q, replace(camera, K=camera.K[0], T_cam_world=camera.T_cam_world[0]))
    seen = Observation.create(rgb, alpha, ks.Camera(first.K.expand(3, 3, 3), torch.eye(4), 48, 48))
    objective = CalibrationObjective(model, seen, first, colour_weight=0.5, robust=0.3)
    count = len(rig.variable_names)
    at = guesses.retract(0.004 * torch.randn(1, count))
    got = objective.linearize(at)
    assert got.gradient.shape == (1, count)
    steps = 1e-3 * torch.eye(count)
    slopes = [
        (objective.loss(at.retract(s[None])).mean() - objective.loss(at.retract(-s[None])).mean()) / 2e-3 for s in steps
    ]
    expected = 0.5 * torch.stack(slopes)
    # splats that change their depth order make the rendered loss jump a little
    assert (got.gradient[0] - expected).norm() < 0.06 * expected.norm()
    assert torch.allclose(got.loss, objective.loss(at).mean(), rtol=1e-5)
    # at the truth residuals vanish, and the loss is the Gauss-Newton parabola; where it is steep, jumps do not matter
    truth = objective.linearize(guesses)
    for k in (0, 1, count - 2, count - 1):
        x = 2e-3 * torch.eye(count)[k : k + 1]
        bent = 0.5 * (objective.loss(guesses.retract(x)).mean() + objective.loss(guesses.retract(-x)).mean())
        assert torch.allclose(bent, (x @ truth.hessian[0] @ x.T)[0, 0], rtol=0.25)


def test_camera_from_nothing(kinearm: ks.SelfModel) -> None:
    model, q = kinearm.subsample(3_000), configurations(kinearm.tree, 3)
    camera = view_of(model, q, 96)
    rgb, alpha = pictures(model, q, camera)
    found = ks.calibrate(model, rgb, q, camera.K, alpha)
    T_base = kinearm.tree.forward_kinematics(kinearm.tree.q_canonical)[0].float()
    truth = camera.T_cam_world @ T_base
    assert found.verdict == "converged"
    assert (found.T_cam_base[:3, 3] - truth[:3, 3]).norm() < 2e-3
    assert angles_between(found.T_cam_base, truth) < 2e-3
    assert min(image.iou for image in found.images) > 0.98
    assert found.spread_mm[0] < 2.0
    assert found.camera.batch_shape == ()
    assert found.position_std_mm[0] < 1.0
    assert found.weak_directions == ()
    json.dumps(found.to_json(), allow_nan=False)
    assert "jackknife" in found.report()


def test_a_picture_with_a_bad_mask_is_not_called_converged(kinearm: ks.SelfModel) -> None:
    """A mask too wide by a pixel looks like a camera that is too near; nothing else in a single picture tells."""
    model, q = kinearm.subsample(3_000), configurations(kinearm.tree, 1)
    camera = view_of(model, q, 128)
    rgb, alpha = pictures(model, q, camera)
    wide = torch.nn.functional.max_pool2d(alpha[:, None], 3, stride=1, padding=1)[:, 0]
    guess = camera.T_cam_world @ kinearm.tree.forward_kinematics(kinearm.tree.q_canonical)[0].float()
    found = ks.calibrate(model, rgb, q, camera.K, wide, guess)
    off = 1000.0 * (found.camera.T_world_cam - camera.T_world_cam)[:3, 3].norm().item()
    assert found.verdict == "ambiguous"
    assert 0.3 * off < found.position_std_mm[0] < 5.0 * off
    (words,) = found.weak_directions
    assert words in found.report()
    assert found.to_json()["weak_directions"] == [words]
    assert found.to_json()["distance_m"] == pytest.approx([found.distance_m[0]])


def test_displaced_covariance_against_disturbed_answers(kinearm: ks.SelfModel) -> None:
    """Gauss-Newton's answer to an outline that is too wide lies within the covariance's own such direction."""
    model, q = kinearm.subsample(1_000), configurations(kinearm.tree, 2)
    camera = view_of(model, q, 96)
    rgb, alpha = pictures(model, q, camera)
    rig = Rig(kinearm.tree, q, torch.zeros(2, dtype=torch.long))
    at = CameraGuesses.start(rig, camera.T_cam_world[None, None], camera.K[None])
    view = ks.Camera(camera.K.expand(2, 3, 3), torch.eye(4), 96, 96)
    edge = torch.stack(torch.gradient(alpha, dim=(1, 2))).norm(dim=0)
    wide = (alpha + 0.3 * edge).clamp(max=1.0)
    objective = CalibrationObjective(model, Observation.create(rgb, wide, view), camera)
    covariance = displaced_covariance(objective, at)
    shifted = objective.linearize(at)
    step = -torch.linalg.solve(shifted.hessian[0].double(), shifted.gradient[0].double())
    likely = (step @ torch.linalg.solve(covariance.double(), step)).item()
    assert 0.05 < likely < 3.0  # squared standard deviations
    assert torch.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-9)


def test_offsets_and_focal_from_a_guess(kinearm: ks.SelfModel) -> None:
    """Two cameras, one joint reading off, a focal length off by 3 %, and a first guess."""
    model, q = kinearm.subsample(3_000), configurations(kinearm.tree, 6)
    which = [0, 1, 0, 1, 0, 1]
    views = [view_of(model, q, 96), view_of(model, q, 96, (-0.4, 1.0, 0.3))]
    images = [pictures(model, q[i], views[c]) for i, c in enumerate(which)]
    offset = torch.zeros(kinearm.tree.dof)
    offset[1] = 0.03
    T_base = kinearm.tree.forward_kinematics(kinearm.tree.q_canonical)[0].float()
    T = torch.stack([v.T_cam_world for v in views]) @ T_base
    guess = exp_twist(torch.tensor([[0.02, 0.01, 0.02, 0.02, -0.02, 0.02]])) @ T
    K = torch.stack([v.K for v in views])
    K[:, :2, :2] *= 1.03
    found = ks.calibrate(
        model,
        [rgb for rgb, _ in images],
        q - offset,
        K,
        [alpha for _, alpha in images],
        guess,
        camera_of_image=which,
        free=("offsets", "focal"),
    )
    assert (found.q_offset - offset)[1:].abs().max() < 5e-3  # a turn of joint 0 is a turn of both cameras
    assert ((found.K[:, 0, 0] / torch.stack([v.K[0, 0] for v in views])) - 1.0).abs().max() < 5e-3
    assert found.T_cam_base.shape == (2, 4, 4)
    assert len(found.variable_names) == len(found.covariance) == 12 + kinearm.tree.dof + 2


def test_without_masks_before_clutter(kinearm: ks.SelfModel) -> None:
    """The median over the pictures stands for the background."""
    model, q = kinearm.subsample(3_000), configurations(kinearm.tree, 7)
    camera = view_of(model, q, 96)
    rgb, alpha = pictures(model, q, camera)
    clutter = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12), size=(96, 96), mode="bicubic")[0].clamp(0, 1)
    images = rgb - (1.0 - alpha[..., None]) * (1.0 - clutter.permute(1, 2, 0))
    T_base = kinearm.tree.forward_kinematics(kinearm.tree.q_canonical)[0].float()
    truth = camera.T_cam_world @ T_base
    guess = exp_twist(torch.tensor([0.03, -0.02, 0.03, 0.04, -0.03, 0.04])) @ truth
    found = ks.calibrate(model, images.clamp(0, 1), q, camera.K, T_cam_base_init=guess)
    assert (found.T_cam_base[:3, 3] - truth[:3, 3]).norm() < 5e-3
    assert angles_between(found.T_cam_base, truth) < 5e-3


def test_translation_fills_the_boxes() -> None:
    generator = torch.Generator().manual_seed(1)
    R = random_rotations(50, generator)
    assert torch.allclose(R @ R.mT, torch.eye(3).expand(50, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(R), torch.ones(50), atol=1e-5)
    points = 0.3 * torch.randn(2, 80, 3, generator=generator)
    view = ks.Camera(torch.tensor([[80.0, 0, 50], [0, 80.0, 50], [0, 0, 1]]), torch.eye(4), 100, 100)
    t = torch.tensor([0.1, -0.05, 2.5])
    turned = torch.einsum("nab,imb->nima", R, points) + t
    pixels = turned[..., :2] / turned[..., 2:] * 80.0 + 50.0
    edges = Boxes.of_pixels(pixels, 100, 100).edges
    for i in range(50):
        T = translated(R[i : i + 1], points, edges[i], view)
        assert (T[0, :3, 3] - t).norm() < 0.05


def test_boxes_of_masks() -> None:
    mask = torch.zeros(1, 8, 10)
    mask[0, 2:5, 3:9] = 1.0
    assert Boxes.of_masks(mask).edges.tolist() == [[3.0, 2.0, 9.0, 5.0]]


def test_robust_weights_are_the_slope_of_the_loss() -> None:
    r = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    loss, weight = geman_mcclure(r.square(), 0.7)
    (slope,) = torch.autograd.grad(loss.sum(), r)
    assert torch.allclose(slope, 2.0 * weight * r)
    assert float(loss.detach().max()) < 0.49
    assert torch.equal(geman_mcclure(r.detach().square(), None)[0], r.detach().square())


def test_backdrop_from_moving_pictures() -> None:
    scene = torch.rand(16, 20, 3)
    rgb = scene.repeat(5, 1, 1, 1)
    covered = torch.zeros(5, 16, 20, dtype=torch.bool)
    for i in range(5):
        covered[i, 4:12, 3 * i : 3 * i + 5] = True
    rgb[covered] = 1.0 - scene.expand(5, -1, -1, -1)[covered]
    assert torch.equal(median_backdrop(rgb), scene)
    assert torch.equal(median_backdrop(rgb, covered), scene)
    assert moving_masks(rgb, scene).mean() == pytest.approx(covered.float().mean().item(), rel=0.35)


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(kinearm: ks.SelfModel) -> None:
    q = configurations(kinearm.tree, 2)
    camera = view_of(kinearm, q, 32)
    rgb, alpha = pictures(kinearm, q, camera)
    with pytest.raises(InputError, match="1 images but 2 configurations"):
        ks.calibrate(kinearm, rgb[:1], q, camera.K, alpha)
    with pytest.raises(InputError, match="unknown link 'wrst'"):
        ks.calibrate(kinearm, rgb, q, camera.K, alpha, mount="wrst")
    with pytest.raises(InputError, match="unknown free variable 'focus'"):
        ks.calibrate(kinearm, rgb, q, camera.K, alpha, free=("focus",))
    with pytest.raises(InputError, match="every camera from 0 on"):
        ks.calibrate(kinearm, rgb, q, camera.K, alpha, camera_of_image=[0, 2])
    with pytest.raises(InputError, match="K has shape"):
        ks.calibrate(kinearm, rgb, q, torch.eye(4), alpha)
    with pytest.raises(InputError, match="no rigid motion"):
        ks.calibrate(kinearm, rgb, q, camera.K, alpha, 2.0 * torch.eye(4))
    with pytest.raises(InputError, match="focal length needs masks"):
        ks.calibrate(kinearm, torch.rand(2, 32, 32, 3), q, camera.K, free=("focal",))
    with pytest.raises(InputError, match="images are of type str"):
        ks.calibrate(kinearm, ["a.png", "b.png"], q, camera.K)
    with pytest.raises(InputError, match="backdrop is a str"):
        ks.calibrate(kinearm, rgb, q, camera.K, backdrop="x")
    with pytest.raises(InputError, match="holds no configuration"):
        ks.calibrate(kinearm, rgb[:0], q[:0], camera.K)


def test_folder(kinearm: ks.SelfModel, tmp_path: Path) -> None:
    q = configurations(kinearm.tree, 2)
    rgb, alpha = pictures(kinearm, q, view_of(kinearm, q, 32))
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(2):
        write_png(tmp_path / "images" / f"{i}.png", rgb[i])
        write_png(tmp_path / "masks" / f"{i}.png", alpha[i])
    with pytest.raises(InputError, match=r"holds no camera\.json"):
        read_cameras(tmp_path, kinearm.tree, "T_cam_base")
    (tmp_path / "camera.json").write_text(json.dumps({"K": torch.eye(3).tolist()}))
    with pytest.raises(InputError, match=r"neither q\.csv nor q\.json"):
        read_cameras(tmp_path, kinearm.tree, "T_cam_base")
    (tmp_path / "q.json").write_text(json.dumps({f"{i}.png": q[i].tolist() for i in range(2)}))
    (camera,) = read_cameras(tmp_path, kinearm.tree, "T_cam_base")
    assert [p.name for p in camera.masks] == ["0.png", "1.png"]
    assert torch.allclose(torch.tensor(camera.q), q)
    header = ",".join(("image", *kinearm.tree.joint_names))
    lines = [",".join((f"{i}.png", *map(str, q[i].tolist()))) for i in range(2)]
    (tmp_path / "q.csv").write_text("\n".join((header, *lines)))
    assert read_cameras(tmp_path, kinearm.tree, "T_cam_base")[0].q == camera.q
    (tmp_path / "q.csv").write_text("image,elbow\n0.png,1\n")
    with pytest.raises(InputError, match="no column"):
        read_cameras(tmp_path, kinearm.tree, "T_cam_base")
