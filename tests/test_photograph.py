"""Photographs: the light is found again from a picture, and pictures under the model's own headlight have none."""

from dataclasses import replace

import pytest
import torch

import kinesplat as ks
from kinesplat.inverse.lighting import Light, fit_light, normals_of
from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.photograph import light_of
from kinesplat.rasterizer import rasterize_links

FIRST = torch.tensor([[0.5, 0.45, 0.4], [0.1, 0.1, 0.05], [-0.05, 0.0, 0.05], [0.2, 0.2, 0.25]])
SECOND = torch.tensor([[0.03, -0.04, 0.02, 0.05, -0.03]]).T.expand(5, 3)


def light_for(model: ks.SelfModel) -> Light:
    """A light from a side, in which every second link is darker than the model has it."""
    gains = torch.ones(len(model.tree.link_names))
    gains[::2] = 0.8
    return Light(torch.cat([FIRST, SECOND]), gains)


@pytest.fixture(scope="module")
def arm(kinearm: ks.SelfModel) -> ks.SelfModel:
    return kinearm.subsample(3_000)


@pytest.fixture(scope="module")
def scene(arm: ks.SelfModel) -> tuple[torch.Tensor, ks.Camera, Observation]:
    """A configuration, a camera, and the picture in `light_for` the arm."""
    q = arm.tree.q_canonical.float()
    camera = ks.Camera.framing(arm.posed(q).means, width=96, height=96)
    Ts = arm.tree.forward_kinematics(q)
    lit = light_for(arm).shine_on(arm.parameters.activate(), arm.link_index, Ts)
    out = rasterize_links(lit, arm.link_index, Ts, camera, eps2d=arm.eps2d)
    assert out.rgb is not None
    assert out.alpha is not None
    return q, camera, Observation.create(out.rgb.clamp(0, 1), out.alpha.clamp(0, 1), camera)


def test_normals_are_unit_and_point_outward(arm: ks.SelfModel) -> None:
    splats = arm.parameters.activate()
    normals = normals_of(splats)
    assert torch.allclose(normals.norm(dim=-1), torch.ones(len(normals)), atol=1e-4)
    for link in arm.link_index.unique():
        own = arm.link_index == link
        away = splats.means[own] - splats.means[own].mean(dim=0)
        assert (away * normals[own]).sum() > 0


def test_light_found_again(arm: ks.SelfModel, scene: tuple[torch.Tensor, ks.Camera, Observation]) -> None:
    q, camera, seen = scene
    found = fit_light(arm, seen, q, camera.T_cam_world[None])
    assert found is not None
    at = Configurations(arm.tree, q[None], camera.T_cam_world[None, None], False)
    errors = [
        PhotometricObjective(arm, seen, light=light).difference(at)[..., :3].square().mean()
        for light in (found, light_for(arm), replace(found, gains=torch.ones_like(found.gains)))
    ]
    assert errors[0] < 1e-4
    assert errors[1] < 1e-4
    assert errors[2] > 10.0 * errors[0]


def test_a_light_for_every_configuration(arm: ks.SelfModel, scene: tuple[torch.Tensor, ks.Camera, Observation]) -> None:
    """Of a batch of lights each shines on its own configuration."""
    q, camera, seen = scene
    T, light = camera.T_cam_world[None, None], light_for(arm)
    dark = replace(light, coefficients=0.5 * light.coefficients)
    both = PhotometricObjective(arm, seen, robust=0.3, light=Light.stacked([light, dark]))
    twice = Configurations(arm.tree, torch.stack([q, q]), T.expand(2, -1, -1, -1), False)
    alone = [
        PhotometricObjective(arm, seen, robust=0.3, light=one).linearize(Configurations(arm.tree, q[None], T, False))
        for one in (light, dark)
    ]
    found = both.linearize(twice)
    torch.testing.assert_close(found.loss, torch.cat([a.loss for a in alone]))
    torch.testing.assert_close(found.hessian, torch.cat([a.hessian for a in alone]), rtol=1e-4, atol=1e-6)


def test_the_light_explains_its_picture(arm: ks.SelfModel, scene: tuple[torch.Tensor, ks.Camera, Observation]) -> None:
    """Loss near zero at the truth, the gradient too; away from it the robust gradient follows the loss."""
    q, camera, seen = scene
    at = Configurations(arm.tree, q[None], camera.T_cam_world[None, None], False)
    objective = PhotometricObjective(arm, seen, light=light_for(arm), robust=0.3)
    truth = objective.linearize(at)
    assert truth.loss.item() < 1e-4
    step = torch.zeros(1, arm.tree.dof)
    step[0, 1] = 0.02
    away = objective.linearize(at.retract(step))
    h = 2e-3 * torch.nn.functional.one_hot(torch.tensor([1]), arm.tree.dof)
    slope = objective.linearize(at.retract(step + h)).loss - objective.linearize(at.retract(step - h)).loss
    assert away.gradient[0, 1].item() == pytest.approx(0.5 * slope.item() / 4e-3, rel=0.2)
    assert away.loss > 10.0 * truth.loss


def test_only_photographs_have_a_light(arm: ks.SelfModel, scene: tuple[torch.Tensor, ks.Camera, Observation]) -> None:
    q, camera, photograph = scene
    out = arm.render(q, camera)
    assert out.rgb is not None
    plain = Observation.create(out.rgb.clamp(0, 1), photograph.mask, camera)
    fit = ks.reconstruct(arm, out.rgb.clamp(0, 1), camera, masks=photograph.mask, q_init=q, starts=1)
    assert "light" not in fit.evidence
    assert light_of(arm, plain, fit) is None
    assert light_of(arm, photograph, fit) is not None
    assert light_of(arm, photograph, replace(fit, verdict="failed")) is None
