"""Bad input: each a one-line error that names the tensor or option."""

from dataclasses import replace

import pytest
import torch
from rasterizer_scenes import FIELDS, look, random_gaussians

from kinesplat.camera import Camera
from kinesplat.errors import BackendError, InputError
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import cpu, rasterize, rasterize_links

BACKENDS = ("reference", "cpu")


@pytest.fixture
def gaussians() -> Gaussians:
    return random_gaussians(20, dtype=torch.float32)


@pytest.fixture
def camera() -> Camera:
    return look(dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_splats_are_named(
    gaussians: Gaussians, camera: Camera, backend: str, field: str, value: float
) -> None:
    tensor = getattr(gaussians, field).clone()
    tensor.view(-1)[7] = value
    with pytest.raises(InputError, match=rf"gaussians\.{field} contains NaN or infinity"):
        rasterize(replace(gaussians, **{field: tensor}), camera, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_transforms_background_and_weights(gaussians: Gaussians, camera: Camera, backend: str) -> None:
    bad = torch.eye(4)[None].clone()
    bad[0, 1, 3] = float("nan")
    index = torch.zeros(20, 1, dtype=torch.int64)
    with pytest.raises(InputError, match=r"Ts_world_link.*NaN"):
        rasterize_links(gaussians, index[:, 0], bad, camera, backend=backend)
    with pytest.raises(InputError, match="background contains NaN"):
        rasterize(gaussians, camera, (0.0, float("nan"), 0.0), backend=backend)
    weights = torch.full((20, 1), float("nan"))
    with pytest.raises(InputError, match="link_weights contains NaN"):
        rasterize_links(gaussians, index, torch.eye(4)[None], camera, link_weights=weights, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_quaternion_and_focal_length(gaussians: Gaussians, camera: Camera, backend: str) -> None:
    quats = gaussians.quats.clone()
    quats[3] = 0
    with pytest.raises(InputError, match="quaternion of length zero"):
        rasterize(replace(gaussians, quats=quats), camera, backend=backend)
    K = camera.K.clone()
    K[0, 0] = 0.0
    with pytest.raises(InputError, match="focal length"):
        rasterize(gaussians, replace(camera, K=K), backend=backend)
    K = camera.K.clone()
    K[0, 1] = 2.0
    with pytest.raises(InputError, match="skew"):
        rasterize(gaussians, replace(camera, K=K), backend=backend)


@pytest.mark.usefixtures("unchecked_types")
class TestShapesAndOptions:
    def test_shapes(self, gaussians: Gaussians, camera: Camera) -> None:
        for field, bad in (
            ("quats", torch.zeros(20, 3)),
            ("scales", torch.zeros(19, 3)),
            ("opacities", torch.zeros(20, 1)),
            ("sh", torch.zeros(20, 9)),
        ):
            with pytest.raises(InputError, match=rf"gaussians\.{field} has shape"):
                rasterize(replace(gaussians, **{field: bad}), camera)
        with pytest.raises(InputError, match="5 coefficients"):
            rasterize(replace(gaussians, sh=torch.zeros(20, 5, 3)), camera)

    def test_dtypes(self, gaussians: Gaussians, camera: Camera) -> None:
        with pytest.raises(InputError, match=r"gaussians\.scales is torch.float64"):
            rasterize(replace(gaussians, scales=gaussians.scales.double()), camera)
        with pytest.raises(InputError, match="float16"):
            rasterize(Gaussians(**{f: getattr(gaussians, f).half() for f in FIELDS}), camera)

    def test_float64_on_the_native_backend(self, camera: Camera) -> None:
        with pytest.raises(InputError, match="float32 on the CPU"):
            rasterize(random_gaussians(3), camera, backend="cpu")

    def test_links(self, gaussians: Gaussians, camera: Camera) -> None:
        Ts = torch.eye(4).repeat(2, 1, 1)
        for backend in BACKENDS:
            with pytest.raises(InputError, match=r"link_index holds 2; .*links 0 to 1"):
                rasterize_links(gaussians, torch.arange(20) % 3, Ts, camera, backend=backend)
        with pytest.raises(InputError, match="dtype"):
            rasterize_links(gaussians, torch.zeros(20), Ts, camera)
        with pytest.raises(InputError, match="link_index has shape"):
            rasterize_links(gaussians, torch.zeros(19, dtype=torch.int64), Ts, camera)
        with pytest.raises(InputError, match="needs link_weights"):
            rasterize_links(gaussians, torch.zeros(20, 2, dtype=torch.int64), Ts, camera)
        five = torch.zeros(20, 5, dtype=torch.int64)
        with pytest.raises(InputError, match="m up to 4"):
            rasterize_links(gaussians, five, Ts, camera, link_weights=torch.zeros(20, 5))
        with pytest.raises(InputError, match="Ts_world_link has shape"):
            rasterize_links(gaussians, torch.zeros(20, dtype=torch.int64), torch.eye(4), camera)

    def test_batches_that_do_not_broadcast(self, camera: Camera) -> None:
        with pytest.raises(InputError, match="do not broadcast"):
            rasterize(random_gaussians(4, batch=(3,), dtype=torch.float32), camera, torch.zeros(2, 3))

    def test_options(self, gaussians: Gaussians, camera: Camera) -> None:
        with pytest.raises(InputError, match=r"unknown backend 'cpuu'.*did you mean 'cpu'"):
            rasterize(gaussians, camera, backend="cpuu")
        with pytest.raises(InputError, match=r"unknown output 'dept'.*did you mean 'depth'"):
            rasterize(gaussians, camera, outputs=("dept",))
        for eps2d in (0.0, -1.0, float("nan")):
            with pytest.raises(InputError, match="eps2d"):
                rasterize(gaussians, camera, eps2d=eps2d)

    def test_background_shape(self, gaussians: Gaussians, camera: Camera) -> None:
        with pytest.raises(InputError, match="background has shape"):
            rasterize(gaussians, camera, (1.0, 1.0))


def test_missing_native_module_says_how_to_build(
    monkeypatch: pytest.MonkeyPatch, gaussians: Gaussians, camera: Camera
) -> None:
    monkeypatch.setattr(cpu, "_native", None)
    with pytest.raises(BackendError, match=r"not built.*pip install"):
        rasterize(gaussians, camera)


def test_unknown_simd_level(monkeypatch: pytest.MonkeyPatch, gaussians: Gaussians, camera: Camera) -> None:
    monkeypatch.setenv("KINESPLAT_SIMD", "mmx")
    with pytest.raises(InputError, match=r"unknown SIMD level.*'mmx'.*baseline"):
        rasterize(gaussians, camera)
