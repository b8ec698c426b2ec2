"""Normal equations of the CUDA backend against the native ones, which are tested against a dense Jacobian."""

from dataclasses import replace

import pytest
import torch
from cuda_scenes import DEVICE
from rasterizer_scenes import in_dtype, look, random_gaussians, random_transforms, relative_error
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import gauss_newton
from kinesplat.rasterizer.gauss_newton import NormalEquations, normal_equations
from kinesplat.twists import exp_twist

SIZE = (21, 18)


def on_gpu(
    splats: Gaussians, index: Tensor, Ts: Tensor, camera: Camera, rgb: Tensor, **more: Tensor
) -> NormalEquations:
    """By the kernels, on a GPU or interpreted."""
    background = more.pop("background", torch.ones(3))
    scene = gauss_newton.make_scene(
        splats.to(device=DEVICE), index.to(DEVICE), None, Ts.to(DEVICE), camera.to(device=DEVICE),
        background.to(DEVICE), 0.3, (),
    )  # fmt: skip
    names = ("rgb", "alpha", "rgb_weight", "alpha_weight", "backdrop")
    given = {name: more[name].to(DEVICE) if name in more else None for name in names[1:]}
    targets = gauss_newton._checked_targets(camera, {"rgb": rgb.to(DEVICE)} | given)
    shape = tuple(torch.broadcast_shapes(scene.batch_shape, rgb.shape[:-3]))
    return gauss_newton._on_gpu(replace(scene, batch_shape=shape), targets, rgb.ndim - 3)


def scene(n: int, links: int, coefficients: int = 9) -> tuple[Gaussians, Tensor, Tensor, Camera]:
    splats = in_dtype(random_gaussians(n, coefficients=coefficients, size=0.08), torch.float32, False)
    Ts = random_transforms(links, spread=0.05, dtype=torch.float32)
    return splats, torch.randint(0, links, (n,)), Ts, look(*SIZE, dtype=torch.float32)


def check(got: NormalEquations, truth: NormalEquations) -> None:
    for name, bound in (("loss", 1e-5), ("gradient", 1e-4), ("hessian", 1e-4)):
        value, exact = getattr(got, name).cpu(), getattr(truth, name)
        assert value.dtype == torch.float64
        assert value.shape == exact.shape
        assert relative_error(value, exact) < bound, name
    assert torch.equal(got.hessian, got.hessian.mT)


@pytest.mark.parametrize(("n", "links", "coefficients"), [(3, 1, 1), (30, 3, 9), (30, 2, 16)])
def test_all_targets_and_weights(n: int, links: int, coefficients: int) -> None:
    splats, index, Ts, camera = scene(n, links, coefficients)
    plane = (SIZE[1], SIZE[0])
    images = {name: torch.rand(plane) for name in ("alpha", "rgb_weight", "alpha_weight")}
    rgb, background = torch.rand(*plane, 3), torch.rand(3)
    truth = normal_equations(splats, index, Ts, camera, rgb, background=background, **images)
    check(on_gpu(splats, index, Ts, camera, rgb, background=background, **images), truth)


def test_starts_share_a_target_and_a_backdrop() -> None:
    splats, index, Ts, camera = scene(20, 3)
    starts = exp_twist(0.05 * torch.randn(2, 1, 6)) @ Ts
    rgb, backdrop = torch.rand(SIZE[1], SIZE[0], 3), torch.rand(SIZE[1], SIZE[0], 3)
    truth = normal_equations(splats, index, starts, camera, rgb, backdrop=backdrop)
    check(on_gpu(splats, index, starts, camera, rgb, backdrop=backdrop), truth)


def test_harmonics_along_the_optical_axis() -> None:
    splats, index, Ts, camera = scene(20, 3)
    splats, rgb = replace(splats, sh_direction="axis"), torch.rand(SIZE[1], SIZE[0], 3)
    check(on_gpu(splats, index, Ts, camera, rgb), normal_equations(splats, index, Ts, camera, rgb))


def test_nothing_in_sight() -> None:
    splats, index, Ts, camera = scene(5, 2)
    Ts = Ts.clone()
    Ts[:, :3, 3] += 100.0
    rgb = torch.rand(SIZE[1], SIZE[0], 3)
    got = on_gpu(splats, index, Ts, camera, rgb)
    assert float(got.loss) == pytest.approx(float(((1 - rgb) ** 2).sum()), rel=1e-5)
    assert (got.gradient == 0).all()
    assert (got.hessian == 0).all()


def test_targets_with_nan_are_named() -> None:
    splats, index, Ts, camera = scene(5, 1)
    rgb = torch.rand(SIZE[1], SIZE[0], 3)
    with pytest.raises(InputError, match="target rgb contains NaN"):
        on_gpu(splats, index, Ts, camera, rgb * float("nan"))
    with pytest.raises(InputError, match="alpha contains NaN"):
        on_gpu(splats, index, Ts, camera, rgb, alpha=rgb[..., 0] * float("inf"))
