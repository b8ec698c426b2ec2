"""What a rasteriser eats and gives: `Scene` (checked, one batch shape) and `Render`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError, unknown
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer.spherical_harmonics import sh_degree

OUTPUTS = ("rgb", "alpha", "depth", "link_id", "contribution")
MAX_LINKS_PER_SPLAT = 4

Background = Sequence[float] | Tensor


@dataclass(frozen=True)
class Render:
    """Images of a batch; what was not asked for is None.

    Attributes:
        rgb: ``(*batch, height, width, 3)`` sRGB values as displayed, in [0, 1] for colours in [0, 1].
        alpha: ``(*batch, height, width)`` coverage, 1 - remaining transmittance.
        depth: ``(*batch, height, width)`` blending-weighted mean of z, 0 where nothing was hit [m].
        link_id: ``(*batch, height, width)`` link of the splat at which transmittance falls below 1/2, else -1.
        contribution: ``(*batch, n)`` sum of a splat's blending weights over the pixels; carries no gradient.
    """

    rgb: Float[Tensor, "*batch height width 3"] | None = None
    alpha: Float[Tensor, "*batch height width"] | None = None
    depth: Float[Tensor, "*batch height width"] | None = None
    link_id: Int[Tensor, "*batch height width"] | None = None
    contribution: Float[Tensor, "*batch n"] | None = None


@dataclass(frozen=True)
class Scene:
    """Checked input of a backend: splats in link frames, the links' transforms, cameras; all of one dtype and device.

    Attributes:
        gaussians: batch ``*g``, in link frames.
        link_index: ``(n, m)`` links of each splat.
        link_weights: ``(n, m)`` blend-skinning weights, None where m = 1.
        Ts_world_link: ``(*t, links, 4, 4)``.
        camera: batch ``*c``.
        background: ``(*k, 3)``.
        batch_shape: broadcast of ``*g``, ``*t``, ``*c`` and ``*k``.
        outputs: subset of `OUTPUTS`.
    """

    gaussians: Gaussians
    link_index: Int[Tensor, "n m"]
    link_weights: Float[Tensor, "n m"] | None
    Ts_world_link: Float[Tensor, "*t links 4 4"]
    camera: Camera
    background: Float[Tensor, "*k 3"]
    eps2d: float
    outputs: tuple[str, ...]
    batch_shape: tuple[int, ...]


def make_scene(
    gaussians: Gaussians,
    link_index: Tensor,
    link_weights: Tensor | None,
    Ts_world_link: Tensor,
    camera: Camera,
    background: Background,
    eps2d: float,
    outputs: Sequence[str],
) -> Scene:
    """Check shapes, dtypes, devices and options; cast camera, transforms and background to the splats' dtype.

    Raises:
        InputError: naming the tensor or option that does not fit.
    """
    means = gaussians.means
    _check_gaussians(gaussians)
    _check_options(eps2d, outputs)
    if camera.K.dtype != means.dtype or camera.T_cam_world.dtype != means.dtype:
        camera = camera.to(dtype=means.dtype)
    Ts_world_link = _on(means, "Ts_world_link", Ts_world_link, (None, 4, 4))
    if not isinstance(background, Tensor):
        background = torch.tensor(tuple(background), dtype=means.dtype, device=means.device)
    background = _on(means, "background", background, (3,))
    _on(means, "camera K", camera.K, (3, 3))
    index, weights = _check_links(means, link_index, link_weights)
    batches = {
        "gaussians": gaussians.batch_shape,
        "Ts_world_link": tuple(Ts_world_link.shape[:-3]),
        "camera K": tuple(camera.K.shape[:-2]),
        "camera T_cam_world": tuple(camera.T_cam_world.shape[:-2]),
        "background": tuple(background.shape[:-1]),
    }
    return Scene(
        gaussians, index, weights, Ts_world_link, camera, background, float(eps2d), tuple(outputs), _broadcast(batches)
    )


def check_values(scene: Scene) -> None:
    """Raise InputError that names the first tensor of `scene` with values that cannot be rendered."""
    named = {f"gaussians.{name}": getattr(scene.gaussians, name) for name in _GAUSSIAN_TAILS}
    named |= {"camera K": scene.camera.K, "camera T_cam_world": scene.camera.T_cam_world}
    named |= {"Ts_world_link": scene.Ts_world_link, "background": scene.background}
    if scene.link_weights is not None:
        named["link_weights"] = scene.link_weights
    for name, value in named.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{name} contains NaN or infinity")
    if not (scene.gaussians.quats != 0).any(-1).all():
        raise InputError("gaussians.quats contains a quaternion of length zero")
    index, links = scene.link_index, scene.Ts_world_link.shape[-3]
    if ((index < 0) | (index >= links)).any():
        outside = int(index[(index < 0) | (index >= links)][0])
        raise InputError(f"link_index holds {outside}; Ts_world_link holds links 0 to {links - 1}")
    K = scene.camera.K
    if not ((K[..., 0, 0] > 0) & (K[..., 1, 1] > 0)).all():
        raise InputError("camera K has a focal length that is not positive")
    if (K[..., 0, 1] != 0).any():
        raise InputError("camera K has skew (K[0, 1] is not 0), which no backend renders")


_GAUSSIAN_TAILS = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh": (None, 3)}


def _check_gaussians(gaussians: Gaussians) -> None:
    means = gaussians.means
    if means.dtype not in (torch.float32, torch.float64):
        raise InputError(f"gaussians.means has dtype {means.dtype}; expected torch.float32 or torch.float64")
    for name, tail in _GAUSSIAN_TAILS.items():
        value = getattr(gaussians, name)
        expected = (*means.shape[:-1], *tail)
        known = expected if None not in tail else (*expected[:-2], *value.shape[-2:-1], 3)  # any number of coefficients
        if value.shape != known:
            raise InputError(f"gaussians.{name} has shape {tuple(value.shape)}; expected {_shape_text(expected)}")
        if value.dtype != means.dtype or value.device != means.device:
            raise InputError(
                f"gaussians.{name} is {value.dtype} on {value.device}, means is {means.dtype} on {means.device}; "
                "all fields need one dtype and one device"
            )
    sh_degree(gaussians.sh.shape[-2])


def _check_options(eps2d: float, outputs: Sequence[str]) -> None:
    if not 0.0 < eps2d < 1e6:
        raise InputError(f"eps2d is {eps2d} px^2; expected a positive number below 1e6")
    for name in outputs:
        if name not in OUTPUTS:
            raise InputError(unknown("output", name, OUTPUTS))


def _on(means: Tensor, name: str, value: Tensor, tail: tuple[int | None, ...]) -> Tensor:
    """`value` in the dtype of `means`, its trailing shape and device checked."""
    end = tuple(value.shape[-len(tail) :])
    if len(end) < len(tail) or any(e not in (None, s) for e, s in zip(tail, end, strict=True)):
        raise InputError(f"{name} has shape {tuple(value.shape)}; expected (*batch, {_shape_text(tail)[1:]}")
    if value.device != means.device:
        raise InputError(f"{name} is on {value.device}, the gaussians are on {means.device}")
    return value.to(means.dtype)


def _check_links(
    means: Tensor, index: Tensor, weights: Tensor | None
) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"] | None]:
    n = means.shape[-2]
    if index.is_floating_point() or index.dtype == torch.bool:
        raise InputError(f"link_index has dtype {index.dtype}; expected integers")
    if index.ndim == 1 and weights is None:
        index = index[:, None]
    if index.ndim != 2 or index.shape[0] != n or not 1 <= index.shape[1] <= MAX_LINKS_PER_SPLAT:
        raise InputError(
            f"link_index has shape {tuple(index.shape)}; expected ({n},), or with link_weights ({n}, m), "
            f"m up to {MAX_LINKS_PER_SPLAT}"
        )
    if index.device != means.device:
        raise InputError(f"link_index is on {index.device}, the gaussians are on {means.device}")
    if weights is None:
        if index.shape[1] != 1:
            raise InputError(f"link_index of shape {tuple(index.shape)} needs link_weights of the same shape")
        return index, None
    if weights.shape != index.shape:
        raise InputError(
            f"link_weights has shape {tuple(weights.shape)}; expected that of link_index, {tuple(index.shape)}"
        )
    return index, _on(means, "link_weights", weights, (None, None))


def _broadcast(batches: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    distinct = {shape for shape in batches.values() if shape}
    if len(distinct) < 2:  # the common case; torch takes longer than all other checks together
        return next(iter(distinct), ())
    try:
        return tuple(torch.broadcast_shapes(*batches.values()))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {shape}" for name, shape in batches.items())
        raise InputError(f"batch dimensions do not broadcast: {shapes}") from error


def _shape_text(shape: tuple[int | None, ...]) -> str:
    inner = ", ".join("k" if s is None else str(s) for s in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"
