"""Semantics of `rasterize`, against closed forms; and the reference's gradients against finite differences."""

import pytest
import torch
from rasterizer_scenes import FIELDS, in_dtype, look, random_gaussians, random_transforms

from kinesplat.camera import Camera
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import OUTPUTS, Render, rasterize, rasterize_links
from kinesplat.rasterizer.spherical_harmonics import SH_C0

BACKENDS = ("reference", "cpu")
FRONT = Camera(K=torch.tensor([[100.0, 0, 8], [0, 100.0, 8], [0, 0, 1]]), T_cam_world=torch.eye(4), width=16, height=16)


def splat(
    z: float = 1.0, opacity: float = 0.5, rgb: tuple[float, float, float] = (1.0, 0.0, 0.0), scale: float = 1e-4
) -> Gaussians:
    """One tiny isotropic splat whose centre projects onto the pixel centre (8.5, 8.5) of FRONT."""
    colour = (torch.tensor(rgb) - 0.5) / SH_C0
    return Gaussians(
        means=torch.tensor([[0.005 * z, 0.005 * z, z]]),
        quats=torch.tensor([[1.0, 0, 0, 0]]),
        scales=torch.full((1, 3), scale),
        opacities=torch.tensor([opacity]),
        sh=colour.reshape(1, 1, 3),
    )


def stack(*splats: Gaussians) -> Gaussians:
    return Gaussians(**{f: torch.cat([getattr(s, f) for s in splats]) for f in FIELDS})


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_splat_closed_form(backend: str) -> None:
    eps2d, sx = 0.3, 0.02
    out = rasterize(splat(opacity=0.8, scale=sx), FRONT, (0.0, 0.0, 1.0), eps2d=eps2d, backend=backend)
    assert out.rgb is not None
    assert out.alpha is not None
    assert out.depth is not None
    x = torch.arange(16) + 0.5 - 8.5
    slope = 0.005
    J = torch.tensor([[100.0, 0, -100 * slope], [0, 100.0, -100 * slope]])
    conic = torch.linalg.inv(J @ J.T * sx**2 + eps2d * torch.eye(2))
    d = torch.stack(torch.meshgrid(x, x, indexing="xy"), -1)
    alpha = 0.8 * torch.exp(-0.5 * torch.einsum("hwi,ij,hwj->hw", d, conic, d))
    alpha = torch.where(alpha < 1 / 255, 0.0, alpha)
    torch.testing.assert_close(out.alpha, alpha, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.rgb[..., 0], alpha, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.rgb[..., 2], 1 - alpha, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.depth, (alpha > 0).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_is_clamped(backend: str) -> None:
    out = rasterize(splat(1.0, 1.0, (1.0, 0.5, 0.0)), FRONT, (0.0, 0.0, 0.0), backend=backend)
    assert out.rgb is not None
    torch.testing.assert_close(out.rgb[8, 8], torch.tensor([0.99, 0.495, 0.0]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compositing_stops_before_the_threshold(backend: str) -> None:
    """Transmittance 0.05, 0.0025, 0.000125; the fourth splat would leave 6e-6 < 1e-4 and is not composited."""
    colours = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0))
    layers = [splat(1.0 + i, 0.95, rgb) for i, rgb in enumerate(colours)]
    out = rasterize(stack(*layers[::-1]), FRONT, (0.0, 0.0, 0.0), backend=backend)
    assert out.rgb is not None
    assert out.alpha is not None
    torch.testing.assert_close(out.rgb[8, 8], torch.tensor([0.95, 0.0475, 0.002375]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(float(out.alpha[8, 8]), 1 - 0.000125, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_depth_is_the_weighted_mean_and_zero_where_empty(backend: str) -> None:
    out = rasterize(stack(splat(1.0, 0.5), splat(3.0, 0.5)), FRONT, backend=backend)
    assert out.depth is not None
    torch.testing.assert_close(float(out.depth[8, 8]), (0.5 * 1 + 0.25 * 3) / 0.75, rtol=1e-5, atol=0)
    assert out.depth[0, 0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_link_id_is_where_half_the_light_is_gone(backend: str) -> None:
    splats = stack(splat(1.0, 0.4), splat(2.0, 0.4), splat(3.0, 0.4))
    Ts = torch.eye(4).repeat(8, 1, 1)
    out = rasterize_links(splats, torch.tensor([5, 7, 2]), Ts, FRONT, backend=backend, outputs=("link_id",))
    assert out.link_id is not None
    assert out.link_id[8, 8] == 7
    assert out.link_id[0, 0] == -1
    assert out.rgb is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_contribution_is_the_sum_of_weights(backend: str) -> None:
    gaussians, camera = random_gaussians(200, dtype=torch.float32), look(50, 41, dtype=torch.float32)
    out = rasterize(gaussians, camera, backend=backend, outputs=("alpha", "contribution"))
    assert out.contribution is not None
    assert out.alpha is not None
    torch.testing.assert_close(out.contribution.sum(), out.alpha.sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_splats_does_not_matter(backend: str) -> None:
    gaussians, camera = random_gaussians(300, dtype=torch.float32), look(dtype=torch.float32)
    order = torch.randperm(300)
    shuffled = Gaussians(**{f: getattr(gaussians, f)[order] for f in FIELDS})
    a, b = (rasterize(g, camera, backend=backend).rgb for g in (gaussians, shuffled))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moving_world_and_camera_together_changes_nothing(backend: str) -> None:
    gaussians, camera = random_gaussians(100, coefficients=1, dtype=torch.float32), look(dtype=torch.float32)
    T = random_transforms(spread=0.5, dtype=torch.float32)
    link = torch.zeros(100, dtype=torch.int64)
    moved = Camera(camera.K, camera.T_cam_world @ torch.linalg.inv(T), camera.width, camera.height)
    a = rasterize(gaussians, camera, backend=backend).rgb
    b = rasterize_links(gaussians, link, T[None], moved, backend=backend).rgb
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_splats_before_the_near_plane_vanish(backend: str) -> None:
    for z in (-1.0, 0.0, 0.0099):
        out = rasterize(splat(z, 0.9, scale=0.1), FRONT, backend=backend)
        assert out.alpha is not None
        assert (out.alpha == 0).all()
    out = rasterize(splat(0.011, 0.9, scale=1e-3), FRONT, backend=backend)
    assert out.alpha is not None
    assert (out.alpha > 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (17, 33)])
def test_odd_image_sizes(backend: str, shape: tuple[int, int]) -> None:
    gaussians = random_gaussians(100, size=0.3, dtype=torch.float32)
    out = rasterize(gaussians, look(*shape, dtype=torch.float32), backend=backend, outputs=OUTPUTS)
    assert out.rgb is not None
    assert out.rgb.shape == (shape[1], shape[0], 3)
    assert torch.isfinite(out.rgb).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_scene_and_empty_batch(backend: str) -> None:
    camera = look(dtype=torch.float32)
    out = rasterize(random_gaussians(0, dtype=torch.float32), camera, (0.1, 0.2, 0.3), backend=backend, outputs=OUTPUTS)
    assert out.rgb is not None
    torch.testing.assert_close(out.rgb, torch.tensor([0.1, 0.2, 0.3]).expand_as(out.rgb))
    assert out.link_id is not None
    assert (out.link_id == -1).all()
    none = rasterize(random_gaussians(5, batch=(0,), dtype=torch.float32), camera, backend=backend)
    assert none.rgb is not None
    assert none.rgb.shape == (0, camera.height, camera.width, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_scene_has_empty_gradients(backend: str) -> None:
    gaussians = in_dtype(random_gaussians(0), torch.float32)
    out = rasterize(gaussians, look(dtype=torch.float32), backend=backend)
    assert out.rgb is not None
    background = torch.ones(3, requires_grad=True)
    rgb = rasterize(gaussians, look(dtype=torch.float32), background, backend=backend).rgb
    assert rgb is not None
    rgb.sum().backward()
    assert background.grad is not None
    torch.testing.assert_close(background.grad, torch.full((3,), 40.0 * 36.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_and_degenerate_scales(backend: str) -> None:
    """A wall of any size covers the image; a point of no size is still as large as the dilation."""
    for scale in (1e3, 1e6, 1e18):
        wall = in_dtype(splat(1.0, 0.7, scale=scale), torch.float64 if backend == "reference" else torch.float32)
        alpha = rasterize(wall, FRONT, backend=backend).alpha
        assert alpha is not None
        torch.testing.assert_close(alpha.float(), torch.full((16, 16), 0.7), rtol=1e-3, atol=0)
    point = rasterize(splat(1.0, 0.7, scale=0.0), FRONT, backend=backend)
    assert point.alpha is not None
    torch.testing.assert_close(float(point.alpha[8, 8]), 0.7, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_broadcast_configurations_with_cameras(backend: str) -> None:
    gaussians = random_gaussians(30, batch=(3, 1), dtype=torch.float32)
    cameras = Camera.look_at(
        2 * torch.nn.functional.normalize(torch.randn(2, 3), dim=-1), (0.0, 0.0, 0.0), width=20, height=18
    )
    background = torch.rand(3, 1, 3)
    out = rasterize(gaussians, cameras, background, backend=backend, outputs=OUTPUTS)
    for i in range(3):
        for j in range(2):
            one = Gaussians(**{f: getattr(gaussians, f)[i, 0] for f in FIELDS})
            camera = Camera(cameras.K[j], cameras.T_cam_world[j], 20, 18)
            single = rasterize(one, camera, background[i, 0], backend=backend, outputs=OUTPUTS)
            for name in OUTPUTS:
                assert torch.equal(getattr(out, name)[i, j], getattr(single, name)), name


def test_reference_gradients_against_finite_differences() -> None:
    gaussians, camera = random_gaussians(4, coefficients=4, size=0.2), look(5, 4)
    K, T = camera.K.clone().requires_grad_(), camera.T_cam_world.clone().requires_grad_()
    background = torch.rand(3, dtype=torch.float64, requires_grad=True)
    fields = [getattr(in_dtype(gaussians, torch.float64), f) for f in FIELDS]

    def images(K: torch.Tensor, T: torch.Tensor, background: torch.Tensor, *fields: torch.Tensor) -> tuple:
        out = rasterize(Gaussians(*fields), Camera(_no_skew(K), T, 5, 4), background, backend="reference")
        return out.rgb, out.alpha, out.depth

    assert torch.autograd.gradcheck(images, (K, T, background, *fields), eps=1e-7, atol=1e-5, rtol=1e-4)


def _no_skew(K: torch.Tensor) -> torch.Tensor:
    """Only the entries of K that a pinhole without skew reads."""
    return K * torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]], dtype=K.dtype)


def test_reference_gradients_to_links_and_weights() -> None:
    gaussians, camera = random_gaussians(4, coefficients=4, size=0.2), look(5, 4)
    index = torch.randint(0, 3, (4, 2))
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    Ts = random_transforms(3).requires_grad_()

    def rgb(Ts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        normalised = weights / weights.sum(-1, keepdim=True)
        out = rasterize_links(gaussians, index, Ts, camera, link_weights=normalised, backend="reference")
        assert out.rgb is not None
        return out.rgb

    assert torch.autograd.gradcheck(rgb, (Ts, weights), eps=1e-7, atol=1e-5, rtol=1e-4)


def test_float64_takes_the_reference_by_default() -> None:
    out = rasterize(random_gaussians(5), look())
    assert isinstance(out, Render)
    assert out.rgb is not None
    assert out.rgb.dtype == torch.float64


def test_jacobian_guard_keeps_grazing_splats_small() -> None:
    """A splat far outside the field of view, close to the camera plane, must not smear over the image."""
    gaussians = splat(1.0, 0.9, scale=0.02)
    outside = Gaussians(
        torch.tensor([[3.0, 0.0, 0.02]]), gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh
    )
    for backend in BACKENDS:
        out = rasterize(outside, FRONT, backend=backend)
        assert out.alpha is not None
        assert (out.alpha == 0).all()
