"""The CUDA backend against the float64 reference: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import replace
from importlib import util
from typing import Any

import pytest
import torch
from cuda_scenes import DEVICE, GPU, away_from_thresholds, compare
from rasterizer_scenes import FIELDS, in_dtype, look, random_gaussians, random_transforms

from kinesplat.camera import Camera
from kinesplat.errors import BackendError, InputError
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import OUTPUTS, cuda, default_backend, rasterize, rasterize_links

EYE = torch.eye(4, dtype=torch.float64)[None]
GREY = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


def one_link(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize("coefficients", [1, 4, 9, 16])
def test_images_and_gradients_are_those_of_the_reference(coefficients: int) -> None:
    splats, camera = random_gaussians(40, coefficients=coefficients), look(37, 21)
    compare(splats, EYE, camera, GREY, one_link(40), mask=away_from_thresholds(splats, camera))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_fifty_random_scenes(seed: int) -> None:
    torch.manual_seed(seed)
    size = float(0.01 + 0.2 * torch.rand(()))
    splats, camera = random_gaussians(60, size=size), look(48, 40)
    bounds = (1e-4, 1e-3)
    compare(splats, EYE, camera, GREY, one_link(60), mask=away_from_thresholds(splats, camera), bounds=bounds)


def test_opaque_splats_are_limited_and_stop_the_light() -> None:
    splats = random_gaussians(40, size=0.2)
    splats = Gaussians(splats.means, splats.quats, splats.scales, 0.9 + 0.1 * torch.rand(40).double(), splats.sh)
    camera = look(24, 24)
    compare(splats, EYE, camera, GREY, one_link(40), mask=away_from_thresholds(splats, camera))


def test_configurations_times_cameras_on_links() -> None:
    """Sets of splats (2, 1), poses (2, 1), cameras (2,) and a background each."""
    splats, index = random_gaussians(12, batch=(2, 1)), torch.randint(3, (12,))
    cameras = [look(20, 18) for _ in range(2)]
    T = torch.stack([c.T_cam_world for c in cameras])
    camera = Camera(cameras[0].K.expand(2, 3, 3), T, 20, 18)
    Ts = random_transforms(2, 1, 3)
    compare(splats, Ts, camera, torch.rand(2, 1, 3).double(), index, bounds=(1e-4, 1e-3))


def test_harmonics_along_the_optical_axis() -> None:
    splats, index = replace(random_gaussians(12), sh_direction="axis"), torch.randint(3, (12,))
    compare(splats, random_transforms(3), look(16, 24), GREY, index, bounds=(1e-4, 1e-3))


def test_poses_share_one_set_of_splats() -> None:
    splats, index = random_gaussians(12), torch.randint(3, (12,))
    compare(splats, random_transforms(3, 3), look(16, 24), GREY, index, bounds=(1e-4, 1e-3))


def test_blend_skinning() -> None:
    splats, index = random_gaussians(20), torch.stack([torch.randperm(4)[:2] for _ in range(20)])
    share = 0.1 + 0.8 * torch.rand(20, 1, dtype=torch.float64)
    weights = torch.cat([share, 1.0 - share], -1)
    Ts = random_transforms(1, spread=0.02).repeat(4, 1, 1)
    Ts[:, :3, 3] += 0.05 * torch.randn(4, 3)
    compare(splats, Ts, look(24, 24), GREY, index, weights=weights, bounds=(1e-4, 1e-3))


def test_only_poses_require_grad() -> None:
    splats = in_dtype(random_gaussians(10), torch.float32, requires_grad=False).to(device=DEVICE)
    Ts = torch.eye(4, device=DEVICE)[None].requires_grad_()
    camera = look(16, 16, dtype=torch.float32).to(device=DEVICE)
    rgb = rasterize_links(splats, one_link(10).to(DEVICE), Ts, camera, backend="cuda", outputs=("rgb",)).rgb
    assert rgb is not None
    rgb.square().sum().backward()
    assert Ts.grad is not None
    assert float(Ts.grad.abs().sum()) > 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (17, 9)])
def test_odd_image_sizes(shape: tuple[int, int]) -> None:
    splats, camera = random_gaussians(10, size=0.3), look(*shape)
    compare(splats, EYE, camera, GREY, one_link(10), mask=away_from_thresholds(splats, camera))


def test_splats_behind_the_camera_and_nothing_at_all() -> None:
    splats = in_dtype(random_gaussians(8), torch.float32).to(device=DEVICE)
    away = Camera.look_at((0.0, 0.0, 5.0), (0.0, 0.0, 9.0), up=(0.0, 1.0, 0.0), width=9, height=8).to(device=DEVICE)
    empty = Gaussians(**{f: getattr(splats, f)[:0] for f in FIELDS})
    for scene in (splats, empty):
        out = rasterize(scene, away, backend="cuda", outputs=OUTPUTS)
        assert out.rgb is not None
        assert out.alpha is not None
        assert out.link_id is not None
        assert out.contribution is not None
        assert (out.rgb == 1).all()
        assert (out.alpha == 0).all()
        assert (out.link_id == -1).all()
        assert (out.contribution == 0).all()
        out.rgb.sum().backward()


def test_splat_in_the_camera_centre_is_no_error() -> None:
    splats = in_dtype(random_gaussians(3), torch.float32, requires_grad=False).to(device=DEVICE)
    camera = look(8, 8, dtype=torch.float32).to(device=DEVICE)
    T = torch.linalg.inv(camera.T_cam_world)
    splats.means[0] = T[:3, 3]
    alpha = rasterize(splats, camera, backend="cuda", outputs=("alpha",)).alpha
    assert alpha is not None
    assert torch.isfinite(alpha).all()


def test_two_runs_agree_bitwise() -> None:
    camera = look(24, 24, dtype=torch.float32).to(device=DEVICE)
    grads = []
    splats = random_gaussians(20, size=0.2)
    for _ in range(2):
        leaves = in_dtype(splats, torch.float32).to(device=DEVICE)
        leaves.means.retain_grad()
        rgb = rasterize(leaves, camera, backend="cuda").rgb
        assert rgb is not None
        rgb.square().sum().backward()
        assert leaves.means.grad is not None
        grads.append((rgb.detach(), leaves.means.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_what_the_backward_pass_needs_cannot_be_changed_in_place() -> None:
    splats = in_dtype(random_gaussians(5), torch.float32).to(device=DEVICE)
    camera = look(8, 8, dtype=torch.float32).to(device=DEVICE)
    out = rasterize(splats, camera, backend="cuda", outputs=("rgb", "depth"))
    assert out.rgb is not None
    assert out.depth is not None
    with torch.no_grad():
        out.depth.mul_(2.0)
    with pytest.raises(RuntimeError, match="inplace"):
        (out.rgb.sum() + out.depth.sum()).backward()


def test_nothing_is_kept_where_nothing_is_recorded() -> None:
    splats = in_dtype(random_gaussians(5), torch.float32).to(device=DEVICE)
    camera = look(8, 8, dtype=torch.float32).to(device=DEVICE)
    with torch.no_grad():
        still = rasterize(splats, camera, backend="cuda", outputs=OUTPUTS)
    moving = rasterize(splats, camera, backend="cuda", outputs=OUTPUTS)
    for name in OUTPUTS:
        assert torch.equal(getattr(still, name), getattr(moving, name))
        assert getattr(still, name).grad_fn is None


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_a_batch_of_nothing(batch: tuple[int, ...]) -> None:
    splats = in_dtype(random_gaussians(5), torch.float32).to(device=DEVICE)
    camera = look(8, 8, dtype=torch.float32).to(device=DEVICE)
    Ts = torch.eye(4, device=DEVICE).expand(*batch, 1, 4, 4)
    out = rasterize_links(splats, one_link(5).to(DEVICE), Ts, camera, backend="cuda", outputs=OUTPUTS)
    for name, tail in (("rgb", (8, 8, 3)), ("alpha", (8, 8)), ("link_id", (8, 8)), ("contribution", (5,))):
        assert getattr(out, name).shape == (*batch, *tail)
    assert out.rgb is not None
    out.rgb.sum().backward()


def test_slices_and_transposes_are_rendered_like_copies() -> None:
    wide = in_dtype(random_gaussians(20), torch.float32, requires_grad=False).to(device=DEVICE)
    thin = replace(wide, **{f: getattr(wide, f)[1::2] for f in FIELDS})
    copy = replace(thin, **{f: getattr(thin, f).clone(memory_format=torch.contiguous_format) for f in FIELDS})
    camera = look(19, 13, dtype=torch.float32).to(device=DEVICE)
    turned = Camera(camera.K.mT.contiguous().mT, camera.T_cam_world.mT.contiguous().mT, 19, 13)
    background = torch.ones(1, 6, device=DEVICE)[..., ::2]
    for output in OUTPUTS:
        a = rasterize(thin, turned, background[0], backend="cuda", outputs=(output,))
        b = rasterize(copy, camera, (1.0, 1.0, 1.0), backend="cuda", outputs=(output,))
        assert torch.equal(getattr(a, output), getattr(b, output))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("field", [*FIELDS, "K", "T_cam_world", "Ts_world_link", "background"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_input_are_named(field: str, value: float, unchecked_types: None) -> None:
    splats = in_dtype(random_gaussians(3), torch.float32, requires_grad=False)
    camera = look(8, 8, dtype=torch.float32)
    Ts, background = torch.eye(4)[None], torch.ones(3)
    tensors = {f: getattr(splats, f) for f in FIELDS}
    tensors |= {"K": camera.K, "T_cam_world": camera.T_cam_world, "Ts_world_link": Ts, "background": background}
    moved = {name: t.to(DEVICE) for name, t in tensors.items()}
    broken = Gaussians(**{f: moved[f] for f in FIELDS})
    lens = Camera(moved["K"], moved["T_cam_world"], 8, 8)
    moved[field].view(-1)[0] = value
    with pytest.raises(InputError, match=field):
        rasterize_links(
            broken, one_link(3).to(DEVICE), moved["Ts_world_link"], lens, moved["background"], backend="cuda"
        )


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")  # the interpreter's numpy
def test_unknown_links_and_zero_quaternions_are_named() -> None:
    splats = in_dtype(random_gaussians(3), torch.float32, requires_grad=False).to(device=DEVICE)
    camera = look(8, 8, dtype=torch.float32).to(device=DEVICE)
    for bad in (-1, 2):
        index = torch.tensor([0, bad, 1], device=DEVICE)
        with pytest.raises(InputError, match=f"link_index holds {bad}"):
            rasterize_links(splats, index, torch.eye(4, device=DEVICE).repeat(2, 1, 1), camera, backend="cuda")
    splats.quats[1] = 0.0
    with pytest.raises(InputError, match="length zero"):
        rasterize(splats, camera, backend="cuda")


def test_other_dtypes_and_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    splats, camera = random_gaussians(3), look(8, 8)
    with pytest.raises(InputError, match=r"float32 on a GPU; the gaussians are torch\.float64"):
        rasterize(splats, camera, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="on cpu"):
        rasterize(splats.to(dtype=torch.float32), camera, backend="cuda")


def test_missing_triton_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        return None if name == "triton" else util.find_spec(name)

    monkeypatch.setattr(cuda, "find_spec", absent)
    with pytest.raises(BackendError, match=r"kinesplat\[cuda\]"):
        rasterize(random_gaussians(3, dtype=torch.float32), look(8, 8), backend="cuda")


def test_the_backend_follows_the_splats() -> None:
    values = torch.zeros(2, 3)
    assert default_backend(values) == "cpu"
    assert default_backend(values.double()) == "reference"
    if GPU:
        assert default_backend(values.cuda()) == "cuda"
    with pytest.raises(BackendError, match="no backend for device meta"):
        default_backend(values.to("meta"))
