"""Ground-truth images of a robot from MuJoCo, by the ray-traced renderer of `mujoco_warp`: no GL, CPU or CUDA."""

import copy
import math
from importlib import import_module
from typing import Any, Literal

import mujoco
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.dataset.frames import Frames
from kinesplat.dataset.lights import HEADLIGHT_AMBIENT, HEADLIGHT_DIFFUSE, LightSetting, draw_lights
from kinesplat.description import Robot, mujoco_qpos
from kinesplat.description.visuals import VISUAL_GROUP
from kinesplat.errors import BackendError, InputError
from kinesplat.rasterizer import Render

Device = Literal["auto", "cpu", "cuda"]
WHITE = (1.0, 1.0, 1.0, 1.0)
_WORLD_AXES_OF_CV = np.array([1.0, -1.0, -1.0])  # an OpenCV camera seen from MuJoCo's: +Y up, looking along -Z


class Capture:
    """Renders the visual geoms of a robot on white: no floor, no specular, the description's own lights off.

    The headlight is a directional light along the view axis (ambient 0.5, diffuse 0.5) without shadows; "world" and
    "random" are lights fixed in the world with ray-traced shadows, see `kinesplat.dataset.lights`. Meshes are seen from
    their front only, as in MuJoCo's own viewer.
    """

    def __init__(
        self,
        robot: Robot,
        samples: int = 4,
        light: LightSetting = "headlight",
        seed: int = 0,
        device: Device = "auto",
    ) -> None:
        """Prepare a robot; the first rendering compiles kernels (seconds, cached on disk by warp).

        Args:
            robot: what to look at.
            samples: rays a pixel, on a low-discrepancy pattern; at most 255.
            light: "headlight", "world" (one fixed light) or "random" (another light for every image).
            seed: of the random lights that a call does not name.
            device: "cpu", "cuda", or "auto", CUDA where there is one.

        Raises:
            BackendError: `mujoco_warp` is not installed, or there is no CUDA device and one was asked for.
            InputError: the robot has no visual geom, `samples` is not within 1 to 255, or `light` is unknown.
        """
        if not 1 <= samples <= 255:
            raise InputError(f"samples is {samples}; expected 1 to 255 rays a pixel")
        self.robot = robot
        self.samples = samples
        self.light: LightSetting = light
        self._generator = torch.Generator().manual_seed(seed)
        draw_lights(light, 0, self._generator)  # refuses an unknown light
        self._warp, self._mjw = _import_renderer()
        if device == "cuda" and not self._warp.is_cuda_available():
            raise BackendError("device 'cuda': the renderer finds no CUDA device; choose cpu or auto")
        cuda = device != "cpu" and self._warp.is_cuda_available()
        self._device_name = "cuda" if cuda else "cpu"
        self._mj_model = _render_model(robot, headlight=light == "headlight")
        self._mj_data = mujoco.MjData(self._mj_model)
        self._link_of_geom = np.append(self._mj_model.geom_bodyid - 1, -1)  # the last is what "no geom", -1, finds
        with self._device():
            self._model = self._mjw.put_model(self._mj_model)
            self._data = self._mjw.make_data(self._mj_model, nworld=1)
            self._context = self._mjw.create_render_context(
                self._mj_model,
                1,
                cam_active=[],
                enabled_geom_groups=[VISUAL_GROUP],
                background_color=WHITE,
                use_shadows=light != "headlight",
                shadow_light_fraction=0.0,
            )
            if light != "headlight":
                self._install_lights()
        self._size, self._K = (0, 0), np.zeros((3, 3))

    def render(
        self,
        q: Float[Tensor, "*#batch dof"],
        camera: Camera,
        T_world_base: Float[Tensor, "*#batch 4 4"] | None = None,
        light: Float[Tensor, "*#batch 7"] | None = None,
    ) -> Render:
        """Images of configurations `q` from `camera`; the batch is the broadcast of both (one image at a time).

        Args:
            q: ``(*batch, dof)`` joint values [rad], [m].
            camera: camera or batch of cameras, any K (skew and off-centre principal point included).
            T_world_base: ``(*batch, 4, 4)`` where the base is; the description's own place by default.
            light: ``(*batch, 7)`` rows of `kinesplat.dataset.lights`; by default the fixed or the next random ones.

        Returns:
            rgb ``(*batch, h, w, 3)`` on white; alpha, the share of rays that hit; depth [m] along +Z, the mean over the
            rays that hit, 0 where none does; link_id, the link that most rays hit, -1 where fewer than half hit any.

        Raises:
            InputError: lights are given, but the capture was made for the headlight.
        """
        tree = self.robot.tree
        T_world_base = tree.T_world_base if T_world_base is None else T_world_base
        shapes = [q.shape[:-1], T_world_base.shape[:-2], camera.batch_shape]
        batch = torch.broadcast_shapes(*shapes, *([] if light is None else [light.shape[:-1]]))
        Ts = [T.detach().double().cpu() for T in (T_world_base, camera.K, camera.T_cam_world)]
        count = math.prod(batch)
        Ts = [T.expand(*batch, *T.shape[-2:]).reshape(count, *T.shape[-2:]) for T in Ts]
        q = q.detach().cpu().expand(*batch, tree.dof).reshape(count, tree.dof)
        rows = [mujoco_qpos(self.robot, q, Ts[0]), *(T.numpy() for T in Ts), self._lights(light, batch)]
        with self._device():
            self._resize(camera.width, camera.height)
            images = [self._image(*row) for row in zip(*rows, strict=True)]
        parts = [torch.from_numpy(np.stack(part)) for part in zip(*images, strict=True)]
        return Render(*(part.reshape(*batch, *part.shape[1:]) for part in parts))

    def draw_lights(self, count: int) -> Float[Tensor, "count 7"] | None:
        """Lights of the next `count` images, see `kinesplat.dataset.lights`; None under the headlight."""
        return draw_lights(self.light, count, self._generator)

    def _image(
        self,
        qpos: Float[np.ndarray, " nq"],
        T_world_base: Float[np.ndarray, "4 4"],
        K: Float[np.ndarray, "3 3"],
        T_cam_world: Float[np.ndarray, "4 4"],
        light: Float[np.ndarray, " numbers"],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        width, height = self._size
        self._place(*_geom_poses(self.robot, self._mj_data, qpos, T_world_base), T_cam_world)
        if self.light != "headlight":
            self._light(light, T_cam_world[2, :3])
        if not np.array_equal(K, self._K):
            rays = _camera_rays(K, width, height, self.samples)
            self._context.ray, self._K = self._warp.array(rays, dtype=self._warp.vec3), K.copy()
        self._mjw.refit_bvh(self._model, self._data, self._context)
        self._mjw.render(self._model, self._data, self._context)
        shape = (height, width, self.samples)
        packed = self._context.rgb_data.numpy().reshape(shape)
        depth = self._context.depth_data.numpy().reshape(shape)
        geom = self._context.seg_data.numpy().reshape(*shape, 2)[..., 0]
        return _resolve(packed, depth, self._link_of_geom[geom])

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
        self._data.cam_xmat = wp.array((R_world_cam * _WORLD_AXES_OF_CV)[None, None].astype(np.float32), dtype=wp.mat33)

    def _lights(self, light: Tensor | None, batch: tuple[int, ...]) -> Float[np.ndarray, "count numbers"]:
        """Light rows of every image; rows of nothing under the headlight."""
        count = math.prod(batch)
        if self.light == "headlight":
            if light is not None:
                raise InputError(
                    f"lights given to a headlight; make the capture of {self.robot.name} with light='world'"
                )
            return np.zeros((count, 0))
        if light is None:
            light = draw_lights(self.light, count, self._generator)
            assert light is not None
            return light.numpy()
        return light.detach().double().cpu().expand(*batch, 7).reshape(count, 7).numpy()

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
        return self._warp.ScopedDevice(self._device_name)


def capture_frames(
    capture: Capture | Robot,
    q: Float[Tensor, "n dof"],
    camera: Camera,
    light: Float[Tensor, "n 7"] | None = None,
) -> Frames:
    """Images of one configuration and one camera a row.

    Args:
        capture: a prepared capture, or a robot to make one for (4 rays a pixel, headlight).
        q: ``(n, dof)`` joint values [rad or m].
        camera: cameras of batch ``(n,)``.
        light: ``(n, 7)`` lights; by default those of the capture.
    """
    capture = capture if isinstance(capture, Capture) else Capture(capture)
    if camera.batch_shape != (len(q),):
        raise InputError(f"{len(q)} configurations need as many cameras, got a batch {camera.batch_shape}")
    light = capture.draw_lights(len(q)) if light is None else light.detach().double().cpu()
    out = capture.render(q, camera, light=light)
    assert out.rgb is not None
    assert out.alpha is not None
    assert out.link_id is not None
    rgb, alpha = ((255.0 * part).round().to(torch.uint8) for part in (out.rgb, out.alpha))
    q, camera = q.detach().double().cpu(), camera.to("cpu", torch.float64)
    return Frames(q, camera, rgb, alpha, out.depth, out.link_id.to(torch.int16), light)


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


def _render_model(robot: Robot, headlight: bool) -> mujoco.MjModel:
    """A copy of the model that is lit by the headlight alone, or by nothing."""
    if VISUAL_GROUP not in robot.mj_model.geom_group:  # the renderer would crash
        raise InputError(f"robot {robot.name} has no visual geom; nothing to render")
    model = copy.copy(robot.mj_model)
    model.light_active[:] = 0
    model.geom_contype[:] = model.geom_conaffinity[:] = 0
    light = model.vis.headlight
    light.active = int(headlight)
    light.ambient[:], light.diffuse[:], light.specular[:] = HEADLIGHT_AMBIENT, HEADLIGHT_DIFFUSE, 0.0
    return model


def _geom_poses(
    robot: Robot, data: mujoco.MjData, qpos: Float[np.ndarray, " nq"], T_world_base: Float[np.ndarray, "4 4"]
) -> tuple[Float[np.ndarray, "geoms 3"], Float[np.ndarray, "geoms 3 3"]]:
    """Positions and rotations of all geoms by MuJoCo's own kinematics, not by the tree's."""
    data.qpos[:] = qpos
    mujoco.mj_kinematics(robot.mj_model, data)
    positions, rotations = data.geom_xpos, data.geom_xmat.reshape(-1, 3, 3)
    if robot.base_qpos >= 0:
        return positions, rotations
    T = T_world_base @ np.linalg.inv(robot.tree.T_world_base.numpy())
    return positions @ T[:3, :3].T + T[:3, 3], T[:3, :3] @ rotations


def _camera_rays(K: Float[np.ndarray, "3 3"], width: int, height: int, samples: int) -> Float[np.ndarray, "rays 3"]:
    """Unit directions in MuJoCo's camera frame, pixel by pixel; sample i at the i-th Hammersley point."""
    index = np.arange(samples)
    offsets = np.stack([(index + 0.5) / samples, _van_der_corput(samples) + 0.5 / samples], axis=-1)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x, y], axis=-1)[:, :, None, :] + offsets % 1.0
    homogeneous = np.concatenate([pixels, np.ones_like(pixels[..., :1])], axis=-1)
    rays = (homogeneous @ np.linalg.inv(K).T) * _WORLD_AXES_OF_CV
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    return rays.reshape(-1, 3).astype(np.float32)


def _van_der_corput(count: int) -> Float[np.ndarray, " count"]:
    values, index, scale = np.zeros(count), np.arange(count), 0.5
    while index.any():
        values += scale * (index % 2)
        index, scale = index // 2, 0.5 * scale
    return values


def _resolve(
    packed: np.ndarray, depth: np.ndarray, links: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Average the rays of each pixel: rgb, alpha, depth, link_id; computed where a ray hits, the rest is white."""
    shape, samples = links.shape[:-1], links.shape[-1]
    rgb = np.ones((*shape, 3), dtype=np.float32)
    alpha, mean_depth = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    link_id = np.full(shape, fill_value=-1, dtype=np.int64)
    seen = (links >= 0).any(axis=-1)
    packed, depth, links = packed[seen], depth[seen], links[seen]
    colours = packed.view(np.uint8).reshape(*packed.shape, 4)[..., 2::-1].astype(np.float32)
    hit = links >= 0
    colours += 0.5 * (hit[..., None] & (colours < 255.0))  # the renderer truncates to bytes: undo the mean bias
    hits = hit.sum(axis=-1)
    rgb[seen] = colours.mean(axis=1) / np.float32(255.0)
    alpha[seen] = hit.mean(axis=-1, dtype=np.float32)
    mean_depth[seen] = np.where(hit, depth, 0.0).sum(axis=-1, dtype=np.float32) / hits
    link_id[seen] = np.where(2 * hits >= samples, _most_frequent(links), -1)
    return rgb, alpha, mean_depth, link_id


def _most_frequent(links: Int[np.ndarray, "pixels samples"]) -> Int[np.ndarray, " pixels"]:
    """The link that occurs most often in each row, the lowest of several; -1, no link, never wins over a link."""
    winner = links[:, 0].copy()
    mixed = (links != links[:, :1]).any(axis=-1)
    rows = links[mixed]
    votes = (rows[:, :, None] == rows[:, None, :]).sum(axis=-1)
    rank = np.where(rows >= 0, votes * (links.max(initial=0) + 1) - rows, np.iinfo(np.int64).min)
    winner[mixed] = rows[np.arange(len(rows)), rank.argmax(axis=-1)]
    return winner
