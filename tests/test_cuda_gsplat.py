"""What is handed to gsplat, and what is made of its answers; gsplat itself runs on GPUs only, a stand-in takes its
place elsewhere."""

import sys
from dataclasses import replace

import fake_gsplat
import pytest
import torch
from cuda_scenes import DEVICE, GPU, away_from_thresholds, compare
from rasterizer_scenes import FIELDS, look, random_gaussians, random_transforms

from kinesplat.camera import Camera
from kinesplat.errors import BackendError, InputError
from kinesplat.rasterizer import gsplat, rasterize

OUTPUTS = ("rgb", "alpha", "depth", "contribution")
EYE = torch.eye(4, dtype=torch.float64)[None]
GREY = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


@pytest.fixture(params=fake_gsplat.VERSIONS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """gsplat of this version: the stand-in, or the real one on a GPU that has it."""
    if GPU:
        real = pytest.importorskip("gsplat")
        if real.__version__ != request.param:
            pytest.skip(f"gsplat {real.__version__} is installed")
    else:
        monkeypatch.setattr(gsplat, "load", lambda device: fake_gsplat.make(request.param))
    return request.param


@pytest.mark.parametrize("coefficients", [1, 9])
def test_images_and_gradients_are_those_of_the_reference(version: str, coefficients: int) -> None:
    splats, camera = random_gaussians(25, coefficients=coefficients), look(37, 21)
    keep, index = away_from_thresholds(splats, camera), torch.zeros(25, dtype=torch.int64)
    compare(splats, EYE, camera, GREY, index, backend="gsplat", outputs=OUTPUTS, mask=keep, bounds=(1e-4, 1e-3))


def test_configurations_times_cameras_on_links(version: str) -> None:
    splats, index = random_gaussians(10, batch=(2, 1)), torch.randint(3, (10,))
    cameras = [look(20, 18) for _ in range(2)]
    T = torch.stack([c.T_cam_world for c in cameras])
    camera = Camera(cameras[0].K.expand(2, 3, 3), T, 20, 18)
    background, bounds = torch.rand(2, 1, 3).double(), (1e-4, 1e-3)
    compare(splats, random_transforms(2, 1, 3), camera, background, index, backend="gsplat", outputs=OUTPUTS,
            bounds=bounds)  # fmt: skip


def test_harmonics_along_the_optical_axis(version: str) -> None:
    splats, index = replace(random_gaussians(12), sh_direction="axis"), torch.randint(3, (12,))
    compare(splats, random_transforms(3), look(16, 24), GREY, index, backend="gsplat", outputs=OUTPUTS,
            bounds=(1e-4, 1e-3))  # fmt: skip


def test_blend_skinning(version: str) -> None:
    splats, index = random_gaussians(10), torch.randint(3, (10, 2))
    weights, bounds = torch.rand(10, 2).double(), (1e-4, 1e-3)
    weights /= weights.sum(-1, keepdim=True)
    compare(splats, random_transforms(3, spread=0.3), look(20, 20), GREY, index, weights=weights, backend="gsplat",
            outputs=OUTPUTS, bounds=bounds)  # fmt: skip


def test_splats_in_the_plane_of_the_camera_give_no_nan(version: str) -> None:
    """x / z would be infinite."""
    splats, camera = random_gaussians(4), look(16, 16)
    centre = torch.linalg.inv(camera.T_cam_world)[:3, 3]
    splats.means[0] = centre.float().double()
    index, bounds = torch.zeros(4, dtype=torch.int64), (1e-4, 1e-3)
    keep = away_from_thresholds(splats, camera)
    compare(splats, EYE, camera, GREY, index, backend="gsplat", outputs=("rgb", "alpha"), mask=keep, bounds=bounds)


def test_nothing_to_see_and_nothing_at_all(version: str) -> None:
    splats = random_gaussians(4, dtype=torch.float32).to(device=DEVICE)
    camera = look(20, 16, dtype=torch.float32).to(device=DEVICE)
    away = Camera.look_at((0.0, 0.0, 5.0), (0.0, 0.0, 9.0), up=(0.0, 1.0, 0.0), width=20, height=16).to(device=DEVICE)
    none = replace(splats, **{name: getattr(splats, name)[:0] for name in FIELDS})
    for scene, view in ((splats, away), (none, camera)):
        out = rasterize(scene, view, backend="gsplat", outputs=OUTPUTS)
        assert out.rgb is not None
        assert out.alpha is not None
        assert (out.rgb == 1).all()
        assert (out.alpha == 0).all()


def test_link_ids_are_refused() -> None:
    with pytest.raises(InputError, match="no link_id; pass backend='cuda'"):
        rasterize(random_gaussians(3, dtype=torch.float32), look(8, 8), backend="gsplat", outputs=("link_id",))


def test_a_missing_device_package_or_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="on a GPU; the gaussians are on cpu"):
        rasterize(random_gaussians(3, dtype=torch.float32), look(8, 8), backend="gsplat")
    with pytest.raises(InputError, match="float32"):
        rasterize(random_gaussians(3), look(8, 8), backend="gsplat")
    device = torch.device("cuda")
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(BackendError, match=r"pip install 'gsplat>=1\.4,<1\.6'"):
        gsplat.load(device)
    monkeypatch.setitem(sys.modules, "gsplat", fake_gsplat.make("1.6.0"))
    with pytest.raises(BackendError, match=r"this is 1\.6\.0"):
        gsplat.load(device)
