"""What runs on a GPU keeps to it: a stand-in refuses to mix its tensors with the CPU's."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from standin_gpu import OnGpu, Work, standing_in

import kinesplat as ks
from kinesplat.camera import Camera
from kinesplat.commands import render
from kinesplat.commands.common import Common, cpu_of
from kinesplat.dataset.frames import Frames
from kinesplat.devices import resolve_device
from kinesplat.errors import BackendError, InputError
from kinesplat.evaluation import table
from kinesplat.evaluation import trained as trained_models
from kinesplat.evaluation.kplanes import KPlanesModel
from kinesplat.imagination.masks import prompt_points
from kinesplat.inverse import camera_search
from kinesplat.inverse.lighting import Light
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.photograph import second_look
from kinesplat.inverse.result import FitResult, Hypothesis
from kinesplat.inverse.text import text_to_q
from kinesplat.rasterizer import normal_equations
from kinesplat.training import field
from kinesplat.training.default import DefaultSettings, fit_splats, prepared
from kinesplat.training.loop import Budget
from kinesplat.training.paper import PaperSettings, train_paper
from kinesplat.training.recipes import kept_on
from kinesplat.twists import exp_twist


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch, unchecked_types: None) -> Iterator[Work]:
    with standing_in(monkeypatch) as work:
        yield work


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small searches, and few steps at every image size."""
    for module, names in (("calibrate", ("NEAR_LEVELS", "FINE_LEVELS")), ("tracker", ("LEVELS",))):
        there = import_module(f"kinesplat.inverse.{module}")
        for name in names:
            monkeypatch.setattr(there, name, tuple(replace(level, iterations=2) for level in getattr(there, name)))
    monkeypatch.setattr(import_module("kinesplat.inverse.calibrate"), "REFIT_ITERATIONS", 1)
    plan = import_module("kinesplat.inverse.reconstruct")
    planned = plan.planned
    monkeypatch.setattr(
        plan, "planned", lambda *given: [replace(a, drawn=64, rounds=a.rounds[:1]) for a in planned(*given)]
    )
    monkeypatch.setattr(import_module("kinesplat.inverse.search"), "CHILDREN", 64)


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
def test_reconstruct(work: Work, short: None, known: bool) -> None:
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
    assert work.gpu > 0 == work.cpu


@pytest.mark.parametrize("known", [True, False])
def test_imagine(work: Work, short: None, known: bool) -> None:
    """The video's pictures are on the CPU, as a video model gives them."""
    model = ks.zoo.load("kinearm").subsample(300).to("cuda")
    q = model.tree.q_canonical.float()
    camera = Camera.framing(model.posed(q.cuda()).means.cpu(), width=32, height=32)
    image = model.render(q.cuda(), camera.to("cuda"), outputs=("rgb",)).rgb
    assert image is not None
    found = ks.imagine(model, image, "stay", camera, video=[image, image], q_init=q if known else None)
    assert found.video.device.type == found.q.device.type == "cpu"
    found.report()
    assert work.gpu > 0 == work.cpu
    points, _ = prompt_points(model, q, camera)
    assert points.device.type == "cpu"


def test_calibrate(work: Work, short: None) -> None:
    """Two cameras, offsets and focal lengths free, from a guess; what comes back is on the CPU."""
    model = ks.zoo.load("kinearm").subsample(600).to("cuda")
    q = (model.tree.q_canonical + 0.3 * torch.randn(4, model.tree.dof)).float()
    view = Camera.framing(model.posed(q[0].cuda()).means.cpu(), width=32, height=32)
    turn = exp_twist(torch.tensor([0.0, 0.0, 0.0, 0.02, 0.03, -0.02]))
    images = [model.render(joints.cuda(), view.to("cuda"), outputs=("rgb",)).rgb for joints in q]
    fit = ks.calibrate(model, images, q, view.K, None, turn @ view.T_cam_world, camera_of_image=[0, 0, 1, 1],
                       free=("offsets", "focal"))  # fmt: skip
    assert fit.T_cam_mount.device.type == fit.covariance.device.type == "cpu"
    fit.report()
    fit.to_json()
    assert work.gpu > 0 == work.cpu


def test_camera_search_for_a_calibration(work: Work, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_search, "ROTATIONS", 64)
    monkeypatch.setattr(camera_search, "RENDERED", 16)
    monkeypatch.setattr(camera_search, "LEVELS", camera_search.LEVELS[:1])
    model = ks.zoo.load("kinearm").subsample(600).to("cuda")
    tree = model.tree
    q = (tree.q_canonical + 0.3 * torch.randn(2, tree.dof)).float()
    view = Camera.framing(model.posed(q[0].cuda()).means.cpu(), width=32, height=32)
    out = [model.render(joints.cuda(), view.to("cuda"), outputs=("rgb", "alpha")) for joints in q]
    with contextlib.suppress(InputError):  # so few rotations may end inside the robot
        ks.calibrate(model, [o.rgb for o in out], q, view.K, [o.alpha for o in out], mount=tree.link_names[1])
    assert work.gpu > 0 == work.cpu


def test_track(work: Work, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video whose background is learnt, so that the robot is cut out of it on the way."""
    model = ks.zoo.load("kinearm").subsample(600).to("cuda")
    q = (model.tree.q_canonical + torch.linspace(0.0, 0.1, 5)[:, None]).float()
    camera = Camera.framing(model.posed(q[0].cuda()).means.cpu(), width=32, height=32)
    out = model.render(q.cuda(), camera.to("cuda"), outputs=("rgb", "alpha"))
    assert out.rgb is not None
    assert out.alpha is not None
    scene = torch.rand(32, 32, 3)
    frames = out.rgb.cpu() - (1.0 - out.alpha.cpu()[..., None]) * (1.0 - scene)
    monkeypatch.setattr(import_module("kinesplat.inverse.tracker"), "BACKDROP_STEP", 2)
    found = ks.track(model, frames, camera, q_init=q[0].cuda())
    assert found.q.device.type == "cpu"
    assert len(found.states) == 5
    assert work.gpu > 0 == work.cpu


def test_photographs_get_their_second_look(work: Work) -> None:
    model = ks.zoo.load("kinearm").subsample(600)
    q = model.tree.q_canonical.float()
    camera = Camera.framing(model.posed(q).means, width=48, height=48)
    seen = Observation.create(torch.rand(48, 48, 3), (torch.rand(48, 48) > 0.5).float(), camera)
    fit = FitResult(q, camera, (0.1,), (0,), q[None], torch.eye(6), model.tree.joint_names,
                    (Hypothesis(q, camera, 0.1),), "converged", 0.0,
                    {"unexplained": 0.0, "confirmed": True})  # fmt: skip
    light = Light(torch.rand(9, 3), torch.ones(len(model.tree.link_names)))
    solution, losses = second_look(model, seen, fit, light, 0, torch.device("cuda"))
    assert solution.state.q.device.type == losses.device.type == "cpu"
    assert work.gpu > work.cpu  # small pictures, from which lights are fitted, are made on the CPU


def pictures(model: ks.SelfModel, q: torch.Tensor) -> Frames:
    """Pictures of a model on the CPU, one camera."""
    camera = Camera.framing(model.posed(q[0].float()).means, width=24, height=24)
    many = Camera(camera.K.expand(len(q), 3, 3).double(), camera.T_cam_world.expand(len(q), 4, 4).double(), 24, 24)
    out = model.render(q.float(), many, outputs=("rgb", "alpha"))
    assert out.rgb is not None
    assert out.alpha is not None
    return Frames(q, many, (255 * out.rgb.clamp(0, 1)).byte(), (255 * out.alpha).byte())


@pytest.fixture
def arm() -> ks.SelfModel:
    return ks.zoo.load("kinearm").subsample(300)


@pytest.fixture
def frames(arm: ks.SelfModel, work: Work) -> Frames:
    found = pictures(arm, arm.tree.q_canonical + 0.1 * torch.randn(6, arm.tree.dof).double())
    assert work == Work(0, 1)
    work.cpu = 0
    return found


@pytest.mark.parametrize("kept", [True, False])
def test_default_recipe(work: Work, arm: ks.SelfModel, frames: Frames, kept: bool, tmp_path: Path) -> None:
    """Steps, density control and validation of a model on the GPU, with the pictures there or on the CPU; resumed."""
    frames = frames.to("cuda") if kept else frames
    settings = DefaultSettings(start=300, gaussians=320, rounds=1, pictures=3, validate_every=2)
    for steps, resume in ((4, False), (5, True)):
        trained = fit_splats(
            arm.to("cuda"), frames, frames, Budget(steps, None), settings, folder=tmp_path, resume=resume
        )
    assert trained.parameters.means.is_cuda
    assert torch.isfinite(trained.parameters.means).all()
    assert work.gpu > 0 == work.cpu


def test_pictures_are_kept_where_they_fit(frames: Frames, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, there in ((10**9, True), (frames.nbytes, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert kept_on(torch.device("cuda"), frames).rgb.is_cuda == there
    assert kept_on(torch.device("cpu"), frames) is frames


def test_world_light(work: Work, arm: ks.SelfModel, frames: Frames) -> None:
    settings = DefaultSettings(start=300, gaussians=320, rounds=1, pictures=3, validate_every=2, degree=1)
    start = prepared(arm.to("cuda"), settings, torch.tensor([0.3, 0.2, -1.0, 0.3, 0.5, 0.2, 1.0]))
    trained = fit_splats(start, frames, frames, Budget(3, None), settings)
    assert trained.shader is not None
    assert work.gpu > 0 == work.cpu


def test_field_recipe(
    work: Work, arm: ks.SelfModel, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(field, "LABEL_STEPS", 2)
    for steps, resume in ((2, False), (3, True)):
        trained = field.train_with_field(
            arm.to("cuda"), frames, frames.to("cuda"), Budget(steps, None), folder=tmp_path, resume=resume
        )
    assert trained.parameters.means.is_cuda
    assert work.gpu > 0 == work.cpu


def test_paper_recipe_and_its_baseline(
    work: Work, arm: ks.SelfModel, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three stages, resumed, and K-planes from the splats of the first."""
    monkeypatch.setattr(KPlanesModel, "around", partial(KPlanesModel.around, features=4, joint_cells=4))
    robot = ks.load_description("kinearm")
    canonical = pictures(arm, arm.tree.q_canonical[None].repeat(3, 1))
    work.cpu = 0
    settings = PaperSettings(gaussians=200, canonical_steps=8, skinning_steps=1, layers=2, width=32)
    frames = frames.select([0, 1])
    for steps, resume in ((1, False), (2, True)):
        trained = train_paper(
            robot, canonical, frames.to("cuda"), frames, Budget(steps, None), settings, folder=tmp_path, resume=resume,
            device="cuda",
        )  # fmt: skip
    assert trained.parameters.means.is_cuda
    stages = trained_models.shared_stages(robot, canonical, settings, tmp_path, device="cuda")
    planes = trained_models.train_kplanes(
        stages, robot, (frames, frames), Budget(1, None), tmp_path / "planes", device="cuda"
    )
    assert planes.parameters.means.is_cuda
    assert work.gpu > 0 == work.cpu
    for model in (trained, planes):
        row = table._model_row("paper", model, frames, [(frames.q[0].float(), torch.rand(50, 3))], None, [0])
        assert row.psnr_db > 0
        assert row.chamfer_mm2 is not None
    assert work.cpu == 0


def test_commands(tmp_path: Path) -> None:
    picture = tmp_path / "arm.png"
    render.render("kinearm", picture, size=24, mask=True, depth=True, link_id=True, common=Common(device="cuda"))
    assert picture.is_file()
    with pytest.raises(BackendError, match="computes on the CPU alone"):
        cpu_of(Common(device="cuda"))
    assert cpu_of(Common()) == torch.device("cpu")


def test_text(work: Work, arm: ks.SelfModel) -> None:
    """Words to joints, gradients through the pictures."""

    class Bright:
        logit_scale = 10.0

        def embed_text(self, prompts: Sequence[str]) -> torch.Tensor:
            return torch.ones(len(prompts), 3, device="cuda") / 3**0.5

        def embed_images(self, rgb: torch.Tensor) -> torch.Tensor:
            assert rgb.is_cuda
            return torch.nn.functional.normalize(rgb.mean((1, 2)) + 0.1, dim=-1)

    found = text_to_q(arm.to("cuda"), "hello", encoder=Bright(), starts=2, iterations=3)
    assert found.q.device.type == "cpu"
    assert work.gpu > 0 == work.cpu
