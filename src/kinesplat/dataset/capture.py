"""Ground-truth images of a robot from MuJoCo: ray traced by `mujoco_warp`, or by MuJoCo's own OpenGL renderer."""

import copy
import math

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.dataset.device import Device, Renderer
from kinesplat.dataset.frames import Frames
from kinesplat.dataset.gl import GLRenderer
from kinesplat.dataset.lights import HEADLIGHT_AMBIENT, HEADLIGHT_DIFFUSE, LightSetting, draw_lights
from kinesplat.dataset.rays import averaged, averaged_there
from kinesplat.dataset.tracer import RayTracer
from kinesplat.description import Robot, mujoco_qpos
from kinesplat.description.visuals import VISUAL_GROUP
from kinesplat.errors import InputError
from kinesplat.rasterizer import Render


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
        renderer: Renderer = "warp",
    ) -> None:
        """Prepare a robot; the first rendering compiles kernels (seconds, cached on disk by warp).

        Args:
            robot: what to look at.
            samples: rays a pixel, on a low-discrepancy pattern; at most 255.
            light: "headlight", "world" (one fixed light) or "random" (another light for every image).
            seed: of the random lights that a call does not name.
            device: "cpu", "cuda", or "auto", CUDA where there is one; for the ray tracer.
            renderer: "warp", the ray tracer of `mujoco_warp`, or "gl", MuJoCo's own, which needs OpenGL.

        Raises:
            BackendError: `mujoco_warp` is not installed, there is no CUDA device and one was asked for, or no OpenGL.
            InputError: the robot has no visual geom, `samples` is not within 1 to 255, or `light` is unknown.
        """
        if not 1 <= samples <= 255:
            raise InputError(f"samples is {samples}; expected 1 to 255 rays a pixel")
        self.robot = robot
        self.samples = samples
        self.light: LightSetting = light
        self._generator = torch.Generator().manual_seed(seed)
        draw_lights(light, 0, self._generator)  # refuses an unknown light
        model = _render_model(robot, headlight=light == "headlight")
        self._mj_data = mujoco.MjData(model)
        self._link_of_geom = np.append(model.geom_bodyid - 1, -1)  # the last is what "no geom", -1, finds
        lit = light != "headlight"
        self._renderer = GLRenderer(model, samples) if renderer == "gl" else RayTracer(model, samples, lit, device)
        on_gpu = isinstance(self._renderer, RayTracer) and self._renderer.device == "cuda"
        self._averages_there = on_gpu and torch.cuda.is_available()  # Warp may see a GPU that this PyTorch cannot use

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
        size = (camera.width, camera.height)
        images = [self._image(size, *row) for row in zip(*rows, strict=True)]
        parts = [torch.from_numpy(np.stack(part)) for part in zip(*images, strict=True)]
        return Render(*(part.reshape(*batch, *part.shape[1:]) for part in parts))

    def draw_lights(self, count: int) -> Float[Tensor, "count 7"] | None:
        """Lights of the next `count` images, see `kinesplat.dataset.lights`; None under the headlight."""
        return draw_lights(self.light, count, self._generator)

    def _image(
        self,
        size: tuple[int, int],
        qpos: Float[np.ndarray, " nq"],
        T_world_base: Float[np.ndarray, "4 4"],
        K: Float[np.ndarray, "3 3"],
        T_cam_world: Float[np.ndarray, "4 4"],
        light: Float[np.ndarray, " numbers"],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        geoms = _geom_poses(self.robot, self._mj_data, qpos, T_world_base)
        view, bias = (geoms, K, T_cam_world, size, light if len(light) else None), self._renderer.bias
        if self._averages_there and isinstance(self._renderer, RayTracer):
            colours, depth, geom = self._renderer.tensors(*view)
            links = torch.from_numpy(self._link_of_geom).to(geom.device)[geom.long()]
            rgb, alpha, mean_depth, link_id = (t.cpu().numpy() for t in averaged_there(colours, depth, links, bias))
            return rgb, alpha, mean_depth, link_id
        colours, depth, geom = self._renderer.image(*view)
        return averaged(colours, depth, self._link_of_geom[geom], bias)

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
