"""Soft terms of a fit: self-collision and joint limits."""

import math

import pytest
import torch

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse import reconstruct
from kinesplat.inverse.levenberg_marquardt import Linearization
from kinesplat.inverse.priors import Priors
from kinesplat.inverse.search import joint_scale
from kinesplat.self_model import SelfModel


def alone(priors: Priors, model: SelfModel, q: torch.Tensor, extra: int = 0) -> Linearization:
    """The terms without pixels."""
    batch, p = len(q), model.tree.dof + extra
    nothing = Linearization(torch.zeros(batch).to(q), torch.zeros(batch, p).to(q), torch.zeros(batch, p, p).to(q))
    return priors.added_to(nothing, model.tree, q)


def draws(model: SelfModel, count: int) -> torch.Tensor:
    share = torch.rand(count, model.tree.dof, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model.tree.q_lower + (model.tree.q_upper - model.tree.q_lower) * share


def test_the_canonical_configuration_costs_nothing(kinearm: SelfModel) -> None:
    priors = Priors.of(kinearm, self_collision=1.0)
    assert len(priors.pairs) > 10
    assert alone(priors, kinearm, kinearm.tree.q_canonical[None]).loss.item() == 0.0


def test_an_arm_folded_into_itself_costs(kinearm: SelfModel) -> None:
    priors = Priors.of(kinearm, self_collision=1.0)
    loss = alone(priors, kinearm, draws(kinearm, 300)).loss
    assert 0.02 < (loss > 0.0).double().mean() < 0.9


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_gradients_are_the_derivatives(kinearm: SelfModel, weights: tuple[float, float]) -> None:
    priors = Priors.of(kinearm, *weights)
    q = draws(kinearm, 60)
    made, h = alone(priors, kinearm, q, extra=6), 1e-7
    assert made.loss.max() > 0.0
    assert (made.gradient[:, kinearm.tree.dof :] == 0.0).all()
    for joint in range(kinearm.tree.dof):
        step = torch.zeros(kinearm.tree.dof, dtype=torch.float64)
        step[joint] = h
        ends = [alone(priors, kinearm, q + sign * step).loss for sign in (1.0, -1.0)]
        torch.testing.assert_close(made.gradient[:, joint], (ends[0] - ends[1]) / (4 * h), atol=1e-3, rtol=1e-3)
    assert (torch.linalg.eigvalsh(made.hessian) > -1e-6).all()


def test_limits_cost_their_weight_at_the_limit_and_nothing_inside(kinearm: SelfModel) -> None:
    tree, priors = kinearm.tree, Priors.of(kinearm, limits=0.3)
    middle = 0.5 * (tree.q_lower + tree.q_upper)
    assert alone(priors, kinearm, middle[None]).loss.item() == 0.0
    assert math.isclose(alone(priors, kinearm, tree.q_upper[None]).loss.item(), 0.3 * int(tree.q_limited.sum()))


def test_a_fit_with_terms_finds_the_joints_and_counts_them(kinearm: SelfModel) -> None:
    tree = kinearm.tree
    q = tree.clamp(tree.q_canonical.float() + 0.1 * joint_scale(tree))
    camera = Camera.framing(kinearm.posed(q).means)
    out = kinearm.render(q, camera)
    priors = Priors.of(kinearm, self_collision=1e-4, limits=1e-5)
    fit = reconstruct(kinearm, out.rgb, camera, masks=out.alpha, q_init=q, priors=priors)
    assert (fit.q - q).abs().max() < 0.02


def test_bad_weights_are_named(kinearm: SelfModel) -> None:
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="limits"):
            Priors.of(kinearm, limits=bad)
