"""Ground-truth images of a robot from MuJoCo, by the ray-traced renderer of `mujoco_warp`: no GL, CPU or CUDA."""

import copy
import math
from importlib import import_module
from typing import Any

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.description import Robot, mujoco_qpos
from kinesplat.description.visuals import VISUAL_GROUP
from kinesplat.errors import BackendError, InputError
from kinesplat.rasterizer import Render

HEADLIGHT_AMBIENT = 0.5
HEADLIGHT_DIFFUSE = 0.5
WHITE = (1.0, 1.0, 1.0, 1.0)
_WORLD_AXES_OF_CV = np.array([1.0, -1.0, -1.0])  # an OpenCV camera seen from MuJoCo's: +Y up, looking along -Z


class Capture:
    """Renders the visual geoms of a robot under a headlight, on white.

    The light is the one of the data sets: a directional light along the view axis (ambient 0.5, diffuse 0.5, no
    specular), the description's own lights off, no shadows, no floor. Meshes are seen from their front only, as in
    MuJoCo's own viewer.
    """

    def __init__(self, robot: Robot, samples: int = 4) -> None:
        """Prepare a robot; the first rendering compiles kernels (seconds, cached on disk by warp).

        Args:
            robot: what to look at.
            samples: rays a pixel, on a low-discrepancy pattern.

        Raises:
            BackendError: `mujoco_warp` is not installed.
            InputError: the robot has no visual geom, or `samples` is below 1.
        """
        if samples < 1:
            raise InputError(f"samples is {samples}; expected at least one ray a pixel")
        self.robot = robot
        self.samples = samples
        self._warp, self._mjw = _import_renderer()
        self._mj_model = _render_model(robot)
        self._mj_data = mujoco.MjData(self._mj_model)
        self._link_of_geom = np.append(self._mj_model.geom_bodyid - 1, -1)  # the last is what "no geom", -1, finds
        with self._device():
            self._model = self._mjw.put_model(self._mj_model)
            self._data = self._mjw.make_data(self._mj_model, nworld=1)
            self._context = self._mjw.create_render_context(
                self._mj_model, 1, cam_active=[], enabled_geom_groups=[VISUAL_GROUP], background_color=WHITE
            )
        self._size = (0, 0)

    def render(
        self,
        q: Float[Tensor, "*#batch dof"],
        camera: Camera,
        T_world_base: Float[Tensor, "*#batch 4 4"] | None = None,
    ) -> Render:
        """Images of configurations `q` from `camera`; the batch is the broadcast of both (one image at a time).

        Args:
            q: ``(*batch, dof)`` joint values [rad], [m].
            camera: camera or batch of cameras, any K (skew and off-centre principal point included).
            T_world_base: ``(*batch, 4, 4)`` where the base is; the description's own place by default.

        Returns:
            rgb ``(*batch, h, w, 3)`` on white; alpha, the share of rays that hit; depth [m] along +Z, the mean over the
            rays that hit, 0 where none does; link_id, the link that most rays hit, -1 where fewer than half hit any.
        """
        tree = self.robot.tree
        T_world_base = tree.T_world_base if T_world_base is None else T_world_base
        batch = torch.broadcast_shapes(q.shape[:-1], T_world_base.shape[:-2], camera.batch_shape)
        Ts = [T.detach().double().cpu() for T in (T_world_base, camera.K, camera.T_cam_world)]
        count = math.prod(batch)
        Ts = [T.expand(*batch, *T.shape[-2:]).reshape(count, *T.shape[-2:]) for T in Ts]
        q = q.detach().cpu().expand(*batch, tree.dof).reshape(count, tree.dof)
        rows = [mujoco_qpos(self.robot, q, Ts[0]), *(T.numpy() for T in Ts)]
        with self._device():
            self._resize(camera.width, camera.height)
            images = [self._image(*row) for row in zip(*rows, strict=True)]
        parts = [torch.from_numpy(np.stack(part)) for part in zip(*images, strict=True)]
        return Render(*(part.reshape(*batch, *part.shape[1:]) for part in parts))

    def _image(
        self,
        qpos: Float[np.ndarray, " nq"],
        T_world_base: Float[np.ndarray, "4 4"],
        K: Float[np.ndarray, "3 3"],
        T_cam_world: Float[np.ndarray, "4 4"],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        width, height = self._size
        self._place(*_geom_poses(self.robot, self._mj_data, qpos, T_world_base), T_cam_world)
        rays = _camera_rays(K, width, height, self.samples)
        self._context.ray = self._warp.array(rays, dtype=self._warp.vec3)
        self._mjw.refit_bvh(self._model, self._data, self._context)
        self._mjw.render(self._model, self._data, self._context)
        shape = (height, width, self.samples)
        packed = self._context.rgb_data.numpy().reshape(shape)
        depth = self._context.depth_data.numpy().reshape(shape)
        geom = self._context.seg_data.numpy().reshape(*shape, 2)[..., 0]
        return _resolve(packed, depth, self._link_of_geom[geom], len(self.robot.tree.link_names))

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
        self._size = (width, height)

    def _device(self) -> Any:
        return self._warp.ScopedDevice("cuda" if self._warp.is_cuda_available() else "cpu")


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


def _render_model(robot: Robot) -> mujoco.MjModel:
    """A copy of the model that is lit by the headlight alone."""
    if VISUAL_GROUP not in robot.mj_model.geom_group:  # the renderer would crash
        raise InputError(f"robot {robot.name} has no visual geom; nothing to render")
    model = copy.copy(robot.mj_model)
    model.light_active[:] = 0
    light = model.vis.headlight
    light.active = 1
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
    packed: np.ndarray, depth: np.ndarray, links: np.ndarray, link_count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Average the rays of each pixel: rgb, alpha, depth, link_id."""
    colours = packed.view(np.uint8).reshape(*packed.shape, 4)[..., 2::-1].astype(np.float32)
    hit = links >= 0
    colours += 0.5 * (hit[..., None] & (colours < 255.0))  # the renderer truncates to bytes: undo the mean bias
    alpha = hit.mean(axis=-1, dtype=np.float32)
    hits = hit.sum(axis=-1)
    mean_depth = np.where(hit, depth, 0.0).sum(axis=-1, dtype=np.float32) / np.maximum(hits, 1)
    votes = np.stack([(links == link).sum(axis=-1) for link in range(link_count)])
    link_id = np.where(2 * hits >= links.shape[-1], votes.argmax(axis=0), -1)
    return colours.mean(axis=2) / np.float32(255.0), alpha, mean_depth.astype(np.float32), link_id
