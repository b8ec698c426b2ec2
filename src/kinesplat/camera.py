"""Pinhole cameras: `Camera(K, T_cam_world, width, height)`, OpenCV axes (+X right, +Y down, +Z forward)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.errors import InputError

Vector3 = Sequence[float] | Tensor
RIGID_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Camera:
    """One pinhole camera, or a batch of them that shares one image size.

    Attributes:
        K: ``(*batch, 3, 3)`` intrinsics [px]; pixel centres lie at +0.5.
        T_cam_world: ``(*batch, 4, 4)`` maps world points to the camera, ``p_cam = T_cam_world @ p_world`` [m].
        width: image width [px].
        height: image height [px].
    """

    K: Float[Tensor, "*#batch 3 3"]
    T_cam_world: Float[Tensor, "*#batch 4 4"]
    width: int
    height: int

    def __post_init__(self) -> None:
        for name, tail in (("K", (3, 3)), ("T_cam_world", (4, 4))):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                value = torch.as_tensor(value, dtype=torch.float32)
                object.__setattr__(self, name, value)
            if tuple(value.shape[-2:]) != tail:
                raise InputError(
                    f"camera {name} has shape {tuple(value.shape)}; expected (*batch, {tail[0]}, {tail[1]})"
                )
            if not torch.isfinite(value).all():
                raise InputError(f"camera {name} contains NaN or infinity")
        R = self.T_cam_world[..., :3, :3].detach()
        if R.numel() and (R @ R.mT - torch.eye(3).to(R)).abs().amax().item() > RIGID_TOLERANCE:
            raise InputError("camera T_cam_world is no rigid motion: its rotation part is not orthonormal")
        if self.width < 1 or self.height < 1:
            raise InputError(f"camera image size is {self.width} x {self.height}; both must be at least 1")

    @classmethod
    def look_at(
        cls,
        eye: Vector3,
        target: Vector3,
        fov_y: float = 0.785,
        width: int = 256,
        height: int = 256,
        up: Vector3 = (0.0, 0.0, 1.0),
    ) -> "Camera":
        """Camera at `eye` looking at `target`, square pixels, principal point in the centre.

        Args:
            eye: ``(*batch, 3)`` camera centre in the world [m].
            target: ``(*batch, 3)`` point that projects onto the image centre [m].
            fov_y: vertical field of view [rad].
            up: world direction that points up in the image; an axis across where it is parallel.

        Raises:
            InputError: `eye` equals `target`, or `fov_y` lies outside (0, pi).
        """
        if not 0.0 < fov_y < math.pi:
            raise InputError(f"fov_y is {fov_y} rad; expected a value between 0 and pi")
        device = next((v.device for v in (eye, target) if isinstance(v, Tensor)), None)
        eye_t, target_t, up_t = (
            v.to(_float_dtype(eye))
            if isinstance(v, Tensor)
            else torch.tensor(v, dtype=_float_dtype(eye), device=device)
            for v in (eye, target, up)
        )
        eye_t, target_t = torch.broadcast_tensors(eye_t, target_t)
        forward = target_t - eye_t
        if not (forward.norm(dim=-1) > 1e-9).all():
            raise InputError("camera eye and target coincide (or are not finite); no view direction")
        focal = 0.5 * height / math.tan(0.5 * fov_y)
        K = eye_t.new_tensor([[focal, 0.0, 0.5 * width], [0.0, focal, 0.5 * height], [0.0, 0.0, 1.0]])
        return cls(K.expand(*eye_t.shape[:-1], 3, 3), _look_at_transform(eye_t, forward, up_t), width, height)

    @classmethod
    def framing(
        cls,
        points: Float[Tensor, "*batch n 3"],
        direction: Vector3 = (1.0, 0.7, 0.5),
        fov_y: float = 0.785,
        width: int = 256,
        height: int = 256,
    ) -> "Camera":
        """Camera that looks at `points` from the side that `direction` names; their bounding sphere fills the frame.

        Args:
            points: ``(*batch, n, 3)`` what to see, in the world [m].
            direction: ``(3,)`` from the points towards the camera, any length but zero.
            fov_y: vertical field of view [rad].
        """
        if width < 1 or height < 1:
            raise InputError(f"image size is {width} x {height}; both must be at least 1")
        low, high = points.amin(dim=-2), points.amax(dim=-2)
        centre = 0.5 * (low + high)
        radius = (points - centre[..., None, :]).norm(dim=-1).amax(dim=-1, keepdim=True)
        side = torch.nn.functional.normalize(torch.as_tensor(direction).to(points), dim=-1)
        fov_x = 2.0 * math.atan(math.tan(0.5 * fov_y) * width / height)
        return cls.look_at(centre + radius / math.sin(0.5 * min(fov_x, fov_y)) * side, centre, fov_y, width, height)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading dimensions of the batch, () for a single camera."""
        return tuple(torch.broadcast_shapes(self.K.shape[:-2], self.T_cam_world.shape[:-2]))

    @property
    def T_world_cam(self) -> Float[Tensor, "*batch 4 4"]:
        """``(*batch, 4, 4)`` inverse of `T_cam_world`; its last column is the camera centre [m]."""
        return torch.linalg.inv(self.T_cam_world)

    def project(self, points: Float[Tensor, "*#batch n 3"]) -> tuple[Float[Tensor, "*b n 2"], Float[Tensor, "*b n"]]:
        """Pixels ``(*batch, n, 2)`` and depths ``(*batch, n)`` [m] along +Z of world points ``(*batch, n, 3)`` [m].

        Points with depth <= 0 lie behind the camera; their pixels mean nothing.
        """
        R, t = self.T_cam_world[..., :3, :3], self.T_cam_world[..., :3, 3]
        p_cam = points @ R.mT + t[..., None, :]
        p_image = p_cam @ self.K.mT
        return p_image[..., :2] / p_image[..., 2:], p_cam[..., 2]

    def resized(self, width: int, height: int) -> "Camera":
        """The same view at another resolution: K scaled so that the field of view is kept."""
        scale = torch.tensor([width / self.width, height / self.height, 1.0], dtype=self.K.dtype, device=self.K.device)
        return replace(self, K=self.K * scale[:, None], width=width, height=height)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Camera":
        """The same camera with its tensors on another device or in another dtype."""
        return replace(self, K=self.K.to(device, dtype), T_cam_world=self.T_cam_world.to(device, dtype))

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary with keys ``K``, ``T_cam_world``, ``width``, ``height``."""
        tensors = {"K": self.K.tolist(), "T_cam_world": self.T_cam_world.tolist()}
        return {**tensors, "width": self.width, "height": self.height}

    @classmethod
    def from_json(cls, path: str | Path) -> "Camera":
        """Read a camera file: JSON with ``K`` [px], ``T_cam_world`` [m], ``width``, ``height`` [px], or a list of such.

        Raises:
            InputError: the file is missing, is no JSON, or lacks one of the keys.
        """
        try:
            data = json.loads(Path(path).read_text())
            entries = data if isinstance(data, list) else [data]
            sizes = {(int(entry["width"]), int(entry["height"])) for entry in entries}
            K, T_cam_world = (torch.tensor([entry[key] for entry in entries]).float() for key in ("K", "T_cam_world"))
        except OSError as error:
            raise InputError(f"camera file {path}: {error.strerror}") from error
        except KeyError as error:
            keys = "K, T_cam_world, width, height"
            raise InputError(f"camera file {path}: key {error} is missing; expected {keys}") from error
        except (ValueError, TypeError) as error:
            raise InputError(f"camera file {path}: {error}") from error
        if len(sizes) != 1:
            raise InputError(
                f"camera file {path}: {len(sizes)} image sizes {sorted(sizes)}; expected one for all views"
            )
        if not isinstance(data, list):
            K, T_cam_world = K[0], T_cam_world[0]
        return cls(K, T_cam_world, *sizes.pop())


def _float_dtype(value: Vector3) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) and value.is_floating_point() else torch.float32


def _look_at_transform(
    eye: Float[Tensor, "*batch 3"], forward: Float[Tensor, "*batch 3"], up: Float[Tensor, "3"]
) -> Float[Tensor, "*batch 4 4"]:
    z = forward / forward.norm(dim=-1, keepdim=True)
    x = torch.linalg.cross(z, up.expand_as(z))
    axis = torch.eye(3, dtype=z.dtype, device=z.device)[(z.abs() - up.new_tensor([0.0, 1e-6, 0.0])).argmin(dim=-1)]
    fallback = torch.linalg.cross(z, axis)
    x = torch.where(x.norm(dim=-1, keepdim=True) > 1e-6, x, fallback)
    x = x / x.norm(dim=-1, keepdim=True)
    R_cam_world = torch.stack([x, torch.linalg.cross(z, x), z], dim=-2)
    T = torch.eye(4, dtype=eye.dtype, device=eye.device).repeat(*eye.shape[:-1], 1, 1)
    T[..., :3, :3] = R_cam_world
    T[..., :3, 3] = -(R_cam_world @ eye[..., None])[..., 0]
    return T
