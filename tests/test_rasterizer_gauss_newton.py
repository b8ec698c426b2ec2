"""Normal equations against a dense Jacobian of the float64 reference, built by autograd and by finite differences."""

from collections.abc import Callable, Iterator

import pytest
import torch
from rasterizer_scenes import away_from_thresholds, in_dtype, look, random_gaussians, random_transforms, relative_error
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import cpu, rasterize_links
from kinesplat.rasterizer.gauss_newton import normal_equations
from kinesplat.twists import adjoint, exp_twist

SIZE = (34, 27)
LEVELS = tuple(cpu.native().levels())


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KINESPLAT_SIMD", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def channels(splats: Gaussians, index: Tensor, Ts: Tensor, camera: Camera, background: Tensor) -> Tensor:
    """Rendered (height, width, 4) in float64."""
    out = rasterize_links(splats, index, Ts, camera, background, backend="reference", outputs=("rgb", "alpha"))
    assert out.rgb is not None
    assert out.alpha is not None
    return torch.cat([out.rgb, out.alpha[..., None]], -1)


def twisted(x: Tensor, Ts: Tensor, camera: Camera) -> Tensor:
    """Ts_world_link after the camera-frame twists x (links * 6)."""
    T = camera.T_cam_world
    return torch.linalg.inv(T) @ exp_twist(x.reshape(-1, 6)) @ T @ Ts


def differences(f: Callable[[Tensor], Tensor], count: int, h: float = 1e-6) -> Tensor:
    """Jacobian ``(m, count)`` of f at zero by central differences in float64."""
    steps = h * torch.eye(count, dtype=torch.float64)
    return torch.stack([(f(step) - f(-step)) / (2 * h) for step in steps], -1)


def dense(
    splats: Gaussians, index: Tensor, Ts: Tensor, camera: Camera, background: Tensor, target: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, J^T W r and J^T W J from the dense Jacobian; target and weight (height, width, 4)."""
    residual = (channels(splats, index, Ts, camera, background) - target).reshape(-1)
    J = differences(
        lambda x: channels(splats, index, twisted(x, Ts, camera), camera, background).reshape(-1), 6 * len(Ts)
    )
    W = weight.reshape(-1)
    return (W * residual**2).sum(), J.T @ (W * residual), J.T @ (W[:, None] * J)


def problem(n: int, links: int, coefficients: int = 9) -> tuple[Gaussians, Tensor, Tensor, Camera, Tensor]:
    splats, camera = random_gaussians(n, coefficients=coefficients, size=0.08), look(*SIZE)
    background = torch.rand(3).double()
    return splats, torch.randint(0, links, (n,)), random_transforms(links, spread=0.05), camera, background


def mask_of(splats: Gaussians, index: Tensor, Ts: Tensor, camera: Camera) -> Tensor:
    """Pixels away from thresholds; the posed splats are put together by hand (colours do not matter here)."""
    T = Ts[index]
    turn = T[:, :3, :3]
    means = (turn @ splats.means[..., None])[..., 0] + T[:, :3, 3]
    w = torch.sqrt((1 + turn.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(min=1e-9)) / 2
    axis = torch.stack(
        [turn[:, 2, 1] - turn[:, 1, 2], turn[:, 0, 2] - turn[:, 2, 0], turn[:, 1, 0] - turn[:, 0, 1]], -1
    )
    a = torch.cat([w[:, None], axis / (4 * w[:, None])], -1)
    b = splats.quats / splats.quats.norm(dim=-1, keepdim=True)
    real = a[:, :1] * b[:, :1] - (a[:, 1:] * b[:, 1:]).sum(-1, keepdim=True)
    imaginary = a[:, :1] * b[:, 1:] + b[:, :1] * a[:, 1:] + torch.linalg.cross(a[:, 1:], b[:, 1:])
    posed = Gaussians(means, torch.cat([real, imaginary], -1), splats.scales, splats.opacities, splats.sh)
    return away_from_thresholds(posed, camera)


@pytest.mark.parametrize(("n", "links", "coefficients"), [(3, 1, 1), (60, 1, 16), (120, 3, 9), (90, 2, 4)])
def test_against_the_dense_jacobian(level: str, n: int, links: int, coefficients: int) -> None:
    splats, index, Ts, camera, background = problem(n, links, coefficients)
    mask = mask_of(splats, index, Ts, camera)
    target = torch.rand(SIZE[1], SIZE[0], 4).double()
    weights = torch.rand(2, SIZE[1], SIZE[0]).double() * mask
    full = torch.cat([weights[:1, ..., None].expand(1, -1, -1, 3)[0], weights[1, ..., None]], -1)
    loss, gradient, hessian = dense(splats, index, Ts, camera, background, target, full)
    got = normal_equations(
        in_dtype(splats, torch.float32, False),
        index,
        Ts.float(),
        camera,
        target[..., :3],
        alpha=target[..., 3],
        rgb_weight=weights[0],
        alpha_weight=weights[1],
        background=background.float(),
    )
    assert relative_error(got.loss, loss) < 1e-6
    assert relative_error(got.gradient, gradient) < 2e-5
    assert relative_error(got.hessian, hessian) < 2e-5
    assert torch.equal(got.hessian, got.hessian.mT)


def test_without_alpha_and_weights() -> None:
    splats, index, Ts, camera, background = problem(80, 3)
    target = torch.rand(SIZE[1], SIZE[0], 4).double()
    mask = mask_of(splats, index, Ts, camera)
    weight = torch.stack([mask, mask, mask, torch.zeros_like(mask)], -1)
    loss, gradient, hessian = dense(splats, index, Ts, camera, background, target, weight)
    splats32 = in_dtype(splats, torch.float32, False)
    got = normal_equations(
        splats32, index, Ts.float(), camera, target[..., :3], rgb_weight=mask, background=background.float()
    )
    assert relative_error(got.loss, loss) < 1e-6
    assert relative_error(got.gradient, gradient) < 2e-5
    assert relative_error(got.hessian, hessian) < 2e-5
    ones = torch.ones_like(mask)
    plain, weighted = (
        normal_equations(splats32, index, Ts.float(), camera, target[..., :3], rgb_weight=w) for w in (None, ones)
    )
    assert torch.equal(plain.hessian, weighted.hessian)


def test_gradient_against_finite_differences_of_the_native_loss() -> None:
    """The model predicts the change of the loss for small twists of links and, contracted, of the camera."""
    splats, index, Ts, camera, _ = problem(200, 3)
    splats = in_dtype(splats, torch.float32, False)
    target = torch.rand(SIZE[1], SIZE[0], 3)
    model = normal_equations(splats, index, Ts.float(), camera, target)
    camera_twist = model.contract(torch.eye(6).repeat(3, 1))
    direction = torch.randn(6).double()
    losses = []
    for h in (1e-7, -1e-7):
        moved = Camera(camera.K, exp_twist(h * direction) @ camera.T_cam_world, *SIZE)
        rgb = rasterize_links(
            in_dtype(splats, torch.float64, False), index, Ts, moved, backend="reference", outputs=("rgb",)
        ).rgb
        assert rgb is not None
        losses.append(float(((rgb - target) ** 2).sum()))
    slope = (losses[0] - losses[1]) / 2e-7
    assert slope == pytest.approx(float(2 * camera_twist.gradient @ direction), rel=1e-4, abs=1e-4)


def test_contraction_reaches_joints() -> None:
    """A hinge about the world's z axis on link 1 of 2, by the formula in the docstring."""
    splats, index, Ts, camera, background = problem(60, 2)
    target = torch.rand(SIZE[1], SIZE[0], 3).double()
    mask = mask_of(splats, index, Ts, camera)
    link_jacobian = torch.zeros(2, 6, 1, dtype=torch.float64)
    link_jacobian[1, 5, 0] = 1.0
    P = (adjoint(camera.T_cam_world) @ link_jacobian).flatten(-3, -2)
    got = normal_equations(
        in_dtype(splats, torch.float32, False),
        index,
        Ts.float(),
        camera,
        target,
        rgb_weight=mask,
        background=background.float(),
    ).contract(P)

    def rgb(q: Tensor) -> Tensor:
        turn = exp_twist(link_jacobian[1, :, 0] * q)
        moved = torch.stack([Ts[0], turn @ Ts[1]])
        return channels(splats, index, moved, camera, background)[..., :3]

    J = differences(rgb, 1)[..., 0]
    residual = rgb(torch.zeros(1, dtype=torch.float64)) - target
    assert relative_error(got.gradient[0], (J * residual * mask[..., None]).sum()) < 2e-5
    assert relative_error(got.hessian[0, 0], (J * J * mask[..., None]).sum()) < 2e-5


def test_starts_share_one_target() -> None:
    splats, index, Ts, camera, _ = problem(100, 3)
    splats = in_dtype(splats, torch.float32, False)
    starts = exp_twist(0.05 * torch.randn(5, 1, 6)) @ Ts.float()
    target = torch.rand(SIZE[1], SIZE[0], 3)
    batch = normal_equations(splats, index, starts, camera, target)
    for i in range(5):
        one = normal_equations(splats, index, starts[i], camera, target)
        for name in ("loss", "gradient", "hessian"):
            assert torch.equal(getattr(batch, name)[i], getattr(one, name))


@pytest.mark.usefixtures("threads")
def test_bitwise_equal_over_threads(level: str) -> None:
    splats, index, Ts, camera, _ = problem(800, 6)
    splats = in_dtype(splats, torch.float32, False)
    target = torch.rand(2, 1, SIZE[1], SIZE[0], 3)
    starts = exp_twist(0.05 * torch.randn(3, 1, 6)) @ Ts.float()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(normal_equations(splats, index, starts, camera, target, alpha=target[..., 0]))
    for other in results[1:]:
        for name in ("loss", "gradient", "hessian"):
            assert torch.equal(getattr(results[0], name), getattr(other, name))


def test_bad_targets() -> None:
    splats, index, Ts, camera, _ = problem(5, 1)
    splats, Ts = in_dtype(splats, torch.float32, False), Ts.float()
    rgb = torch.rand(SIZE[1], SIZE[0], 3)
    with pytest.raises(InputError, match="target rgb has shape"):
        normal_equations(splats, index, Ts, camera, rgb[:-1])
    with pytest.raises(InputError, match="target rgb contains NaN"):
        normal_equations(splats, index, Ts, camera, rgb * float("nan"))
    with pytest.raises(InputError, match="negative weights"):
        normal_equations(splats, index, Ts, camera, rgb, rgb_weight=-rgb[..., 0])
    with pytest.raises(InputError, match="without alpha"):
        normal_equations(splats, index, Ts, camera, rgb, alpha_weight=rgb[..., 0])
    with pytest.raises(InputError, match="does not broadcast"):
        normal_equations(splats, index, Ts.expand(2, 1, 4, 4), camera, rgb.expand(3, *rgb.shape))
