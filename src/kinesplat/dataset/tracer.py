"""Ray tracing of MuJoCo models by `mujoco_warp`: no GL, on the CPU or on CUDA."""

from importlib import import_module
from typing import Any

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.dataset.device import Device
from kinesplat.description.visuals import VISUAL_GROUP
from kinesplat.errors import BackendError

WHITE = (1.0, 1.0, 1.0, 1.0)
WORLD_AXES_OF_CV = np.array([1.0, -1.0, -1.0])  # an OpenCV camera seen from MuJoCo's: +Y up, looking along -Z


class RayTracer:
    """Renders one image at a time into samples of every pixel.

    Attributes:
        bias: what the renderer takes from a byte on average, by truncating instead of rounding.
        device: "cpu" or "cuda", where it traces.
        samples: rays a pixel.
    """

    bias = 0.5

    def __init__(self, model: mujoco.MjModel, samples: int, lit: bool, device: Device) -> None:
        """Prepare a model whose own lights are off.

        Args:
            model: its headlight serves where `lit` is false.
            samples: rays a pixel, on a Hammersley pattern.
            lit: whether every image comes with a light of its own.
            device: where to trace.

        Raises:
            BackendError: `mujoco_warp` is not installed, or there is no CUDA device and one was asked for.
        """
        self._warp, self._mjw = _import_renderer()
        self.device, self.samples = traced_on(device), samples
        with self._device():
            self._model = self._mjw.put_model(model)
            self._data = self._mjw.make_data(model, nworld=1)
            self._context = self._mjw.create_render_context(
                model,
                1,
                cam_active=[],
                enabled_geom_groups=[VISUAL_GROUP],
                background_color=WHITE,
                use_shadows=lit,
                shadow_light_fraction=0.0,
            )
            if lit:
                self._install_lights()
        self._size, self._K = (0, 0), np.zeros((3, 3))

    def image(
        self,
        geoms: tuple[Float[np.ndarray, "geoms 3"], Float[np.ndarray, "geoms 3 3"]],
        K: Float[np.ndarray, "3 3"],
        T_cam_world: Float[np.ndarray, "4 4"],
        size: tuple[int, int],
        light: Float[np.ndarray, "7"] | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colours ``(h, w, samples, 3)`` as bytes, depths [m] and geoms (-1 for none) ``(h, w, samples)``."""
        self._trace(geoms, K, T_cam_world, size, light)
        with self._device():
            shape = (size[1], size[0], self.samples)
            packed = self._context.rgb_data.numpy().reshape(shape)
            depth = self._context.depth_data.numpy().reshape(shape)
            geom = self._context.seg_data.numpy().reshape(*shape, 2)[..., 0]
        return packed.view(np.uint8).reshape(*shape, 4)[..., 2::-1], depth, geom

    def tensors(
        self,
        geoms: tuple[Float[np.ndarray, "geoms 3"], Float[np.ndarray, "geoms 3 3"]],
        K: Float[np.ndarray, "3 3"],
        T_cam_world: Float[np.ndarray, "4 4"],
        size: tuple[int, int],
        light: Float[np.ndarray, "7"] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `image` gives, as tensors that stay where it was traced; the next image overwrites them."""
        self._trace(geoms, K, T_cam_world, size, light)
        context, shape = self._context, (size[1], size[0], self.samples)
        with self._device():
            self._warp.synchronize_device()  # torch has a stream of its own
            packed, depth, segments = map(self._warp.to_torch, (context.rgb_data, context.depth_data, context.seg_data))
        colours = packed.view(torch.uint8).view(*shape, 4)[..., [2, 1, 0]]
        return colours, depth.view(shape), segments.view(*shape, 2)[..., 0]

    def _trace(
        self,
        geoms: tuple[Float[np.ndarray, "geoms 3"], Float[np.ndarray, "geoms 3 3"]],
        K: Float[np.ndarray, "3 3"],
        T_cam_world: Float[np.ndarray, "4 4"],
        size: tuple[int, int],
        light: Float[np.ndarray, " numbers"] | None,
    ) -> None:
        width, height = size
        with self._device():
            self._resize(width, height)
            self._place(*geoms, T_cam_world)
            if light is not None:
                self._light(light, T_cam_world[2, :3])
            if not np.array_equal(K, self._K):
                rays = camera_rays(K, width, height, self.samples)
                self._context.ray, self._K = self._warp.array(rays, dtype=self._warp.vec3), K.copy()
            self._mjw.refit_bvh(self._model, self._data, self._context)
            self._mjw.render(self._model, self._data, self._context)

    def _place(
        self,
        positions: Float[np.ndarray, "geoms 3"],
        rotations: Float[np.ndarray, "geoms 3 3"],
        T_cam_world: Float[np.ndarray, "4 4"],
    ) -> None:
        wp = self._warp
        R_world_cam = T_cam_world[:3, :3].T
        centre = -R_world_cam @ T_cam_world[:3, 3]
        self._data.geom_xpos = wp.array(positions[None].astype(np.float32), dtype=wp.vec3)
        self._data.geom_xmat = wp.array(rotations[None].astype(np.float32), dtype=wp.mat33)
        self._data.cam_xpos = wp.array(centre[None, None].astype(np.float32), dtype=wp.vec3)
        self._data.cam_xmat = wp.array((R_world_cam * WORLD_AXES_OF_CV)[None, None].astype(np.float32), dtype=wp.mat33)

    def _install_lights(self) -> None:
        """Give the device model two directional lights: the world's, and one that goes with the camera.

        The description's own lights are left behind, so the model needs none; `_light` sets what an image needs.
        """
        wp, model = self._warp, self._model
        model.nlight = 2
        model.light_type = wp.array([[1, 1]], dtype=int)
        model.light_active = wp.array([[True, True]], dtype=bool)
        model.light_attenuation = wp.array([[[1.0, 0.0, 0.0]] * 2], dtype=wp.vec3)
        model.light_cutoff = model.light_exponent = wp.zeros((1, 2), dtype=float)
        model.light_specular = self._data.light_xpos = wp.zeros((1, 2), dtype=wp.vec3)

    def _light(self, light: Float[np.ndarray, " numbers"], view_axis: Float[np.ndarray, "3"]) -> None:
        wp, model = self._warp, self._model
        _, _, _, ambient, diffuse, headlight, shadows = light.tolist()
        model.light_castshadow = wp.array([[shadows > 0.5, False]], dtype=bool)
        model.light_ambient = wp.array([[[ambient] * 3, [0.0] * 3]], dtype=wp.vec3)
        model.light_diffuse = wp.array([[[diffuse] * 3, [headlight] * 3]], dtype=wp.vec3)
        directions = np.stack([light[:3] / np.linalg.norm(light[:3]), view_axis])
        self._data.light_xdir = wp.array(directions[None].astype(np.float32), dtype=wp.vec3)

    def _resize(self, width: int, height: int) -> None:
        """Give the context its one camera: the model needs none, and rays are our own, so any K is exact."""
        if self._size == (width, height):
            return
        wp, context = self._warp, self._context
        rays = width * height * self.samples
        context.nrender, context.total_rays = 1, rays
        context.cam_res = wp.array([[width * self.samples, height]], dtype=wp.vec2i)
        context.cam_id_map = context.rgb_adr = context.depth_adr = context.seg_adr = wp.zeros(1, dtype=int)
        context.render_rgb = context.render_depth = context.render_seg = wp.array([True], dtype=bool)
        context.ray_offset = wp.zeros(rays, dtype=wp.vec3)
        context.rgb_data = wp.zeros((1, rays), dtype=wp.uint32)
        context.depth_data = wp.zeros((1, rays), dtype=float)
        context.seg_data = wp.zeros((1, rays), dtype=wp.vec2i)
        self._size, self._K = (width, height), np.zeros((3, 3))

    def _device(self) -> Any:
        return self._warp.ScopedDevice(self.device)


def traced_on(device: Device) -> str:
    """The device on which rays are traced: "cpu" or "cuda".

    Raises:
        BackendError: `mujoco_warp` is not installed, or there is no CUDA device and one was asked for.
    """
    cuda = device != "cpu" and _import_renderer()[0].is_cuda_available()
    if device == "cuda" and not cuda:
        raise BackendError("device 'cuda': the renderer finds no CUDA device; choose cpu or auto")
    return "cuda" if cuda else "cpu"


def _import_renderer() -> tuple[Any, Any]:
    try:
        warp = import_module("warp")
        warp.config.quiet = True  # Warp up to 1.18
        warp.config.log_level = getattr(warp, "LOG_ERROR", 40)  # from 1.19
        return warp, import_module("mujoco_warp")
    except ImportError as error:
        raise BackendError(
            f"rendering with MuJoCo needs mujoco_warp: pip install 'kinesplat[render]' ({error})"
        ) from error


def camera_rays(K: Float[np.ndarray, "3 3"], width: int, height: int, samples: int) -> Float[np.ndarray, "rays 3"]:
    """Unit directions in MuJoCo's camera frame, pixel by pixel; sample i at the i-th Hammersley point."""
    index = np.arange(samples)
    offsets = np.stack([(index + 0.5) / samples, _van_der_corput(samples) + 0.5 / samples], axis=-1)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x, y], axis=-1)[:, :, None, :] + offsets % 1.0
    homogeneous = np.concatenate([pixels, np.ones_like(pixels[..., :1])], axis=-1)
    rays = (homogeneous @ np.linalg.inv(K).T) * WORLD_AXES_OF_CV
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    return rays.reshape(-1, 3).astype(np.float32)


def _van_der_corput(count: int) -> Float[np.ndarray, " count"]:
    values, index, scale = np.zeros(count), np.arange(count), 0.5
    while index.any():
        values += scale * (index % 2)
        index, scale = index // 2, 0.5 * scale
    return values
