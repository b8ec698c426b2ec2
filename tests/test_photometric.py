"""L1 + SSIM against plain torch in float64 with the full 11 x 11 window, and against finite differences."""

import math

import pytest
import torch
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.rasterizer import cpu
from kinesplat.rasterizer.photometric import in_torch, l1_ssim

SHAPES = [(1, 1), (3, 2), (11, 11), (12, 17), (64, 64), (65, 48), (130, 21)]


def plain(rendered: Tensor, truth: Tensor, weight: float) -> Tensor:
    """The definition, written down: moments under the window, then the quotient."""
    offsets = torch.arange(-5, 6, dtype=rendered.dtype)
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    planes = lambda t: t.movedim(-1, -3).reshape(-1, 1, *t.shape[-3:-1])  # noqa: E731
    mean = lambda t: torch.nn.functional.conv2d(t, window, padding=5)  # noqa: E731
    x, y = planes(rendered), planes(truth.expand(rendered.shape))
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    values = (1 - weight) * (x - y).abs() + weight * (1 - ssim)
    return values.reshape(*rendered.shape[:-3], -1).mean(-1)


def pair(kind: str, *shape: int) -> tuple[Tensor, Tensor]:
    truth = torch.rand(*shape, 3)
    if kind == "close":
        return truth + 0.01 * torch.randn(*shape, 3), truth
    if kind == "flat":  # nearly constant and bright: where the textbook formula in float32 loses its digits
        return 0.98 + 1e-3 * torch.rand(*shape, 3), torch.full((*shape, 3), 0.97)
    return torch.rand(*shape, 3), truth


def value_and_gradient(function, rendered: Tensor, truth: Tensor, weight: float, v: Tensor) -> tuple[Tensor, Tensor]:
    leaf = rendered.clone().requires_grad_()
    loss = function(leaf, truth, weight)
    (gradient,) = torch.autograd.grad((loss * v).sum(), leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("level", cpu.native().levels())
@pytest.mark.parametrize("kind", ["random", "close", "flat"])
def test_value_and_gradient_are_those_of_the_definition(level: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINESPLAT_SIMD", level)
    for seed, (height, width) in enumerate(SHAPES):
        torch.manual_seed(seed)
        batch = ((), (2,), (2, 3))[seed % 3]
        rendered, truth = pair(kind, *batch, height, width)
        weight, v = (0.2, 0.0, 1.0)[seed % 3], torch.randn(batch)
        loss, gradient = value_and_gradient(l1_ssim, rendered, truth, weight, v)
        exact, exact_gradient = value_and_gradient(plain, rendered.double(), truth.double(), weight, v.double())
        assert loss.shape == batch
        assert torch.allclose(loss.double(), exact, rtol=2e-6, atol=3e-9), (height, width)
        error = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
        assert error < 1e-5, (height, width, float(error))


@pytest.mark.parametrize("kind", ["random", "close", "flat"])
def test_torch_path_is_the_native_one(kind: str) -> None:
    """What runs on a GPU, run here; flat pictures lose digits of the variances, hence their wider bound."""
    for seed, (height, width) in enumerate(SHAPES):
        torch.manual_seed(seed)
        batch = ((), (2,), (2, 3))[seed % 3]
        rendered, truth = pair(kind, *batch, height, width)
        weight, v = (0.2, 0.0, 1.0)[seed % 3], torch.randn(batch)
        found = value_and_gradient(in_torch, rendered, truth, weight, v)
        exact = value_and_gradient(l1_ssim, rendered, truth, weight, v)
        assert torch.allclose(found[0], exact[0], rtol=1e-5, atol=1e-7), (height, width)
        assert (found[1] - exact[1]).norm() / exact[1].norm() < (1e-3 if kind == "flat" else 1e-5), (height, width)
    assert in_torch(truth, truth, 0.5).abs().max() == 0


def test_gradient_is_the_finite_difference() -> None:
    torch.manual_seed(0)
    rendered, truth = pair("random", 19, 23)
    _, gradient = value_and_gradient(l1_ssim, rendered, truth, 0.3, torch.ones(()))
    step = 1e-6
    for _ in range(20):
        at = tuple(int(torch.randint(0, s, ())) for s in rendered.shape)
        ends = []
        for sign in (1.0, -1.0):
            moved = rendered.double()
            moved[at] += sign * step
            ends.append(plain(moved, truth.double(), 0.3))
        assert math.isclose(float(gradient[at]), float((ends[0] - ends[1]) / (2 * step)), rel_tol=1e-4, abs_tol=1e-8)


def test_equal_images_cost_nothing_and_threads_change_nothing() -> None:
    torch.manual_seed(1)
    rendered, truth = pair("close", 3, 150, 70)
    assert (l1_ssim(truth, truth) == 0).all()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradient(l1_ssim, rendered, truth, 0.2, torch.ones(3)))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_one_truth_serves_many_and_strides_do_not_matter() -> None:
    torch.manual_seed(2)
    rendered, truth = pair("random", 4, 20, 30)
    shared = l1_ssim(rendered, truth[0])
    for i in range(4):
        assert torch.equal(shared[i], l1_ssim(rendered[i], truth[0]))
    strided = rendered.movedim(-1, 0).contiguous().movedim(0, -1)
    assert torch.equal(l1_ssim(strided, truth), l1_ssim(rendered, truth))
    assert l1_ssim(rendered[:0], truth[:0]).shape == (0,)


def test_nan_shows() -> None:
    rendered, truth = pair("random", 2, 20, 20)
    rendered[1, 3, 4, 0] = torch.nan
    loss = l1_ssim(rendered, truth)
    assert torch.isfinite(loss[0])
    assert torch.isnan(loss[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 1.5}, "weight is 1.5"),
        ({"truth": torch.rand(5, 5, 3)}, "does not broadcast"),
        ({"truth": torch.rand(8, 8, 3, dtype=torch.float64)}, "truth is torch.float64"),
        ({"truth": torch.rand(8, 8, 3).requires_grad_()}, "requires grad"),
        ({"rendered": torch.rand(0, 8, 3), "truth": torch.rand(0, 8, 3)}, "no pixels"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_wrong_input_is_named(change: dict, message: str) -> None:
    arguments = {"rendered": torch.rand(8, 8, 3), "truth": torch.rand(8, 8, 3), "weight": 0.2, **change}
    with pytest.raises(InputError, match=message):
        l1_ssim(**arguments)
