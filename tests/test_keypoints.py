"""Keypoints: kinematics-only least squares on places in pictures."""

import torch

from kinesplat.camera import Camera
from kinesplat.inverse.initializer import modes_of
from kinesplat.inverse.initializer_network import CELLS
from kinesplat.inverse.keypoints import PRIOR, KeypointObjective, Keypoints
from kinesplat.inverse.levenberg_marquardt import levenberg_marquardt
from kinesplat.inverse.objective import Configurations
from kinesplat.inverse.search import joint_scale, one_turn
from kinesplat.self_model import SelfModel
from kinesplat.twists import exp_twist


def problem(model: SelfModel, seed: int, views: int = 1) -> tuple[KeypointObjective, Configurations]:
    """An objective whose first places are exact and whose second ones are wrong, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    lower, upper = one_turn(model.tree)
    q = lower + (upper - lower) * (0.2 + 0.6 * torch.rand(model.tree.dof, generator=generator))
    keypoints = Keypoints.on(model)
    sides = torch.randn(views, 3, generator=generator).abs() + 0.2
    cameras = [Camera.framing(model.posed(q).means, side, width=CELLS, height=CELLS) for side in sides]
    K, T = torch.stack([c.K for c in cameras]), torch.stack([c.T_cam_world for c in cameras])
    pixels, _ = Camera(K, T, CELLS, CELLS).project(keypoints.in_world(model.tree.forward_kinematics(q)))
    wrong = CELLS * torch.rand(pixels.shape, generator=generator)
    spreads = torch.full((*pixels.shape[:-1], 2), 0.4)
    shares = torch.tensor([0.7, 0.2]).expand_as(spreads)
    places = torch.stack([pixels, wrong], dim=-2)
    return KeypointObjective(keypoints, K, places, spreads, shares), Configurations(model.tree, q[None], T[None], True)


def test_points_lie_on_every_link_and_apart(kinearm: SelfModel) -> None:
    keypoints = Keypoints.on(kinearm)
    assert set(keypoints.links.tolist()) == set(kinearm.link_index.tolist())
    for link in keypoints.links.unique():
        own = keypoints.points[keypoints.links == link]
        assert torch.pdist(own).min() > 0.01


def test_gradient_and_hessian_are_the_derivatives(kinearm: SelfModel) -> None:
    objective, truth = problem(kinearm, 0, views=2)
    objective = KeypointObjective(
        objective.keypoints,
        objective.K.double(),
        objective.places[..., :1, :].double(),
        objective.spreads[..., :1].double(),
        objective.shares[..., :1].double(),
    )
    generator = torch.Generator().manual_seed(1)
    twists = 0.02 * torch.randn(1, 2, 6, generator=generator)
    at = Configurations(
        truth.tree,
        truth.q.double() + 0.05 * joint_scale(truth.tree) * torch.randn(truth.q.shape, generator=generator).double(),
        (exp_twist(twists) @ truth.T_cam_world).double(),
        True,
    )
    made = objective.linearize(at)
    torch.testing.assert_close(made.loss, objective.losses(at))
    h, p = 1e-5, made.gradient.shape[1]
    for i in range(p):
        step = torch.zeros(1, p, dtype=torch.float64)
        step[0, i] = h
        ends = [objective.losses(at.retract(sign * step)) for sign in (1.0, -1.0)]
        torch.testing.assert_close(made.gradient[:, i], (ends[0] - ends[1]) / (4 * h), atol=1e-3, rtol=1e-4)
    curvature = torch.linalg.eigvalsh(made.hessian)
    assert (curvature > 0.5 * PRIOR).all()


def test_the_truth_is_found_from_many_starts_joints_and_camera(kinearm: SelfModel) -> None:
    objective, truth = problem(kinearm, 3)
    generator = torch.Generator().manual_seed(3)
    lower, upper = one_turn(truth.tree)
    q = lower + (upper - lower) * torch.rand(200, truth.tree.dof, generator=generator)
    T = exp_twist(0.1 * torch.randn(200, 1, 6, generator=generator)) @ truth.T_cam_world
    for free in (False, True):
        start = Configurations(truth.tree, q, T if free else truth.T_cam_world.expand(200, -1, 4, 4), free)
        solution = levenberg_marquardt(objective.linearize, start, iterations=30)
        best = solution.state.select(solution.linearization.loss.argmin()[None])
        points = [objective.keypoints.in_world(s.tree.forward_kinematics(s.q)) for s in (best, truth)]
        cameras = [s.T_cam_world[:, 0] for s in (best, truth)]
        seen = [p @ T[:, :3, :3].mT + T[:, None, :3, 3] for p, T in zip(points, cameras, strict=True)]
        assert (seen[0] - seen[1]).norm(dim=-1).max() < 0.01


def test_peaks_of_a_heat_map_are_read_to_a_fraction_of_a_cell() -> None:
    cells = torch.arange(CELLS) + 0.5
    x = torch.exp(-0.5 * ((cells - 10.3) / 0.7) ** 2)
    y = torch.exp(-0.5 * ((cells - 20.8) / 0.7) ** 2)
    far = torch.exp(-0.5 * ((cells - 3.0) / 0.7) ** 2)
    heat = 0.6 * y[:, None] * x / (x.sum() * y.sum()) + 0.3 * far[:, None] * far / far.sum() ** 2
    places, spreads, shares = modes_of(heat[None, None])
    torch.testing.assert_close(places[0, 0], torch.tensor([[10.3, 20.8], [3.0, 3.0]]), atol=0.05, rtol=0)
    torch.testing.assert_close(shares[0, 0], torch.tensor([0.6, 0.3]), atol=0.01, rtol=0)
    assert (spreads > 0.5).all()
