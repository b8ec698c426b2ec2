"""Points followed through a video: what trackers give, which points to ask them for, and Lucas-Kanade.

A tracker is a function of frames ``(frames, height, width, 3)`` in [0, 1] and queries ``(n, 3)``, each a frame and a
place (frame, x [px], y [px]); it gives `PointTracks`. Pixel centres lie at +0.5, as everywhere.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.files import written_whole
from kinesplat.vision.loading import library

WINDOW_PX = 11
PYRAMID = 3
RETURN_PX = 0.5
LEVELS = 1024
REFRESH = 8
LEAST_FRAMES = 2


@dataclass(frozen=True)
class PointTracks:
    """Points followed through a video.

    Attributes:
        points: ``(frames, n, 2)`` [px]; finite everywhere, but meaningless where not visible.
        visible: ``(frames, n)`` where each point was seen.
    """

    points: Float[Tensor, "frames n 2"]
    visible: Bool[Tensor, "frames n"]

    def __post_init__(self) -> None:
        if not isinstance(self.points, Tensor) or not isinstance(self.visible, Tensor):
            raise InputError("tracks need points and visible as torch tensors")
        if self.points.dim() != 3 or self.points.shape[-1] != 2 or self.visible.shape != self.points.shape[:2]:
            shapes = f"points {tuple(self.points.shape)} and visible {tuple(self.visible.shape)}"
            raise InputError(f"tracks have {shapes}; expected (frames, n, 2) and (frames, n)")
        if self.visible.dtype != torch.bool or not self.points.is_floating_point():
            dtypes = f"points {self.points.dtype} and visible {self.visible.dtype}"
            raise InputError(f"tracks have {dtypes}; expected floating point and bool")
        if not bool(torch.isfinite(self.points.detach()[self.visible]).all()):
            raise InputError("tracks contain NaN or infinity at a visible point")

    def select(self, which: Tensor) -> "PointTracks":
        """Some of the tracks, by index or mask."""
        return PointTracks(self.points[:, which], self.visible[:, which])

    def seen(self, least: int = LEAST_FRAMES) -> "PointTracks":
        """The tracks that are visible in at least so many frames."""
        return self.select(self.visible.sum(dim=0) >= least)

    def scaled(self, factor: Float[Tensor, "2"]) -> "PointTracks":
        """The tracks in a picture whose width and height are `factor` times as large."""
        return PointTracks(self.points * factor.to(self.points), self.visible)

    def save(self, path: str | Path) -> None:
        """Write an .npz file with ``points`` and ``visible``, whole or not at all."""
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, points=self.points.detach().cpu().numpy(), visible=self.visible.cpu().numpy())

    @classmethod
    def load(cls, path: str | Path) -> "PointTracks":
        """Read what `save` or any other program wrote: arrays ``points (frames, n, 2)`` and ``visible (frames, n)``.

        Raises:
            InputError: the file is missing, no .npz, or holds something else.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                points, visible = torch.from_numpy(arrays["points"]).float(), torch.from_numpy(arrays["visible"]) > 0
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: no .npz file with points and visible ({error})") from error
        return cls(points, visible)


PointTracker = Callable[[Tensor, Tensor], PointTracks]


def track_video(
    frames: Float[Tensor, "frames height width 3"],
    masks: Float[Tensor, "frames height width"],
    tracker: PointTracker,
    count: int = 400,
    refresh: int = REFRESH,
) -> PointTracks:
    """Tracks of the foreground: points spread over it in every `refresh`-th frame, where none is being followed yet.

    Args:
        frames: the video, in [0, 1].
        masks: 1 on what moves; points come from there.
        tracker: which one.
        count: points in one frame, about; they are spread evenly.
        refresh: frames between new queries; at least one.

    Raises:
        InputError: no point can be followed.
    """
    height, width = masks.shape[1:]
    spacing = max(2.0, (masks.mean().item() * height * width / max(count, 1)) ** 0.5)
    found: list[PointTracks] = []
    for index in range(0, len(frames), refresh):
        places = spread_points(frames[index], masks[index], spacing)
        for before in found:
            near = torch.cdist(places, before.points[index][before.visible[index]])
            places = places[(near > spacing).all(dim=1)] if near.shape[1] else places
        if len(places):
            queries = torch.nn.functional.pad(places, (1, 0), value=float(index))
            found.append(tracker(frames, queries).seen())
    if not sum(tracks.points.shape[1] for tracks in found):
        raise InputError("no point could be followed: nothing in the foreground, or nothing that moves on")
    points = torch.cat([tracks.points for tracks in found], dim=1)
    return PointTracks(points, torch.cat([tracks.visible for tracks in found], dim=1))


def spread_points(
    frame: Float[Tensor, "height width 3"], mask: Float[Tensor, "height width"], spacing: float
) -> Float[Tensor, "n 2"]:
    """Corners inside the mask, and a grid where there are none; no two nearer than `spacing` [px]."""
    cv2 = library("cv2", "video")
    inside = (-torch.nn.functional.max_pool2d(-(mask > 0.5).float()[None], 3, stride=1, padding=1)[0]).numpy() > 0.5
    corners = cv2.goodFeaturesToTrack(_grays(frame[None])[0], 0, 0.01, spacing, mask=inside.astype(np.uint8))
    corners = np.zeros((0, 2), np.float32) if corners is None else corners.reshape(-1, 2)
    y, x = np.meshgrid(*(np.arange(spacing / 2, size, spacing) for size in inside.shape), indexing="ij")
    grid = np.stack([x.ravel(), y.ravel()], axis=-1).astype(np.float32)
    grid = grid[inside[grid[:, 1].astype(int), grid[:, 0].astype(int)]]
    if len(corners) and len(grid):
        grid = grid[np.linalg.norm(grid[:, None] - corners, axis=-1).min(axis=1) > spacing]
    return torch.from_numpy(np.concatenate([corners, grid])) + 0.5


def lucas_kanade(frames: Float[Tensor, "frames height width 3"], queries: Float[Tensor, "n 3"]) -> PointTracks:
    """Sparse optical flow from frame to frame (Bouguet 2001, pyramidal Lucas-Kanade), both ways from the query.

    A point is lost for good where the flow back does not return to within half a pixel. Frames or queries that require
    a gradient give tracks that have one, see `with_gradient`.
    """
    video = _grays(frames)
    start = queries[:, 0].detach().round().long()
    points = queries[None, :, 1:].detach().cpu().float().repeat(len(video), 1, 1)
    visible = torch.arange(len(video))[:, None] == start
    for order in (range(len(video) - 1), range(len(video) - 1, 0, -1)):
        step = 1 if order.step > 0 else -1
        for i in order:
            due = (start <= i) if step > 0 else (start >= i)
            alive = torch.nonzero(visible[i] & due)[:, 0]
            points[i + step, due] = points[i, due]
            if len(alive):
                points[i + step, alive], visible[i + step, alive] = _flow(video[i], video[i + step], points[i, alive])
    tracks = PointTracks(points, visible)
    wanted = frames.requires_grad or queries.requires_grad
    return with_gradient(frames, tracks, start, places=queries[:, 1:]) if wanted else tracks


def with_gradient(
    frames: Float[Tensor, "frames height width 3"],
    tracks: PointTracks,
    start: Tensor,
    window: int = WINDOW_PX,
    places: Float[Tensor, "n 2"] | None = None,
) -> PointTracks:
    """The same tracks, differentiable in the frames: one more Gauss-Newton step of Lucas-Kanade, in plain torch.

    Where the patch of the frame equals that of the query, the step is zero and its derivative is that of the minimum by
    the implicit function theorem, as far as Gauss-Newton's Hessian goes. The values stay those of `tracks`. Queried
    `places`, where given, carry their own derivative: in their frame the point is there, and its patch is taken there.
    """
    gray = frames.mean(dim=-1)
    slopes = torch.stack(torch.gradient(gray, dim=(1, 2))[::-1], dim=1)
    images = torch.cat([gray[:, None], slopes], dim=1)
    reach = torch.arange(window, dtype=gray.dtype) - window // 2
    around = torch.stack(torch.meshgrid(reach, reach, indexing="xy"), dim=-1).reshape(-1, 2)
    points = tracks.points.to(gray)
    if places is not None:
        queried = (torch.arange(len(frames))[:, None] == start)[..., None]
        points = torch.where(queried, points + (places - places.detach()).to(gray), points)
    around = points[:, :, None] + around
    size = torch.tensor([gray.shape[2], gray.shape[1]], dtype=gray.dtype)
    patches = torch.nn.functional.grid_sample(images, around / size * 2.0 - 1.0, align_corners=False)
    first = patches[start, :1, torch.arange(len(start))]
    difference = first[None] - patches.transpose(1, 2)[:, :, :1]
    slope = patches[:, 1:].transpose(1, 2).detach()
    hessian = slope @ slope.mT
    ridge = 1e-3 * hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None] + 1e-8
    step = torch.linalg.solve(hessian + ridge * torch.eye(2).to(hessian), (slope @ difference.mT)[..., 0])
    step = torch.where(tracks.visible[..., None], step, 0.0)
    return PointTracks(points + (step - step.detach()), tracks.visible)


def _flow(
    before: UInt8[np.ndarray, "height width"], after: UInt8[np.ndarray, "height width"], points: Tensor
) -> tuple[Float[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """Where the points are in the next frame, and which of them were found."""
    cv2 = library("cv2", "video")
    options = {"winSize": (WINDOW_PX, WINDOW_PX), "maxLevel": PYRAMID}
    old = (points.numpy() - 0.5)[:, None]
    new, found, _ = cv2.calcOpticalFlowPyrLK(before, after, old, None, **options)
    back, returned, _ = cv2.calcOpticalFlowPyrLK(after, before, new, None, **options)
    inside = ((new >= 0.0) & (new <= np.array(after.shape[::-1]) - 1.0)).all(axis=(1, 2))
    good = (np.linalg.norm(back - old, axis=-1)[:, 0] < RETURN_PX) & (found & returned)[:, 0].astype(bool) & inside
    new = np.where(good[:, None, None], new, old)
    return torch.from_numpy(new[:, 0]) + 0.5, torch.from_numpy(good)


def _grays(frames: Float[Tensor, "frames height width 3"]) -> list[UInt8[np.ndarray, "height width"]]:
    """Brightness, spread over the range by one curve for the whole video: many a robot is black, and flow needs slopes.

    Every level gets a share that grows with the root of its pixels' number. A contrast that changes from place to place
    would make points drift.
    """
    weights = torch.tensor([0.299, 0.587, 0.114]).to(frames)
    levels = ((frames.detach() @ weights).clamp(0.0, 1.0) * (LEVELS - 1)).round().long().cpu()
    curve = torch.bincount(levels.flatten(), minlength=LEVELS).sqrt().cumsum(dim=0)
    span = (curve[-1] - curve[0]).clamp(min=1e-9)
    return [image.numpy() for image in ((curve - curve[0]) / span * 255.0).round().to(torch.uint8)[levels]]
