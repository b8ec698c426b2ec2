"""A second look at a tracked video whose backdrop was guessed: frames that the others' backdrop explains better.

The median of a short clip may show the robot itself. The first frames are then solved before a wrong backdrop, and what
is wrong stays wrong from frame to frame without a trace in their states. Frames that are explained well later on give a
better backdrop, and joints from which the others are followed, backwards in time too. What remains doubtful says so.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kinesplat.errors import UnseenError
from kinesplat.inverse.backdrop import FOREGROUND, moving_masks
from kinesplat.inverse.track_result import TrackedFrame
from kinesplat.inverse.tracker import LEVELS, LOST_RATIO, Tracker, predict

ROUNDS = 2
BEST_SHARE, USUAL_SHARE = 0.1, 0.25
AGAIN_RATIO = 1.5
COVERED, BESIDE = 0.9, 0.05
STILL_SHARE = 0.75
LEFT_SHARE = 0.12


def mended(tracker: Tracker, found: Sequence[TrackedFrame]) -> list[TrackedFrame]:
    """The frames, those in doubt solved again from their neighbours before a better backdrop, or called doubtful.

    A frame is doubtful where its loss is twice what the better quarter of the frames has, where much of what stands out
    from the backdrop is no robot, or where hardly any of the robot stands out from it. Where the backdrop was not
    guessed nothing changes.

    Args:
        tracker: as it was before its first frame.
        found: what it found, frame by frame.
    """
    frames = list(found)
    if not tracker.clip.guessed:
        return frames
    for _ in range(ROUNDS):
        worker = _cleaned(tracker, frames)
        doubt = in_doubt(worker, frames, _most(frames))
        if bool(doubt.all()):
            frames, doubt = _begun_again(worker, frames)
        if not bool(doubt.any()):
            break
        frames = _followed_again(worker, frames, doubt)
    doubt = in_doubt(_cleaned(tracker, frames), frames, torch.tensor(LOST_RATIO * _usual(frames, USUAL_SHARE))).tolist()
    return [
        replace(frame, state="doubtful") if unsure and frame.state != "lost" else frame
        for frame, unsure in zip(frames, doubt, strict=True)
    ]


def in_doubt(
    tracker: Tracker, frames: Sequence[TrackedFrame], most: Float[Tensor, "*frames"]
) -> Bool[Tensor, " frames"]:
    """Which frames are lost, have a loss above `most`, or show too little of the robot or too much beside it."""
    losses = torch.tensor([frame.loss for frame in frames])
    lost = torch.tensor([frame.state == "lost" for frame in frames])
    still, left = (
        torch.tensor(values) for values in zip(*(told(tracker, i, f) for i, f in enumerate(frames)), strict=True)
    )
    return lost | (losses > most) | (still > STILL_SHARE) | (left > LEFT_SHARE)


def told(tracker: Tracker, index: int, frame: TrackedFrame) -> tuple[float, float]:
    """Share of the robot's pixels that look like the backdrop, and pixels beside it that do not, as a share of them."""
    observation = tracker.clip.observation(index)
    assert observation.backdrop is not None
    camera = replace(observation.camera, T_cam_world=frame.T_cam_world[None])
    alpha = tracker.rendered(LEVELS[1].splats, frame.q, camera, ("alpha",)).alpha
    assert alpha is not None
    inside = alpha[0] > COVERED
    count = inside.sum().clamp(min=1)
    alike = (observation.rgb - observation.backdrop).abs().amax(dim=-1)[0] < FOREGROUND
    beside = (moving_masks(observation.rgb, observation.backdrop)[0] > 0.5) & (alpha[0] < BESIDE)
    return ((alike & inside).sum() / count).item(), (beside.sum() / count).item()


def _cleaned(tracker: Tracker, frames: Sequence[TrackedFrame]) -> Tracker:
    """The tracker before the backdrop that the frames which are explained as usual uncover."""
    usual = _usual(frames, USUAL_SHARE)
    return tracker.behind([f if f.loss <= LOST_RATIO * usual else replace(f, state="lost") for f in frames])


def _most(frames: Sequence[TrackedFrame]) -> Float[Tensor, " frames"]:
    """The loss up to which every frame is beyond doubt; less for those before the robot was searched anew.

    What led there had gone astray before it was noticed.
    """
    searched = [i for i, frame in enumerate(frames) if i and frame.state == "searched"]
    before = torch.arange(len(frames)) < max(searched, default=0)
    usual, best = LOST_RATIO * _usual(frames, USUAL_SHARE), AGAIN_RATIO * _usual(frames, BEST_SHARE)
    return torch.where(before, min(usual, best), usual)


def _usual(frames: Sequence[TrackedFrame], share: float) -> float:
    losses = torch.tensor([frame.loss for frame in frames if frame.state != "lost"])
    return losses.quantile(share).item() if len(losses) else 0.0


def _begun_again(worker: Tracker, frames: Sequence[TrackedFrame]) -> tuple[list[TrackedFrame], Bool[Tensor, " frames"]]:
    """One frame, of the middle or the end, searched anew, if that has an answer beyond doubt; and what is in doubt."""
    new, doubt = list(frames), torch.ones(len(frames), dtype=torch.bool)
    anywhere = replace(worker, q_init=None)
    for index in (len(frames) // 2, len(frames) - 1):
        if told(worker, index, new[index])[0] > STILL_SHARE:
            continue
        try:
            frame = anywhere.first_frame(index)
        except UnseenError:  # an answer with the camera inside the robot
            continue
        still, left = told(worker, index, frame)
        if frame.state != "lost" and still <= STILL_SHARE and left <= LEFT_SHARE:
            new[index], doubt[index] = frame, False
            break
    return new, doubt


def _followed_again(
    worker: Tracker, frames: Sequence[TrackedFrame], doubt: Bool[Tensor, " frames"]
) -> list[TrackedFrame]:
    """Frames in doubt solved from the neighbours that are not: backwards in time, then what remains forwards."""
    new, usual = list(frames), _usual(frames, USUAL_SHARE)
    settled = (~doubt).tolist()
    for step in (-1, 1):
        order = range(len(new)) if step > 0 else range(len(new) - 1, -1, -1)
        for index in order:
            behind = [index - 2 * step, index - step]
            if settled[index] or not (0 <= behind[1] < len(new) and settled[behind[1]]):
                continue
            before = [new[i] for i in behind if 0 <= i < len(new) and settled[i]]
            expected = predict(worker.model, before)
            starts = [replace(before[-1], q=expected), before[-1], new[index]]
            answer = worker.solve(index, starts, expected, "tracked")
            settled[index] = answer.loss <= LOST_RATIO * usual and not worker.misfits(index, answer)
            if settled[index] or new[index].state != "lost":
                new[index] = answer
    return new
