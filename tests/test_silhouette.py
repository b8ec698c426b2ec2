"""Distances of silhouettes: their slope against differences, and how far they pull."""

from dataclasses import replace

import pytest
import torch

import kinesplat as ks
from kinesplat.inverse.attempts import drawn_to_silhouette
from kinesplat.inverse.levenberg_marquardt import levenberg_marquardt
from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.silhouette import SilhouettePull
from kinesplat.twists import exp_twist

Seen = tuple[ks.SelfModel, Observation, Configurations]


@pytest.fixture(scope="module", params=[1, 2])
def seen(request: pytest.FixtureRequest, kinearm: ks.SelfModel) -> Seen:
    """A small model, what one or two cameras see of it, and the truth."""
    model = kinearm.subsample(1_000)
    eyes = torch.tensor([[0.9, 0.5, 0.5], [0.1, -1.0, 0.6]])[: request.param]
    camera = ks.Camera.look_at(eyes, torch.tensor([0.0, 0.0, 0.25]), width=64, height=48)
    q = model.tree.q_canonical.float()
    out = model.render(q, camera)
    observation = Observation.create(out.rgb, out.alpha, camera)
    return model, observation, Configurations(model.tree, q[None], camera.T_cam_world[None], True)


def off(truth: Configurations, by: float, turned: float) -> Configurations:
    """Three guesses, every joint off by up to `by` within its limits, and every camera turned."""
    inside = 0.02 * (truth.tree.q_upper - truth.tree.q_lower)
    q = truth.q + by * (2.0 * torch.rand(3, truth.tree.dof) - 1.0) * (8.0 * inside).clamp(max=1.0)
    q = torch.minimum(torch.maximum(q, truth.tree.q_lower + inside), truth.tree.q_upper - inside).float()
    T = exp_twist(turned * torch.randn(3, truth.T_cam_world.shape[1], 6)) @ truth.T_cam_world
    return replace(truth, q=q, T_cam_world=T)


@pytest.mark.parametrize("camera_free", [True, False])
def test_slope_against_differences(seen: Seen, camera_free: bool) -> None:
    model, observation, truth = seen
    pull = SilhouettePull.of(model, observation)
    assert pull is not None
    at = replace(off(truth, 1.0, 0.1), camera_free=camera_free)
    got = pull.linearize(at)
    steps = 1e-3 * torch.eye(got.gradient.shape[1])
    ahead, behind = ([pull.linearize(at.retract(s * step.repeat(3, 1))).loss for step in steps] for s in (1.0, -1.0))
    expected = (torch.stack(ahead) - torch.stack(behind)).T / 4e-3
    # nearest neighbours change within a step
    assert (got.gradient - expected).norm() < 0.02 * expected.norm()
    assert (torch.linalg.eigvalsh(got.hessian) > -1e-6).all()


def test_nothing_pulls_at_the_truth_and_far_away_everything_does(seen: Seen) -> None:
    model, observation, truth = seen
    pull = SilhouettePull.of(model, observation)
    assert pull is not None
    assert pull.linearize(truth).loss.item() < 1e-5
    aside = truth.T_cam_world.clone()
    aside[..., 0, 3] += 0.7  # no pixel in common
    start = replace(truth, T_cam_world=aside)
    found = levenberg_marquardt(pull.linearize, start, iterations=30)
    assert found.losses[-1] < 1e-3 * found.losses[0]


def test_empty_silhouettes_do_not_pull(seen: Seen) -> None:
    model, observation, _ = seen
    assert observation.mask is not None
    assert SilhouettePull.of(model, replace(observation, mask=torch.zeros_like(observation.mask))) is None


def test_starts_far_off_come_near(seen: Seen) -> None:
    """Cameras turned so far that pictures hardly overlap: no start gets a worse picture, and links come near theirs."""
    model, observation, truth = seen
    views = truth.T_cam_world.shape[1]
    twists = torch.cat([torch.zeros(12, views, 3), 0.25 * torch.randn(12, views, 3).sign()], dim=-1)
    start = replace(truth, q=truth.q.repeat(12, 1), T_cam_world=exp_twist(twists) @ truth.T_cam_world)
    objective = PhotometricObjective(model, observation)
    drawn = drawn_to_silhouette(objective, start)
    before, after = (objective.residuals(state).square().sum(dim=1) for state in (start, drawn))
    assert (after <= before).all()

    def off(state: Configurations) -> torch.Tensor:
        Ts = [x.T_cam_world[:, :, None] @ x.tree.forward_kinematics(x.q)[:, None] for x in (state, truth)]
        return (Ts[0] - Ts[1])[..., :3, 3].norm(dim=-1).mean()

    assert off(drawn) < 0.65 * off(start)
