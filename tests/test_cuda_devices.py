"""What runs on a GPU keeps to it: a stand-in refuses to mix its tensors with the CPU's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from standin_gpu import OnGpu, standing_in

import kinesplat as ks
from kinesplat.camera import Camera
from kinesplat.commands import render
from kinesplat.commands.common import Common, cpu_of
from kinesplat.dataset.frames import Frames
from kinesplat.devices import resolve_device
from kinesplat.errors import BackendError
from kinesplat.rasterizer import normal_equations
from kinesplat.training.default import DefaultSettings, fit_splats
from kinesplat.training.loop import Budget


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch, unchecked_types: None) -> Iterator[None]:
    with standing_in(monkeypatch):
        yield


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.device == resolve_device("auto") == torch.device("cuda", 0)
    assert (2.0 * there + torch.tensor(1.0)).is_cuda
    assert here[torch.tensor([0])].device.type == "cpu"
    assert there[torch.tensor([0])].device.type == "cuda"
    for mixed in (lambda: here + there, lambda: torch.stack([here, there]), lambda: here[there.long()]):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there.cpu() + here).sum() == 6
    leaf = torch.ones(2).to("cuda").requires_grad_()
    leaf.square().sum().backward()
    assert isinstance(leaf.grad, OnGpu)


@pytest.mark.parametrize("name", ["kinearm", "franka_emika_panda"])
def test_kinematics(name: str) -> None:
    tree = ks.zoo.load(name).tree
    q = tree.q_canonical.float().to("cuda").expand(2, -1).clone().requires_grad_()
    base = torch.eye(4, device="cuda")
    for Ts in (tree.forward_kinematics(q), tree.forward_kinematics(q, base)):
        assert Ts.is_cuda
    assert tree.link_jacobian(q).is_cuda
    assert tree.clamp(q).is_cuda
    assert tree.coordinates(q).is_cuda


def test_render_and_normal_equations() -> None:
    model = ks.zoo.load("kinearm").subsample(300).to("cuda")
    q = model.tree.q_canonical.float().to("cuda").requires_grad_()
    camera = Camera.framing(model.posed(q.detach()).means, width=24, height=24)
    assert camera.K.is_cuda
    rgb = model.render(q, camera).rgb
    assert rgb is not None
    rgb.sum().backward()
    assert q.grad is not None
    Ts = model.tree.forward_kinematics(q.detach())
    system = normal_equations(model.parameters.activate(), model.link_index, Ts, camera, rgb.detach())
    assert system.contract(model.tree.link_jacobian(q.detach()).flatten(-3, -2)).hessian.is_cuda
    model.check_camera(q.detach(), camera)


@pytest.mark.parametrize("known", [True, False])
def test_reconstruct(known: bool) -> None:
    model = ks.zoo.load("kinearm").subsample(1000).to("cuda")
    q = model.tree.q_canonical.float().to("cuda")
    camera = Camera.framing(model.posed(q).means, width=48, height=48)
    image = model.render(q, camera).rgb
    assert image is not None
    start = q + 0.05 if known else None
    fit = ks.reconstruct(model, image, camera, q_init=start, starts=2)
    assert fit.verdict
    fit.report()
    fit.to_json()


def test_default_recipe() -> None:
    """Steps, density control and validation of a model on the GPU, with the pictures on the CPU."""
    model = ks.zoo.load("kinearm").subsample(300)
    tree = model.tree
    q = tree.q_canonical + 0.1 * torch.randn(6, tree.dof).double()
    camera = Camera.framing(model.posed(q[0].float()).means, width=24, height=24)
    camera = Camera(camera.K.expand(6, 3, 3).double(), camera.T_cam_world.expand(6, 4, 4).double(), 24, 24)
    out = model.render(q.float(), camera, outputs=("rgb", "alpha"))
    assert out.rgb is not None
    assert out.alpha is not None
    frames = Frames(q, camera, (255 * out.rgb.clamp(0, 1)).byte(), (255 * out.alpha).byte())
    settings = DefaultSettings(start=300, gaussians=320, rounds=1, pictures=3, validate_every=2)
    trained = fit_splats(model.to("cuda"), frames, frames, Budget(5, None), settings)
    assert trained.parameters.means.is_cuda
    assert torch.isfinite(trained.parameters.means).all()


def test_commands(tmp_path: Path) -> None:
    picture = tmp_path / "arm.png"
    render.render("kinearm", picture, size=24, mask=True, depth=True, link_id=True, common=Common(device="cuda"))
    assert picture.is_file()
    with pytest.raises(BackendError, match="computes on the CPU alone"):
        cpu_of(Common(device="cuda"))
    assert cpu_of(Common()) == torch.device("cpu")
