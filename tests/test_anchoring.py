"""A video of this robot: pixels say where it begins, partners are read off there, and carried through time."""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import kinesplat as ks
from kinesplat.errors import InputError, UnseenError
from kinesplat.inverse.anchoring import Bound, anchored, misfit, through
from kinesplat.inverse.clip import Clip
from kinesplat.inverse.key_frames import KeyFrames, key_frames, of_frame, unwrapped
from kinesplat.inverse.outline import outline, outlined
from kinesplat.inverse.result import FitResult, Hypothesis
from kinesplat.inverse.retarget_result import Alignment
from kinesplat.inverse.retargeting import Answer, Retargeting
from kinesplat.inverse.surface_tracks import SurfaceTracks
from kinesplat.inverse.trajectory import Trajectory
from kinesplat.vision.point_tracks import PointTracks

FRAMES, SIZE = 8, 128


@pytest.fixture(scope="module")
def arm(kinearm: ks.SelfModel) -> ks.SelfModel:
    return kinearm.subsample(2_000)


@pytest.fixture(scope="module")
def motion(arm: ks.SelfModel) -> Tensor:
    """A swing of every joint."""
    tree = arm.tree
    span = torch.minimum(0.2 * (tree.q_upper - tree.q_lower), torch.tensor(0.4)).float()
    t = torch.linspace(0.0, 1.0, FRAMES)[:, None]
    return tree.clamp(tree.q_canonical.float() + span * torch.sin(2.0 * math.pi * 0.4 * t + torch.arange(tree.dof)))


@pytest.fixture(scope="module")
def camera(arm: ks.SelfModel, motion: Tensor) -> ks.Camera:
    return ks.Camera.framing(arm.posed(motion).means.detach().flatten(0, 1), width=SIZE, height=SIZE)


@pytest.fixture(scope="module")
def every(arm: ks.SelfModel, camera: ks.Camera) -> SurfaceTracks:
    return SurfaceTracks.on(arm, camera, 2_000)


def fit_of(camera: ks.Camera, *answers: Tensor, verdict: str = "converged") -> FitResult:
    """What `reconstruct` would say: the answers, all as good."""
    hypotheses = tuple(Hypothesis(q, camera, 1e-3) for q in answers)
    spread, names = 1e-4 * torch.eye(len(answers[0])), tuple(str(i) for i in range(len(answers[0])))
    return FitResult(answers[0], camera, (1e-3,), (0,), answers[0][None], spread, names, hypotheses, verdict, 0.0)


def off(arm: ks.SelfModel, q: Tensor, truth: Tensor) -> float:
    """Median distance of the last link's frame [m]."""
    a, b = (arm.tree.forward_kinematics(x)[:, -1, :3, 3] for x in (q, truth))
    return (a - b).norm(dim=-1).median().item()


def moving(camera: ks.Camera) -> ks.Camera:
    """The camera, sliding sideways and zooming."""
    K, T = camera.K.repeat(FRAMES, 1, 1), camera.T_cam_world.repeat(FRAMES, 1, 1)
    K[:, :2, :2] *= torch.linspace(1.0, 1.1, FRAMES)[:, None, None]
    T[:, 0, 3] += torch.linspace(0.0, 0.1, FRAMES)
    return ks.Camera(K, T, SIZE, SIZE)


def test_what_lies_under_a_place_is_seen_there(every: SurfaceTracks, motion: Tensor) -> None:
    q = motion[2]
    seen = every.visible(q[None])[0]
    places = every.pixels(every.in_camera(q[None]))[0][seen]
    points, miss = every.under(q, places)
    assert miss.max() == 0.0
    assert torch.equal(points.links, every.links[seen])
    assert torch.allclose(points.points, every.points[seen], atol=1e-4)
    beside = places + 0.4 * torch.randn(places.shape, generator=torch.Generator().manual_seed(0))
    points, miss = every.under(q, beside)
    back = points.pixels(points.in_camera(q[None]))[0]
    assert (back - beside).norm(dim=-1).median() < 1e-3  # where the surface is not seen edge-on
    assert miss.max() < 2.0
    nothing, miss = every.select(torch.zeros(0, dtype=torch.long)).under(q, places[:0])
    assert len(nothing.links) == len(miss) == 0


@pytest.mark.parametrize("turning", [False, True])
def test_joints_in_two_frames_give_the_motion(
    arm: ks.SelfModel, camera: ks.Camera, every: SurfaceTracks, motion: Tensor, turning: bool
) -> None:
    """Places between our splats, straight lines as the first guess: partners read off in two frames carry the rest."""
    sees = moving(camera) if turning else camera
    some = replace(every.select(torch.arange(0, len(every.links), 7)), camera=sees)
    shifted = replace(some, points=some.points + 0.002 * torch.linalg.cross(some.normals, torch.ones(3).expand(1, 3)))
    shown = shifted.tracks(motion).seen()
    with torch.no_grad():
        work = Retargeting.create(arm, shown, sees, None, False, 0.5, 0.0)
        answer = anchored(work, torch.tensor([1, 6]), motion[[1, 6]])
        unmoved = Answer(Trajectory(motion, work.nothing_shared()), 0.0, [])
    assert off(arm, answer.at.q, motion) < 0.003
    assert misfit(work, answer) < 0.5 < misfit(work, unmoved)  # without partners nothing is explained
    assert answer.followed is not None
    assert answer.followed.visible.sum() <= shown.visible.sum()
    assert answer.followed.visible.sum() > 0.9 * shown.visible.sum()


def test_no_point_of_a_track_is_there_twice(every: SurfaceTracks) -> None:
    generator = torch.Generator().manual_seed(0)
    tracks = PointTracks(
        torch.rand(FRAMES, 5, 2, generator=generator), torch.rand(FRAMES, 5, generator=generator) > 0.3
    )
    track, frame = torch.tensor([0, 1, 1, 2, 2, 2, 3]), torch.tensor([0, 2, 6, 0, 4, 4, 5])
    bound = Bound(track, frame, every.select(track))
    parted = bound.parted(tracks)
    count = torch.zeros(FRAMES, 5).index_add(1, track, parted.visible.float())
    assert torch.equal(count[:, :4] > 0, tracks.visible[:, :4])
    assert count.max() == 1.0
    assert not count[:, 4].any()
    assert bound.weights(tracks).sum() == pytest.approx(5.0)


def test_pixels_say_where_a_video_of_this_robot_begins(arm: ks.SelfModel, camera: ks.Camera, motion: Tensor) -> None:
    """By themselves where frames are given; on demand they must."""
    frames = arm.render(motion, camera).rgb
    assert frames is not None
    asked: list[Tensor] = []

    def answers(model: ks.SelfModel, seen: object, camera: ks.Camera, seed: int) -> FitResult:
        assert camera.batch_shape == (1,)
        asked.append(camera.K)
        return fit_of(camera, motion[-1 if len(asked) == 1 else 0])

    with patch("kinesplat.inverse.key_frames.reconstruct", answers):
        fit = ks.retarget(arm, frames, camera)
    assert len(asked) == 2
    assert fit.start == "pixels"
    assert fit.verdict == "followed"
    assert "pixels of key frames" in fit.report()
    assert fit.shown.points.shape[1] == fit.tracks
    assert fit.alignment == Alignment()
    assert off(arm, fit.q, motion) < 0.02
    failed = fit_of(camera, motion[0], verdict="failed")
    with patch("kinesplat.inverse.key_frames.reconstruct", lambda *_, **__: failed):
        with pytest.raises(InputError, match="verdict failed"):
            ks.retarget(arm, frames, camera, q_init="pixels")
        asked.clear()
        assert ks.retarget(arm, frames, camera, objective="frames").start == "search"
    with pytest.raises(InputError, match="tracks have none"):
        ks.retarget(arm, fit.shown, camera, q_init="pixels")


def test_tracks_tell_which_of_several_answers_is_meant(
    arm: ks.SelfModel, camera: ks.Camera, every: SurfaceTracks, motion: Tensor
) -> None:
    """A wrong answer in one frame, beside the right one: tracks from a sure frame tell, or all if none is."""
    wrong = motion.clone()
    wrong[:, 1:4] += torch.tensor([0.5, -0.6, 0.8])
    shown = every.select(torch.arange(0, len(every.links), 7)).tracks(motion).seen()
    two = torch.stack([wrong[6], motion[6]])
    std = torch.full((2, arm.tree.dof), 0.01)
    with torch.no_grad():
        work = Retargeting.create(arm, shown, camera, None, False, 0.5, 0.0)
        known = KeyFrames(
            torch.tensor([1, 6]),
            torch.stack([motion[1], wrong[6]]),
            std,
            torch.tensor([True, False]),
            (motion[1:2], two),
        )
        one = through(work, known)
        both = (torch.stack([wrong[1], motion[1]]), two)
        neither = replace(known, q=wrong[[1, 6]], sure=torch.tensor([False, False]), choices=both)
        none = through(work, neither)
    for answer in (one, none):
        assert off(arm, answer.at.q, motion) < 0.005
    assert not one.rivals
    assert len(none.rivals) == 1
    assert none.rivals[0].loss > 2.0 * none.loss
    assert off(arm, none.rivals[0].q, motion) > 0.05


def test_what_is_ambiguous_in_all_frames_is_said_to_be(arm: ks.SelfModel, camera: ks.Camera, motion: Tensor) -> None:
    frames = arm.render(motion, camera).rgb
    assert frames is not None
    asked: list[Tensor] = []

    def answers(model: ks.SelfModel, seen: object, camera: ks.Camera, seed: int) -> FitResult:
        asked.append(camera.K)
        q = motion[-1 if len(asked) == 1 else 0]
        return fit_of(camera, q, q + 0.5, verdict="ambiguous")

    with patch("kinesplat.inverse.key_frames.reconstruct", answers):
        fit = ks.retarget(arm, frames, camera)
    assert fit.ambiguous
    assert "ambiguous" in fit.report()
    assert fit.to_json()["ambiguous"]
    assert len(fit.hypotheses) == 2
    assert off(arm, fit.q, motion) < 0.05 < off(arm, fit.hypotheses[1].q, motion)


def test_frames_without_the_robot_are_no_key_frames(arm: ks.SelfModel, camera: ks.Camera, motion: Tensor) -> None:
    """The middle mask is empty; the last frame's answer has the camera inside the robot."""
    out = arm.render(motion, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    masks = out.alpha.clamp(0.0, 1.0)
    masks[len(masks) // 2] = 0.0
    clip = Clip.read(out.rgb, masks, None, camera, 64)
    answers = [fit_of(camera, motion[0]), UnseenError("inside the robot")]
    wanted = patch("kinesplat.inverse.key_frames.FEWEST", 3)
    with wanted, patch("kinesplat.inverse.key_frames.reconstruct", side_effect=answers) as asked:
        known = key_frames(arm, clip, camera, 0)
    assert asked.call_count == 2
    assert known is not None
    assert known.frames.tolist() == [0]


def test_key_frames_on_either_side_of_a_full_turn(arm: ks.SelfModel, motion: Tensor) -> None:
    """Answers lie within one turn; a hinge without limits, or with wider ones, goes on to the next."""
    tree = arm.tree
    free = tree.q_limited.clone()
    free[0] = False
    lower, upper = tree.q_lower.clone(), tree.q_upper.clone()
    lower[1], upper[1] = -2.0 * math.pi, 2.0 * math.pi
    lower[2], upper[2] = -3.0, 3.0
    open_tree = replace(tree, q_limited=free, q_lower=lower, q_upper=upper)
    q = motion[[0, 0, 0]].clone()
    q[:, :3] = torch.tensor([2.9, -2.78, -2.0])[:, None]
    out = unwrapped(open_tree, q)
    ahead = torch.tensor([2.9, 2.0 * math.pi - 2.78, 2.0 * math.pi - 2.0])
    assert torch.allclose(out[:, 0], ahead)
    assert torch.allclose(out[:, 1], ahead)
    assert torch.equal(out[:, 2:], q[:, 2:])


@pytest.mark.slow
def test_key_frames_by_reconstruct_itself(arm: ks.SelfModel, camera: ks.Camera, motion: Tensor) -> None:
    """Nothing is known: its own search finds two frames of the video, tracks carry them on."""
    frames = arm.render(motion, camera).rgb
    assert frames is not None
    fit = ks.retarget(arm, frames, camera, q_init="pixels")
    assert fit.start == "pixels"
    assert off(arm, fit.q, motion) < 0.02


@pytest.mark.usefixtures("unchecked_types")
def test_other_words_than_pixels_are_refused(arm: ks.SelfModel, camera: ks.Camera) -> None:
    word: Any = "picture"
    with pytest.raises(InputError, match="'picture'"):
        ks.retarget(arm, [], camera, q_init=word)


def test_the_camera_of_a_frame(camera: ks.Camera) -> None:
    cameras, small = moving(camera), camera.resized(64, 64)
    one = of_frame(cameras, 3, small)
    assert one.batch_shape == (1,)
    assert torch.allclose(one.K[0], replace(cameras, K=cameras.K[3], T_cam_world=camera.T_cam_world).resized(64, 64).K)
    assert torch.equal(one.T_cam_world[0], cameras.T_cam_world[3])
    assert torch.equal(of_frame(camera, 5, small).T_cam_world[0], camera.T_cam_world)


def test_points_have_the_outline_of_what_they_cover(arm: ks.SelfModel, camera: ks.Camera, motion: Tensor) -> None:
    """Points spread over the rendered robot give back its mask, but for the spacing; and its joints fill it."""
    alpha = arm.render(motion[0], camera).alpha
    assert alpha is not None
    inside = torch.nonzero(alpha > 0.5).flip(1) + 0.5
    points = inside[(inside[:, 0].long() % 3 == 0) & (inside[:, 1].long() % 3 == 0)]
    mask, small = outline(points, camera)
    truth = arm.render(motion[0], small).alpha
    assert truth is not None
    both, either = ((mask > 0.5) & (truth > 0.5)).sum(), ((mask > 0.5) | (truth > 0.5)).sum()
    assert mask.shape == (small.height, small.width) == (96, 96)
    assert both / either > 0.75
    lonely, _ = outline(points[:1], camera)
    assert 0 < (lonely > 0.5).sum() < 10


@pytest.mark.slow
def test_joints_that_fill_an_outline(arm: ks.SelfModel, camera: ks.Camera, motion: Tensor) -> None:
    alpha = arm.render(motion[0], camera).alpha
    assert alpha is not None
    inside = torch.nonzero(alpha > 0.5).flip(1)[::7] + 0.5
    found = outlined(arm, inside, camera, 4, 0)
    assert 1 <= len(found) <= 4
    again = arm.render(found[0], camera).alpha
    assert again is not None
    assert ((again > 0.5) & (alpha > 0.5)).sum() > 0.8 * ((again > 0.5) | (alpha > 0.5)).sum()
    assert torch.equal(arm.tree.clamp(found), found)
