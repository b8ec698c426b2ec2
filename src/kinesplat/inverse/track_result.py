"""What tracking returns: joints over time, how sure they are, and where the robot was lost."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera

STATES = ("tracked", "searched", "doubtful", "lost")


@dataclass(frozen=True)
class TrackedFrame:
    """The robot in one frame.

    Attributes:
        q: ``(dof,)`` [rad]/[m].
        T_cam_world: ``(4, 4)`` [m].
        std: ``(dof,)`` standard deviations [rad]/[m] from residuals taken for independent; infinite where unseen.
        loss: squared residuals of the finest image size, robust, averaged over pixels; where a frame shows no robot,
            that of the frame before.
        state: ``tracked`` from the frame before, ``searched`` anew (the first frame, or after a loss), ``lost``
            (the frame shows no robot, or nothing explains it; the values are those before), or ``doubtful``: the
            backdrop was guessed from the video, and the frame is explained much worse than others, or the robot hardly
            stands out from the backdrop (`kinesplat.inverse.mending`).
    """

    q: Float[Tensor, " dof"]
    T_cam_world: Float[Tensor, "4 4"]
    std: Float[Tensor, " dof"]
    loss: float
    state: str


@dataclass(frozen=True)
class TrackResult:
    """Result of `track`.

    Attributes:
        joint_names: names of the columns of q.
        q: ``(frames, dof)`` [rad]/[m].
        camera: the camera, or a batch ``(frames,)`` where it was tracked too.
        std: ``(frames, dof)`` standard deviations [rad]/[m], see `TrackedFrame`.
        losses: of every frame.
        states: of every frame: ``tracked``, ``searched``, ``doubtful`` or ``lost``.
        seconds: wall time, all included.
        first_seconds: the part of it before the first frame was known: reading the video, background, search.
    """

    joint_names: tuple[str, ...]
    q: Float[Tensor, "frames dof"]
    camera: Camera
    std: Float[Tensor, "frames dof"]
    losses: tuple[float, ...]
    states: tuple[str, ...]
    seconds: float
    first_seconds: float

    @property
    def verdict(self) -> str:
        """``tracked``, ``ambiguous``, ``partly lost`` or ``failed``.

        Failed: more than half of the frames are lost; else partly lost where one is, ambiguous where one is doubtful.
        """
        lost = self.states.count("lost")
        if lost > 0.5 * len(self.states):
            return "failed"
        return "partly lost" if lost else "ambiguous" if "doubtful" in self.states else "tracked"

    @property
    def frames_per_second(self) -> float:
        """Rate once the first frame is known."""
        return len(self.states) / max(self.seconds - self.first_seconds, 1e-9)

    def report(self) -> str:
        """A few lines for a person."""
        count = Counter(self.states)
        lines = [
            f"{self.verdict}: {len(self.states)} frames in {self.seconds:.1f} s ({self.first_seconds:.1f} s until the "
            f"first was known, then {self.frames_per_second:.1f} frames/s); "
            + ", ".join(f"{count[state]} {state}" for state in STATES if count[state])
        ]
        std = self.std.median(dim=0).values.tolist()
        for name, low, high, deviation in zip(
            self.joint_names, self.q.amin(dim=0).tolist(), self.q.amax(dim=0).tolist(), std, strict=True
        ):
            lines.append(f"  {name:<24} {low:+.4f} to {high:+.4f} +- {deviation:.1g}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary; units in the key names."""
        return {
            "verdict": self.verdict,
            "joint_names": list(self.joint_names),
            "q": self.q.tolist(),
            "camera": self.camera.to_json(),
            "losses": list(self.losses),
            "states": list(self.states),
            "seconds": self.seconds,
            "first_seconds": self.first_seconds,
            "frames_per_second": self.frames_per_second,
        }
