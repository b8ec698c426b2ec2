"""Recovery: render a configuration, forget it, find it again. And what the result says about itself."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse import FitResult, Hypothesis, reconstruct
from kinesplat.inverse.coarse_to_fine import GLOBAL_LEVELS, NEAR_LEVELS, levels_for
from kinesplat.inverse.observation import Observation, plain_background
from kinesplat.inverse.result import covariance_of
from kinesplat.inverse.verdict import settled, verdict
from kinesplat.self_model import SelfModel
from kinesplat.twists import exp_twist

Case = tuple[torch.Tensor, Camera, torch.Tensor, torch.Tensor]


def case(model: SelfModel, seed: int, views: int = 1) -> Case:
    generator = torch.Generator().manual_seed(seed)
    span = (model.tree.q_upper - model.tree.q_lower).float()
    q = model.tree.q_canonical.float() + (torch.rand(model.tree.dof, generator=generator) - 0.5) * 0.6 * span.clamp(
        max=1
    )
    q = model.tree.clamp(q)
    direction = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0).abs()
    cameras = [
        Camera.framing(model.posed(q).means, direction + torch.tensor([0.3, 0.9 * v, 0.2])) for v in range(views)
    ]
    camera = (
        cameras[0]
        if views == 1
        else Camera(torch.stack([c.K for c in cameras]), torch.stack([c.T_cam_world for c in cameras]), 256, 256)
    )
    out = model.render(q, camera)
    assert out.alpha is not None
    return q, camera, out.rgb, out.alpha


def off(model: SelfModel, q: torch.Tensor, by: float, seed: int) -> torch.Tensor:
    noise = 2.0 * torch.rand(model.tree.dof, generator=torch.Generator().manual_seed(seed)) - 1.0
    return model.tree.clamp(q + by * noise * (0.5 * (model.tree.q_upper - model.tree.q_lower)).clamp(max=1.0).float())


@pytest.mark.parametrize(("width", "height"), [(100, 80), (200, 150), (30, 20)])
def test_the_last_stage_is_at_full_size_with_the_whole_model(kinearm: SelfModel, width: int, height: int) -> None:
    for levels in (NEAR_LEVELS, GLOBAL_LEVELS):
        last = levels_for(levels, max(width, height))[-1]
        assert last.px == width
        assert last.splats >= len(kinearm.parameters)


@pytest.mark.parametrize("less", [1, 3, 10, 19])
def test_merging_a_few_splats_keeps_a_model_whole(kinearm: SelfModel, less: int) -> None:
    smaller = kinearm.subsample(len(kinearm.parameters) - less)
    assert len(smaller.parameters) == len(smaller.link_index) <= len(kinearm.parameters)


@pytest.mark.parametrize("seed", range(4))
def test_joints_are_recovered_from_a_start_that_is_off(kinearm: SelfModel, seed: int) -> None:
    q, camera, rgb, alpha = case(kinearm, seed)
    fit = reconstruct(kinearm, rgb, camera, masks=alpha, q_init=off(kinearm, q, 0.3, seed))
    assert (fit.q - q).abs().max() < 0.02
    assert fit.verdict in ("converged", "ambiguous")
    assert fit.loss < 1e-3


def test_no_mask_is_needed_on_a_plain_background_of_any_colour(kinearm: SelfModel) -> None:
    q, camera, _, _ = case(kinearm, 5)
    rgb = kinearm.render(q, camera, background=(0.1, 0.4, 0.9)).rgb
    fit = reconstruct(kinearm, rgb, camera, q_init=off(kinearm, q, 0.2, 5))
    assert (fit.q - q).abs().max() < 0.02


def test_two_views_of_one_configuration(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = case(kinearm, 6, views=2)
    fit = reconstruct(kinearm, rgb, camera, masks=alpha, q_init=off(kinearm, q, 0.3, 6))
    assert fit.q.shape == q.shape
    assert (fit.q - q).abs().max() < 0.01


def test_joints_and_camera_together(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = case(kinearm, 7)
    twist = torch.tensor([0.01, -0.01, 0.015, 0.02, -0.015, 0.02])
    guess = Camera(camera.K, exp_twist(twist) @ camera.T_cam_world, 256, 256)
    start = off(kinearm, q, 0.1, 7)
    fit = reconstruct(kinearm, rgb, guess, masks=alpha, q_init=start, optimize_camera=True)
    before = (guess.T_world_cam[:3, 3] - camera.T_world_cam[:3, 3]).norm()
    after = (fit.camera.T_world_cam[:3, 3] - camera.T_world_cam[:3, 3]).norm()
    assert after < 0.5 * before
    assert (fit.q - q).abs().mean() < 0.02
    assert len(fit.variable_names) == kinearm.tree.dof + 6 == len(fit.covariance)


def test_large_pictures_are_fitted_small_and_their_camera_comes_back_in_its_own_size(kinearm: SelfModel) -> None:
    q, camera, _, _ = case(kinearm, 8)
    large = camera.resized(600, 600)
    out = kinearm.render(q, large)
    fit = reconstruct(kinearm, out.rgb, large, masks=out.alpha, q_init=off(kinearm, q, 0.1, 8))
    assert (fit.camera.width, fit.camera.height) == (600, 600)
    torch.testing.assert_close(fit.camera.K, large.K)
    assert (fit.q - q).abs().max() < 0.02


def test_uint8_numpy_pictures_do_as_well(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = case(kinearm, 1)
    image = (rgb.detach() * 255).round().to(torch.uint8).numpy()
    fit = reconstruct(kinearm, image, camera, masks=alpha.detach().numpy() > 0.5, q_init=off(kinearm, q, 0.1, 1))
    assert (fit.q - q).abs().max() < 0.03


def test_answers_stay_within_the_limits_and_repeat_with_the_seed(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = case(kinearm, 2)
    fits = [reconstruct(kinearm, rgb, camera, masks=alpha, q_init=off(kinearm, q, 0.3, 2), seed=3) for _ in range(2)]
    assert torch.equal(fits[0].q, fits[1].q)
    assert fits[0].loss_history == fits[1].loss_history
    for hypothesis in fits[0].hypotheses:
        assert (hypothesis.q >= kinearm.tree.q_lower - 1e-6).all()
        assert (hypothesis.q <= kinearm.tree.q_upper + 1e-6).all()


def test_the_history_leads_to_the_answer_and_falls_within_each_size(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = case(kinearm, 3)
    fit = reconstruct(kinearm, rgb, camera, masks=alpha, q_init=off(kinearm, q, 0.2, 3))
    torch.testing.assert_close(fit.q_history[-1], fit.q)
    assert len(fit.q_history) == len(fit.loss_history)
    ends = [*fit.level_starts[1:], len(fit.loss_history)]
    for begin, end in zip(fit.level_starts, ends, strict=True):
        assert (np.diff(fit.loss_history[begin:end]) <= 0).all()


def test_a_picture_of_something_else_is_called_a_failure(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = case(kinearm, 4)
    blob = torch.zeros_like(alpha)
    blob[100:230, 10:60] = 1.0
    fit = reconstruct(kinearm, torch.rand_like(rgb), camera, masks=blob, q_init=q, starts=2)
    assert fit.verdict == "failed"


def test_verdicts_follow_from_the_evidence() -> None:
    clean = {"unexplained": 0.01, "doubt": 0.03, "gap": 2.0, "agreement": 0.5, "attempts": 1, "confirmed": False}
    cases = [
        ({}, "converged", True),
        ({"gap": None}, "converged", True),
        ({"gap": 1.1}, "ambiguous", False),
        ({"gap": 1.1, "confirmed": True}, "ambiguous", True),
        ({"gap": 1.0, "agreement": 1.0}, "ambiguous", True),
        ({"unexplained": 0.05}, "ambiguous", False),
        ({"unexplained": 0.05, "confirmed": True}, "converged", True),
        ({"unexplained": 0.05, "gap": 1.0, "agreement": 1.0}, "ambiguous", False),
        ({"unexplained": 0.3}, "failed", False),
        ({"unexplained": 0.3, "gap": 1.0, "agreement": 1.0, "confirmed": True}, "failed", False),
    ]
    for change, says, done in cases:
        assert (verdict(clean | change), settled(clean | change)) == (says, done), change


def test_report_and_json_name_every_joint(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = case(kinearm, 1)
    fit = reconstruct(kinearm, rgb, camera, masks=alpha, q_init=q, starts=1)
    assert all(name in fit.report() for name in kinearm.tree.joint_names)
    data = json.loads(json.dumps(fit.to_json(), allow_nan=False))
    assert data["verdict"] == fit.verdict
    assert len(data["covariance"]) == kinearm.tree.dof


def test_a_joint_that_no_pixel_shows_is_called_unobservable(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = case(kinearm, 1)
    fit = reconstruct(kinearm, rgb, camera, masks=alpha, q_init=q, starts=1)
    hessian = torch.eye(kinearm.tree.dof)
    hessian[2, 2] = 0.0
    covariance = covariance_of(hessian, 1e-4, 1000)
    assert math.isinf(covariance[2, 2])
    blind = FitResult(**{**fit.__dict__, "covariance": covariance})
    assert blind.weak_variables == (kinearm.tree.joint_names[2],)
    assert "hardly observable" in blind.report()
    json.dumps(blind.to_json(), allow_nan=False)


def test_joints_outside_the_picture_rest(kinearm: SelfModel) -> None:
    q, camera, _, _ = case(kinearm, 1)
    low = replace(camera, height=96, K=camera.K - torch.tensor([[0, 0, 0], [0, 0, 160.0], [0, 0, 0]]))
    image = kinearm.render(q, low)
    assert image.rgb is not None
    start = off(kinearm, q, 0.1, 0)
    fit = reconstruct(kinearm, image.rgb.clamp(0, 1), low, masks=image.alpha, q_init=start, starts=4)
    blind = torch.isinf(fit.covariance.diagonal())
    assert blind.any()
    assert not blind.all()
    torch.testing.assert_close(fit.q[blind], start[blind])
    assert {kinearm.tree.joint_names[i] for i in torch.nonzero(blind)[:, 0]} <= set(fit.weak_variables)


def test_what_other_answers_differ_in_is_named(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = case(kinearm, 1)
    fit = reconstruct(kinearm, rgb, camera, masks=alpha, q_init=q, starts=1)
    names, first = kinearm.tree.joint_names, fit.hypotheses[0]
    turned, bent, far = (first.q.clone() for _ in range(3))
    turned[1] += 2.0 * math.pi  # a full turn is no difference
    bent[3] += 0.2
    far[0] += 1.0
    others = [
        Hypothesis(value, first.camera, loss * first.loss) for value, loss in ((turned, 1.0), (bent, 1.1), (far, 2.0))
    ]
    rivals = FitResult(**{**fit.__dict__, "hypotheses": (first, *others), "verdict": "ambiguous"})
    assert rivals.ambiguous_joints == (names[3],)
    assert f"differ in {names[3]}" in rivals.report()
    assert fit.ambiguous_joints == ()


def test_variables_that_make_good_for_each_other_are_named(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = case(kinearm, 1)
    fit = reconstruct(kinearm, rgb, camera, masks=alpha, q_init=q, starts=1)
    covariance = 1e-6 * torch.eye(kinearm.tree.dof)
    covariance[0, 0] = covariance[2, 2] = 0.01
    covariance[0, 2] = covariance[2, 0] = -0.0099
    covariance[-1, -1] = 0.006**2  # a slide: 6 mm are much
    together = FitResult(**{**fit.__dict__, "covariance": covariance})
    names = kinearm.tree.joint_names
    assert together.weak_variables == (names[0], names[2], names[-1])
    assert together.weak_pairs == ((names[0], names[2]),)
    assert f"{names[0]} and {names[2]} can make good" in together.report()


def test_covariance_is_that_of_repeated_measurements() -> None:
    A = torch.randn(60, 4, dtype=torch.float64)
    x, sigma = torch.randn(4, dtype=torch.float64), 0.1
    answers, claimed = [], []
    for _ in range(400):
        b = A @ x + sigma * torch.randn(60, dtype=torch.float64)
        solution = torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
        answers.append(solution)
        claimed.append(covariance_of(A.T @ A, ((A @ solution - b) ** 2).sum().item(), 60))
    measured = torch.cov(torch.stack(answers).T)
    torch.testing.assert_close(torch.stack(claimed).mean(dim=0), measured, atol=0.25 * measured.max().item(), rtol=0.3)


def test_shrinking_averages_and_keeps_the_view(kinearm: SelfModel) -> None:
    _, camera, rgb, alpha = case(kinearm, 1)
    seen = Observation.create(rgb, alpha, camera)
    small = seen.resized(64)
    assert small.mask is not None
    torch.testing.assert_close(small.rgb[0, 3, 5], seen.rgb[0, 12:16, 20:24].mean(dim=(0, 1)))
    torch.testing.assert_close(small.mask.mean(), alpha.mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(small.camera.K[0, :2], seen.camera.K[0, :2] / 4)
    assert seen.resized(1000) is seen


def test_cluttered_borders_are_no_plain_background() -> None:
    assert plain_background(torch.rand(1, 40, 40, 3)) is None
    flat = torch.full((1, 40, 40, 3), 0.3)
    flat[:, 0, :10] = 0.9
    torch.testing.assert_close(plain_background(flat), torch.full((3,), 0.3))


def test_bad_input_is_named(kinearm: SelfModel, unchecked_types: None) -> None:
    q, camera, rgb, alpha = case(kinearm, 1)
    nan = rgb.clone()
    nan[3, 4, 1] = math.nan
    inside = kinearm.posed(q).means[kinearm.link_index == 0].mean(dim=0)
    bad_q = q.clone()
    bad_q[1] = math.nan
    cases = [
        ({"images": nan}, "images contain NaN"),
        ({"images": rgb * 255}, r"expected \[0, 1\]"),
        ({"images": "photo.png"}, "type str"),
        ({"images": (rgb * 255).long()}, "dtype"),
        ({"images": rgb[..., 0]}, "images have shape"),
        ({"images": rgb[:100]}, "the camera says"),
        ({"masks": alpha[:100]}, "masks have shape"),
        ({"masks": torch.zeros_like(alpha)}, "mask is empty"),
        ({"images": torch.rand_like(rgb), "masks": None, "optimize_camera": True}, "give masks"),
        ({"images": torch.ones_like(rgb), "masks": None}, "no robot"),
        ({"camera": None}, "camera is None"),
        (
            {"camera": Camera(camera.K.expand(3, 3, 3), camera.T_cam_world.expand(3, 4, 4), 256, 256)},
            "one camera per view",
        ),
        ({"q_init": torch.zeros(3)}, "joints"),
        ({"q_init": bad_q}, "shoulder"),
        ({"q_init": torch.zeros(2, 2, 7)}, "q_init has shape"),
        ({"starts": 0}, "starts is 0"),
        ({"images": torch.stack([rgb, rgb]), "masks": torch.stack([alpha, alpha])}, "one camera per view"),
        ({"camera": Camera.look_at(inside, inside + torch.tensor([1.0, 0.0, 0.0]))}, "robot"),
    ]
    for change, says in cases:
        arguments = {"images": rgb, "camera": camera, "masks": alpha, "q_init": q, "starts": 1, **change}
        with pytest.raises(InputError, match=says):
            reconstruct(kinearm, **arguments)
