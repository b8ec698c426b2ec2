"""Images of known configurations and cameras: what data sets hold, training fits and evaluation compares with."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError

Rows = Tensor | slice | Sequence[int]


@dataclass(frozen=True, eq=False)
class Frames:
    """Images of known configurations and cameras, one per row.

    Attributes:
        q: ``(n, dof)`` joint values [rad or m], float64.
        camera: cameras of batch ``(n,)``, float64.
        rgb: ``(n, height, width, 3)`` sRGB on white.
        alpha: ``(n, height, width)`` share of the pixel's rays that hit the robot, times 255.
        depth: ``(n, height, width)`` [m] along +Z, the mean over the rays that hit; 0 where none does. Or None.
        link_id: ``(n, height, width)`` link that most rays hit; -1 where fewer than half hit any. Or None.
        light: ``(n, 7)`` the light of every image, see `kinesplat.dataset.lights`; None for the headlight.
    """

    q: Float[Tensor, "n dof"]
    camera: Camera
    rgb: UInt8[Tensor, "n height width 3"]
    alpha: UInt8[Tensor, "n height width"]
    depth: Float[Tensor, "n height width"] | None = None
    link_id: Int16[Tensor, "n height width"] | None = None
    light: Float[Tensor, "n 7"] | None = None

    def __post_init__(self) -> None:
        counts = {f.name: len(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        counts["camera"] = self.camera.batch_shape[0] if len(self.camera.batch_shape) == 1 else -1
        if set(counts.values()) != {len(self.q)}:
            raise InputError(f"frames need one row per image everywhere, got {counts}")
        size = (self.camera.height, self.camera.width)
        if tuple(self.rgb.shape[1:3]) != size:
            raise InputError(f"frames are {tuple(self.rgb.shape[1:3])} px, their cameras {size} (height, width)")

    def __len__(self) -> int:
        return len(self.q)

    def select(self, rows: Rows) -> "Frames":
        """The images that an index tensor, a mask, a slice or a list of row numbers picks."""
        index = rows if isinstance(rows, Tensor | slice) else torch.tensor(list(rows), dtype=torch.int64)
        return Frames(**{f.name: _rows_of(getattr(self, f.name), index) for f in fields(self)})

    def to(self, device: torch.device | str) -> "Frames":
        """The same images on another device."""
        moved = {f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return Frames(**moved)

    @property
    def nbytes(self) -> int:
        """Memory that the images take [bytes]."""
        return sum(value.nbytes for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor))

    @staticmethod
    def concatenate(parts: Sequence["Frames"]) -> "Frames":
        """All images of `parts`, in order.

        Raises:
            InputError: there are no parts, their sizes or joints differ, or only some have depth, link ids or lights.
        """
        if not parts:
            raise InputError("no frames to concatenate")
        shapes = {(part.camera.width, part.camera.height, part.q.shape[1]) for part in parts}
        present = {tuple(getattr(part, f.name) is None for f in fields(Frames)) for part in parts}
        if len(shapes) > 1 or len(present) > 1:
            raise InputError(f"frames differ in (width, height, joints) {sorted(shapes)} or in what they hold")
        return Frames(**{f.name: _joined([getattr(part, f.name) for part in parts]) for f in fields(Frames)})


def _rows_of(value: Any, index: Tensor | slice) -> Any:
    if isinstance(value, Camera):
        K, T_cam_world = _expanded(value)
        return Camera(K[index], T_cam_world[index], value.width, value.height)
    return None if value is None else value[index]


def _joined(values: list[Any]) -> Any:
    cameras = [value for value in values if isinstance(value, Camera)]
    if cameras:
        Ks, Ts = zip(*(_expanded(camera) for camera in cameras), strict=True)
        return Camera(torch.cat(Ks), torch.cat(Ts), cameras[0].width, cameras[0].height)
    tensors = [value for value in values if isinstance(value, Tensor)]
    return torch.cat(tensors) if tensors else None


def _expanded(camera: Camera) -> tuple[Tensor, Tensor]:
    """K and T_cam_world with the whole batch written out."""
    batch = camera.batch_shape
    return camera.K.expand(*batch, 3, 3), camera.T_cam_world.expand(*batch, 4, 4)
