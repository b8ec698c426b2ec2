"""Retargeting: gradients by differences, motions that come back, the command."""

import csv
import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import kinesplat as ks
from kinesplat import cli
from kinesplat.errors import InputError
from kinesplat.files import write_png
from kinesplat.inverse.priors import Priors
from kinesplat.inverse.rendered_tracks import follow_rendered, queried, rendered_distance, rendered_tracks
from kinesplat.inverse.retarget import demonstrated
from kinesplat.inverse.retarget_result import Alignment, Motion
from kinesplat.inverse.retarget_search import limbs
from kinesplat.inverse.retargeting import between, distinct
from kinesplat.inverse.search import joint_scale
from kinesplat.inverse.surface_tracks import SurfaceTracks
from kinesplat.inverse.track_matching import equal_pairs, first_distances, frame_pairs, track_pairs
from kinesplat.inverse.track_objective import TrackObjective
from kinesplat.inverse.trajectory import Smoothness, Trajectory, solve_trajectory
from kinesplat.video import read_frames
from kinesplat.vision.correlation_tracker import CorrelationTracker
from kinesplat.vision.point_tracks import PointTracks, lucas_kanade

FRAMES, SIZE = 8, 128


@pytest.fixture(scope="module")
def arm(kinearm: ks.SelfModel) -> ks.SelfModel:
    return kinearm.subsample(2_000)


@pytest.fixture(scope="module")
def motion(arm: ks.SelfModel) -> Tensor:
    """A swing of every joint about a configuration that is not the canonical one."""
    tree = arm.tree
    span = torch.minimum(0.3 * (tree.q_upper - tree.q_lower), torch.tensor(0.5)).float()
    t = torch.linspace(0.0, 1.0, FRAMES)[:, None]
    middle = tree.q_canonical.float() + 0.25 * torch.linspace(-1.0, 1.0, tree.dof) * span
    return tree.clamp(middle + span * torch.sin(2.0 * math.pi * 0.6 * t + torch.arange(tree.dof)))


@pytest.fixture(scope="module")
def camera(arm: ks.SelfModel, motion: Tensor) -> ks.Camera:
    return ks.Camera.framing(arm.posed(motion).means.detach().flatten(0, 1), width=SIZE, height=SIZE)


@pytest.fixture(scope="module")
def surface(arm: ks.SelfModel, camera: ks.Camera) -> SurfaceTracks:
    return SurfaceTracks.on(arm, camera, 400)


@pytest.fixture(scope="module")
def shown(arm: ks.SelfModel, camera: ks.Camera, motion: Tensor) -> PointTracks:
    """What a perfect tracker would say of some of the splats."""
    some = SurfaceTracks.on(arm, camera, 2_000)
    chosen = torch.randperm(len(some.links), generator=torch.Generator().manual_seed(2))[:250]
    return some.select(chosen).tracks(motion).seen()


def test_jacobian_of_pixels(surface: SurfaceTracks, motion: Tensor) -> None:
    q = motion.double()
    frame, point = torch.tensor([0, 3, 3, 7]), torch.tensor([5, 100, 311, 250])
    where, J = surface.pixel_jacobian(q, frame, point)
    step = torch.randn(q.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [surface.pixels(surface.in_camera(q + sign * 1e-6 * step))[frame, point] for sign in (1, -1)]
    assert torch.allclose((ends[0] - ends[1]) / 2e-6, (J @ step[frame][..., None])[..., 0], atol=1e-4)
    assert torch.allclose(where, surface.pixels(surface.in_camera(q))[frame, point])


def test_what_is_visible_is_what_is_rendered(arm: ks.SelfModel, surface: SurfaceTracks, motion: Tensor) -> None:
    """At the pixel of a visible point the rendered link is the point's own or, at seams, one that it touches."""
    tracks = surface.tracks(motion)
    link = arm.render(motion, surface.camera, outputs=("link_id",)).link_id
    assert link is not None
    x, y = tracks.points.floor().long().clamp(0, SIZE - 1).unbind(-1)
    seen = link[torch.arange(FRAMES)[:, None], y, x]
    own = surface.links.expand(FRAMES, -1)
    right = (seen == own) | (arm.tree.parents[own] == seen) | ((seen >= 0) & (arm.tree.parents[seen] == own))
    assert right[tracks.visible].float().mean() > 0.97
    assert 0.15 < tracks.visible.float().mean() < 0.6


def test_points_slide_to_where_the_tracks_are(surface: SurfaceTracks, motion: Tensor) -> None:
    target = surface.tracks(motion)
    seen = target.visible.sum(dim=0) > 3
    truth, target = surface.select(seen), target.select(seen)
    off = torch.randn(truth.points.shape, generator=torch.Generator().manual_seed(0))
    off = off - (off * truth.normals).sum(dim=-1, keepdim=True) * truth.normals
    moved = SurfaceTracks(
        truth.model, truth.camera, truth.links, truth.points + 0.002 * off, truth.normals, truth.tolerance
    )
    slid = moved
    for _ in range(12):
        slid = slid.slid(motion, target, 6.0)
    before, after = ((s.points - truth.points).norm(dim=-1).median() for s in (moved, slid))
    assert after < 0.5 * before


@pytest.mark.parametrize("robust", [None, 5.0])
def test_gradient_of_the_objective(
    arm: ks.SelfModel, surface: SurfaceTracks, shown: PointTracks, motion: Tensor, robust: float | None
) -> None:
    """Joints and alignment against differences of the loss with the same pairs, self-collision included."""
    q = motion.double() + 0.05
    distance = first_distances(shown, surface.tracks(motion), 40.0)
    priors = Priors.of(arm, self_collision=3.0)
    objective = TrackObjective(shown, surface, lambda s, o, q: track_pairs(s, distance, 4.0), robust, priors)
    at = Trajectory(q, torch.tensor([0.1, -0.05, 0.02, -0.03], dtype=torch.float64))
    blocks = objective.linearize(at)
    assert objective.loss(at) == pytest.approx(blocks.loss, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for joints in (True, False):
        dq = joints * torch.randn(q.shape, generator=generator, dtype=torch.float64)
        da = (not joints) * torch.randn(4, generator=generator, dtype=torch.float64)
        ends = [objective.loss(Trajectory(q + s * 1e-5 * dq, at.shared + s * 1e-5 * da)) for s in (1, -1)]
        slope = 2.0 * ((blocks.gradient * dq).sum() + (blocks.shared_gradient * da).sum()).item()
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=2e-3)


def test_losses_fall_and_limits_hold(surface: SurfaceTracks, shown: PointTracks, motion: Tensor) -> None:
    tree = surface.tree
    some = surface.select(torch.arange(shown.points.shape[1]))
    objective = TrackObjective(shown, some, lambda s, o, q: equal_pairs(s))  # nonsense partners: limits are reached
    ties = Smoothness(torch.full((tree.dof,), 0.3), torch.full((tree.dof,), 0.03), tree.q_canonical.float())
    start = Trajectory(motion, torch.zeros(0))
    at, losses = solve_trajectory(objective.linearize, objective.loss, start, tree, ties, 15)
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(losses))
    assert torch.equal(tree.clamp(at.q), at.q)
    assert losses[-1] < 0.9 * losses[0]


def off(arm: ks.SelfModel, q: Tensor, truth: Tensor) -> Tensor:
    """Distance of the last link's frame [m]."""
    Ts = [arm.tree.forward_kinematics(x)[:, -1, :3, 3] for x in (q, truth)]
    return (Ts[0] - Ts[1]).norm(dim=-1)


def test_a_motion_from_tracks_alone(arm: ks.SelfModel, camera: ks.Camera, shown: PointTracks, motion: Tensor) -> None:
    """No start, no correspondence: tracks of a perfect tracker give the motion back; outlines have their own tests."""
    none = torch.zeros(0, arm.tree.dof)
    with patch("kinesplat.inverse.retarget_search.outlined", lambda *_: none):
        fit = ks.retarget(arm, shown, camera, starts=2)
    assert fit.verdict == "followed"
    assert off(arm, fit.q, motion).median() < 0.01
    assert fit.q.shape == motion.shape
    assert fit.std is not None
    assert fit.std.shape == motion.shape
    assert fit.covariance is not None
    assert torch.equal(fit.covariance.diagonal(dim1=1, dim2=2).sqrt(), fit.std)
    assert torch.linalg.eigvalsh(fit.covariance).min() > 0.0
    assert torch.equal(fit.hypotheses[0].q, fit.q)
    assert fit.camera.width == SIZE
    assert "8 frames" in fit.report()
    assert len(fit.level_starts) > 5
    json.dumps(fit.to_json(), allow_nan=False)


def test_tracks_as_a_plain_tensor(camera: ks.Camera, shown: PointTracks) -> None:
    """NaN where a point was not seen says what `visible` says."""
    points = torch.where(shown.visible[..., None], shown.points, torch.nan)
    (ours, _), (theirs, _) = (demonstrated(tracks, camera, None, lucas_kanade) for tracks in (points, shown))
    assert torch.equal(ours.points, theirs.points)
    assert torch.equal(ours.visible, theirs.visible)


def test_other_answers_differ_from_each_other() -> None:
    motions = [Motion(torch.full((3, 2), value), loss) for value, loss in ((0.0, 0.1), (0.9, 0.2), (0.91, 0.3))]
    assert distinct([*motions, Motion(torch.full((3, 2), 0.01), 0.4)]) == motions[:2]


@pytest.mark.slow
def test_a_known_first_frame_and_a_moving_camera(
    arm: ks.SelfModel, camera: ks.Camera, shown: PointTracks, motion: Tensor
) -> None:
    fit = ks.retarget(arm, shown, camera, q_init=motion[0] + 0.05)
    assert off(arm, fit.q, motion).median() < 0.03
    K, T = camera.K.expand(FRAMES, 3, 3), camera.T_cam_world.repeat(FRAMES, 1, 1)
    T[:, 0, 3] += torch.linspace(0.0, 0.1, FRAMES)
    cameras = ks.Camera(K, T, SIZE, SIZE)
    some = SurfaceTracks.on(arm, cameras, 2_000)
    fit = ks.retarget(arm, some.select(torch.arange(0, len(some.links), 8)).tracks(motion), cameras, q_init=motion[0])
    assert off(arm, fit.q, motion).median() < 0.03


@pytest.mark.slow
def test_another_size_and_place(arm: ks.SelfModel, camera: ks.Camera, shown: PointTracks, motion: Tensor) -> None:
    """A demonstration that was shrunk, turned and moved is brought back, roughly: joints can make up for the rest."""
    away = Alignment(0.7, 0.1, (12.0, -9.0))
    moved = PointTracks(away.apply(shown.points, SIZE, SIZE), shown.visible)
    fit = ks.retarget(arm, moved, camera, q_init=motion[0], align=True)
    back = fit.alignment.apply(moved.points, SIZE, SIZE)
    before, after = ((x - shown.points).norm(dim=-1)[shown.visible].median() for x in (moved.points, back))
    assert after < 0.5 * before
    assert fit.alignment.scale == pytest.approx(1.0 / 0.7, rel=0.2)
    assert off(arm, fit.q, motion).median() < 0.15
    assert "demonstration times" in fit.report()


@pytest.mark.slow
def test_chamfer_frame_by_frame(arm: ks.SelfModel, camera: ks.Camera, shown: PointTracks, motion: Tensor) -> None:
    fit = ks.retarget(arm, shown, camera, q_init=motion + 0.06, objective="frames")
    assert fit.loss_history[-1] < fit.loss_history[0]
    every = SurfaceTracks.on(arm, camera, 2_000)
    values = []
    for q in (fit.q, arm.tree.clamp(motion + 0.06)):
        pairs = frame_pairs(shown, ours := every.tracks(q), 0.1)
        away = ours.points[pairs.frame, pairs.ours] - pairs.target
        values.append((pairs.weight * away.square().sum(dim=-1)).sum())
    assert values[0] < 0.5 * values[1]


def test_gradient_of_the_paper_objective(kinearm: ks.SelfModel, motion: Tensor, camera: ks.Camera) -> None:
    """Through rendering, tracker and distance, in double precision, against differences."""
    model, small = kinearm.subsample(150), camera.resized(40, 40)
    points = queried(SurfaceTracks.on(model, small, 150), motion[0])
    model, small = model.to(dtype=torch.float64), small.to(dtype=torch.float64)
    points = replace(points, model=model, camera=small, points=points.points.double())
    tracker = CorrelationTracker(channels=8, radius=3).double()
    q = motion[:2].double()
    with torch.no_grad():
        target = rendered_tracks(points, tracker, q + 0.05)

    def loss(q: Tensor) -> Tensor:
        return rendered_distance(points, target, tracker, q)

    q = q.requires_grad_()
    (slope,) = torch.autograd.grad(loss(q), q)
    step = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = [loss(q + sign * 1e-6 * step).item() for sign in (1, -1)]
    assert (slope * step).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3)


def test_tracks_of_rendered_frames_move_as_the_surface(
    kinearm: ks.SelfModel, camera: ks.Camera, motion: Tensor
) -> None:
    """The derivative of a tracked point by the joints is that of the point of the surface; in its own frame exactly."""
    q = (motion[0] + torch.tensor([[0.0], [0.02]])).requires_grad_()
    points = queried(SurfaceTracks.on(kinearm, camera, 3_000), motion[0])
    tracks = rendered_tracks(points, lucas_kanade, q)
    index = torch.nonzero(tracks.visible[1])[:, 0]
    _, J = points.pixel_jacobian(q.detach(), torch.ones_like(index), index)
    fast = J.norm(dim=(1, 2)) > 20.0
    index, J = index[fast][:: max(1, int(fast.sum()) // 12)], J[fast][:: max(1, int(fast.sum()) // 12)]

    def slopes(frame: int) -> Tensor:
        sums = [tracks.points[frame, i].sum() for i in index.tolist()]
        return torch.stack([torch.autograd.grad(total, q, retain_graph=True)[0][frame] for total in sums])

    cosine = torch.nn.functional.cosine_similarity(slopes(1), J.sum(dim=1), dim=-1)
    assert len(index) > 5
    assert cosine.median() > 0.8
    _, J = points.pixel_jacobian(q.detach(), torch.zeros_like(index), index)
    assert torch.allclose(slopes(0), J.sum(dim=1), rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_the_paper_objective_improves(arm: ks.SelfModel, camera: ks.Camera, motion: Tensor) -> None:
    """Demonstration tracked by Lucas-Kanade; ours by a small differentiable tracker, then by Lucas-Kanade, too."""
    frames = arm.render(motion[:4], camera).rgb
    assert frames is not None
    start = motion[:4] + 0.04 * torch.randn(4, arm.tree.dof, generator=torch.Generator().manual_seed(0))
    with patch("kinesplat.inverse.retarget.follow_rendered", partial(follow_rendered, steps=6)):
        fit = ks.retarget(arm, frames, camera, q_init=start, objective="rendered", tracker=CorrelationTracker())
    assert fit.std is None
    assert len(fit.loss_history) == 6
    assert min(fit.loss_history) < fit.loss_history[0]
    surface = SurfaceTracks.on(arm, camera, 500)
    ties = Smoothness(torch.zeros(arm.tree.dof), torch.zeros(arm.tree.dof), start)
    shown, _ = demonstrated(frames, camera, None, lucas_kanade)
    _, losses = follow_rendered(surface, shown, lucas_kanade, start, ties, steps=12)
    assert min(losses) < losses[0]
    points = queried(surface, motion[0])
    with pytest.raises(InputError, match="without gradients"):
        rendered_distance(points, shown, lambda f, q: lucas_kanade(f.detach(), q.detach()), motion[:4].requires_grad_())


def test_a_joint_beyond_its_limit_comes_back(surface: SurfaceTracks, shown: PointTracks, motion: Tensor) -> None:
    """A loss that first pulls out of the limits and then back: the joints follow it back."""
    tree, calls, step = surface.tree, itertools.count(), 0.04 * joint_scale(surface.tree)
    start = torch.where(tree.q_limited, tree.q_upper, tree.q_canonical).float().expand(FRAMES, -1)

    def pulls(points: object, target: object, tracker: object, q: Tensor) -> Tensor:
        return ((q - (start + step if next(calls) < 3 else start - step)) / step).square().sum()

    ties = Smoothness(torch.zeros(tree.dof), torch.zeros(tree.dof), start)
    with patch("kinesplat.inverse.rendered_tracks.rendered_distance", pulls):
        q, losses = follow_rendered(surface, shown, lucas_kanade, start, ties, steps=60)
    assert losses[-1] < 0.1 * losses[3]
    assert ((q - (start - step)).abs() < 0.5 * step).all()
    assert torch.equal(tree.clamp(q), q)


def test_limbs_and_thinned_motions(kinearm: ks.SelfModel) -> None:
    hand = ks.zoo.load("shadow_hand").tree
    blocks = [[hand.joint_names[i] for i in block] for block in limbs(hand)]
    assert ["rh_LFJ5", "rh_LFJ4", "rh_LFJ3", "rh_LFJ2", "rh_LFJ1"] in blocks
    assert ["rh_WRJ2", "rh_WRJ1"] in blocks
    assert sorted(joint for limb in limbs(kinearm.tree) for joint in limb) == list(range(kinearm.tree.dof))
    q = torch.arange(7.0)[:, None].expand(-1, 2)
    assert torch.allclose(between(q[[0, 3, 6]], torch.tensor([0, 3, 6]), 7), q)


def test_command(
    arm: ks.SelfModel, camera: ks.Camera, motion: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From a folder of pictures to a table and a film, and from the saved tracks to the same table."""
    motion = between(motion[:2], torch.tensor([0, 2 * FRAMES - 1]), FRAMES)
    frames = arm.render(motion, camera).rgb
    assert frames is not None
    (tmp_path / "frames").mkdir()
    for i, picture in enumerate(frames):
        write_png(tmp_path / "frames" / f"{i:03}.png", picture)
    arm.save(tmp_path / "arm.safetensors")
    (tmp_path / "camera.json").write_text(json.dumps(camera.to_json()))
    words = ["kinesplat", "retarget", str(tmp_path / "arm.safetensors")]
    common = ["--camera", str(tmp_path / "camera.json"), "--q-init", *(f"{v:.4f}" for v in motion[0].tolist())]
    first = ["-o", str(tmp_path / "a.csv"), "--film", str(tmp_path / "a.gif"), "--json", str(tmp_path / "a.json")]
    tracks = ["--save-tracks", str(tmp_path / "a.npz")]
    with patch("sys.argv", [*words, str(tmp_path / "frames"), *common, *first, *tracks]):
        cli.main()
    assert "followed: 8 frames" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    found = torch.tensor([[float(row[name]) for name in arm.tree.joint_names] for row in rows])
    assert off(arm, found, motion).median() < 0.03
    pictures = list(read_frames(tmp_path / "a.gif"))
    assert len(pictures) == FRAMES
    assert pictures[0].shape == (SIZE, 3 * SIZE, 3)
    with patch("sys.argv", [*words, str(tmp_path / "a.npz"), *common, "-o", str(tmp_path / "b.csv")]):
        cli.main()
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    with patch("sys.argv", [*words, str(tmp_path / "a.npz"), "-o", str(tmp_path / "b.csv")]), pytest.raises(SystemExit):
        cli.main()
    assert "tracks need --camera" in capsys.readouterr().err
    with patch("sys.argv", [*words, str(tmp_path / "frames"), *common, "--this-robot"]), pytest.raises(SystemExit):
        cli.main()
    assert "give one of them" in capsys.readouterr().err
    failed = SimpleNamespace(verdict="failed", q=motion[0])
    words = [*words, str(tmp_path / "frames"), *common[:2], "--this-robot", "-o", str(tmp_path / "c.csv")]
    argv, fails = patch("sys.argv", words), patch("kinesplat.inverse.key_frames.reconstruct", lambda *_, **__: failed)
    with argv, fails, pytest.raises(SystemExit):
        cli.main()
    assert "verdict failed" in capsys.readouterr().err
    assert not (tmp_path / "c.csv").exists()


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(arm: ks.SelfModel, camera: ks.Camera, shown: PointTracks, motion: Tensor) -> None:
    with pytest.raises(InputError, match="unknown objective 'track': did you mean 'tracks'"):
        ks.retarget(arm, shown, camera, objective="track")
    with pytest.raises(InputError, match=r"expected a kinesplat\.Camera"):
        ks.retarget(arm, shown, None)
    with pytest.raises(InputError, match=r"expected \(dof,\) or \(8, dof\)"):
        ks.retarget(arm, shown, camera, q_init=motion[:3])
    with pytest.raises(InputError, match="0 tracks are seen twice"):
        ks.retarget(arm, PointTracks(shown.points, torch.zeros_like(shown.visible)), camera)
    with pytest.raises(InputError, match="batch shape"):
        ks.retarget(arm, shown, ks.Camera(camera.K, camera.T_cam_world.repeat(3, 1, 1), SIZE, SIZE))
    with pytest.raises(InputError, match="expected 0 or more"):
        ks.retarget(arm, shown, camera, smoothness=-1.0)
    with pytest.raises(InputError, match="no frame"):
        ks.retarget(arm, [], camera)
    for path in ("dance.mp4", Path("dance.npz")):
        with pytest.raises(InputError, match=r"read_frames .*PointTracks\.load"):
            ks.retarget(arm, path, camera)
    with pytest.raises(InputError, match="masks are given with tracks"):
        ks.retarget(arm, shown, camera, masks=[])
    with pytest.raises(InputError, match="starts is 0"):
        ks.retarget(arm, shown, camera, starts=0)


@pytest.mark.slow
def test_a_hand_of_24_joints() -> None:
    """The Shadow Hand's fingertips follow the tracks of a perfect tracker, the first frame known within 0.02 rad."""
    hand = ks.zoo.load("shadow_hand")
    tree, generator = hand.tree, torch.Generator().manual_seed(0)
    span = (tree.q_upper - tree.q_lower).float()
    ends = tree.q_lower.float() + span * (0.1 + 0.5 * torch.rand(2, tree.dof, generator=generator))
    q = between(ends, torch.tensor([0, 19]), 20)
    on_hand = hand.link_index >= tree.link_names.index("rh_palm")
    points = hand.posed(q[[0, 19]]).means[:, on_hand].detach().flatten(0, 1)
    camera = ks.Camera.framing(points, (0.55, 0.3, 0.8), width=256, height=256)
    every = SurfaceTracks.on(hand, camera, 100_000)
    shown = every.select(torch.randperm(len(every.links), generator=generator)[:1_200]).tracks(q)
    fit = ks.retarget(hand, shown, camera, q_init=q[0] + 0.02 * torch.randn(tree.dof, generator=generator))
    links = [tree.link_names.index(f"rh_{finger}distal") for finger in ("ff", "mf", "rf", "lf", "th")]
    away = [tree.forward_kinematics(x)[:, links, :3, 3] for x in (fit.q, q)]
    assert fit.verdict == "followed"
    assert (away[0] - away[1]).norm(dim=-1).median() < 0.005
