"""The paper's recipe and the K-planes baseline, whole, on a small robot and small networks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinesplat.dataset.frames import Frames
from kinesplat.dataset.sampling import random_cameras, random_configurations
from kinesplat.description import Robot, load_description
from kinesplat.errors import InputError, ModelFileError
from kinesplat.evaluation.kplanes import KPlanesModel, kplanes_settings
from kinesplat.self_model import SelfModel
from kinesplat.skinning import SkinningField
from kinesplat.training import field, paper
from kinesplat.training.canonical import mesh_cloud, round_splats
from kinesplat.training.checkpoint import read_checkpoint, write_checkpoint
from kinesplat.training.field import field_settings, train_with_field, with_skinning_field
from kinesplat.training.joint import Trainable, fit_jointly, mean_psnr, views_by_configuration
from kinesplat.training.loop import Budget
from kinesplat.training.paper import CHECKPOINT, PaperSettings, train_paper
from kinesplat.training.skinning import fit_by_labels

SMALL = PaperSettings(gaussians=400, canonical_steps=40, skinning_steps=20, layers=2, width=32)
SMALL = replace(SMALL, joint=replace(SMALL.joint, validate_every=5))


@pytest.fixture(scope="module")
def robot() -> Robot:
    return load_description("kinearm")


def pictures(model: SelfModel, q: torch.Tensor, views: int, seed: int) -> Frames:
    """Pictures of a self-model: the truth here, so that no renderer is needed."""
    q = q.repeat_interleave(views, 0)
    camera = random_cameras(model.posed(q.float()).means.double(), torch.Generator().manual_seed(seed), size=40)
    with torch.no_grad():
        out = model.render(q.float(), camera)
    rgb, alpha = ((255.0 * part).round().clamp(0, 255).to(torch.uint8) for part in (out.rgb, out.alpha))
    return Frames(q, camera.to(dtype=torch.float64), rgb, alpha)


@pytest.fixture(scope="module")
def data(kinearm: SelfModel) -> tuple[Frames, Frames, Frames]:
    """Canonical, training and validation pictures."""
    truth, tree = kinearm.subsample(800), kinearm.tree
    q = random_configurations(tree, 16, torch.Generator().manual_seed(0))
    canonical = pictures(truth, tree.q_canonical[None], 8, 1)
    return canonical, pictures(truth, q[:12], 2, 2), pictures(truth, q[12:], 2, 3)


def test_views_are_grouped_by_configuration(data: tuple[Frames, Frames, Frames]) -> None:
    _, frames, _ = data
    shuffled = frames.select(torch.randperm(len(frames)))
    groups = views_by_configuration(shuffled)
    assert sorted(row for group in groups for row in group) == list(range(24))
    assert [len(group) for group in groups] == [2] * 12
    assert all(torch.equal(shuffled.q[a], shuffled.q[b]) for a, b in groups)


def test_joint_training_improves_what_it_has_not_seen(robot: Robot, data: tuple[Frames, Frames, Frames]) -> None:
    """From a field that knows the links, with the splats of a poor start; and the files keep the result."""
    _, frames, validation = data
    cloud, colours = mesh_cloud(robot, 600)
    start = round_splats(cloud.posed(robot.tree, robot.tree.q_canonical), colours)
    skinning = SkinningField.around(start.means, len(robot.tree.link_names), layers=2, width=32, frequencies=32)
    list(fit_by_labels(skinning, robot.tree, cloud, Budget(steps=150), points=600, learning_rate=1e-2))
    model = SelfModel(robot.tree, start, cloud.link_index, 0.3, skinning=skinning)
    before = mean_psnr(model, validation)
    trained, _ = fit_jointly(model, frames, validation, Budget(steps=60), SMALL.joint)
    assert mean_psnr(trained, validation) > before + 1.5
    assert trained.skinning is skinning


@pytest.mark.parametrize("appearance", [True, False])
def test_the_recipe_runs_through_and_its_file_renders(
    robot: Robot, data: tuple[Frames, Frames, Frames], tmp_path: Path, appearance: bool
) -> None:
    canonical, frames, validation = data
    settings = replace(SMALL, appearance=appearance)
    model = train_paper(robot, canonical, frames, validation, Budget(steps=8), settings, folder=tmp_path)
    assert set(model.networks) == ({"skinning", "appearance"} if appearance else {"skinning"})
    assert model.provenance["recipe"].startswith("paper")
    model.save(tmp_path / "m.safetensors")
    again = SelfModel.load(tmp_path / "m.safetensors")
    q, camera = validation.q[0].float(), validation.select(slice(0, 1)).camera
    with torch.no_grad():
        assert torch.equal(again.render(q, camera).rgb, model.render(q, camera).rgb)
        weights = model.networks["skinning"](model.parameters.means)
    assert torch.equal(model.link_index, weights.argmax(-1))
    assert "joint/psnr_db" in (tmp_path / "log.csv").read_text()


def test_a_resumed_run_ends_where_an_unbroken_one_does(
    robot: Robot, data: tuple[Frames, Frames, Frames], tmp_path: Path
) -> None:
    canonical, frames, validation = data

    def run(folder: Path, resume: bool) -> SelfModel:
        # the schedule follows the budget, so both have the same
        return train_paper(
            robot, canonical, frames, validation, Budget(steps=10), SMALL, folder=folder, resume=resume, seed=2
        )

    whole = run(tmp_path / "a", False)
    (tmp_path / "b").mkdir()
    broken = replace(SMALL, joint=replace(SMALL.joint, validate_every=5))

    class Killed(Exception):
        pass

    written = []
    original = paper.write_checkpoint

    def write_and_die(path: Path, state: dict) -> None:
        original(path, state)
        written.append(set(state))
        if "joint" in state:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "write_checkpoint", write_and_die)
        with pytest.raises(Killed):
            train_paper(robot, canonical, frames, validation, Budget(steps=10), broken, folder=tmp_path / "b", seed=2)
    assert written == [{"canonical"}, {"canonical", "skinning"}, {"canonical", "skinning", "joint"}]
    resumed = run(tmp_path / "b", True)
    for name, value in whole.parameters.tensors().items():
        assert torch.equal(value, resumed.parameters.tensors()[name]), name
    for name, network in whole.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, resumed.networks[name].state_dict()[key]), key


def test_a_checkpoint_of_something_else_is_refused(
    robot: Robot, data: tuple[Frames, Frames, Frames], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / CHECKPOINT, {"canonical": {"means": torch.zeros(1)}, "skinning": {}})
    with pytest.raises(ModelFileError, match="not one of the recipe 'paper'"):
        train_paper(robot, *data, Budget(steps=1), SMALL, folder=tmp_path, resume=True)


def test_early_stop_returns_the_best(robot: Robot, data: tuple[Frames, Frames, Frames]) -> None:
    """Rates that ruin the model: training stops after `patience` looks, with what it started from."""
    _, frames, validation = data
    cloud, colours = mesh_cloud(robot, 300)
    start = round_splats(cloud.posed(robot.tree, robot.tree.q_canonical), colours)
    skinning = SkinningField.around(start.means, len(robot.tree.link_names), layers=2, width=32)
    model = SelfModel(robot.tree, start, cloud.link_index, 0.3, skinning=skinning)
    rates = replace(SMALL.joint.rates, means=3.0, logit_opacities=3.0)
    settings = replace(SMALL.joint, rates=rates, patience=2, last_share=1.0)
    looks: list[int] = []
    trained, _ = fit_jointly(
        model, frames, validation, Budget(steps=500), settings, log=lambda step, values: looks.append(step)
    )
    assert looks[-1] < 300
    assert mean_psnr(trained, validation) >= mean_psnr(model, validation) - 3.0


def test_a_field_takes_over_from_the_links(kinearm: SelfModel, data: tuple[Frames, Frames, Frames]) -> None:
    """Nearly the link-bound model before any training on pictures, better after."""
    _, frames, validation = data
    model = kinearm.subsample(300)
    start = with_skinning_field(model, steps=250)
    assert (start.link_index == model.link_index).float().mean() > 0.97
    assert abs(mean_psnr(start, validation) - mean_psnr(model, validation)) < 0.5
    trained = train_with_field(model, frames, validation, Budget(steps=30), field_settings())
    assert mean_psnr(trained, validation) > mean_psnr(start, validation) + 0.5
    with pytest.raises(InputError, match="already"):
        with_skinning_field(trained)


def test_a_resumed_field_ends_where_an_unbroken_one_does(
    kinearm: SelfModel, data: tuple[Frames, Frames, Frames], tmp_path: Path
) -> None:
    _, frames, validation = data
    model, settings = kinearm.subsample(200), replace(SMALL.joint, validate_every=3)
    whole = train_with_field(model, frames, validation, Budget(steps=6), settings, folder=tmp_path)
    half = read_checkpoint(tmp_path / CHECKPOINT)
    assert half["step"] == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(field, "write_checkpoint", _dies)
        with pytest.raises(KeyboardInterrupt):
            train_with_field(model, frames, validation, Budget(steps=6), settings, folder=tmp_path / "b")
    resumed = train_with_field(model, frames, validation, Budget(steps=6), settings, folder=tmp_path / "b", resume=True)
    for name, value in whole.parameters.tensors().items():
        assert torch.equal(value, resumed.parameters.tensors()[name]), name


def _dies(path: Path, state: dict) -> None:
    write_checkpoint(path, state)
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def kplanes(robot: Robot) -> KPlanesModel:
    cloud, colours = mesh_cloud(robot, 300)
    start = round_splats(cloud.posed(robot.tree, robot.tree.q_canonical), colours)
    return KPlanesModel.around(start, robot.tree, features=4, joint_cells=5)


def test_untrained_planes_move_nothing(kplanes: KPlanesModel, robot: Robot) -> None:
    q = random_configurations(robot.tree, 3, torch.Generator().manual_seed(4)).float()
    posed, still = kplanes.posed(q), kplanes.parameters.activate()
    assert isinstance(kplanes, Trainable)
    assert posed.batch_shape == (3,)
    for name in ("means", "scales", "opacities", "sh", "quats"):
        assert (getattr(posed, name) - getattr(still, name)).abs().max() < 1e-5, name


def test_planes_are_the_product_of_bilinear_readings(kplanes: KPlanesModel, robot: Robot) -> None:
    """Every plane read by torch's own bilinear sampling, one pair of the 3 + dof axes at a time."""
    planes = kplanes.planes
    for parameter in planes.parameters():
        torch.nn.init.uniform_(parameter, 0.8, 1.2)
    points = kplanes.parameters.means[:20]
    q = random_configurations(robot.tree, 1, torch.Generator().manual_seed(4))[0].float()
    dof = robot.tree.dof
    place = torch.cat(
        [
            (points - planes.centre) / planes.radius,
            (2 * (q - planes.q_lower) / (planes.q_upper - planes.q_lower) - 1).expand(20, dof),
        ],
        dim=-1,
    )

    def read(grid: torch.Tensor, row: int, column: int) -> torch.Tensor:
        at = place[:, [column, row]][None, :, None]  # grid_sample wants (column, row)
        return torch.nn.functional.grid_sample(grid.permute(2, 0, 1)[None], at, align_corners=True)[0, :, :, 0].T

    expected = torch.ones(20, 4)
    for i, (a, b) in enumerate(((1, 2), (0, 2), (0, 1))):
        expected = expected * read(planes.space[i], a, b)
    for joint in range(dof):
        for axis in range(3):
            expected = expected * read(planes.mixed[joint, :, axis], 3 + joint, axis)
    for i, (a, b) in enumerate(planes.pairs.tolist()):
        expected = expected * read(planes.joints[i], 3 + a, 3 + b)
    assert (planes(points, q) / expected - 1.0).abs().max() < 1e-4


def test_kplanes_learn_a_motion(robot: Robot, kinearm: SelfModel) -> None:
    """Two configurations of one joint: something that moves with q must be learnt, and gradients reach everything."""
    truth, tree = kinearm.subsample(800), kinearm.tree
    q = tree.q_canonical.repeat(2, 1)
    q[1, 1] += 0.4
    frames = pictures(truth, q, 6, 5)
    cloud, colours = mesh_cloud(robot, 500)
    start = round_splats(cloud.posed(tree, tree.q_canonical), colours)
    model = KPlanesModel.around(start, tree, features=8, joint_cells=4)
    settings = replace(kplanes_settings(model), validate_every=30, network_rates={"planes": 1e-2, "decoder": 5e-3})
    before = mean_psnr(model, frames)
    still = replace(kplanes_settings(model), validate_every=30, network_rates={"planes": 0.0, "decoder": 0.0})
    fixed, _ = fit_jointly(model, frames, frames, Budget(steps=90), still)
    moving, _ = fit_jointly(model, frames, frames, Budget(steps=90), settings)
    assert before < mean_psnr(fixed, frames) + 0.4 < mean_psnr(moving, frames)
