"""Chamfer distance, and skinning weights learnt from clouds and from labels."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from kinesplat.description import load_description
from kinesplat.kinematics import KinematicTree
from kinesplat.skinning import SkinningField
from kinesplat.training import chamfer as chamfer_module
from kinesplat.training.canonical import mesh_cloud
from kinesplat.training.chamfer import chamfer
from kinesplat.training.loop import Budget
from kinesplat.training.skinning import LinkCloud, fit_by_chamfer, fit_by_labels, skinning_error


@pytest.fixture(scope="module")
def arm() -> tuple[KinematicTree, LinkCloud]:
    robot = load_description("kinearm")
    return robot.tree, mesh_cloud(robot, 3000)[0]


def configurations(tree: KinematicTree, count: int) -> torch.Tensor:
    return tree.q_lower + torch.rand(count, tree.dof, dtype=torch.float64) * (tree.q_upper - tree.q_lower)


def small_field(tree: KinematicTree, cloud: LinkCloud) -> SkinningField:
    points = cloud.posed(tree, tree.q_canonical)
    return SkinningField.around(points, len(tree.link_names), layers=2, width=64, frequencies=32)


@pytest.mark.parametrize("sizes", [(1, 1), (300, 200), (70, 500)])
def test_chamfer_against_a_kd_tree(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chamfer_module, "CHUNK", 64)
    a, b = (torch.randn(n, 3, dtype=torch.float64) for n in sizes)
    there, back = cKDTree(b.numpy()).query(a.numpy())[0], cKDTree(a.numpy()).query(b.numpy())[0]
    assert abs(float(chamfer(a, b)) - float(np.mean(there**2) + np.mean(back**2))) < 1e-12
    assert chamfer(a, b) == chamfer(b, a)
    assert chamfer(a, a[torch.randperm(len(a))]) == 0.0


def test_chamfer_is_differentiable() -> None:
    a, b = (torch.randn(20, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(chamfer, (a, b))


def test_chamfer_of_a_shift_smaller_than_the_spacing() -> None:
    grid = torch.cartesian_prod(*[torch.arange(6.0, dtype=torch.float64)] * 3)
    assert abs(float(chamfer(grid, grid + torch.tensor([0.3, 0.0, 0.0], dtype=torch.float64))) - 2 * 0.09) < 1e-12


def test_a_cloud_follows_its_links(arm: tuple[KinematicTree, LinkCloud]) -> None:
    tree, cloud = arm
    q = configurations(tree, 1)[0]
    posed, Ts = cloud.posed(tree, q), tree.forward_kinematics(q)
    for link in cloud.link_index.unique():
        rows = cloud.link_index == link
        expected = cloud.points[rows].double() @ Ts[link, :3, :3].T + Ts[link, :3, 3]
        assert (posed[rows] - expected).abs().max() < 1e-6


def test_points_are_spread_in_proportion_to_area() -> None:
    robot = load_description("kinearm")
    cloud, colours = mesh_cloud(robot, 5000)
    areas = torch.zeros(len(robot.tree.link_names), dtype=torch.float64)
    for mesh in robot.link_meshes:
        a, b, c = (mesh.vertices[mesh.faces[:, i]].astype(float) for i in range(3))
        areas[mesh.link] += 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=-1).sum()
    found = torch.bincount(cloud.link_index, minlength=len(areas)) / 5000
    assert len(cloud.points) == len(colours) == 5000
    assert (found - areas / areas.sum()).abs().max() < 0.02


def test_right_weights_have_no_error_and_even_ones_do(arm: tuple[KinematicTree, LinkCloud]) -> None:
    tree, cloud = arm
    q, links = configurations(tree, 3), len(tree.link_names)
    canonical = cloud.posed(tree, tree.q_canonical)

    def right(points: torch.Tensor) -> torch.Tensor:
        nearest = cKDTree(canonical.numpy()).query(points.numpy())[1]
        return torch.nn.functional.one_hot(cloud.link_index[nearest], links).float()

    exact = skinning_error(right, tree, cloud, q)
    even = skinning_error(lambda points: torch.full((len(points), links), 1.0 / links), tree, cloud, q)
    assert exact["displacement_mm"] < 0.01
    assert even["displacement_mm"] > 50.0
    assert even["chamfer_m2"] > 5.0 * exact["chamfer_m2"]


@pytest.mark.parametrize(("fit", "rate", "bound_mm"), [(fit_by_labels, 1e-2, 10.0), (fit_by_chamfer, 4e-3, 90.0)])
def test_fields_learn(arm: tuple[KinematicTree, LinkCloud], fit, rate: float, bound_mm: float) -> None:
    tree, cloud = arm
    field, q = small_field(tree, cloud), configurations(tree, 4)
    before = skinning_error(field, tree, cloud, q)
    losses = [tick.values for tick in fit(field, tree, cloud, Budget(steps=150), points=800, learning_rate=rate)]
    after = skinning_error(field, tree, cloud, q)
    assert len(losses) == 150
    assert before["displacement_mm"] > 200.0
    assert after["displacement_mm"] < bound_mm
    assert after["chamfer_m2"] < 0.05 * before["chamfer_m2"]
    assert not field.network.low_precision


def test_learning_repeats_bit_by_bit(arm: tuple[KinematicTree, LinkCloud]) -> None:
    tree, cloud = arm
    results = []
    for _ in range(2):
        field = small_field(tree, cloud)
        list(fit_by_chamfer(field, tree, cloud, Budget(steps=3), points=300, seed=4))
        results.append(field(cloud.points[:50]))
    assert torch.equal(*results)
