"""A video of the robot itself: some of its frames say by their pixels where the joints are."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import UnseenError
from kinesplat.inverse.clip import Clip
from kinesplat.inverse.reconstruct import reconstruct
from kinesplat.inverse.result import AMBIGUOUS_RATIO, FitResult
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel

APART_FRAMES = 20
FEWEST, MOST = 2, 6
CHOICES = 3
WITHIN = 1e-4


@dataclass(frozen=True)
class KeyFrames:
    """Joints known in some frames.

    Attributes:
        frames: ``(k,)`` ascending.
        q: ``(k, dof)`` [rad]/[m]; hinges go on from one to the next without full turns in between.
        std: ``(k, dof)`` standard deviations.
        sure: ``(k,)`` false where other answers fit a frame nearly as well.
        choices: of every frame ``(n, dof)``, these answers and its own, which is the first.
    """

    frames: Int[Tensor, " k"]
    q: Float[Tensor, "k dof"]
    std: Float[Tensor, "k dof"]
    sure: Bool[Tensor, " k"]
    choices: tuple[Float[Tensor, "_ dof"], ...]


def key_frames(model: SelfModel, clip: Clip, camera: Camera, seed: int) -> KeyFrames | None:
    """What `reconstruct` finds in every twentieth frame or so, in two to six of them, the middle one first.

    Frames that are not explained are left out; where neither the middle one nor the first is, the video shows something
    else, and the rest is not tried.

    Args:
        model: self-model of the robot.
        clip: the video.
        camera: batch ``()`` or ``(frames,)``.
        seed: of the random starts.

    Returns:
        None where no frame is explained.
    """
    count = len(clip.rgb)
    wanted = min(max(round(count / APART_FRAMES) + 1, FEWEST), MOST, count)
    frames = torch.linspace(0, count - 1, wanted).round().long().unique().tolist()
    middle = frames[len(frames) // 2]
    found: dict[int, FitResult] = {}
    for tried, frame in enumerate([middle, *(f for f in frames if f != middle)]):
        if tried == FEWEST and not found:
            return None
        try:
            seen = clip.observation(frame)
            seen = replace(seen, camera=of_frame(camera, frame, seen.camera))
            fit = reconstruct(model, seen, seen.camera, seed=seed)
        except UnseenError:  # a frame without the robot, or an answer with the camera inside it
            continue
        if fit.verdict != "failed":
            found[frame] = fit
    if not found:
        return None
    known, fits = sorted(found), [found[frame] for frame in sorted(found)]
    return KeyFrames(
        torch.tensor(known),
        unwrapped(model.tree, torch.stack([fit.q for fit in fits])),
        torch.stack([fit.covariance.diagonal()[: model.tree.dof].sqrt() for fit in fits]),
        torch.tensor([fit.verdict == "converged" for fit in fits]),
        tuple(choices(fit) for fit in fits),
    )


def choices(fit: FitResult) -> Float[Tensor, "n dof"]:
    """The answer of a fit and, where it is ambiguous, the few others that fit nearly as well."""
    others = (
        [h.q for h in fit.hypotheses[1:] if h.loss < AMBIGUOUS_RATIO * fit.loss] if fit.verdict != "converged" else []
    )
    return torch.stack([fit.q, *others[: CHOICES - 1]])


def unwrapped(tree: KinematicTree, q: Float[Tensor, "k dof"]) -> Float[Tensor, "k dof"]:
    """Every row in those turns of its hinges that are nearest to the row before."""
    rows = [q[0]]
    for row in q[1:]:
        rows.append(nearest_turn(tree, row, rows[-1]))
    return torch.stack(rows)


def nearest_turn(
    tree: KinematicTree, q: Float[Tensor, "*batch dof"], to: Float[Tensor, " dof"]
) -> Float[Tensor, "*batch dof"]:
    """The same configurations with hinges turned by full turns, within their limits, to be as near as they can."""
    hinge = torch.tensor([kind == "hinge" for kind in tree.joint_types])
    turned = q + 2.0 * math.pi * torch.round((to - q) / (2.0 * math.pi))
    lower, upper = tree.q_lower.to(q) - WITHIN, tree.q_upper.to(q) + WITHIN
    possible = hinge & (~tree.q_limited | ((turned >= lower) & (turned <= upper)))
    return torch.where(possible, turned, q)


def of_frame(camera: Camera, frame: int, size: Camera) -> Camera:
    """The camera of one frame, of the size of another, as a batch of one view."""
    K, T = camera.K.reshape(-1, 3, 3), camera.T_cam_world.reshape(-1, 4, 4)
    one = replace(camera, K=K[min(frame, len(K) - 1)][None], T_cam_world=T[min(frame, len(T) - 1)][None])
    return one.resized(size.width, size.height)
