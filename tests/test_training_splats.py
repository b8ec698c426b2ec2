"""Splats that are optimised while they come and go: the optimiser's memory, density control, the canonical stage."""

import math

import pytest
import torch

from kinesplat.camera import Camera
from kinesplat.dataset.frames import Frames
from kinesplat.gaussians import Parameters
from kinesplat.rasterizer import rasterize
from kinesplat.rasterizer.projection import quats_to_rotations
from kinesplat.training.adaptive_control import SHRINK, ScreenGradients, Thresholds, densify_and_prune
from kinesplat.training.canonical import fit_canonical, round_splats, scene_size
from kinesplat.training.loop import psnr
from kinesplat.training.splat_optimizer import Rates, SplatOptimizer


def random_parameters(n: int) -> Parameters:
    return Parameters(torch.randn(n, 3), torch.randn(n, 4), torch.randn(n, 3) - 3, torch.randn(n), torch.randn(n, 9, 3))


def rows(parameters: Parameters, which: slice | list[int]) -> Parameters:
    return parameters.select(torch.arange(len(parameters))[which])


def pull(splats: SplatOptimizer, target: Parameters) -> None:
    difference = [(a - target.tensors()[name]).square().sum() for name, a in splats.parameters.tensors().items()]
    torch.stack(difference).sum().backward()
    splats.step(1.0)


def same(a: Parameters, b: Parameters) -> bool:
    return all(torch.equal(value, b.tensors()[name]) for name, value in a.tensors().items())


def test_kept_rows_go_on_as_if_nothing_had_happened() -> None:
    """Drop and append rows half way: those that stay move as in a run of their own."""
    start, target = random_parameters(12), random_parameters(12)
    keep = torch.arange(12) % 3 != 0
    whole, alone = (SplatOptimizer(p, Rates(), 2.0) for p in (start, start.select(keep)))
    for _ in range(5):
        pull(whole, target)
        pull(alone, target.select(keep))
    extra = random_parameters(4)
    whole.rearrange(keep, extra)
    assert same(rows(whole.detached(), slice(8, 12)), extra)
    joined = Parameters(*(torch.cat([value[keep], value[:4]]) for value in target.tensors().values()))
    for _ in range(5):
        pull(whole, joined)
        pull(alone, target.select(keep))
    for name, value in rows(whole.detached(), slice(0, 8)).tensors().items():  # vectors and tails round differently
        torch.testing.assert_close(value, alone.detached().tensors()[name], rtol=1e-5, atol=1e-6)
    assert not same(rows(whole.detached(), slice(8, 12)), extra)


def test_a_state_goes_on_bit_by_bit() -> None:
    start, target = random_parameters(6), random_parameters(6)
    first = SplatOptimizer(start, Rates(), 1.0)
    for _ in range(3):
        pull(first, target)
    second = SplatOptimizer(random_parameters(9), Rates(), 1.0)
    second.load_state_dict(first.state_dict())
    for splats in (first, second):
        for _ in range(3):
            pull(splats, target)
    assert same(first.detached(), second.detached())


def test_screen_gradients_are_those_of_the_pixel() -> None:
    """A loss that is linear in the projected place, with K's own focal length: its gradient is known."""
    camera = Camera.look_at((0.0, -3.0, 0.5), (0.0, 0.0, 0.0), width=100, height=80)
    means = (0.01 * torch.randn(50, 3)).requires_grad_()  # near the axis, where "across the ray" is the image plane
    pixels, _ = camera.project(means)
    pull_px = torch.randn(50, 2)
    (pixels * pull_px).sum().backward()
    gradients = ScreenGradients(50)
    assert means.grad is not None
    gradients.add(means, means.grad, camera)
    assert torch.allclose(gradients.mean, pull_px.norm(dim=-1) * 50.0, rtol=0.02)
    gradients.add(means, torch.zeros_like(means), camera)  # a view that does not see them does not count
    assert torch.allclose(gradients.mean, pull_px.norm(dim=-1) * 50.0, rtol=0.02)


def densified(thresholds: Thresholds, pulls: list[float]) -> tuple[Parameters, Parameters]:
    """Four splats: small, large, small, transparent."""
    n = 4
    quats = torch.randn(n, 4)
    log_scales = torch.tensor([[0.002], [0.1], [0.003], [0.004]]).log() + torch.tensor([0.0, -1.0, -2.0])
    opacities = torch.tensor([0.9, 0.8, 0.7, 0.001])
    before = Parameters(torch.randn(n, 3), quats, log_scales, opacities.logit(), torch.randn(n, 9, 3))
    splats, gradients = SplatOptimizer(before, Rates(), 1.0), ScreenGradients(n)
    gradients.total, gradients.views = torch.tensor(pulls) * 3.0, torch.full((n,), 3.0)
    densify_and_prune(splats, gradients, thresholds, 1.0, torch.Generator().manual_seed(0))
    return before, splats.detached()


def test_small_ones_are_cloned_large_ones_split_transparent_ones_dropped() -> None:
    before, after = densified(Thresholds(gradient=1e-3), [2e-3, 2e-3, 1e-4, 1.0])
    assert len(after) == 5  # two kept, a copy of the first, two halves of the second
    assert same(rows(after, [0, 1]), rows(before, [0, 2]))
    assert same(rows(after, [2]), rows(before, [0]))
    halves, parent = rows(after, [3, 4]), rows(before, [1])
    assert torch.allclose(halves.log_scales, (parent.log_scales - math.log(SHRINK)).expand(2, 3))
    assert torch.equal(halves.sh, parent.sh.expand(2, 9, 3))
    offset = halves.means - parent.means
    inside = offset @ quats_to_rotations(parent.quats)[0] / parent.log_scales.exp()
    assert (inside.abs() < 5.0).all()
    assert (offset[0] != offset[1]).all()


def test_there_are_never_too_many() -> None:
    before, after = densified(Thresholds(gradient=1e-3, most=4), [2e-3, 3e-3, 2e-3, 0.0])
    assert len(after) == 4
    assert same(rows(after, [0, 1]), rows(before, [0, 2]))  # the strongest was split, the others stay as they are
    _, after = densified(Thresholds(gradient=1e-3, most=2), [2e-3, 3e-3, 2e-3, 0.0])
    assert len(after) == 3  # nothing is added where there are too many already; only the transparent one goes


def test_round_splats_are_as_large_as_their_neighbours_are_far() -> None:
    grid = 0.1 * torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    splats = round_splats(grid, torch.rand(64, 3)).activate()
    assert torch.allclose(splats.scales, torch.full((64, 3), 0.1), rtol=1e-4)
    camera = Camera.look_at((2.0, 0.1, 0.1), (0.1, 0.1, 0.1), width=8, height=8)
    assert (rasterize(splats, camera).rgb >= 0.0).all()


@pytest.fixture(scope="module")
def ball() -> tuple[Parameters, Frames]:
    """Pictures of a striped ball, rendered from splats of our own, and a poor start."""
    directions = torch.nn.functional.normalize(torch.randn(1500, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    stripes = 0.5 + 0.4 * torch.sin(14.0 * directions[:, 2:]).sign() * torch.tensor([1.0, -1.0, 0.2])
    truth = round_splats(0.3 * directions, stripes)
    truth.logit_opacities.fill_(4.0)
    eyes = 1.2 * torch.nn.functional.normalize(torch.randn(12, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    camera = Camera.look_at(eyes, (0.0, 0.0, 0.0), width=64, height=64)
    out = rasterize(truth.activate(), camera)
    assert out.rgb is not None
    assert out.alpha is not None
    images = ((255.0 * part).round().clamp(0, 255).to(torch.uint8) for part in (out.rgb, out.alpha))
    frames = Frames(torch.zeros(12, 1, dtype=torch.float64), camera.to(dtype=torch.float64), *images)
    return round_splats(0.3 * directions[::10], torch.full((150, 3), 0.5)), frames


def quality(splats: Parameters, frames: Frames) -> float:
    out = rasterize(splats.activate(), frames.camera.to(dtype=torch.float32), outputs=("rgb",))
    assert out.rgb is not None
    return float(psnr(out.rgb, frames.rgb / 255.0).mean())


def test_the_canonical_stage_explains_its_pictures(ball: tuple[Parameters, Frames]) -> None:
    start, frames = ball
    train, test = frames.select(slice(0, 10)), frames.select(slice(10, 12))
    fixed = fit_canonical(start, train, steps=300, thresholds=Thresholds(gradient=1e9))
    grown = fit_canonical(start, train, steps=300, thresholds=Thresholds(most=2000))
    assert len(fixed) <= 150
    assert 300 < len(grown) <= 2000
    assert quality(start, train) + 1.5 < quality(fixed, train) < quality(grown, train)
    assert quality(start, test) + 1.5 < quality(fixed, test)


def test_the_canonical_stage_repeats(ball: tuple[Parameters, Frames]) -> None:
    start, frames = ball
    first, second = (fit_canonical(start, frames, steps=60, seed=3) for _ in range(2))
    assert same(first, second)


def test_scene_size() -> None:
    camera = Camera.look_at(torch.tensor([[2.0, 0, 0], [-2.0, 0, 0]]), (0.0, 0.0, 0.0))
    assert abs(scene_size(camera) - 2.2) < 1e-6
