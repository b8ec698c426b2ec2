"""The photometric objective against finite differences, and the state it is minimised over."""

from dataclasses import replace

import pytest
import torch

from kinesplat.camera import Camera
from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.inverse.observation import Observation
from kinesplat.self_model import SelfModel
from kinesplat.twists import exp_twist


@pytest.fixture(scope="module")
def model(kinearm: SelfModel) -> SelfModel:
    """Coarse and blurred, so that the picture is smooth in q."""
    return replace(kinearm.subsample(1_000), eps2d=1.0)


def observe(model: SelfModel, q: torch.Tensor, views: int, masked: bool) -> Observation:
    eyes = torch.tensor([[0.9, 0.5, 0.5], [0.1, -1.0, 0.6]])[:views]
    camera = Camera.look_at(eyes, torch.tensor([0.0, 0.0, 0.25]), width=64, height=48)
    out = model.render(q, camera)
    assert out.alpha is not None
    return Observation.create(out.rgb, out.alpha if masked else None, camera)


def states(model: SelfModel, seen: Observation, count: int, camera_free: bool) -> Configurations:
    q = model.tree.q_canonical.float() + 0.1 * torch.randn(count, model.tree.dof)
    T = exp_twist(0.02 * torch.randn(count, len(seen.rgb), 6)) @ seen.camera.T_cam_world
    margin = 0.05 * (model.tree.q_upper - model.tree.q_lower)  # on a limit, half of the slope is cut off
    inside = torch.minimum(torch.maximum(q, model.tree.q_lower + margin), model.tree.q_upper - margin).float()
    return Configurations(model.tree, inside, T, camera_free)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("camera_free", [True, False])
@pytest.mark.parametrize("views", [1, 2])
def test_gradient_is_that_of_automatic_differentiation(
    model: SelfModel, views: int, camera_free: bool, masked: bool
) -> None:
    seen = observe(model, model.tree.q_canonical.float(), views, masked)
    at = states(model, seen, 3, camera_free)
    objective = PhotometricObjective(model, seen, colour_weight=0.7, alpha_weight=1.3)
    step = torch.zeros(3, model.tree.dof + 6 * views * camera_free, requires_grad=True)
    loss = objective.residuals(at.retract(step)).square().sum(dim=1)
    (gradient,) = torch.autograd.grad(loss.sum(), step)
    exact = objective.linearize(at)
    torch.testing.assert_close(exact.loss, loss.detach(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(exact.gradient, 0.5 * gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("camera_free", [True, False])
def test_hessian_is_the_slope_of_the_gradient_where_the_residual_vanishes(model: SelfModel, camera_free: bool) -> None:
    q = model.tree.q_canonical.float()
    seen = observe(model, q, 2, masked=False)
    at = Configurations(model.tree, q[None], seen.camera.T_cam_world[None], camera_free)
    objective = PhotometricObjective(model, seen)
    hessian = objective.linearize(at).hessian[0]
    scale = hessian.diagonal().sqrt()
    for direction in torch.eye(len(scale)):
        delta = 3e-3 * direction[None] / scale.max()
        ahead, behind = objective.linearize(at.retract(delta)), objective.linearize(at.retract(-delta))
        slope = 0.5 * (ahead.gradient - behind.gradient)[0]
        expected = hessian @ delta[0]
        assert ((slope - expected) / scale).abs().max() < 0.2 * (expected / scale).abs().max()


def test_differences_and_exact_linearization_agree_but_for_cut_off_tails(model: SelfModel) -> None:
    seen = observe(model, model.tree.q_canonical.float(), 1, masked=True)
    at = states(model, seen, 3, camera_free=True)
    objective = PhotometricObjective(model, seen)
    exact, rough = objective.linearize(at), objective.linearize_by_differences(at, h=4e-3)
    torch.testing.assert_close(exact.loss, rough.loss, rtol=1e-4, atol=1e-7)
    cosine = torch.nn.functional.cosine_similarity(exact.gradient, rough.gradient, dim=1)
    assert (cosine > 0.98).all()


def test_the_loss_vanishes_at_the_truth_and_the_yardstick_is_the_empty_picture(model: SelfModel) -> None:
    q = model.tree.q_canonical.float()
    seen = observe(model, q, 1, masked=True)
    at = Configurations(model.tree, q[None], seen.camera.T_cam_world[None], False)
    objective = PhotometricObjective(model, seen)
    assert objective.linearize(at).loss.item() < 1e-5
    away = Configurations(model.tree, q[None], seen.camera.T_cam_world[None].clone(), False)
    away.T_cam_world[..., 2, 3] = -50.0
    torch.testing.assert_close(objective.linearize(away).loss.item(), objective.empty_loss, rtol=1e-4, atol=0.0)


def test_steps_respect_the_limits_and_bounds_hold(model: SelfModel) -> None:
    seen = observe(model, model.tree.q_canonical.float(), 1, masked=True)
    at = states(model, seen, 4, camera_free=True)
    stepped = at.retract(torch.full((4, model.tree.dof + 6), 10.0))
    torch.testing.assert_close(stepped.q.double(), model.tree.q_upper.expand(4, -1), atol=1e-6, rtol=0)
    outward, inward = -torch.ones(4, model.tree.dof + 6), torch.ones(4, model.tree.dof + 6)
    assert stepped.at_bound(outward)[:, : model.tree.dof].all()
    assert not stepped.at_bound(inward).any()
    assert not stepped.at_bound(outward)[:, model.tree.dof :].any()
