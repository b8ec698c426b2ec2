"""Contours against edges: closed forms, differences, robots found again before clutter without masks, and refusals."""

import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import kinesplat as ks
from kinesplat.description import Robot
from kinesplat.errors import InputError
from kinesplat.inverse.attempts import Problem
from kinesplat.inverse.calibration import CalibrationObjective, CameraGuesses, Rig
from kinesplat.inverse.camera_search import angles_between
from kinesplat.inverse.contour_calibration import contour_objective
from kinesplat.inverse.contour_cameras import Templates, sphere, turned
from kinesplat.inverse.contour_fit import neighbours, rested, with_turns
from kinesplat.inverse.contour_objective import OUTPUTS, by_link, image_rows, strays
from kinesplat.inverse.contour_search import SHARPEN, ContourLevel, fixed_links, objective_at, only_links, poses_on
from kinesplat.inverse.contour_verdict import rival_loss, verdict_of
from kinesplat.inverse.contours import PATCH, Contours, spread_choice, straight_edge, unlit
from kinesplat.inverse.edges import EdgePictures, sampled
from kinesplat.inverse.levenberg_marquardt import levenberg_marquardt
from kinesplat.inverse.objective import Configurations
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.reconstruct import before_anything
from kinesplat.inverse.result import FitResult, Hypothesis
from kinesplat.twists import exp_twist

LEVELS = ContourLevel(256, 3_000, 3.0, 12, 300), ContourLevel(256, 5_000, 1.5, 10, 400)
Scene = tuple[torch.Tensor, ks.Camera, torch.Tensor]


def clutter(height: int, width: int, seed: int) -> torch.Tensor:
    """Soft blobs, noise, and boxes of random colours."""
    generator = torch.Generator().manual_seed(seed)
    planes = torch.zeros(3, height, width)
    for cells, share in ((4, 0.6), (16, 0.25), (60, 0.15)):
        noise = torch.rand(1, 3, cells, cells, generator=generator)
        planes += share * torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic")[0]
    for y, x, h, w in (torch.rand(12, 4, generator=generator) * torch.tensor([1, 1, 0.4, 0.3])).tolist():
        rows, columns = (slice(int(a * s), int((a + b) * s)) for a, b, s in ((y, h, height), (x, w, width)))
        planes[:, rows, columns] = torch.rand(3, 1, 1, generator=generator)
    return planes.clamp(0, 1).permute(1, 2, 0)


@pytest.fixture(scope="module")
def scene(kinearm: ks.SelfModel) -> Scene:
    """A configuration, a camera, and the robot's own rendering before clutter, 256 px."""
    return scene_of(kinearm, 256, 192)


def scene_of(kinearm: ks.SelfModel, width: int, height: int) -> Scene:
    tree = kinearm.tree
    share = torch.rand(tree.dof, generator=torch.Generator().manual_seed(3))
    q = tree.q_lower.float() + (0.2 + 0.6 * share) * (tree.q_upper - tree.q_lower).float()
    camera = ks.Camera.framing(kinearm.posed(q).means, width=width, height=height)
    out = kinearm.render(q, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    return q, camera, (out.rgb - (1.0 - out.alpha[..., None]) * (1.0 - clutter(height, width, 0))).clamp(0, 1)


def at(model: ks.SelfModel, q: torch.Tensor, camera: ks.Camera) -> Configurations:
    return Configurations(model.tree, q, camera.T_cam_world.expand(len(q), 1, 4, 4), False)


def test_a_straight_edge_is_found_in_a_patch() -> None:
    """An edge blurred over a pixel, of any direction, up to half a pixel off the middle."""
    step = torch.arange(-PATCH, PATCH + 1).float()
    y, x = torch.meshgrid(step, step, indexing="ij")
    for angle in torch.linspace(-3.0, 3.0, 13).tolist():
        normal = torch.tensor([math.cos(angle), math.sin(angle)])
        for shift in (-0.4, 0.0, 0.3):
            away = normal[0] * x + normal[1] * y - shift
            found, distance = straight_edge((away + 0.5).clamp(0, 1))
            assert (found @ normal) > 0.99
            assert abs(distance.item() - shift) < 0.12


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.2, 2.5])
@pytest.mark.parametrize("step", [0.04, 0.5])
def test_edges_of_photographs(angle: float, step: float) -> None:
    """A step, faint or not, is strongest on itself and knows its direction; flat pictures have no edge."""
    y, x = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(48) + 0.5, indexing="ij")
    normal = torch.tensor([math.cos(angle), math.sin(angle)])
    away = (x - 24.0) * normal[0] + (y - 20.0) * normal[1]
    rgb = (0.4 + step * (away + 0.5).clamp(0, 1))[None, ..., None].expand(-1, -1, -1, 3)
    camera = ks.Camera(torch.eye(3)[None], torch.eye(4), 48, 40)
    pictures = EdgePictures.of(Observation(rgb, None, camera, torch.ones(3), unknown=True))
    along = torch.tensor([24.0, 20.0]) + torch.arange(-6, 7)[:, None] * normal
    values = sampled(pictures.oriented[0], along)
    assert int(values[:, 0].argmax()) == 6
    assert values[6, 0] > 0.1
    assert values[0, 0] < 1e-4
    direction = torch.tensor([math.cos(2 * angle), math.sin(2 * angle)])
    assert torch.allclose(values[6, 1:] / values[6, 0], direction, atol=0.06)


def test_choices_are_spread_and_real() -> None:
    mask = torch.rand(5, 30, 40) < torch.tensor([0.0, 0.002, 0.02, 0.3, 0.9])[:, None, None]
    rows, real = spread_choice(mask, 50)
    for own, which, some in zip(mask.flatten(1), rows, real, strict=True):
        chosen = which[some]
        assert len(chosen) == min(50, int(own.sum())) == len(chosen.unique())
        assert own[chosen].all()
        if own.sum() > 500:  # no gap is twice the mean
            order = (own.cumsum(0)[chosen] - 1).float()
            assert (order[1:] - order[:-1]).max() < 2.0 * own.sum() / 50


def test_points_move_along_normals_as_predicted(kinearm: ks.SelfModel, scene: Scene) -> None:
    """The Jacobian of all points' distances against central differences, in float64; sums by link are plain sums."""
    q, camera, rgb = scene
    out = unlit(kinearm).render(q[None], camera, outputs=("rgb", "alpha", "depth", "link_id"))
    found = Contours.of(out, camera, 200)
    kept = found.weights[0] > 0
    assert kept.sum() > 100
    assert torch.allclose(found.normals[0][kept].norm(dim=-1), torch.ones(int(kept.sum())), atol=1e-5)
    exact = replace(found, points=found.points.double(), normals=found.normals.double(), weights=found.weights.double())
    view = ks.Camera(camera.K.double()[None], camera.T_cam_world.double()[None], camera.width, camera.height)
    rows = image_rows(exact, view)
    state = at(kinearm, q.double()[None], view)
    pictures = EdgePictures.of(Observation.create(rgb, None, camera, unknown=True))
    twists = poses_on(pictures)(state).twists[:, 0].unflatten(1, (-1, 6))
    slopes = torch.einsum("na,nap->np", rows[0], twists[0][found.links[0]])
    Ts = kinearm.tree.forward_kinematics(q.double())
    own = torch.linalg.inv(view.T_cam_world[0] @ Ts[found.links[0]])
    homogeneous = torch.cat([exact.points[0], torch.ones(200, 1, dtype=torch.float64)], dim=-1)[..., None]
    for joint in range(kinearm.tree.dof):
        h = 1e-6 * torch.eye(kinearm.tree.dof, dtype=torch.float64)[joint]
        pixels = []
        for moved in (q.double() + h, q.double() - h):
            T = view.T_cam_world[0] @ kinearm.tree.forward_kinematics(moved)[found.links[0]] @ own
            X = (T @ homogeneous)[:, :3, 0] @ view.K[0].T
            pixels.append(X[:, :2] / X[:, 2:])
        differences = ((pixels[0] - pixels[1]) / 2e-6 * exact.normals[0]).sum(dim=-1)
        assert torch.allclose(slopes[:, joint][kept], differences[kept], atol=1e-5, rtol=1e-6)
    residual = torch.randn(1, 200, dtype=torch.float64)
    g, H = by_link(rows, exact.weights, residual, found.links, len(Ts))
    whole = slopes.T @ (exact.weights[0] * residual[0])
    assert torch.allclose(torch.einsum("la,lap->p", g[0], twists[0]), whole)
    square = slopes.T @ (exact.weights[0][:, None] * slopes)
    assert torch.allclose(torch.einsum("lap,lac,lcr->pr", twists[0], H[0], twists[0]), square)


def test_exact_pictures_leave_nothing_and_draw_neighbours_home(kinearm: ks.SelfModel, scene: Scene) -> None:
    q, camera, rgb = scene
    seen = Observation.create(rgb, None, camera, unknown=True)
    coarse, objective = (objective_at(kinearm, seen, level) for level in LEVELS)
    truth = objective.linearize(at(kinearm, q[None], camera))
    found = Contours.of(objective.model.render(q[None], objective.seen.camera, outputs=OUTPUTS), camera, 400)
    _, weight, distance = objective.matched(found, 0)
    sure = (weight > 0.5) & (found.weights > 0)
    assert sure.sum() > 0.6 * (found.weights > 0).sum()
    assert distance[sure].abs().median() < 0.5
    assert distance[sure].mean().abs() < 0.2
    noise = torch.randn(6, kinearm.tree.dof, generator=torch.Generator().manual_seed(0))
    starts = at(kinearm, kinearm.tree.clamp(q + 0.04 * noise), camera)
    before = objective.linearize(starts)
    assert truth.loss[0] < 0.8 * before.loss.min()
    near = levenberg_marquardt(coarse.linearize, starts, iterations=LEVELS[0].iterations).state
    solution = levenberg_marquardt(objective.linearize, near, iterations=LEVELS[1].iterations)
    best = solution.state.q[solution.linearization.loss.argmin()]
    assert (best - q).abs()[:3].max() < 0.02
    away = (kinearm.posed(best).means - kinearm.posed(q).means).norm(dim=-1)  # two rolls on nearly one axis
    assert away.mean() < 0.004
    proof = objective.evidence(solution.state)
    wrong = objective.evidence(at(kinearm, kinearm.tree.clamp(q + 0.5 * noise), camera))
    assert proof.total.max() > 0.0
    assert proof.total.max() > 1.5 * wrong.total.max()
    assert wrong.losses.min() > proof.losses.min()


def test_links_that_later_joints_leave_alone(kinearm: ks.SelfModel) -> None:
    tree = kinearm.tree
    assert len(fixed_links(tree, tree.dof - 1)) == len(tree.link_names)
    counts = [len(fixed_links(tree, joint)) for joint in range(tree.dof)]
    assert counts == sorted(counts)
    few = only_links(kinearm, fixed_links(tree, 1))
    assert set(few.link_index.tolist()) <= set(fixed_links(tree, 1).tolist())
    assert 0 < len(few.link_index) < len(kinearm.link_index)


def test_colours_stray_where_no_light_explains_them() -> None:
    shown = torch.rand(1, 60, 3) * 0.6 + 0.3
    real = torch.ones(1, 60, dtype=torch.bool)
    light = torch.tensor([0.9, 0.8, 0.7])
    brightness = torch.linspace(0.5, 1.4, 60)[None, :, None]
    assert strays(light * shown * brightness / brightness.median(), shown, real).sum() == 0
    other = (light * shown).clone()
    other[0, :5] = other[0, :5].flip(-1) * torch.tensor([0.1, 1.0, 3.0])
    assert strays(other, shown, real)[0, :5].sum() == 5


def test_templates_look_at_the_middle_and_turn_it_elsewhere() -> None:
    pivot, K = torch.tensor([0.1, -0.2, 0.4]), torch.tensor([[90.0, 0, 64], [0, 90.0, 36], [0, 0, 1]])
    templates = Templates.around(pivot, 0.5, K, (128, 72))
    where, depth = replace(templates.camera, T_cam_world=templates.T_cam_mount).project(pivot[None])
    centre = 0.5 * torch.tensor([templates.camera.width, templates.camera.height]).float()
    assert torch.allclose(where, centre.expand_as(where), atol=1e-2)
    assert (depth > 0.4).all()
    middle = torch.tensor([[20.0, 60.0]]).expand(len(templates.T_cam_mount), 2)
    moved = turned(templates.T_cam_mount, middle, K)
    found, _ = ks.Camera(K, moved, 128, 72).project(pivot[None])
    assert torch.allclose(found[:, 0], middle, atol=1e-2)
    directions = sphere(0.3, -math.pi / 2, math.pi / 2)
    probe = torch.nn.functional.normalize(torch.randn(200, 3), dim=1)
    assert (probe @ directions.T).amax(dim=1).acos().max() < 0.35


def test_a_camera_comes_home_from_a_guess(kinearm: ks.SelfModel, scene: Scene) -> None:
    q, camera, rgb = scene
    rig = Rig(kinearm.tree, q[None], torch.zeros(1, dtype=torch.long), pivot=kinearm.posed(q).means.mean(dim=0))
    seen = Observation.create(rgb, None, camera, unknown=True)
    coarse, fine = (contour_objective(CalibrationObjective(kinearm, seen, camera), level) for level in LEVELS)
    guess = exp_twist(torch.tensor([0.0, 0.0, 0.01, 0.01, -0.012, 0.02])) @ camera.T_cam_world
    start = CameraGuesses.start(rig, guess[None, None], camera.K[None])
    near = levenberg_marquardt(coarse.linearize, start, iterations=12).state
    found = levenberg_marquardt(fine.linearize, near, iterations=12).state.T_cam_mount[0, 0]
    assert angles_between(found, camera.T_cam_world) < 0.5 * angles_between(guess, camera.T_cam_world)
    assert fine.of_views(start).cost.shape == (1,)


def test_verdicts() -> None:
    assert verdict_of([0.97, 1.1]) == verdict_of([1.03]) == "failed"
    assert verdict_of([0.7, 0.72]) == verdict_of([0.80, 0.881]) == "ambiguous"
    assert verdict_of([0.92]) == verdict_of([0.88, 1.2]) == "ambiguous"  # little evidence
    assert verdict_of([0.7, 0.99]) == verdict_of([0.7]) == verdict_of([0.99, 0.7]) == "converged"


@pytest.mark.parametrize("losses", [(0.6, 0.75), (0.2, 0.27), (0.1, 0.14), (0.3, 0.9), (0.77, 0.95)])
def test_rivals_are_named_exactly_where_they_count(losses: tuple[float, float], kinearm: ks.SelfModel) -> None:
    tree, camera = kinearm.tree, ks.Camera(torch.eye(3), torch.eye(4), 8, 8)
    q, other = tree.q_canonical.float(), tree.q_canonical.float()
    other[1] += 0.5
    fit = FitResult(q, camera, (0.1,), (0,), q[None], torch.eye(tree.dof), tuple(tree.joint_names),
                    (Hypothesis(q, camera, losses[0]), Hypothesis(other, camera, losses[1])), verdict_of(list(losses)),
                    0.0, joint_types=tuple(tree.joint_types), rival_loss=rival_loss(losses[0]))  # fmt: skip
    assert (fit.verdict == "ambiguous") == (fit.ambiguous_joints == (tree.joint_names[1],))


def test_what_contours_cannot_do_is_refused(kinearm: ks.SelfModel, scene: Scene) -> None:
    q, camera, rgb = scene
    with pytest.raises(InputError, match="give masks"):
        ks.reconstruct(kinearm, rgb, camera, optimize_camera=True)
    with pytest.raises(InputError, match="without priors"):
        ks.reconstruct(kinearm, rgb, camera, priors=ks.inverse.Priors.of(kinearm, 1e-4, 0.0))
    with pytest.raises(InputError, match="no initializer and no colour_weight"):
        ks.reconstruct(kinearm, rgb, camera, colour_weight=0.1)
    problem = Problem(kinearm, Observation.create(rgb, None, camera, unknown=True), q, 0, False, True, None)
    with pytest.raises(InputError, match="no initializer and no colour_weight"):
        before_anything(problem, None, initializer=True)
    with pytest.raises(InputError, match="focal length needs masks"):
        ks.calibrate(kinearm, rgb[None], q[None], camera.K, free=["focal"])
    with pytest.raises(InputError, match="first guess"):
        ks.calibrate(kinearm, rgb[None], q[None], camera.K, mount="palm")


def test_pictures_that_show_no_backdrop_are_left_to_contours(
    kinearm: ks.SelfModel, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The median of equal pictures shows the robot, which then differs nowhere; focal lengths have no other way."""

    class Reached(Exception):
        pass

    def by_contours(objective: CalibrationObjective, *rest: object) -> None:
        assert objective.observation.unknown
        raise Reached

    monkeypatch.setattr(import_module("kinesplat.inverse.calibrate"), "calibrated_by_contours", by_contours)
    q, camera, rgb = scene
    pictures, joints = rgb.expand(3, -1, -1, -1), q.expand(3, -1)
    with pytest.raises(Reached):
        ks.calibrate(kinearm, pictures, joints, camera.K)
    with pytest.raises(InputError, match="differs nowhere"):
        ks.calibrate(kinearm, pictures, joints, camera.K, free=["focal"])


ARM = """<mujoco><compiler angle="radian"/><worldbody><body name="base">
<geom type="box" size=".06 .09 .04" rgba=".8 .3 .2 1"/>{}
</body></worldbody></mujoco>"""
LINK = """
<body name="link{0}" pos="{1} 0 .06">
<joint name="joint{0}" axis="0 0 1" range="-1.5 1.5"/>
<geom type="box" pos=".12 .02 0" size=".14 .04 .02" rgba=".3 .{0} .9 1"/>{2}</body>"""


def flat_arm(folder: Path, joints: int, last: str = "") -> Robot:
    """Bars on top of each other."""
    links = last
    for number in reversed(range(joints)):
        links = LINK.format(number, 0.24 * number, links)
    (folder / "arm.xml").write_text(ARM.format(links))
    return ks.load_description(folder / "arm.xml")


@pytest.mark.slow
def test_two_joints_before_clutter(tmp_path: Path) -> None:
    """Without a mask and a start."""
    model = ks.SelfModel.from_description(flat_arm(tmp_path, 2), n=3_000)
    q = torch.tensor([0.7, -0.9])
    camera = ks.Camera.framing(model.posed(q).means, width=192, height=144)
    out = model.render(q, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    rgb = out.rgb - (1.0 - out.alpha[..., None]) * (1.0 - clutter(144, 192, 0))
    fit = ks.reconstruct(model, rgb.clamp(0, 1), camera)
    assert (fit.q - q).abs().max() < 0.05
    assert fit.verdict == "converged"
    assert fit.ambiguous_joints == ()


def test_a_round_flange_is_named(tmp_path: Path) -> None:
    """It has the same outline at every angle; the bar that carries it has not."""
    flange = """<body pos=".2 0 .06"><joint name="flange" axis="0 0 1" range="-3 3"/>
    <geom type="cylinder" size=".05 .03" rgba=".9 .8 .2 1"/></body>"""
    model = ks.SelfModel.from_description(flat_arm(tmp_path, 1, flange), n=3_000)
    q = torch.tensor([0.7, 0.4])
    camera = ks.Camera.framing(model.posed(q).means, width=320, height=240)
    out = model.render(q, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    rgb = (out.rgb - (1.0 - out.alpha[..., None]) * (1.0 - clutter(240, 320, 1))).clamp(0, 1)
    seen = Observation.create(rgb, None, camera, unknown=True)
    found, proof = with_turns(model, seen, objective_at(model, seen, SHARPEN), at(model, q[None], camera))
    assert len(found.q) == 2
    assert found.q[1, 0] == q[0]
    assert (found.q[1, 1] - q[1]).abs() > 0.2
    assert proof.losses.max() < rival_loss(proof.losses.min().item())


def test_guesses_that_get_no_neighbours(kinearm: ks.SelfModel, scene: Scene) -> None:
    q, camera, _ = scene
    guesses, like = torch.stack([q, q + 0.01]), at(kinearm, q[None], camera)
    assert torch.equal(neighbours(like, guesses, 2, 0).q, kinearm.tree.clamp(guesses))
    assert len(neighbours(like, guesses, 64, 0).q) == 64


def test_a_single_joint_is_never_rested(tmp_path: Path) -> None:
    tree = flat_arm(tmp_path, 1).tree
    parents = Configurations(tree, torch.zeros(2, 1), torch.eye(4).expand(2, 1, 4, 4), False)
    assert rested(parents, torch.ones(1)).q.shape == (0, 1)


@pytest.mark.slow
def test_joints_without_a_mask_or_a_start(kinearm: ks.SelfModel) -> None:
    q, camera, rgb = scene_of(kinearm, 160, 120)
    fit = ks.reconstruct(kinearm, rgb, camera)
    assert fit.verdict == "ambiguous"  # half a turn of the waist looks alike
    alias = torch.stack([q[0] + math.pi, -q[1], -q[2]])
    assert min((fit.q[:3] - like).abs().max() for like in (q[:3], alias)) < 0.05
    assert "waist" in fit.ambiguous_joints
    shown, right = (kinearm.render(v, camera).alpha for v in (fit.q, q))
    assert shown is not None
    assert right is not None
    assert ((shown - right).abs() > 0.5).sum() < 0.05 * (right > 0.5).sum()
    assert fit.evidence["start"] == "contours"
    assert "contours" in fit.report()


@pytest.mark.slow
def test_a_picture_without_the_robot_fails(kinearm: ks.SelfModel) -> None:
    fit = ks.reconstruct(kinearm, clutter(120, 160, 5), scene_of(kinearm, 160, 120)[1])
    assert fit.verdict == "failed"


@pytest.mark.slow
def test_camera_without_masks_from_two_pictures(kinearm: ks.SelfModel) -> None:
    q, camera, rgb = scene_of(kinearm, 160, 120)
    other = kinearm.tree.clamp(q + 0.5)
    out = kinearm.render(other, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    second = (out.rgb - (1.0 - out.alpha[..., None]) * (1.0 - clutter(120, 160, 0))).clamp(0, 1)
    found = ks.calibrate(kinearm, torch.stack([rgb, second]), torch.stack([q, other]), camera.K)
    assert angles_between(found.camera.T_cam_world, camera.T_cam_world) < 0.03
    assert found.verdict != "failed"
    assert math.isnan(found.images[0].iou)
    assert "IoU" not in found.report()
