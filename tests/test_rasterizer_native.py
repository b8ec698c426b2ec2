"""The native kernel against the float64 reference, over SIMD levels, threads, batches and entries."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from rasterizer_scenes import (
    FIELDS,
    away_from_thresholds,
    in_dtype,
    look,
    random_gaussians,
    random_transforms,
    relative_error,
)

from kinesplat.camera import Camera
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import OUTPUTS, cpu, rasterize, rasterize_links

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


def leaves_of(gaussians: Gaussians, camera: Camera, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    values = {f: getattr(gaussians, f) for f in FIELDS} | {"K": camera.K, "T_cam_world": camera.T_cam_world}
    return {k: v.detach().to(dtype).clone().requires_grad_() for k, v in values.items()}


def gradients(
    leaves: dict[str, torch.Tensor],
    size: tuple[int, int],
    weights: dict[str, torch.Tensor],
    backend: str,
    outputs: Sequence[str] = ("rgb", "alpha", "depth"),
) -> dict[str, torch.Tensor]:
    gaussians = Gaussians(**{f: leaves[f] for f in FIELDS})
    camera = Camera(leaves["K"], leaves["T_cam_world"], *size)
    out = rasterize(gaussians, camera, leaves.get("background", (0.2, 0.5, 0.9)), backend=backend, outputs=outputs)
    loss = torch.stack([(getattr(out, k) * w.to(leaves["K"].dtype)).sum() for k, w in weights.items()]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def image_weights(camera: Camera, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    plane = (camera.height, camera.width)
    weights = {k: (torch.rand(plane, dtype=torch.float64) - 0.25) * mask for k in ("alpha", "depth")}
    return weights | {"rgb": (torch.rand(*plane, 3, dtype=torch.float64) - 0.25) * mask[..., None]}


@pytest.mark.parametrize("coefficients", [1, 4, 9, 16])
@pytest.mark.parametrize("n", [1, 70, 500])
def test_images_and_gradients(level: str, n: int, coefficients: int) -> None:
    gaussians, camera = random_gaussians(n, coefficients=coefficients), look(61, 50)
    mask = away_from_thresholds(gaussians, camera)
    truth = rasterize(gaussians, camera, backend="reference", outputs=OUTPUTS)
    image = rasterize(in_dtype(gaussians, torch.float32), camera, backend="cpu", outputs=OUTPUTS)
    for name in ("rgb", "alpha", "depth", "link_id"):
        difference = (getattr(image, name).double() - getattr(truth, name)).abs()
        assert (difference.reshape(50, 61, -1).amax(-1) * mask).max() <= 1e-5, name
    weights = image_weights(camera, mask)
    native = gradients(leaves_of(gaussians, camera, torch.float32), (61, 50), weights, "cpu")
    exact = gradients(leaves_of(gaussians, camera, torch.float64), (61, 50), weights, "reference")
    for name in exact:
        assert relative_error(native[name], exact[name]) < 1e-5, name


@pytest.mark.parametrize("given", ["rgb", "alpha", "depth"])
def test_each_output_alone(level: str, given: str) -> None:
    gaussians, camera = random_gaussians(200), look(40, 36)
    weights = {given: image_weights(camera, away_from_thresholds(gaussians, camera))[given]}
    native, exact = (
        gradients(leaves_of(gaussians, camera, dtype), (40, 36), weights, backend, outputs=(given,))
        for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference"))
    )
    for name in exact:
        assert relative_error(native[name], exact[name]) < 1e-5, name


def test_background_gradient() -> None:
    gaussians, camera = random_gaussians(50, batch=(2, 1)), look(20, 18)
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        background = torch.tensor([[0.1, 0.5, 0.9]] * 3, dtype=dtype, requires_grad=True)
        rgb = rasterize(in_dtype(gaussians, dtype, False), camera, background, backend=backend, outputs=("rgb",)).rgb
        assert rgb is not None
        assert rgb.shape == (2, 3, 18, 20, 3)
        (rgb * rgb).sum().backward()
        results.append(background.grad)
    assert relative_error(*results) < 1e-5


def scene_bytes(threads: int, backward: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(3)
    torch.set_num_threads(threads)
    gaussians = random_gaussians(3000, batch=(2, 1), size=0.03, dtype=torch.float32)
    cameras = Camera.look_at(
        2 * torch.nn.functional.normalize(torch.randn(2, 3), dim=-1), (0.0, 0.0, 0.0), width=130, height=97
    )
    leaves = leaves_of(gaussians, cameras, torch.float32)
    camera = Camera(leaves["K"], leaves["T_cam_world"], 130, 97)
    out = rasterize(Gaussians(**{f: leaves[f] for f in FIELDS}), camera, backend="cpu", outputs=OUTPUTS)
    assert out.rgb is not None
    assert out.depth is not None
    loss = (out.rgb * torch.rand_like(out.rgb)).sum() + (out.depth * torch.rand_like(out.depth)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values())) if backward else ()
    return [getattr(out, name).detach() for name in OUTPUTS] + list(grads)


@pytest.mark.usefixtures("threads")
def test_bitwise_equal_over_threads_and_runs(level: str) -> None:
    first = scene_bytes(1)
    for count in (1, 2, 3, 8):
        for a, b in zip(first, scene_bytes(count), strict=True):
            assert torch.equal(a, b)


def test_outputs_do_not_change_each_other() -> None:
    gaussians, camera = random_gaussians(400, dtype=torch.float32), look(dtype=torch.float32)
    everything = rasterize(gaussians, camera, outputs=OUTPUTS)
    for name in OUTPUTS:
        alone = rasterize(gaussians, camera, outputs=(name,))
        assert torch.equal(getattr(alone, name), getattr(everything, name)), name


def test_outputs_are_written_everywhere(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """Outputs and gradients start poisoned with NaN (or -77), and nothing of it survives."""
    empty, zeros = torch.empty, torch.zeros

    def poisoned(*size: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*size, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else -77)

    gaussians, camera = random_gaussians(100, dtype=torch.float32), look(37, 21, dtype=torch.float32)
    leaves = leaves_of(gaussians, camera, torch.float32)
    monkeypatch.setattr(torch, "empty", poisoned)
    out = rasterize(
        Gaussians(**{f: leaves[f] for f in FIELDS}), Camera(leaves["K"], leaves["T_cam_world"], 37, 21), outputs=OUTPUTS
    )
    assert out.rgb is not None
    grads = torch.autograd.grad(out.rgb.sum(), list(leaves.values()))
    monkeypatch.setattr(torch, "empty", empty)
    assert torch.zeros is zeros
    for value in (*(getattr(out, name) for name in OUTPUTS), *grads):
        assert torch.isfinite(value).all()
        assert not (value == -77).any()


@pytest.mark.parametrize("links", [1, 5])
@pytest.mark.parametrize("ordered", [True, False])
def test_links_entry_against_the_reference(level: str, links: int, ordered: bool) -> None:
    gaussians, camera, Ts = random_gaussians(150), look(33, 30), random_transforms(3, links)
    index = torch.randint(0, links, (150,))
    index = index.sort().values if ordered else index
    results = []
    weights = torch.randn(3, 30, 33, 3, dtype=torch.float64)
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        leaves = leaves_of(gaussians, camera, dtype) | {"Ts_world_link": Ts.to(dtype).clone().requires_grad_()}
        splats, view = Gaussians(**{f: leaves[f] for f in FIELDS}), Camera(leaves["K"], leaves["T_cam_world"], 33, 30)
        out = rasterize_links(splats, index, leaves["Ts_world_link"], view, backend=backend, outputs=("rgb", "link_id"))
        assert out.rgb is not None
        grads = torch.autograd.grad((out.rgb * weights.to(dtype)).sum(), list(leaves.values()))
        results.append((out, dict(zip(leaves, grads, strict=True))))
    (native, native_grads), (exact, exact_grads) = results
    torch.testing.assert_close(native.rgb.double(), exact.rgb, rtol=0, atol=1e-5)
    assert (native.link_id == exact.link_id).all()
    for name in exact_grads:
        assert relative_error(native_grads[name], exact_grads[name]) < 2e-5, name


@pytest.mark.parametrize("influences", [1, 2, 3, 4])
def test_skinning_weights_against_the_reference(level: str, influences: int) -> None:
    gaussians, camera, Ts = random_gaussians(120), look(33, 30), random_transforms(2, 6, spread=0.05)
    index = torch.randint(0, 6, (120, influences))
    weights = torch.rand(120, influences).softmax(-1).double()
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (Ts, weights, gaussians.means)]
        moved = in_dtype(gaussians, dtype, False)
        moved = Gaussians(leaves[2], moved.quats, moved.scales, moved.opacities, moved.sh)
        out = rasterize_links(
            moved, index, leaves[0], camera, link_weights=leaves[1], backend=backend, outputs=("rgb", "link_id")
        )
        assert out.rgb is not None
        results.append((out, torch.autograd.grad((out.rgb**2).sum(), leaves)))
    (native, native_grads), (exact, exact_grads) = results
    torch.testing.assert_close(native.rgb.double(), exact.rgb, rtol=0, atol=1e-5)
    assert (native.link_id == exact.link_id).all()
    for a, b in zip(native_grads, exact_grads, strict=True):
        assert relative_error(a, b) < 2e-5


def test_links_entry_is_the_single_entry_of_posed_splats() -> None:
    """Splats of colour degree 0, posed by hand, render the same."""
    gaussians, camera = random_gaussians(80, coefficients=1, dtype=torch.float32), look(dtype=torch.float32)
    angle = torch.tensor(0.7)
    T = torch.eye(4)
    T[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    T[:3, 3] = torch.tensor([0.1, -0.2, 0.05])
    turn = torch.tensor([(angle / 2).cos(), 0.0, 0.0, (angle / 2).sin()])
    w, x, y, z = gaussians.quats.unbind(-1)
    c, s = turn[0], turn[3]
    quats = torch.stack([c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w], -1)
    posed = Gaussians(
        gaussians.means @ T[:3, :3].T + T[:3, 3], quats, gaussians.scales, gaussians.opacities, gaussians.sh
    )
    a = rasterize(posed, camera).rgb
    b = rasterize_links(gaussians, torch.zeros(80, dtype=torch.int32), T[None], camera).rgb
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_pose_only_gradients_equal_those_with_everything() -> None:
    gaussians, camera = random_gaussians(300, dtype=torch.float32), look(dtype=torch.float32)
    Ts, index = random_transforms(4, dtype=torch.float32), torch.randint(0, 4, (300,))
    grads = []
    for everything in (False, True):
        leaf = Ts.clone().requires_grad_()
        splats = in_dtype(gaussians, torch.float32, everything)
        out = rasterize_links(splats, index, leaf, camera, outputs=("rgb",))
        assert out.rgb is not None
        (out.rgb**2).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_backward_twice_and_after_other_frames() -> None:
    gaussians, camera = in_dtype(random_gaussians(100), torch.float32), look(dtype=torch.float32)
    out = rasterize(gaussians, camera, outputs=("rgb",))
    assert out.rgb is not None
    first = torch.autograd.grad(out.rgb.sum(), gaussians.means, retain_graph=True)[0]
    for _ in range(3):
        rasterize(in_dtype(random_gaussians(50), torch.float32), camera)
    assert torch.equal(first, torch.autograd.grad(out.rgb.sum(), gaussians.means)[0])


def test_editing_inputs_before_backward_is_refused() -> None:
    gaussians, camera = in_dtype(random_gaussians(20), torch.float32), look(dtype=torch.float32)
    rgb = rasterize(gaussians, camera).rgb
    assert rgb is not None
    with torch.no_grad():
        gaussians.means.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rgb.sum().backward()


def test_non_contiguous_and_expanded_inputs() -> None:
    gaussians, camera = random_gaussians(40, dtype=torch.float32), look(dtype=torch.float32)
    strided = Gaussians(**{f: torch.stack([getattr(gaussians, f)] * 2, -1)[..., 0] for f in FIELDS})
    assert not strided.means.is_contiguous()
    expanded = Gaussians(**{f: getattr(gaussians, f).expand(3, *getattr(gaussians, f).shape) for f in FIELDS})
    plain = rasterize(gaussians, camera).rgb
    assert plain is not None
    for other in (strided, expanded):
        rgb = rasterize(other, camera).rgb
        assert rgb is not None
        assert torch.equal(plain.expand_as(rgb), rgb)
