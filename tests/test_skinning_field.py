"""Blend skinning by a field: what it must do where the answer is known, and that files keep it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from kinesplat.appearance.field import AppearanceField
from kinesplat.camera import Camera
from kinesplat.errors import ModelFileError
from kinesplat.fourier_mlp import FourierMlp
from kinesplat.gaussians import Gaussians, Parameters
from kinesplat.model_file import read_model_file, write_model_file
from kinesplat.rasterizer import rasterize
from kinesplat.rasterizer.projection import quats_to_rotations
from kinesplat.self_model import SelfModel
from kinesplat.skinning import SkinningField, blend_gaussians, link_motions, pose_gaussians

SMALL = {"layers": 2, "width": 16, "frequencies": 8}
CAMERA = Camera.look_at((0.9, -0.5, 0.6), (0.0, 0.0, 0.25), width=48, height=48)


def random_gaussians(n: int, k: int = 9) -> Gaussians:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return Gaussians(normal(n, 3), normal(n, 4), 0.1 + normal(n, 3).abs(), torch.rand(n).double(), normal(n, k, 3))


def random_transforms(*shape: int, seed: int = 3) -> Tensor:
    count = int(np.prod(shape))
    T = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    T[:, :3, :3] = torch.from_numpy(Rotation.random(count, rng=seed).as_matrix())
    T[:, :3, 3] = torch.randn(count, 3, dtype=torch.float64)
    return T.reshape(*shape, 4, 4)


def random_weights(n: int, links: int) -> Tensor:
    return (3.0 * torch.randn(n, links, dtype=torch.float64)).softmax(-1)


def assert_same(a: Gaussians, b: Gaussians, tolerance: float = 1e-12) -> None:
    turned = quats_to_rotations(a.quats) - quats_to_rotations(b.quats)
    others = [getattr(a, name) - getattr(b, name) for name in ("means", "scales", "opacities", "sh")]
    for difference in (turned, *others):
        assert difference.abs().max() < tolerance


def canonical_copy(model: SelfModel) -> Parameters:
    """Splats of a link-bound model, laid out in the canonical configuration."""
    posed = model.posed(model.tree.q_canonical.to(model.parameters.means))
    return replace(model.parameters, means=posed.means, quats=posed.quats, sh=posed.sh)


def trained_by_hand(model: SelfModel, turns: bool = True, appearance: bool = False) -> SelfModel:
    """A model with small random networks, so that weights are mixed and looks do change."""
    parameters = canonical_copy(model)
    skinning = SkinningField.around(parameters.means, len(model.tree.link_names), turns_harmonics=turns, **SMALL)
    fields = {"skinning": skinning, "appearance": None}
    if appearance:
        fields["appearance"] = AppearanceField.around(parameters.means, model.tree, parameters.sh.shape[-2], **SMALL)
    for network in filter(None, fields.values()):
        torch.nn.init.normal_(network.network.last.weight, std=0.3 if network is skinning else 0.02)
    with torch.no_grad():
        heaviest = skinning(parameters.means).argmax(-1)
    return replace(model, parameters=parameters, link_index=heaviest, **fields)


@pytest.mark.parametrize("batch", [(), (3,), (2, 1)])
def test_certain_weights_are_the_rigid_binding(batch: tuple[int, ...]) -> None:
    gaussians, link = random_gaussians(40), torch.randint(0, 4, (40,))
    Ts = random_transforms(*batch, 4)
    certain = torch.nn.functional.one_hot(link, 4).double()
    blended = blend_gaussians(gaussians, certain, Ts, turns_harmonics=True)
    assert blended.batch_shape == batch
    assert_same(blended, pose_gaussians(gaussians, link, Ts))


def test_links_that_move_alike_move_all_splats_alike() -> None:
    gaussians, T = random_gaussians(40), random_transforms(1)
    blended = blend_gaussians(gaussians, random_weights(40, 5), T.expand(5, 4, 4), turns_harmonics=True)
    assert_same(blended, pose_gaussians(gaussians, torch.zeros(40, dtype=torch.int64), T))


def test_two_links_interpolate_rotations() -> None:
    """Half and half is scipy's geodesic midpoint; means follow the blended matrix of eq. 4."""
    gaussians, Ts = random_gaussians(6), random_transforms(2)
    blended = blend_gaussians(gaussians, torch.full((6, 2), 0.5, dtype=torch.float64), Ts, turns_harmonics=False)
    middle = Slerp([0, 1], Rotation.from_matrix(Ts[:, :3, :3].numpy()))(0.5).as_matrix()
    expected = torch.from_numpy(middle) @ quats_to_rotations(gaussians.quats)
    assert (quats_to_rotations(blended.quats) - expected).abs().max() < 1e-12
    M = Ts.mean(0)
    assert (blended.means - (gaussians.means @ M[:3, :3].T + M[:3, 3])).abs().max() < 1e-12
    assert torch.equal(blended.sh, gaussians.sh)


def test_blending_commutes_with_moving_the_world() -> None:
    gaussians, weights, Ts = random_gaussians(20), random_weights(20, 4), random_transforms(2, 4)
    T = random_transforms(1, seed=8)[0]
    moved = blend_gaussians(gaussians, weights, T @ Ts, turns_harmonics=True)
    after = pose_gaussians(
        blend_gaussians(gaussians, weights, Ts, turns_harmonics=True),
        torch.zeros(20, dtype=torch.int64),
        T.expand(2, 1, 4, 4),
    )
    assert_same(moved, after)


def test_blending_is_differentiable() -> None:
    gaussians, logits, Ts = random_gaussians(3, 4), torch.randn(3, 2, dtype=torch.float64), random_transforms(2)

    def outputs(logits: Tensor, T: Tensor) -> tuple[Tensor, ...]:
        blended = blend_gaussians(gaussians, logits.softmax(-1), T, turns_harmonics=True)
        return blended.means, blended.quats, blended.sh

    assert torch.autograd.gradcheck(outputs, (logits.requires_grad_(), Ts.requires_grad_()))


def test_a_new_field_is_even_and_any_field_is_a_partition_of_unity() -> None:
    points = torch.randn(50, 3)
    field = SkinningField.around(points, 7, **SMALL)
    assert (field(points) - 1 / 7).abs().max() < 1e-6
    torch.nn.init.normal_(field.network.last.weight)
    weights = field(10.0 * points)
    assert (weights >= 0).all()
    assert (weights.sum(-1) - 1.0).abs().max() < 1e-6
    assert weights.std() > 0.1


def test_fields_do_not_depend_on_the_robot_s_size_and_place() -> None:
    points = torch.randn(50, 3)
    here, there = (SkinningField.around(p, 3, seed=5, **SMALL) for p in (points, 0.01 * points + 4.0))
    for field in (here, there):
        torch.nn.init.constant_(field.network.last.weight, 0.1)
        field.network.last.weight.data[0] *= -3.0
    assert (here(points) - there(0.01 * points + 4.0)).abs().max() < 1e-3  # single precision, 400 radii away


def test_in_the_canonical_configuration_nothing_moves(kinearm: SelfModel) -> None:
    q = kinearm.tree.q_canonical
    motions = link_motions(kinearm.tree, q)
    assert (motions - torch.eye(4, dtype=torch.float64)).abs().max() < 1e-12
    model = trained_by_hand(kinearm)
    with torch.no_grad():
        assert_same(model.posed(q.float()), model.parameters.activate(), 1e-5)


def test_a_field_that_knows_the_links_renders_the_link_bound_model(kinearm: SelfModel) -> None:
    """Exact labels through `SelfModel.render`, against the link-bound model: pictures and link ids."""

    class Labels(torch.nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return 50.0 * torch.nn.functional.one_hot(kinearm.link_index, len(kinearm.tree.link_names)).to(points)

    skinning = SkinningField(len(kinearm.tree.link_names))
    skinning.network = Labels()  # pyright: ignore[reportAttributeAccessIssue]
    skinning.turns_harmonics.fill_(True)
    model = replace(kinearm, parameters=canonical_copy(kinearm), skinning=skinning)
    q = (0.3 + kinearm.tree.q_canonical).float()
    base = random_transforms(1, seed=2)[0].float()
    base[:3, 3] *= 0.05
    outputs = ("rgb", "alpha", "depth", "link_id")
    with torch.no_grad():
        for T_world_base in (None, base):
            ours, theirs = (m.render(q, CAMERA, T_world_base=T_world_base, outputs=outputs) for m in (model, kinearm))
            assert ours.alpha.max() > 0.9
            assert (ours.rgb - theirs.rgb).abs().mean() < 1e-4
            assert (ours.link_id != theirs.link_id).float().mean() < 2e-3


@pytest.mark.parametrize("turns", [True, False])
def test_render_is_rasterising_posed(kinearm: SelfModel, turns: bool) -> None:
    model = trained_by_hand(kinearm.subsample(300), turns, appearance=True)
    q = model.tree.q_canonical.float() + torch.tensor([[0.2], [0.5]])
    with torch.no_grad():
        ours = model.render(q, CAMERA)
        theirs = rasterize(model.posed(q), CAMERA, eps2d=model.eps2d)
    assert ours.rgb.shape == (2, 48, 48, 3)
    assert (ours.rgb - theirs.rgb).abs().max() < 1e-5


def test_gradients_reach_joints_splats_and_networks(kinearm: SelfModel) -> None:
    model = trained_by_hand(kinearm.subsample(300), False, appearance=True)
    means = model.parameters.means.clone().requires_grad_()
    q = model.tree.q_canonical.float().requires_grad_()
    replace(model, parameters=replace(model.parameters, means=means)).render(q, CAMERA).rgb.sum().backward()
    weights = [p for network in model.networks.values() for p in network.parameters()]
    for tensor in (q, means, *weights):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0.0


def test_an_untrained_appearance_changes_nothing(kinearm: SelfModel) -> None:
    model = trained_by_hand(kinearm.subsample(300), False)
    appearance = AppearanceField.around(model.parameters.means, model.tree, model.parameters.sh.shape[-2], **SMALL)
    q = model.tree.q_canonical.float() + 0.3
    with torch.no_grad():
        assert_same(replace(model, appearance=appearance).posed(q), model.posed(q), 1e-5)


def test_appearance_changes_are_those_of_its_outputs() -> None:
    """Rotation by a known quaternion, scales by exp, opacity by logit, harmonics by sum."""
    gaussians = replace(random_gaussians(10), opacities=0.1 + 0.8 * torch.rand(10).double())
    field = AppearanceField(2, 9, FourierMlp(6, 2, 35, **SMALL)).double()
    turn = Rotation.from_rotvec([0.1, 0.2, -0.1])
    w, x, y, z = turn.as_quat(scalar_first=True)
    bias = [w - 1.0, x, y, z, 0.3, -0.2, 0.1, 0.5, *np.linspace(-1, 1, 27)]
    field.network.last.bias.data = torch.tensor(bias, dtype=torch.float64)
    with torch.no_grad():
        changed = field(gaussians, gaussians.means, torch.zeros(2, dtype=torch.float64))
    matrix = torch.from_numpy(turn.as_matrix())
    assert (quats_to_rotations(changed.quats) - quats_to_rotations(gaussians.quats) @ matrix).abs().max() < 1e-12
    assert (changed.scales / gaussians.scales - torch.tensor([0.3, -0.2, 0.1]).double().exp()).abs().max() < 1e-6
    assert (changed.opacities.logit() - gaussians.opacities.logit() - 0.5).abs().max() < 1e-9
    assert (changed.sh - gaussians.sh - torch.linspace(-1, 1, 27).double().reshape(9, 3)).abs().max() < 1e-6


@pytest.mark.parametrize("appearance", [False, True])
def test_files_keep_the_networks(kinearm: SelfModel, tmp_path: Path, appearance: bool) -> None:
    model = trained_by_hand(kinearm.subsample(300), True, appearance)
    model.save(tmp_path / "m.safetensors")
    again = SelfModel.load(tmp_path / "m.safetensors")
    assert again.networks.keys() == model.networks.keys()
    q = model.tree.q_canonical.float() + 0.3
    with torch.no_grad():
        assert torch.equal(again.render(q, CAMERA).rgb, model.render(q, CAMERA).rgb)


@pytest.mark.parametrize("damage", ["missing", "short", "nan"])
def test_broken_networks_are_refused(kinearm: SelfModel, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.safetensors"
    trained_by_hand(kinearm.subsample(300)).save(path)
    tensors, header = read_model_file(path)
    if damage == "missing":
        del tensors["skinning.network.last.weight"]
    elif damage == "short":
        tensors["skinning.network.last.weight"] = tensors["skinning.network.last.weight"][:, 1:]
    else:
        tensors["skinning.network.last.weight"][0, 0] = float("nan")
    write_model_file(path, tensors, {k: v for k, v in header.items() if k != "format_version"})
    with pytest.raises(ModelFileError, match=r"m\.safetensors: .*(last\.weight|NaN)"):
        SelfModel.load(path)


def test_models_with_fields_move_between_dtypes(kinearm: SelfModel) -> None:
    model = trained_by_hand(kinearm.subsample(200), False, appearance=True)
    exact = model.to(dtype=torch.float64)
    q = model.tree.q_canonical + 0.3
    with torch.no_grad():
        a, b = exact.posed(q), model.posed(q.float())
    assert a.means.dtype == torch.float64
    assert model.skinning is not None
    assert next(model.skinning.parameters()).dtype == torch.float32
    assert (a.means - b.means).abs().max() < 1e-4


def test_cameras_inside_are_refused_and_coarser_copies_work(kinearm: SelfModel) -> None:
    model = trained_by_hand(kinearm)
    q = model.tree.q_canonical.float()
    model.check_camera(q, CAMERA)
    coarse = model.subsample(400)
    with torch.no_grad():
        a, b = model.render(q, CAMERA), coarse.render(q, CAMERA)
    assert (a.rgb - b.rgb).abs().mean() < 0.02
