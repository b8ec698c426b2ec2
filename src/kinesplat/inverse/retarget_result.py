"""What retargeting returns: our joints over time, how well they follow what was shown, and what else would."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.vision.point_tracks import PointTracks

Start = Literal["given", "pixels", "search"]
STARTED: dict[Start, str] = {
    "given": "from the given joints",
    "pixels": "from the pixels of key frames",
    "search": "no first frame was known",
}
NEAR_SHARE = 0.02
FOLLOWED, FAILED = 0.8, 0.5


@dataclass(frozen=True)
class Alignment:
    """How the demonstration was moved in the picture before it was compared, the same in all frames.

    Attributes:
        scale: its size was multiplied by this, about the middle of the picture.
        angle_rad: and it was turned by this, from +x (right) towards +y (down).
        shift_px: and then moved by this, right and down.
    """

    scale: float = 1.0
    angle_rad: float = 0.0
    shift_px: tuple[float, float] = (0.0, 0.0)

    def matrix(self) -> Float[Tensor, "2 2"]:
        """Scaled rotation."""
        c, s = self.scale * math.cos(self.angle_rad), self.scale * math.sin(self.angle_rad)
        return torch.tensor([[c, -s], [s, c]])

    def apply(self, points: Float[Tensor, "*batch 2"], width: int, height: int) -> Float[Tensor, "*batch 2"]:
        """Where points of the demonstration [px] of this image size come to lie [px]."""
        middle = torch.tensor([0.5 * width, 0.5 * height]).to(points)
        return (points - middle) @ self.matrix().to(points).T + middle + torch.tensor(self.shift_px).to(points)

    def then(self, other: "Alignment") -> "Alignment":
        """This one first, then the other."""
        shift = other.matrix() @ torch.tensor(self.shift_px) + torch.tensor(other.shift_px)
        x, y = shift.tolist()
        return Alignment(self.scale * other.scale, self.angle_rad + other.angle_rad, (x, y))


@dataclass(frozen=True)
class Motion:
    """Joints over time that were another answer: ``q (frames, dof)`` [rad]/[m] and their loss."""

    q: Float[Tensor, "frames dof"]
    loss: float


@dataclass(frozen=True)
class RetargetResult:
    """Result of `retarget`.

    Attributes:
        joint_names: names of the columns of q.
        q: ``(frames, dof)`` [rad]/[m].
        camera: the given one.
        covariance: ``(frames, dof, dof)`` of the joints of every frame [rad^2]/[m^2], every track taken for one
            observation, the alignment included; see `kinesplat.inverse.retarget_spread`. Infinite variance where the
            tracks say no more of a joint than its range; where `q_init` does, its 0.1 rad. None for the rendered
            objective.
        loss_history: cost of the best start after every iteration; values of different levels are not comparable.
        level_starts: index into `loss_history` at which each level begins.
        residuals_px: of every frame, median distance of the demonstrated points from our partners; NaN without any.
        near_share: share of the demonstrated points that lie within 2 % of the image side of their partners.
        hypotheses: motions that differ by more than 0.05 rad or m on average, best first; the first is the answer.
            The others are as the search on key frames left them; so is their loss, which compares them with each other
            and not with the answer. Where pixels leave several beginnings possible, all were followed through the
            video, and losses compare.
        alignment: how the demonstration was moved in the picture first.
        shown: the demonstrated tracks, in the pixels of the camera, before they were moved.
        start: what told where the motion begins: ``given`` (`q_init`), ``pixels`` of some frames, or a ``search``.
        ambiguous: the start is ``pixels``, and in no key frame did `reconstruct` converge: its verdict was "ambiguous".
        seconds: wall time.
    """

    joint_names: tuple[str, ...]
    q: Float[Tensor, "frames dof"]
    camera: Camera
    covariance: Float[Tensor, "frames dof dof"] | None
    loss_history: tuple[float, ...]
    level_starts: tuple[int, ...]
    residuals_px: tuple[float, ...]
    near_share: float
    hypotheses: tuple[Motion, ...]
    alignment: Alignment
    shown: PointTracks
    start: Start
    ambiguous: bool
    seconds: float

    @property
    def tracks(self) -> int:
        """Number of demonstrated tracks."""
        return self.shown.points.shape[1]

    @property
    def verdict(self) -> str:
        """``followed`` (80 % of the points are near), ``roughly followed``, or ``failed`` (less than half of them)."""
        if self.near_share >= FOLLOWED:
            return "followed"
        return "failed" if self.near_share < FAILED else "roughly followed"

    @property
    def std(self) -> Float[Tensor, "frames dof"] | None:
        """``(frames, dof)`` standard deviations [rad]/[m]: the root of the diagonal of `covariance`."""
        return None if self.covariance is None else self.covariance.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()

    @property
    def residual_px(self) -> float:
        """Median over the frames of `residuals_px`."""
        seen = [r for r in self.residuals_px if math.isfinite(r)]
        return sorted(seen)[len(seen) // 2] if seen else math.nan

    def report(self) -> str:
        """A few lines for a person."""
        a = self.alignment
        lines = [
            f"{self.verdict}: {len(self.q)} frames, {self.tracks} tracks, {self.seconds:.1f} s; half of the points are "
            f"within {self.residual_px:.2f} px, {100 * self.near_share:.0f} % within {100 * NEAR_SHARE:.0f} % "
            f"of the image side; {STARTED[self.start]}"
        ]
        if self.ambiguous:
            lines.append("  ambiguous: in no key frame do the pixels tell the joints beyond doubt")
        if a != Alignment():
            x, y = a.shift_px
            lines.append(
                f"  demonstration times {a.scale:.3f}, turned by {a.angle_rad:+.3f} rad, moved by {x:+.1f}, {y:+.1f} px"
            )
        std = [math.nan] * len(self.joint_names) if self.std is None else self.std.median(dim=0).values.tolist()
        for name, low, high, deviation in zip(
            self.joint_names, self.q.amin(dim=0).tolist(), self.q.amax(dim=0).tolist(), std, strict=True
        ):
            sure = "" if math.isnan(deviation) else f" +- {deviation:.1g}"
            lines.append(f"  {name:<24} {low:+.4f} to {high:+.4f}{sure}")
        for rank, other in enumerate(self.hypotheses[1:4], start=2):
            away = (other.q - self.q).abs().mean(dim=0)
            joint = self.joint_names[int(away.argmax())]
            lines.append(
                f"  hypothesis {rank}: loss {other.loss:.3g}, most different in {joint}: {away.max():.3f} on average"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary; units in the key names. What is infinite or no number becomes null."""
        std = None if self.std is None else [[_finite(v) for v in row] for row in self.std.tolist()]
        a = self.alignment
        return {
            "verdict": self.verdict,
            "joint_names": list(self.joint_names),
            "q": self.q.tolist(),
            "std": std,
            "camera": self.camera.to_json(),
            "residual_px": _finite(self.residual_px),
            "residuals_px": [_finite(r) for r in self.residuals_px],
            "near_share": self.near_share,
            "alignment": {"scale": a.scale, "angle_rad": a.angle_rad, "shift_px": list(a.shift_px)},
            "hypotheses": [{"q": h.q.tolist(), "loss": h.loss} for h in self.hypotheses],
            "loss_history": list(self.loss_history),
            "level_starts": list(self.level_starts),
            "tracks": self.tracks,
            "start": self.start,
            "ambiguous": self.ambiguous,
            "seconds": self.seconds,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
