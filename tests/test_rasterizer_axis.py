"""Spherical harmonics along the optical axis: the shading of a light that shines along the view axis."""

from dataclasses import replace

import pytest
import torch
from rasterizer_scenes import FIELDS, in_dtype, look, random_gaussians, random_transforms, relative_error
from test_rasterizer_gauss_newton import SIZE, dense, mask_of, problem

from kinesplat.camera import Camera
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import cpu, normal_equations, rasterize, rasterize_links
from kinesplat.rasterizer.spherical_harmonics import SH_C0, sh_basis, sh_degree
from kinesplat.skinning import pose_gaussians

LEVELS = tuple(cpu.native().levels())


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KINESPLAT_SIMD", request.param)
    return request.param


def along_axis(gaussians: Gaussians) -> Gaussians:
    return replace(gaussians, sh_direction="axis")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("coefficients", [1, 4, 9, 16])
def test_all_splats_of_a_link_see_one_direction(backend: str, coefficients: int) -> None:
    """The same picture as splats of one colour, computed by hand from the axis in the link's frame."""
    gaussians = random_gaussians(200, coefficients=coefficients, dtype=torch.float32)
    index, Ts, camera = (
        torch.randint(0, 3, (200,)),
        random_transforms(3, dtype=torch.float32),
        look(dtype=torch.float32),
    )
    axis = Ts[index, :3, :3].mT @ camera.T_cam_world[2, :3]
    sh = (sh_basis(axis, sh_degree(coefficients))[..., None] * gaussians.sh).sum(-2, keepdim=True) / SH_C0
    truth = rasterize_links(replace(gaussians, sh=sh), index, Ts, camera, backend=backend).rgb
    image = rasterize_links(along_axis(gaussians), index, Ts, camera, backend=backend).rgb
    assert truth is not None
    assert image is not None
    assert torch.allclose(image, truth, atol=2e-6)
    if coefficients > 1:
        other = rasterize_links(gaussians, index, Ts, camera, backend=backend).rgb
        assert other is not None
        assert (other - truth).abs().max() > 0.01


@pytest.mark.parametrize("coefficients", [4, 9, 16])
def test_native_images_and_gradients_are_those_of_the_reference(level: str, coefficients: int) -> None:
    camera, splats = look(61, 50), random_gaussians(300, coefficients=coefficients, size=0.1)
    index, Ts = torch.randint(0, 3, (300,)), random_transforms(3)
    splats = replace(splats, opacities=0.5 * splats.opacities)  # no pixel near a threshold of opacity
    weight, images, gradients = torch.rand(50, 61, 3).double(), [], []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        leaves = [getattr(splats, f).to(dtype).clone().requires_grad_() for f in FIELDS]
        moving = [t.to(dtype).clone().requires_grad_() for t in (Ts, camera.T_cam_world)]
        view = Camera(camera.K.to(dtype), moving[1], 61, 50)
        image = rasterize_links(
            Gaussians(*leaves, sh_direction="axis"), index, moving[0], view, backend=backend, outputs=("rgb",)
        ).rgb
        assert image is not None
        images.append(image.detach().double())
        gradients.append(torch.autograd.grad((image * weight.to(dtype)).sum(), [*leaves, *moving]))
    assert (images[0] - images[1]).abs().max() < 1e-3
    assert (images[0] - images[1]).abs().median() < 1e-6
    for name, native, exact in zip((*FIELDS, "Ts_world_link", "T_cam_world"), *gradients, strict=True):
        assert relative_error(native, exact) < 1e-3, name  # pixels at a threshold included


def test_colours_do_not_pull_at_the_means(level: str) -> None:
    """Of one huge opaque splat that fills the picture, the colour alone depends on the pose: by rotation only."""
    flat = Gaussians(
        torch.tensor([[0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        torch.full((1, 3), 50.0),
        torch.tensor([0.9]),
        0.2 * torch.randn(1, 9, 3),
        "axis",
    )
    camera, T = look(8, 8, dtype=torch.float32), torch.eye(4)[None].requires_grad_()
    rgb = rasterize_links(flat, torch.zeros(1, dtype=torch.long), T, camera, outputs=("rgb",)).rgb
    assert rgb is not None
    (gradient,) = torch.autograd.grad(rgb.sum(), T)
    assert gradient[0, :3, 3].abs().max() < 1e-3 * gradient[0, :3, :3].abs().max()


@pytest.mark.parametrize(("n", "links", "coefficients"), [(60, 1, 16), (120, 3, 9), (90, 2, 4)])
def test_normal_equations_against_the_dense_jacobian(level: str, n: int, links: int, coefficients: int) -> None:
    splats, index, Ts, camera, background = problem(n, links, coefficients)
    mask = mask_of(splats, index, Ts, camera)
    target = torch.rand(SIZE[1], SIZE[0], 4).double()
    weight = torch.stack([mask, mask, mask, torch.zeros_like(mask)], -1)
    loss, gradient, hessian = dense(along_axis(splats), index, Ts, camera, background, target, weight)
    got = normal_equations(
        along_axis(in_dtype(splats, torch.float32, False)),
        index,
        Ts.float(),
        camera,
        target[..., :3],
        rgb_weight=mask,
        background=background.float(),
    )
    assert relative_error(got.loss, loss) < 1e-6
    assert relative_error(got.gradient, gradient) < 2e-5
    assert relative_error(got.hessian, hessian) < 2e-5


def test_posed_splats_keep_their_direction() -> None:
    gaussians = along_axis(random_gaussians(100, dtype=torch.float32))
    index, Ts, camera = (
        torch.randint(0, 3, (100,)),
        random_transforms(3, dtype=torch.float32),
        look(dtype=torch.float32),
    )
    posed = pose_gaussians(gaussians, index, Ts)
    assert posed.sh_direction == "axis"
    assert posed.to(dtype=torch.float64).sh_direction == "axis"
    one, two = rasterize(posed, camera).rgb, rasterize_links(gaussians, index, Ts, camera).rgb
    assert one is not None
    assert two is not None
    assert torch.allclose(one, two, atol=1e-4)
