"""The global search and its alias moves."""

import math
from dataclasses import replace

import pytest
import torch

from kinesplat.camera import Camera
from kinesplat.inverse import reconstruct
from kinesplat.inverse.objective import Configurations
from kinesplat.inverse.search import (
    AliasMoves,
    best_distinct,
    blurred,
    children,
    collinear_turns,
    follow,
    joint_influence,
    joint_scale,
    one_turn,
)
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel
from kinesplat.twists import exp_twist


def states(tree: KinematicTree, q: torch.Tensor, camera_free: bool = False) -> Configurations:
    return Configurations(tree, q, torch.eye(4).expand(len(q), 1, 4, 4), camera_free)


def test_alias_moves_are_half_turns_and_mirrored_triples(kinearm: SelfModel) -> None:
    tree = kinearm.tree
    moves = AliasMoves.of(tree)
    hinges = sum(kind == "hinge" for kind in tree.joint_types)
    grippers = 3 * (tree.dof - hinges)
    assert len(moves.sign) == hinges + 2 * (hinges - 2) + grippers
    assert len(AliasMoves.of(tree, 8).sign) == 7 * hinges + 2 * (hinges - 2) + grippers
    q = (tree.q_canonical + 0.1).float()[None]
    changed = (moves.apply_all(q) - q).abs() > 1e-6
    assert (changed.sum(dim=1) <= 3).all()
    slides = torch.tensor([kind == "slide" for kind in tree.joint_types])
    assert not changed[:-grippers, slides].any()
    assert not changed[-grippers:, ~slides].any()
    middle = 0.5 * (tree.q_lower + tree.q_upper)
    expected = torch.stack([tree.q_lower, middle, tree.q_upper])[:, slides].float()
    torch.testing.assert_close(moves.apply_all(q)[-grippers:, slides], expected)


def test_twice_a_half_turn_is_no_turn(kinearm: SelfModel) -> None:
    moves = AliasMoves.of(kinearm.tree)
    q = kinearm.tree.q_canonical.float() + 0.3 * torch.randn(20, kinearm.tree.dof)
    for move in torch.nonzero((moves.sign != 0.0).all(dim=1))[:, 0].tolist():
        index = torch.full((20,), move)
        twice = moves.apply(moves.apply(q, index), index)
        turns = (twice - q) / (2 * math.pi)
        torch.testing.assert_close(turns, turns.round(), atol=1e-5, rtol=0)


def test_turns_about_a_common_axis_move_only_what_is_between(kinearm: SelfModel) -> None:
    tree = kinearm.tree
    q = torch.zeros(tree.dof)  # upright: waist, forearm and wrist turn about one axis
    turned = collinear_turns(tree, q)
    assert len(turned) == 3 * 11 * 2
    before, after = tree.forward_kinematics(q)[-1], tree.forward_kinematics(turned)[:, -1]
    torch.testing.assert_close(after, before.expand_as(after), atol=1e-5, rtol=0)
    lower, upper = one_turn(tree)
    assert ((turned - q).abs() > 0.1).sum(dim=1).eq(2).all()
    assert (turned <= upper + math.pi).all()
    assert (turned >= lower - math.pi).all()
    bent = torch.tensor([0.3, 0.9, 0.8, 0.2, 0.7, 0.1, 0.01])
    assert collinear_turns(tree, bent).shape == (0, tree.dof)


def test_the_search_range_is_one_turn_within_the_limits(kinearm: SelfModel) -> None:
    lower, upper = one_turn(kinearm.tree)
    assert (lower >= kinearm.tree.q_lower - 1e-6).all()
    assert (upper <= kinearm.tree.q_upper + 1e-6).all()
    assert (upper - lower <= 2 * math.pi + 1e-5).all()


def test_children_stay_within_the_limits_and_keep_some_joints(kinearm: SelfModel) -> None:
    tree = kinearm.tree
    q = tree.clamp(tree.q_canonical.float() + 0.5 * torch.randn(10, tree.dof))
    young = children(states(tree, q), AliasMoves.of(tree), 0.5, torch.Generator().manual_seed(0)).q
    assert (young >= tree.q_lower - 1e-5).all()
    assert (young <= tree.q_upper + 1e-5).all()
    same = (young == q[torch.arange(len(young)) % 10]).float().mean()
    assert 0.3 < same < 0.9


def test_robots_of_long_slides_have_no_aliases_and_are_searched_all_the_same(kinearm: SelfModel) -> None:
    long = torch.full_like(kinearm.tree.q_upper, 2.0)
    slides = replace(kinearm.tree, joint_types=("slide",) * kinearm.tree.dof, q_lower=-long, q_upper=long)
    moves = AliasMoves.of(slides)
    assert moves.apply_all(slides.q_canonical.float()[None]).shape == (0, slides.dof)
    start = states(slides, slides.q_canonical.float()[None])
    young = children(start, moves, 0.5, torch.Generator().manual_seed(0)).q
    assert (young != slides.q_canonical.float()).any()


def test_best_distinct_keeps_the_best_of_every_cluster(kinearm: SelfModel) -> None:
    centres = torch.randn(5, kinearm.tree.dof)
    q = (centres[:, None] + 0.0001 * torch.randn(5, 40, kinearm.tree.dof)).flatten(0, 1)
    losses = torch.rand(200)
    q[::2, 0] += 2 * math.pi  # full turns are no difference
    kept = best_distinct(states(kinearm.tree, q), losses, 50, 0.1)
    assert (losses[kept].diff() >= 0).all()
    assert kept[0] == losses.argmin()
    assert len(kept) == 5
    for cluster in kept // 40:
        members = slice(int(cluster) * 40, int(cluster) * 40 + 40)
        assert losses[members].min() == losses[kept[kept // 40 == cluster]].item()


def test_joints_count_by_what_they_move(kinearm: SelfModel) -> None:
    influence, tree = joint_influence(kinearm), kinearm.tree
    assert influence.max() == 1.0
    assert influence[0] > 2 * influence[5]
    q = tree.q_canonical.float().repeat(2, 1)
    q[1, 5] += 0.15
    losses = torch.tensor([1.0, 2.0])
    assert len(best_distinct(states(tree, q), losses, 2, 0.1)) == 2
    assert len(best_distinct(states(tree, q), losses, 2, 0.1, influence)) == 1


def test_directions_of_free_cameras_are_told_apart(kinearm: SelfModel) -> None:
    tree = kinearm.tree
    q = tree.q_canonical.float().repeat(2, 1)
    turned = exp_twist(torch.tensor([[0.0] * 6, [0.0, 0.0, 0.0, 0.0, 0.7, 0.0]]))[:, None]
    for free, count in ((False, 1), (True, 2)):
        both = Configurations(tree, q, turned, free)
        assert len(best_distinct(both, torch.tensor([1.0, 2.0]), 2, 0.3)) == count


def test_a_camera_that_follows_a_link_sees_it_where_it_was(kinearm: SelfModel) -> None:
    tree = kinearm.tree
    before = tree.q_canonical.float().repeat(6, 1)
    after = tree.clamp(before + 0.4 * torch.randn_like(before) * joint_scale(tree))
    link = torch.randint(len(tree.link_names), (6,))
    shift = follow(tree, before, after, link)[:, 0]
    rows = torch.arange(6)
    seen = (shift @ tree.forward_kinematics(after)[rows, link], tree.forward_kinematics(before)[rows, link])
    torch.testing.assert_close(*seen, atol=1e-5, rtol=0)


def test_blurring_keeps_the_sum_and_spreads_a_point_as_a_gaussian() -> None:
    image = torch.zeros(1, 1, 31, 31, 1, dtype=torch.float64)
    image[0, 0, 15, 15, 0] = 1.0
    out = blurred(image, 2.0)[0, 0, :, :, 0]
    x = torch.arange(31, dtype=torch.float64) - 15
    torch.testing.assert_close(out.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert abs((out.sum(dim=0) * x**2).sum().item() - 4.0) < 0.4


@pytest.mark.slow
def test_joints_are_found_without_any_start(kinearm: SelfModel) -> None:
    tree, solved = kinearm.tree, 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        q = (tree.q_lower + (tree.q_upper - tree.q_lower) * torch.rand(tree.dof, generator=generator)).float()
        camera = Camera.framing(kinearm.posed(q).means, (1.0, 0.4, 0.5))
        out = kinearm.render(q, camera)
        fit = reconstruct(kinearm, out.rgb, camera, masks=out.alpha, seed=seed)
        solved += bool((fit.q - q).abs().max() < 0.05)
    assert solved >= 4
