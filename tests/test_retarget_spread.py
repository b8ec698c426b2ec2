"""How sure a retargeted motion is: never of joints that no track tells."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kinesplat as ks
from kinesplat.inverse.retarget_spread import beside_a_joint
from kinesplat.inverse.surface_tracks import SurfaceTracks
from kinesplat.inverse.trajectory import FrameBlocks, Smoothness, covariances
from kinesplat.vision.point_tracks import PointTracks

FRAMES, SIZE = 5, 128


@pytest.fixture(scope="module")
def arm(kinearm: ks.SelfModel) -> ks.SelfModel:
    return kinearm.subsample(2_000)


@pytest.fixture(scope="module")
def motion(arm: ks.SelfModel) -> Tensor:
    tree = arm.tree
    span = torch.minimum(0.3 * (tree.q_upper - tree.q_lower), torch.tensor(0.5)).float()
    t = torch.linspace(0.0, 1.0, FRAMES)[:, None]
    middle = tree.q_canonical.float() + 0.25 * torch.linspace(-1.0, 1.0, tree.dof) * span
    return tree.clamp(middle + span * torch.sin(2.0 * math.pi * 0.6 * t + torch.arange(tree.dof)))


@pytest.fixture(scope="module")
def every(arm: ks.SelfModel, motion: Tensor) -> SurfaceTracks:
    points = arm.posed(motion).means.detach().flatten(0, 1)
    return SurfaceTracks.on(arm, ks.Camera.framing(points, width=SIZE, height=SIZE), 2_000)


def test_tracks_of_the_upper_arm_say_nothing_beyond_the_elbow(
    arm: ks.SelfModel, every: SurfaceTracks, motion: Tensor
) -> None:
    """Some of them find partners on the forearm, which is in their way while its joints are wrong."""
    shown = every.select(every.links <= arm.tree.link_names.index("upper_arm")).tracks(motion).seen()
    fit = ks.retarget(arm, shown, every.camera, q_init=motion[0])
    elbow = arm.tree.joint_names.index("elbow")
    assert fit.verdict == "followed"
    assert fit.std is not None
    assert (fit.q - motion)[:, elbow].abs().max() > 0.3
    assert ((fit.q - motion).abs() < 3.0 * fit.std)[:, elbow:].all()
    assert (fit.std[:, :elbow] < 0.03).all()
    assert fit.std[-1, elbow:].isinf().all()
    assert fit.std[0, elbow] == pytest.approx(0.1, rel=0.05)  # as q_init is said to be


def test_tracks_of_all_links_tell_all_joints(arm: ks.SelfModel, every: SurfaceTracks, motion: Tensor) -> None:
    shown = every.select(torch.arange(0, len(every.links), 8)).tracks(motion).seen()
    fit = ks.retarget(arm, shown, every.camera, q_init=motion[0])
    assert fit.std is not None
    assert fit.std.isfinite().all()
    assert 0.05 < ((fit.q - motion) / fit.std).square().mean().sqrt() < 2.0
    elsewhere = PointTracks(shown.points + 5_000.0, shown.visible)
    lost = ks.retarget(arm, elsewhere, every.camera, q_init=motion[0])
    assert lost.verdict == "failed"
    assert lost.std is not None
    assert lost.std[-1].isinf().all()


def test_points_beside_a_joint(every: SurfaceTracks) -> None:
    tree = every.tree
    beside = beside_a_joint(every)
    places = every.in_camera(tree.q_canonical.float()[None])[0]
    for link, parent in enumerate(tree.parents.tolist()):
        mine = every.links == link
        near = (every.links == parent) | (tree.parents[every.links] == link)
        if mine.any() and near.any():
            away = torch.cdist(places[mine], places[near]).amin(dim=1)
            assert beside[mine][away < 0.9 * every.tolerance].all()
    assert 0.02 < beside.float().mean() < 0.6


def test_smoothness_is_no_evidence() -> None:
    """One joint that is told and one that is not: however small the residuals, the latter is known by its tie alone."""
    hessian = torch.zeros(3, 2, 2, dtype=torch.float64)
    hessian[:, 0, 0] = 4.0
    nothing = torch.zeros(0, dtype=torch.float64)
    blocks = FrameBlocks(0.0, torch.zeros(3, 2).double(), hessian, nothing, torch.zeros(0, 0), torch.zeros(3, 2, 0))
    ties = Smoothness(torch.full((2,), 1e-3), torch.tensor([[0.0, 10.0], [0.0, 1e-2], [0.0, 1e-2]]), torch.zeros(2))
    far = torch.full((2,), 2.0)
    for variance in (1.0, 1e-8):
        out = covariances(blocks, ties, variance, far)
        assert torch.allclose(out[:, 0, 0], torch.full((3,), variance / 4.0), rtol=1e-3)
        assert out[0, 1, 1] == pytest.approx(0.01, rel=1e-3)
        assert out[1:, 1, 1].isinf().all()
    unheard = covariances(replace(blocks, hessian=0.0 * hessian), ties, math.inf, far)
    assert unheard[:, 0, 0].isinf().all()
