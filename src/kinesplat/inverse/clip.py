"""A video as tracking needs it: small frames, their masks or what is behind the robot."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError, UnseenError
from kinesplat.inverse.backdrop import median_backdrop
from kinesplat.inverse.observation import ImageLike, Observation, plain_background

BACKDROP_FRAMES = 32


@dataclass(frozen=True)
class Clip:
    """The frames of a video that one camera took.

    Attributes:
        rgb: ``(frames, height, width, 3)`` 8 bit, at most `long_side` px wide or high.
        masks: ``(frames, height, width)`` 8 bit, or None.
        camera: at that size.
        backdrop: ``(height, width, 3)`` what is behind the robot; None with masks or a plain background.
        guessed: whether the backdrop is the median of the frames, in which the robot itself may show.
    """

    rgb: UInt8[Tensor, "frames height width 3"]
    masks: UInt8[Tensor, "frames height width"] | None
    camera: Camera
    backdrop: Float[Tensor, "height width 3"] | None = None
    guessed: bool = False

    @classmethod
    def read(
        cls,
        frames: Iterable[ImageLike],
        masks: Iterable[ImageLike] | None,
        backdrop: ImageLike | None,
        camera: Camera,
        long_side: int,
    ) -> "Clip":
        """Read a video to its end, frame by frame, and shrink it.

        Raises:
            InputError: no frame, a frame or mask that is refused, fewer masks than frames, or no robot in any frame.
        """
        white = torch.ones(camera.height, camera.width, 3)
        pictures, shapes = [], []
        rest = None if masks is None else iter(masks)
        for number, frame in enumerate(frames):
            mask = None if rest is None else next(rest, None)
            if rest is not None and mask is None:
                raise InputError(f"there is no mask for frame {number}")
            try:
                seen = _seen(frame, mask, camera).resized(long_side)
            except InputError as error:
                raise InputError(f"frame {number}: {error}") from error
            pictures.append(_bytes(seen.rgb[0]))
            shapes += [] if seen.mask is None else [_bytes(seen.mask[0])]
        if not pictures:
            raise InputError("the video has no frame")
        height, width = pictures[0].shape[:2]
        clip = cls(torch.stack(pictures), torch.stack(shapes) if shapes else None, camera.resized(width, height))
        if masks is not None:
            return clip.shown()
        if backdrop is not None:
            return replace(clip, backdrop=Observation.create(backdrop, None, camera, white).resized(long_side).rgb[0])
        return clip.with_median(None) if clip.plain is None else clip.shown()

    @cached_property
    def plain(self) -> Float[Tensor, "3"] | None:
        """The colour of all frames' borders, if that is one."""
        return plain_background(self.some()[0])

    @cached_property
    def begin(self) -> int:
        """The first frame that is not `empty`; the number of frames where all are."""
        return next((i for i in range(len(self.rgb)) if not self.empty(i)), len(self.rgb))

    def shown(self) -> "Clip":
        """The clip itself.

        Raises:
            InputError: all frames are empty.
        """
        if self.begin == len(self.rgb):
            raise UnseenError(
                f"no robot in any frame: {'all are of one colour' if self.masks is None else 'empty masks'}"
            )
        return self

    def empty(self, index: int) -> bool:
        """Whether a frame shows no robot: its mask is empty, or it is of one colour."""
        try:
            self.observation(index)
        except UnseenError:
            return True
        return False

    def some(self) -> tuple[Float[Tensor, "n height width 3"], Tensor]:
        """At most 32 frames from all over the video, and their indices."""
        rows = torch.linspace(0, len(self.rgb) - 1, min(len(self.rgb), BACKDROP_FRAMES)).round().long()
        return self.rgb[rows].float() / 255.0, rows

    def with_median(self, covered: Bool[Tensor, "n height width"] | None) -> "Clip":
        """The backdrop from the median of `some`, without the pixels that the robot is known to cover."""
        if len(self.rgb) < 3:
            raise InputError("the background is not plain; give masks, a backdrop, or a video of three frames or more")
        return replace(self, backdrop=median_backdrop(self.some()[0], covered), guessed=True)

    def observation(self, index: int, T_cam_world: Float[Tensor, "4 4"] | None = None) -> Observation:
        """One frame; `T_cam_world` replaces the camera's.

        Raises:
            UnseenError: it is `empty`.
        """
        camera = self.camera if T_cam_world is None else replace(self.camera, T_cam_world=T_cam_world)
        rgb = self.rgb[index].float() / 255.0
        mask = None if self.masks is None else self.masks[index].float() / 255.0
        behind = self.backdrop
        if mask is None and behind is None and self.plain is not None and plain_background(rgb[None]) is None:
            behind = self.plain.expand(rgb.shape)  # the robot hides the border of this frame
        return Observation.create(rgb, mask, camera, behind)


def _seen(frame: ImageLike, mask: ImageLike | None, camera: Camera) -> Observation:
    """A frame and its mask, which may be empty."""
    white = torch.ones(camera.height, camera.width, 3)
    if mask is None:
        return Observation.create(frame, None, camera, white)
    try:
        return Observation.create(frame, mask, camera)
    except UnseenError:
        return replace(
            Observation.create(frame, None, camera, white), mask=torch.zeros(1, *white.shape[:2]), backdrop=None
        )


def _bytes(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    return (values * 255.0).round().to(torch.uint8)
