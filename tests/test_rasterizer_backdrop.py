"""Normal equations over a backdrop, a picture behind the robot: against a dense Jacobian of the float64 reference."""

import pytest
import torch
from rasterizer_scenes import in_dtype, relative_error
from test_rasterizer_gauss_newton import LEVELS, SIZE, channels, differences, mask_of, problem, twisted
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.rasterizer.gauss_newton import normal_equations


@pytest.mark.parametrize("level", LEVELS)
def test_against_the_dense_jacobian(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINESPLAT_SIMD", level)
    splats, index, Ts, camera, _ = problem(90, 3, 9)
    mask = mask_of(splats, index, Ts, camera)
    target, backdrop = torch.rand(2, SIZE[1], SIZE[0], 4).double()
    weight = torch.stack([mask.double()] * 3 + [0.5 * mask], dim=-1)

    def residual(x: Tensor) -> Tensor:
        over_black = channels(splats, index, twisted(x, Ts, camera), camera, torch.zeros(3).double())
        rgb = over_black[..., :3] + (1.0 - over_black[..., 3:]) * backdrop[..., :3]
        return (torch.cat([rgb, over_black[..., 3:]], dim=-1) - target).reshape(-1)

    r, J, W = residual(torch.zeros(18).double()), differences(residual, 18), weight.reshape(-1)
    got = normal_equations(
        in_dtype(splats, torch.float32, False),
        index,
        Ts.float(),
        camera,
        target[..., :3],
        alpha=target[..., 3],
        rgb_weight=mask.double(),
        alpha_weight=0.5 * mask,
        background=(0.3, 0.9, 0.1),
        backdrop=backdrop[..., :3],
    )
    assert relative_error(got.loss, (W * r**2).sum()) < 1e-6
    assert relative_error(got.gradient, J.T @ (W * r)) < 2e-5
    assert relative_error(got.hessian, J.T @ (W[:, None] * J)) < 2e-5


def test_a_backdrop_of_one_colour_is_a_background() -> None:
    splats, index, Ts, camera, background = problem(50, 2)
    splats, Ts, background = in_dtype(splats, torch.float32, False), Ts.float(), background.float()
    rgb = torch.rand(2, SIZE[1], SIZE[0], 3)
    plain = normal_equations(splats, index, Ts, camera, rgb, background=background)
    shown = normal_equations(splats, index, Ts, camera, rgb, backdrop=background.expand(SIZE[1], SIZE[0], 3))
    for name in ("loss", "gradient", "hessian"):
        assert torch.equal(getattr(plain, name), getattr(shown, name))


@pytest.mark.usefixtures("unchecked_types")
def test_bad_backdrops() -> None:
    splats, index, Ts, camera, _ = problem(5, 1)
    splats, Ts, rgb = in_dtype(splats, torch.float32, False), Ts.float(), torch.rand(SIZE[1], SIZE[0], 3)
    with pytest.raises(InputError, match="backdrop has shape"):
        normal_equations(splats, index, Ts, camera, rgb, backdrop=rgb[:-1])
    with pytest.raises(InputError, match="backdrop contains NaN"):
        normal_equations(splats, index, Ts, camera, rgb, backdrop=rgb * float("nan"))
