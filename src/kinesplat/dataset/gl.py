"""Rendering by MuJoCo's own OpenGL renderer, where it is asked for."""

import math

import mujoco
import numpy as np
from jaxtyping import Float

from kinesplat.dataset.lights import HEADLIGHT_AMBIENT, HEADLIGHT_DIFFUSE
from kinesplat.description.visuals import VISUAL_GROUP
from kinesplat.errors import BackendError, InputError

NEAR, FAR = 0.02, 100.0
SHADOW_MAP_PX = 4096


class GLRenderer:
    """Renders one image at a time, enlarged, into samples of every pixel on a square grid.

    Shadows come from a shadow map and are not as sharp as ray-traced ones.

    Attributes:
        bias: what the renderer takes from a byte on average; it rounds.
    """

    bias = 0.0

    def __init__(self, model: mujoco.MjModel, samples: int) -> None:
        """Prepare a model whose own lights are off.

        Args:
            model: it is changed: sizes of buffers, no multisampling.
            samples: per pixel, a square number.

        Raises:
            InputError: `samples` is no square number.
        """
        self._factor = math.isqrt(samples)
        if self._factor**2 != samples:
            raise InputError(f"samples is {samples}; the gl renderer needs a square number: 1, 4, 9, ...")
        self._model, self._data = model, mujoco.MjData(model)
        model.vis.map.znear, model.vis.map.zfar = NEAR / model.stat.extent, FAR / model.stat.extent
        model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, SHADOW_MAP_PX
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = 0
        self._option.geomgroup[VISUAL_GROUP] = 1
        self._renderer: mujoco.Renderer | None = None

    def image(
        self,
        geoms: tuple[Float[np.ndarray, "geoms 3"], Float[np.ndarray, "geoms 3 3"]],
        K: Float[np.ndarray, "3 3"],
        T_cam_world: Float[np.ndarray, "4 4"],
        size: tuple[int, int],
        light: Float[np.ndarray, "7"] | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colours ``(h, w, samples, 3)`` as bytes, depths [m] and geoms (-1 for none) ``(h, w, samples)``.

        Raises:
            InputError: K has skew, which OpenGL's frustum has not.
            BackendError: there is no OpenGL.
        """
        if abs(K[0, 1]) > 1e-9 * K[0, 0]:
            raise InputError(f"K has a skew of {K[0, 1]:g} px; the gl renderer takes none")
        self._data.geom_xpos[:], self._data.geom_xmat[:] = geoms[0], geoms[1].reshape(-1, 9)
        renderer = self._sized(*size)
        renderer.update_scene(self._data, scene_option=self._option)
        _set_camera(renderer.scene, K, T_cam_world, size)
        _set_lights(renderer.scene, T_cam_world[2, :3], light)
        colours = renderer.render().copy()
        renderer.enable_segmentation_rendering()
        segments = renderer.render().copy()
        renderer.disable_segmentation_rendering()
        renderer.enable_depth_rendering()
        depth = renderer.render().copy()
        renderer.disable_depth_rendering()
        geom = np.where(segments[..., 1] == int(mujoco.mjtObj.mjOBJ_GEOM), segments[..., 0], -1)
        colours[geom < 0] = 255
        return self._samples(colours), self._samples(depth), self._samples(geom)

    def _samples(self, enlarged: np.ndarray) -> np.ndarray:
        """``(h k, w k, ...)`` to ``(h, w, k k, ...)``."""
        k, tail = self._factor, enlarged.shape[2:]
        height, width = (n // k for n in enlarged.shape[:2])
        blocks = enlarged.reshape(height, k, width, k, *tail).swapaxes(1, 2)
        return blocks.reshape(height, width, k * k, *tail)

    def _sized(self, width: int, height: int) -> mujoco.Renderer:
        width, height = width * self._factor, height * self._factor
        if self._renderer is not None and (self._renderer.width, self._renderer.height) == (width, height):
            return self._renderer
        if self._renderer is not None:
            self._renderer.close()
        self._model.vis.global_.offwidth, self._model.vis.global_.offheight = width, height
        try:
            self._renderer = mujoco.Renderer(self._model, height, width)
        except (RuntimeError, ImportError, AttributeError, OSError, mujoco.FatalError) as error:
            self._renderer = None
            raise BackendError(
                f"the gl renderer finds no OpenGL ({error}); set MUJOCO_GL to egl or osmesa, or use the renderer warp"
            ) from error
        return self._renderer


def _set_camera(
    scene: mujoco.MjvScene, K: Float[np.ndarray, "3 3"], T_cam_world: Float[np.ndarray, "4 4"], size: tuple[int, int]
) -> None:
    """Both eyes at the camera, with the frustum of K at the near plane."""
    width, height = size
    _, down, forward = T_cam_world[:3, :3]
    centre = -T_cam_world[:3, :3].T @ T_cam_world[:3, 3]
    left, top = -K[0, 2] / K[0, 0] * NEAR, K[1, 2] / K[1, 1] * NEAR
    across, below = width / K[0, 0] * NEAR, height / K[1, 1] * NEAR
    for eye in scene.camera:
        eye.pos, eye.forward, eye.up, eye.orthographic = centre, forward, -down, 0
        eye.frustum_near, eye.frustum_far = NEAR, FAR
        eye.frustum_center, eye.frustum_width = left + 0.5 * across, 0.5 * across
        eye.frustum_top, eye.frustum_bottom = top, top - below


def _set_lights(
    scene: mujoco.MjvScene, view_axis: Float[np.ndarray, "3"], light: Float[np.ndarray, "7"] | None
) -> None:
    """The headlight alone, or the light of the world beside one that goes with the camera."""
    if light is None:
        rows = [(view_axis, HEADLIGHT_AMBIENT, HEADLIGHT_DIFFUSE, False)]
    else:
        rows = [
            (light[:3], 0.0, light[4], light[6] > 0.5),
            (view_axis, light[3], light[5], False),
        ]  # shadows take ambient
    scene.nlight = len(rows)
    scene.flags[int(mujoco.mjtRndFlag.mjRND_SHADOW)] = int(any(row[3] for row in rows))
    for entry, (direction, ambient, diffuse, shadows) in zip(scene.lights, rows, strict=False):
        entry.type = int(mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
        entry.dir, entry.headlight, entry.castshadow = direction / np.linalg.norm(direction), 0, int(shadows)
        entry.pos = scene.camera[0].pos if not shadows else -10.0 * entry.dir
        entry.attenuation, entry.exponent, entry.cutoff, entry.texid = (1.0, 0.0, 0.0), 0.0, 180.0, -1
        entry.ambient, entry.diffuse, entry.specular = [ambient] * 3, [diffuse] * 3, [0.0] * 3
