"""The learned start: what it is trained on, what it sees, files, and its part in a fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinesplat import zoo
from kinesplat.camera import Camera
from kinesplat.errors import InputError, ModelFileError
from kinesplat.inverse import reconstruct
from kinesplat.inverse.initializer import FOLDER, Initializer, network_input
from kinesplat.inverse.initializer_network import CELLS, SIZE, KeypointNetwork
from kinesplat.inverse.initializer_pictures import Pictures, random_pictures
from kinesplat.inverse.initializer_training import Run, cross_entropy, train_initializer
from kinesplat.inverse.keypoints import Keypoints
from kinesplat.inverse.observation import Observation
from kinesplat.self_model import SelfModel


class Oracle(torch.nn.Module):
    """A network that knows the answer: sharp heat maps at given places."""

    def __init__(self, places: torch.Tensor) -> None:
        super().__init__()
        self.places = places

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        cells = torch.arange(CELLS) + 0.5
        line = -0.5 * ((cells - self.places[..., None]) / 0.7) ** 2
        heat = (line[:, 1, :, None] + line[:, 0, None, :]).flatten(-2)
        return torch.cat([heat, torch.full((len(self.places), 1), -50.0)], dim=-1)[None]


def seen(model: SelfModel, seed: int) -> tuple[torch.Tensor, Camera, torch.Tensor, torch.Tensor]:
    share = torch.rand(model.tree.dof, generator=torch.Generator().manual_seed(seed))
    q = (model.tree.q_lower + (model.tree.q_upper - model.tree.q_lower) * (0.2 + 0.6 * share)).float()
    camera = Camera.framing(model.posed(q).means, (1.0, 0.5, 0.4), width=200, height=160)
    out = model.render(q, camera)
    assert out.alpha is not None
    return q, camera, out.rgb, out.alpha


def test_pictures_show_the_robot_where_the_keypoints_are(kinearm: SelfModel) -> None:
    small = kinearm.subsample(1_000)
    pictures = random_pictures(small, Keypoints.on(small), 40, torch.Generator().manual_seed(0))
    assert pictures.inputs.shape == (40, 4, SIZE, SIZE)
    assert 0.0 <= pictures.inputs.min() <= pictures.inputs.max() <= 1.0
    mask = pictures.inputs[:, 3]
    blind = (mask == 0.5).flatten(1).all(dim=1)
    assert 5 < blind.sum() < 25
    rows = torch.nonzero(~blind)[:, 0]
    pixel = (pictures.places[rows] * SIZE / CELLS).long().clamp(0, SIZE - 1)
    near = torch.nn.functional.max_pool2d(mask[rows, None], 5, stride=1, padding=2)[:, 0]
    on_robot = torch.stack([m[p[:, 1], p[:, 0]] for m, p in zip(near, pixel, strict=True)]) > 0.5
    assert on_robot.float().mean() > 0.9  # occluders hide some


def test_the_input_is_the_square_around_the_mask(kinearm: SelfModel) -> None:
    q, camera, rgb, alpha = seen(kinearm, 0)
    inputs, K = network_input(Observation.create(rgb, alpha, camera))
    again = kinearm.render(
        q, Camera(K[0] * torch.tensor([[SIZE / CELLS], [SIZE / CELLS], [1.0]]), camera.T_cam_world, SIZE, SIZE)
    )
    assert again.alpha is not None
    assert (inputs[0, 3] - again.alpha).abs().mean() < 0.01
    assert (inputs[0, :3].permute(1, 2, 0) - again.rgb).abs().mean() < 0.01


@pytest.mark.parametrize("seed", range(2))
def test_a_fit_from_a_learned_start_says_so(kinearm: SelfModel, seed: int) -> None:
    q, camera, rgb, alpha = seen(kinearm, seed)
    keypoints = Keypoints.on(kinearm)
    _, K = network_input(Observation.create(rgb, alpha, camera))
    places, _ = Camera(K[0], camera.T_cam_world, CELLS, CELLS).project(
        keypoints.in_world(kinearm.tree.forward_kinematics(q))
    )
    oracle = Initializer(Oracle(places), keypoints, tuple(kinearm.tree.joint_names), {})
    fit = reconstruct(kinearm, rgb, camera, masks=alpha, initializer=oracle, starts=16, seed=seed)
    assert fit.evidence["start"] == "initializer"
    assert "learned start" in fit.report()
    assert (fit.q - q)[:4].abs().max() < 0.05  # the wrist is nearly symmetric


def test_training_lowers_the_loss_resumes_and_is_read_back(kinearm: SelfModel, tmp_path: Path) -> None:
    checkpoint, path = tmp_path / "c.safetensors", tmp_path / "i.safetensors"
    small = kinearm.subsample(500)
    run = Run.new(len(Keypoints.on(small).links), 0)
    run.step = 2
    run.save(checkpoint)
    made = train_initializer(small, steps=6, checkpoint=checkpoint, resume=True)
    made.save(path)
    assert path.stat().st_size < 1_000_000
    found = Initializer.load(path)
    assert found.joint_names == tuple(kinearm.tree.joint_names)
    assert found.provenance["steps"] == 6
    inputs = torch.rand(1, 4, SIZE, SIZE)
    made.network.eval()
    found.network.eval()
    torch.testing.assert_close(made.network(inputs), found.network(inputs), atol=0.1, rtol=0.1)


@pytest.mark.slow
def test_a_short_training_finds_keypoints(kinearm: SelfModel) -> None:
    found = train_initializer(kinearm, steps=150)
    assert found.provenance["found_with_mask"] > 0.2


def test_the_loss_is_least_at_the_target() -> None:
    places = torch.tensor([[[5.2, 9.1], [-3.0, 4.0]]])
    cells = torch.arange(CELLS) + 0.5
    line = -0.5 * ((cells - places[0, 0, :, None]) / 0.7) ** 2
    heat = (line[1, :, None] + line[0, None, :]).flatten()
    right = torch.stack(
        [torch.cat([heat, torch.tensor([-30.0])]), torch.cat([torch.full((CELLS**2,), -30.0), torch.zeros(1)])]
    )
    best = cross_entropy(right[None], places)
    for _ in range(5):
        assert cross_entropy(right[None] + 0.5 * torch.randn(1, 2, CELLS**2 + 1), places) > best


def test_broken_and_foreign_files_are_refused(kinearm: SelfModel, tmp_path: Path) -> None:
    path = tmp_path / "i.safetensors"
    keypoints = Keypoints.on(kinearm)
    initializer = Initializer(KeypointNetwork(len(keypoints.links)), keypoints, tuple(kinearm.tree.joint_names), {})
    initializer.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFileError, match="cut short"):
        Initializer.load(path)
    kinearm.save(path)
    with pytest.raises(ModelFileError, match="not an initializer"):
        Initializer.load(path)
    with pytest.raises(InputError, match="resume"):
        train_initializer(kinearm, steps=1, checkpoint=tmp_path / "none.safetensors", resume=True)
    _, camera, rgb, alpha = seen(kinearm, 0)
    other = replace(initializer, joint_names=("knee",))
    with pytest.raises(InputError, match="knee"):
        reconstruct(kinearm, rgb, camera, masks=alpha, initializer=other)


def test_packaged_ones_fit_their_models() -> None:
    names = [path.stem for path in FOLDER.glob("*.safetensors")]
    assert "franka_emika_panda" in names
    for name in set(names) & set(zoo.names()):
        model = zoo.load(name)
        found = Initializer.packaged(model)
        assert found is not None
        assert found.keypoints.links.max() < len(model.tree.link_names)
        spread = found.keypoints.points.abs().max()
        assert spread < 1.0
    assert Initializer.packaged(replace(zoo.load(names[0]), provenance={})) is None


def test_pictures_of_one_seed_are_the_same(kinearm: SelfModel) -> None:
    small = kinearm.subsample(500)
    two: list[Pictures] = [
        random_pictures(small, Keypoints.on(small), 3, torch.Generator().manual_seed(5)) for _ in range(2)
    ]
    assert torch.equal(two[0].inputs, two[1].inputs)
