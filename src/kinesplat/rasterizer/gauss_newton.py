"""Gauss-Newton normal equations of a photometric residual, accumulated natively without a dense Jacobian."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import cpu, cuda
from kinesplat.rasterizer.render import Background, Scene, make_scene


@dataclass(frozen=True)
class NormalEquations:
    """Quadratic model ``loss + 2 gradient . x + x . hessian x`` of a weighted sum of squares, per batch element.

    Attributes:
        loss: ``(*batch,)`` sum of weight * residual^2 over pixels and channels.
        gradient: ``(*batch, p)`` J^T W r, half the derivative of the loss.
        hessian: ``(*batch, p, p)`` J^T W J, symmetric.
    """

    loss: Float[Tensor, "*batch"]
    gradient: Float[Tensor, "*batch p"]
    hessian: Float[Tensor, "*batch p p"]

    def contract(self, jacobian: Float[Tensor, "*#b p m"]) -> "NormalEquations":
        """The same model in m variables y with ``x = jacobian @ y``: J^T W r and J^T W J by the chain rule."""
        J = jacobian.to(self.gradient)
        gradient = (J.mT @ self.gradient[..., None])[..., 0]
        return NormalEquations(self.loss, gradient, J.mT @ self.hessian @ J)


def normal_equations(
    gaussians: Gaussians,
    link_index: Int[Tensor, " n"],
    Ts_world_link: Float[Tensor, "*t links 4 4"],
    camera: Camera,
    rgb: Float[Tensor, "*s height width 3"],
    *,
    alpha: Float[Tensor, "*#s height width"] | None = None,
    rgb_weight: Float[Tensor, "*#s height width"] | None = None,
    alpha_weight: Float[Tensor, "*#s height width"] | None = None,
    background: Background = (1.0, 1.0, 1.0),
    backdrop: Float[Tensor, "*#s height width 3"] | None = None,
    eps2d: float = 0.3,
) -> NormalEquations:
    """Normal equations of ``sum w_rgb |rgb_rendered - rgb|^2 + w_alpha (alpha_rendered - alpha)^2`` over link twists.

    The variables x are one twist ``[v; w]`` [m], [rad] per link, expressed in the CAMERA frame and applied on the left:
    ``T_cam_link <- exp([v; w]^) @ T_cam_link``; they are ordered link by link, ``p = 6 links``. The derivative is that
    of the rendered image including the view direction of the spherical harmonics, exact up to float32.

    How q and the camera follow: a change dq moves link l by the world twist ``link_jacobian(q)[l] @ dq`` (of
    `KinematicTree.link_jacobian`), which in the camera frame is ``adjoint(T_cam_world)`` times it; a camera twist c,
    ``T_cam_world <- exp(c^) @ T_cam_world``, moves every link by c itself. So with
    ``P = cat([(adjoint(T_cam_world) @ link_jacobian(q)).flatten(-3, -2), eye(6).repeat(links, 1)], dim=-1)`` of shape
    ``(*batch, 6 links, dof + 6)``, ``normal_equations(...).contract(P)`` is the system in ``(dq, c)``.

    Batches broadcast as in `rasterize_links`; the targets take part with the batch ``*s``, so that many starts share
    one image and many views of one q can be summed afterwards. Nothing here is differentiable.

    Args:
        gaussians: splats in link frames, float32 on the CPU or a GPU.
        link_index: ``(n,)`` link of each splat.
        Ts_world_link: ``(*t, links, 4, 4)``, rigid.
        camera: pinhole cameras.
        rgb: ``(*s, height, width, 3)`` observed colours; what is compared is the render over `background`.
        alpha: ``(*s, height, width)`` observed mask; None leaves alpha out.
        rgb_weight: ``(*s, height, width)`` weight >= 0 of each pixel's colour residual, e.g. of a robust loss; None: 1.
        alpha_weight: the same for the alpha residual; None: 1.
        background: as in `rasterize`.
        backdrop: ``(*s, height, width, 3)`` what is seen behind the robot, pixel by pixel, in place of `background`.
        eps2d: as in `rasterize`.

    Returns:
        float64 whatever the input, since sums over many pixels are solved with.

    Raises:
        InputError: shapes, dtypes, NaN or infinity, negative weights, or splats that are not float32.
        BackendError: the native module, or Triton on a GPU, is missing.
    """
    scene = make_scene(gaussians, link_index, None, Ts_world_link, camera, background, eps2d, ())
    targets = _checked_targets(
        camera,
        {"rgb": rgb, "alpha": alpha, "rgb_weight": rgb_weight, "alpha_weight": alpha_weight} | {"backdrop": backdrop},
    )
    try:
        shape = tuple(torch.broadcast_shapes(scene.batch_shape, rgb.shape[:-3]))
    except RuntimeError as error:
        raise InputError(
            f"target batch {tuple(rgb.shape[:-3])} does not broadcast with the scene's {scene.batch_shape}"
        ) from error
    scene = replace(scene, batch_shape=shape)
    if scene.gaussians.means.device.type != "cpu":
        return _on_gpu(scene, targets, rgb.ndim - 3)
    plan = cpu.make_plan(scene)
    images, p = math.prod(shape), 6 * scene.Ts_world_link.shape[-3]
    count = math.prod(rgb.shape[:-3])
    index = torch.arange(count, dtype=torch.int32).reshape(rgb.shape[:-3]).expand(shape).reshape(images).contiguous()
    flat = [None if t is None else t.reshape(count, *t.shape[rgb.ndim - 3 :]).contiguous() for t in targets.values()]
    loss, gradient, hessian = (torch.empty(s, dtype=torch.float64) for s in ((images,), (images, p), (images, p, p)))
    module = cpu.native()
    target = module.Target(*(cpu.as_array(t) for t in (*flat, index)))
    problem = module.normal_equations(
        plan.native_scene,
        target,
        *(cpu.as_array(t) for t in (loss, gradient, hessian)),
        torch.get_num_threads(),
        plan.level,
    )
    if problem:
        raise InputError(problem)
    return NormalEquations(loss.view(shape), gradient.view(*shape, p), hessian.view(*shape, p, p))


def _on_gpu(scene: Scene, targets: dict[str, Tensor | None], batch_dims: int) -> NormalEquations:
    """The same by the CUDA backend's kernels."""
    module, shape = cuda.kernels("least_squares", scene), scene.batch_shape
    flat = {
        name: None if t is None else t.expand(*shape, *t.shape[batch_dims:]).reshape(-1, *t.shape[batch_dims:])
        for name, t in targets.items()
    }
    loss, gradient, hessian = module.normal_equations(scene, flat)
    p = gradient.shape[-1]
    return NormalEquations(loss.view(shape), gradient.view(*shape, p), hessian.view(*shape, p, p))


def _checked_targets(camera: Camera, targets: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Targets in float32, expanded to the batch of rgb."""
    rgb, plane = targets["rgb"], (camera.height, camera.width)
    assert rgb is not None
    if tuple(rgb.shape[-3:]) != (*plane, 3):
        raise InputError(f"target rgb has shape {tuple(rgb.shape)}; expected (*batch, {plane[0]}, {plane[1]}, 3)")
    out: dict[str, Tensor | None] = {"rgb": rgb.detach().to(torch.float32)}
    for name in ("alpha", "rgb_weight", "alpha_weight"):
        value = targets[name]
        if value is None:
            out[name] = None
            continue
        if tuple(value.shape[-2:]) != plane:
            raise InputError(f"{name} has shape {tuple(value.shape)}; expected (*batch, {plane[0]}, {plane[1]})")
        if name != "alpha" and (value < 0).any():
            raise InputError(f"{name} holds negative weights")
        out[name] = value.detach().to(torch.float32).expand(rgb.shape[:-1])
    backdrop = targets["backdrop"]
    if backdrop is not None and tuple(backdrop.shape[-3:]) != (*plane, 3):
        raise InputError(f"backdrop has shape {tuple(backdrop.shape)}; expected (*batch, {plane[0]}, {plane[1]}, 3)")
    out["backdrop"] = None if backdrop is None else backdrop.detach().to(torch.float32).expand(rgb.shape)
    if targets["alpha_weight"] is not None and targets["alpha"] is None:
        raise InputError("alpha_weight is given without alpha")
    return out
