"""What a calibration returns: the cameras, how sure they are, and how well each image agrees."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.calibration import CalibrationObjective, CameraGuesses, base_in_world
from kinesplat.inverse.calibration_covariance import displaced_covariance
from kinesplat.inverse.camera_search import angles_between
from kinesplat.inverse.levenberg_marquardt import Solution
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel

UNEXPLAINED_FAILURE = 0.5
IOU_FAILURE = 0.75
AMBIGUOUS_RATIO = 1.3
DISTINCT_RAD = 0.1
WEAK_STD = 0.02
UNSURE_SHARE = 0.01
DIRECTIONS = ("sideways", "up or down", "towards or away from what it sees")


@dataclass(frozen=True)
class ImageQuality:
    """How one image agrees with the calibration.

    Attributes:
        loss: its own loss; the mean over the images is what was minimised.
        iou: of the rendered silhouette and the mask (without masks: what differs from the background; NaN
            where contours alone told the robot from it).
        shift_mm: how far its camera's position in the base frame moves when the image (or its group) is left out [mm].
        shift_deg: how far the camera turns then [deg]; NaN where the camera has no other image.
    """

    loss: float
    iou: float
    shift_mm: float
    shift_deg: float


@dataclass(frozen=True)
class CameraHypothesis:
    """Cameras that explain the images too: ``T_cam_mount (cams, 4, 4)`` and the loss."""

    T_cam_mount: Float[Tensor, "cams 4 4"]
    loss: float


@dataclass(frozen=True)
class CalibrationResult:
    """Result of `calibrate`.

    Attributes:
        tree: the robot.
        mount: name of the link that carries the cameras; None: they stand in the world.
        T_cam_mount: ``(cams, 4, 4)`` from the link `mount`, or from the world, to each camera [m].
        camera: in the world: one camera, or a batch ``(cams,)``; on a link: one for every image, batch ``(images,)``.
        K: ``(cams, 3, 3)`` intrinsics [px], the given ones unless the focal length was estimated.
        q: ``(images, dof)`` the readings with the estimated offsets [rad]/[m].
        q_offset: ``(dof,)`` what was added; zeros unless asked for.
        loss_history: loss after each iteration, over all image sizes in turn.
        covariance: ``(p, p)`` of `variable_names`, for outlines displaced as far as masks and rendered ones disagree,
            in common as well (`kinesplat.inverse.calibration_covariance`).
        variable_names: twist of every camera about its own centre, then joint offsets, then logs of focal lengths.
        spread_mm: standard deviation of every camera's position in the base frame by the jackknife over the images,
            which does not take pixels for independent [mm]; NaN with one image.
        spread_deg: the same of its rotation [deg].
        images: quality, image by image.
        hypotheses: distinct answers, best first.
        distance_m: of every camera from the middle of the robot [m].
        verdict: ``converged``, ``ambiguous`` (another answer explains the images nearly as well, or the standard
            deviation of a camera's position exceeds 1 % of its distance) or ``failed``.
        seconds: wall time.
    """

    tree: KinematicTree
    mount: str | None
    T_cam_mount: Float[Tensor, "cams 4 4"]
    camera: Camera
    K: Float[Tensor, "cams 3 3"]
    q: Float[Tensor, "images dof"]
    q_offset: Float[Tensor, " dof"]
    loss_history: tuple[float, ...]
    covariance: Float[Tensor, "p p"]
    variable_names: tuple[str, ...]
    spread_mm: tuple[float, ...]
    spread_deg: tuple[float, ...]
    images: tuple[ImageQuality, ...]
    hypotheses: tuple[CameraHypothesis, ...]
    distance_m: tuple[float, ...]
    verdict: str
    seconds: float

    @property
    def T_cam_base(self) -> Float[Tensor, "*cams 4 4"]:
        """``(4, 4)``, or ``(cams, 4, 4)`` of several cameras: from the frame of the robot's first link.

        Raises:
            InputError: the cameras ride on a link; see `T_cam_mount`.
        """
        if self.mount is not None:
            raise InputError(f"the cameras ride on {self.mount}; T_cam_mount is their transform, T_cam_base changes")
        T = self.T_cam_mount @ base_in_world(self.tree)
        return T[0] if len(T) == 1 else T

    @property
    def weak_variables(self) -> tuple[str, ...]:
        """Variables whose standard deviation exceeds 0.02 rad, m or (focal lengths) 2 %."""
        std = self.covariance.diagonal().sqrt()
        return tuple(n for n, s in zip(self.variable_names, std.tolist(), strict=True) if not s < WEAK_STD)

    @property
    def position_std_mm(self) -> tuple[float, ...]:
        """Standard deviation of every camera's position by the covariance, in all directions together [mm]."""
        return tuple(1000.0 * position_std(self.covariance, c) for c in range(len(self.T_cam_mount)))

    @property
    def weak_directions(self) -> tuple[str, ...]:
        """Of every camera whose position is unsure by more than 1 % of its distance: how much, and mostly which way."""
        words = []
        for c, (std, distance) in enumerate(zip(self.position_std_mm, self.distance_m, strict=True)):
            if std <= 1000.0 * UNSURE_SHARE * distance:
                continue
            block = self.covariance[6 * c : 6 * c + 3, 6 * c : 6 * c + 3]
            if not math.isfinite(std):
                words.append(f"camera {c} can move without a trace in these images")
                continue
            values, vectors = torch.linalg.eigh(block.double())
            axis = int(vectors[:, -1].abs().argmax())
            most = 1000.0 * values[-1].sqrt().item()
            words.append(f"camera {c} is unsure by {std:.0f} mm, by {most:.0f} mm mostly {DIRECTIONS[axis]}")
        return tuple(words)

    def report(self) -> str:
        """A few lines for a person: verdict, cameras with their spread, weak variables, image by image."""
        lines = [f"{self.verdict}: loss {self.hypotheses[0].loss:.3g}, {len(self.images)} images, {self.seconds:.1f} s"]
        for c, T in enumerate(torch.linalg.inv(self.T_cam_mount)):
            x, y, z = T[:3, 3].tolist()
            spread = f"+- {self.position_std_mm[c]:.1f} mm"
            if not math.isnan(self.spread_mm[c]):
                spread += f" (jackknife {self.spread_mm[c]:.1f} mm, {self.spread_deg[c]:.2f} deg)"
            lines.append(f"  camera {c} at ({x:.4f}, {y:.4f}, {z:.4f}) m of {self.mount or 'the world'} {spread}")
        for name, value in zip(self.tree.joint_names, self.q_offset.tolist(), strict=True):
            if value:
                lines.append(f"  {name} offset {value:+.4f}")
        lines += [f"  {words}: more images, of other configurations, tell more" for words in self.weak_directions]
        lines += [f"  {name} is hardly observable from these images" for name in self.weak_variables]
        for i, image in enumerate(self.images):
            moved = (
                "" if math.isnan(image.shift_mm) else f", without it {image.shift_mm:.1f} mm, {image.shift_deg:.2f} deg"
            )
            overlap = "" if math.isnan(image.iou) else f", IoU {image.iou:.3f}"
            lines.append(f"  image {i}: loss {image.loss:.3g}{overlap}{moved}")
        for rank, other in enumerate(self.hypotheses[1:], start=2):
            away = angles_between(other.T_cam_mount, self.T_cam_mount).max().item()
            lines.append(f"  hypothesis {rank}: loss {other.loss:.3g}, {math.degrees(away):.0f} deg away")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary; units in the key names. Infinite and undefined numbers become null."""
        keys = ("loss", "iou", "shift_mm", "shift_deg")
        return {
            "verdict": self.verdict,
            "mount": self.mount,
            "T_cam_base": None if self.mount is not None else self.T_cam_base.tolist(),
            "T_cam_mount": self.T_cam_mount.tolist(),
            "camera": self.camera.to_json(),
            "K": self.K.tolist(),
            "q_offset": self.q_offset.tolist(),
            "variable_names": list(self.variable_names),
            "covariance": [[_finite(v) for v in row] for row in self.covariance.tolist()],
            "weak_variables": list(self.weak_variables),
            "weak_directions": list(self.weak_directions),
            "position_std_mm": [_finite(v) for v in self.position_std_mm],
            "distance_m": list(self.distance_m),
            "spread_mm": [_finite(v) for v in self.spread_mm],
            "spread_deg": [_finite(v) for v in self.spread_deg],
            "images": [{key: _finite(getattr(image, key)) for key in keys} for image in self.images],
            "hypotheses": [{"T_cam_mount": h.T_cam_mount.tolist(), "loss": h.loss} for h in self.hypotheses],
            "loss": self.hypotheses[0].loss,
            "iterations": len(self.loss_history),
            "seconds": self.seconds,
        }


def summary(
    finest: CalibrationObjective,
    solutions: list[Solution[CameraGuesses]],
    without: list[CameraGuesses],
    groups: list[Tensor],
    seconds: float,
) -> CalibrationResult:
    """Put together what the last level says.

    Args:
        finest: objective of the last level.
        solutions: of every level; the history follows the best of the last.
        without: the answers with each group of images left out.
        groups: those images.
        seconds: wall time.

    Raises:
        InputError: a camera ended up inside the robot.
    """
    last = solutions[-1]
    best = last.state.select(last.linearization.loss.argmin()[None])
    shifts = [camera_shifts(other, best) for other in without]
    hypotheses = distinct_answers(last.state, last.linearization.loss)
    rival = len(hypotheses) > 1 and hypotheses[1].loss < AMBIGUOUS_RATIO * hypotheses[0].loss
    by_pictures = "failed" if not explained(solutions, finest) else "ambiguous" if rival else "converged"
    return assembled(
        finest.model,
        finest.full,
        best,
        by_pictures,
        hypotheses,
        about_cameras(displaced_covariance(finest, best), best),
        shifts,
        image_qualities(finest, best, shifts, groups),
        tuple(v for s in solutions for v in s.losses.amin(dim=1).tolist()),
        seconds,
    )


def assembled(
    model: SelfModel,
    full: Camera,
    best: CameraGuesses,
    by_pictures: str,
    hypotheses: tuple[CameraHypothesis, ...],
    covariance: Float[Tensor, "p p"],
    shifts: list[tuple[Tensor, Tensor]],
    images: tuple[ImageQuality, ...],
    history: tuple[float, ...],
    seconds: float,
) -> CalibrationResult:
    """The result.

    Args:
        model: whose inside no camera may see.
        full: any camera of the size of the images.
        best: the answer, a batch of one.
        by_pictures: the verdict, as far as the images and the other answers tell.
        hypotheses: distinct answers, best first.
        covariance: with the cameras' twists about their own centres.
        shifts: of the answers without some images, see `camera_shifts`.
        images: image by image.
        history: of the loss.
        seconds: wall time.

    Raises:
        InputError: a camera ended up inside the robot.
    """
    rig, camera = best.rig, best.camera(full, full.width, full.height)
    cameras = replace(camera, K=camera.K[0], T_cam_world=camera.T_cam_world[0])
    for i, q in enumerate(best.q[0]):
        model.check_camera(q, replace(cameras, K=cameras.K[i], T_cam_world=cameras.T_cam_world[i]))
    if rig.mount is None:
        first = [int(torch.nonzero(rig.camera_of_image == c)[0]) for c in range(rig.cameras)]
        pick = first[0] if rig.cameras == 1 else torch.tensor(first)
        cameras = replace(cameras, K=cameras.K[pick], T_cam_world=cameras.T_cam_world[pick])
    middle = torch.cat([rig.pivot, torch.ones(1)])
    distances = (best.T_cam_mount[0] @ middle)[:, :3].norm(dim=1).tolist()
    return CalibrationResult(
        tree=rig.tree,
        mount=None if rig.mount is None else rig.tree.link_names[rig.mount],
        T_cam_mount=best.T_cam_mount[0],
        camera=cameras,
        K=best.K[0],
        q=best.q[0],
        q_offset=best.q_offset[0],
        loss_history=history,
        covariance=covariance,
        variable_names=rig.variable_names,
        spread_mm=_jackknife([mm for mm, _ in shifts], rig.cameras),
        spread_deg=_jackknife([deg for _, deg in shifts], rig.cameras),
        images=images,
        hypotheses=hypotheses,
        distance_m=tuple(distances),
        verdict=verdict_of(by_pictures, [position_std(covariance, c) for c in range(rig.cameras)], distances),
        seconds=seconds,
    )


def distinct_answers(state: CameraGuesses, losses: Float[Tensor, " n"]) -> tuple[CameraHypothesis, ...]:
    """The end points in which some camera is turned by more than 0.1 rad from all better ones, best first."""
    found: list[CameraHypothesis] = []
    for i in losses.argsort().tolist():
        T = state.T_cam_mount[i]
        if all(angles_between(h.T_cam_mount, T).max() > DISTINCT_RAD for h in found):
            found.append(CameraHypothesis(T, losses[i].item()))
    return tuple(found)


def camera_shifts(other: CameraGuesses, best: CameraGuesses) -> tuple[Float[Tensor, " cams"], Float[Tensor, " cams"]]:
    """Distance between the camera centres [mm] and angle [deg] of two answers."""
    centres = (torch.linalg.inv(g.T_cam_mount[0])[:, :3, 3] for g in (other, best))
    a, b = centres
    return 1000.0 * (a - b).norm(dim=1), torch.rad2deg(angles_between(other.T_cam_mount[0], best.T_cam_mount[0]))


def silhouette_iou(
    alpha: Float[Tensor, "*batch height width"], mask: Float[Tensor, "*batch height width"]
) -> Float[Tensor, "*batch"]:
    """Intersection over union of ``> 0.5``."""
    a, b = alpha > 0.5, mask > 0.5
    return (a & b).sum(dim=(-2, -1)) / (a | b).sum(dim=(-2, -1)).clamp(min=1)


def about_cameras(covariance: Float[Tensor, "p p"], best: CameraGuesses) -> Float[Tensor, "p p"]:
    """A covariance of twists about the pivot as one of twists about the cameras' own centres."""
    own = torch.eye(len(covariance))
    for c, block in enumerate(best.from_pivot()[0]):
        own[6 * c : 6 * c + 6, 6 * c : 6 * c + 6] = block
    blind = ~torch.isfinite(covariance.diagonal())
    turned = own @ torch.where(torch.isfinite(covariance), covariance, 0.0) @ own.mT
    touched = (own[:, blind].abs() > 1e-9).any(dim=1)
    turned[touched, touched] = math.inf
    return turned


def position_std(covariance: Float[Tensor, "p p"], camera: int) -> float:
    """Standard deviation of a camera's position, in all directions together [m]."""
    return covariance.diagonal()[6 * camera : 6 * camera + 3].sum().sqrt().item()


def _jackknife(shifts: list[Tensor], cameras: int) -> tuple[float, ...]:
    """Standard deviations from the distances of the answers without one group to the full one (Efron & Stein 1981)."""
    if len(shifts) < 2:
        return (math.nan,) * cameras
    count = len(shifts)
    return tuple(((count - 1) / count * torch.stack(shifts).square().sum(dim=0)).sqrt().tolist())


def image_qualities(
    finest: CalibrationObjective, best: CameraGuesses, shifts: list[tuple[Tensor, Tensor]], groups: list[Tensor]
) -> tuple[ImageQuality, ...]:
    """How well every image is explained, and how far the answer without it is off the full one.

    Args:
        finest: objective of the last level.
        best: the answer.
        shifts: of the answers without each of `groups`, see `camera_shifts`.
        groups: the images that were left out together.
    """
    rgb, alpha = finest.render(best)
    losses = finest.losses(rgb, alpha)[0][0].tolist()
    ious = silhouette_iou(alpha[0].cpu(), finest.observation.silhouette()).tolist()
    moved = {int(i): shift for group, shift in zip(groups, shifts, strict=True) for i in group}
    which = best.rig.camera_of_image.tolist()
    qualities = []
    for i, (loss, iou) in enumerate(zip(losses, ious, strict=True)):
        mm, deg = (part[which[i]].item() for part in moved[i]) if i in moved else (math.nan, math.nan)
        qualities.append(ImageQuality(loss, iou, mm, deg))
    return tuple(qualities)


def explained(solutions: list[Solution[CameraGuesses]], finest: CalibrationObjective) -> bool:
    """Whether silhouettes agree on the average; before a backdrop, where there are none, whether the pictures do."""
    best = solutions[-1].linearization.loss.argmin()
    if finest.observation.backdrop is not None:
        return solutions[-1].linearization.loss[best].item() <= UNEXPLAINED_FAILURE * finest.empty_loss
    _, alpha = finest.render(solutions[-1].state.select(best[None]))
    return silhouette_iou(alpha[0].cpu(), finest.observation.silhouette()).mean().item() >= IOU_FAILURE


def verdict_of(by_pictures: str, std_m: Sequence[float], distance_m: Sequence[float]) -> str:
    """What the images say, but ``ambiguous`` where a position's standard deviation exceeds 1 % of the distance."""
    unsure = any(not std <= UNSURE_SHARE * distance for std, distance in zip(std_m, distance_m, strict=True))
    return "ambiguous" if by_pictures == "converged" and unsure else by_pictures


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
