"""From frames in which the joints are known to the whole motion: partners are read off there and carried on in time."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kinesplat.inverse.key_frames import KeyFrames, nearest_turn, unwrapped
from kinesplat.inverse.retarget_result import Motion
from kinesplat.inverse.retargeting import BEGIN, REST, Answer, Retargeting, between
from kinesplat.inverse.robust import geman_mcclure
from kinesplat.inverse.search import joint_scale
from kinesplat.inverse.surface_tracks import SurfaceTracks
from kinesplat.inverse.track_matching import Pairs
from kinesplat.inverse.track_objective import TrackObjective
from kinesplat.inverse.trajectory import Smoothness, Trajectory, solve_trajectory
from kinesplat.vision.point_tracks import PointTracks

GROWTH_FRAMES = 6
DRIFT_FRAMES = 10.0
ROBUST, MISS = 3.0, 4.0  # [px of a picture of 256 px]
ITERATIONS, LAST_ITERATIONS = 6, 12
ROUNDS = 4
AGREEING = 0.2


@dataclass(frozen=True)
class Bound:
    """Tracks that have a partner on our surface, each from one frame in which it was read off.

    Attributes:
        track: ``(k,)`` index of the demonstrated track; one may be there several times.
        frame: ``(k,)`` in which its partner was read off.
        surface: the partners, ``k`` points.
    """

    track: Int[Tensor, " k"]
    frame: Int[Tensor, " k"]
    surface: SurfaceTracks

    @classmethod
    def joined(cls, parts: "list[Bound]") -> "Bound":
        """All of several."""
        surfaces = [part.surface for part in parts]
        each = {name: torch.cat([getattr(s, name) for s in surfaces]) for name in ("links", "points", "normals")}
        track, frame = (torch.cat([getattr(part, name) for part in parts]) for name in ("track", "frame"))
        return cls(track, frame, replace(surfaces[0], **each))

    def shown(self, tracks: PointTracks) -> PointTracks:
        """The demonstration's tracks, one for every partner."""
        return tracks.select(self.track)

    def parted(self, tracks: PointTracks) -> PointTracks:
        """The same, each only where no other of its partners was read off nearer in time: no point is there twice."""
        shown, away = self.shown(tracks), self._away(tracks)
        order = away + torch.linspace(0.0, 0.5, len(self.track))  # of two that are as near, the first
        least = torch.full((len(away), tracks.points.shape[1]), torch.inf)
        least = least.scatter_reduce(1, self.track.expand(len(away), -1), order, "amin")
        return PointTracks(shown.points, shown.visible & (order <= least[:, self.track]))

    def weights(self, tracks: PointTracks) -> Float[Tensor, "frames k"]:
        """Of every point: the farther in time from where its partner was read off the less, since trackers drift."""
        w = tracks.visible[:, self.track] / (1.0 + (self._away(tracks) / DRIFT_FRAMES).square())
        return w * (tracks.points.shape[1] / w.sum().clamp(min=1e-9))

    def _away(self, tracks: PointTracks) -> Float[Tensor, "frames k"]:
        return (torch.arange(len(tracks.points))[:, None] - self.frame).abs().float()


def through(work: Retargeting, known: KeyFrames) -> Answer:
    """The motion through key frames; tracks from the sure ones say which answer of the others is meant.

    Where none is sure, every answer of the middle one is followed through the video. The motion that explains the
    tracks best is kept, the others are its rivals.
    """
    index = torch.nonzero(known.sure)[:, 0]
    if len(index):
        starts = [(index, unwrapped(work.tree, known.q[index]))]
    else:
        middle = len(known.frames) // 2
        starts = [(torch.tensor([middle]), q[None]) for q in known.choices[middle]]
    answers = []
    for index, q in starts:
        answer = anchored(work, known.frames[index], q, known.std[index])
        more, chosen = agreeing(work, known, answer.at.q, index)
        if len(more):
            order = torch.cat([index, more]).argsort()
            index, q = torch.cat([index, more])[order], torch.cat([q, chosen])[order]
            answer = anchored(work, known.frames[index], q, known.std[index])
        answers.append(replace(answer, loss=misfit(work, answer) * work.unit**2))
    answers.sort(key=lambda answer: answer.loss)
    rivals = tuple(Motion(answer.at.q, answer.loss) for answer in answers[1:])
    return replace(answers[0], rivals=rivals)


def agreeing(
    work: Retargeting, known: KeyFrames, q: Float[Tensor, "frames dof"], taken: Int[Tensor, " a"]
) -> tuple[Int[Tensor, " b"], Float[Tensor, "b dof"]]:
    """The key frames that are left, and of each the answer nearest to a motion; those far from it are left out."""
    index, chosen = list[int](), [q[:0]]
    for i in sorted(set(range(len(known.frames))) - set(taken.tolist())):
        there = q[known.frames[i]]
        answers = nearest_turn(work.tree, known.choices[i], there)
        away = ((answers - there) / joint_scale(work.tree)).abs().mean(dim=1)
        if away.min() < AGREEING:
            index.append(i)
            chosen.append(answers[away.argmin()][None])
    return torch.tensor(index, dtype=torch.long), torch.cat(chosen)


def anchored(
    work: Retargeting,
    frames: Int[Tensor, " a"],
    q: Float[Tensor, "a dof"],
    std: Float[Tensor, "a dof"] | None = None,
) -> Answer:
    """The motion through joints that are known at some frames.

    What lies under a track in such a frame is its partner: no guess is needed. Frames farther and farther away are
    solved with those partners; tracks that begin there get theirs from the motion found so far. In the end partners
    slide along the surface.

    Args:
        work: model and demonstration; it is not aligned.
        frames: ascending.
        q: the joints there [rad]/[m].
        std: how sure they are; at best, and by default, a tenth of a joint's unit.
    """
    motion, every = between(q, frames, len(work.every)), work.every
    scale = joint_scale(work.tree)
    weight = torch.full((len(every), 1), REST * work.unit**2) / scale.square()
    spread = (BEGIN**-0.5 * scale).expand(len(frames), -1)
    spread = spread if std is None else torch.maximum(spread, std).minimum(REST**-0.5 * scale)
    weight[frames] = work.unit**2 / spread.square()
    ties = Smoothness((work.smoothness * work.unit**2) ** 0.5 / scale, weight.sqrt(), motion)
    answer = Answer(Trajectory(motion, work.nothing_shared()), 0.0, [], ties=ties)
    bound = Bound.joined(
        [read_off(work, motion[a], a, torch.nonzero(work.shown.visible[a])[:, 0]) for a in frames.tolist()]
    )
    away = (every[:, None] - frames).abs().amin(dim=1)
    for reach in range(GROWTH_FRAMES, int(away.max()) + GROWTH_FRAMES, GROWTH_FRAMES):
        answer = solved(work, answer, bound, away <= reach, ITERATIONS)
        bound = Bound.joined([bound, *at_mid_life(work, answer.at.q, bound, away <= reach)])
    return polished(work, answer, bound)


def carried_on(work: Retargeting, answer: Answer) -> Answer:
    """A motion with partners that are read off from itself, and then moved as these want it."""
    nobody = torch.zeros(0, dtype=torch.long)
    bound = Bound(nobody, nobody, work.everything(work.every[:1]).select(nobody))
    found = list(at_mid_life(work, answer.at.q, bound, torch.ones(len(work.every), dtype=torch.bool)))
    ties = work.ties(len(work.every))
    return polished(work, replace(answer, ties=ties), Bound.joined(found)) if found else answer


def polished(work: Retargeting, answer: Answer, bound: Bound) -> Answer:
    """Motion and partners in turn, the latter sliding along the surface."""
    everywhere = torch.ones(len(work.every), dtype=torch.bool)
    for _ in range(ROUNDS):
        answer = solved(work, answer, bound, everywhere, LAST_ITERATIONS)
        bound = replace(bound, surface=bound.surface.slid(answer.at.q, bound.shown(work.shown), ROBUST * work.unit))
    answer = solved(work, answer, bound, everywhere, LAST_ITERATIONS)
    shown = bound.parted(work.shown)
    told = shown.visible.any(dim=0)
    return replace(answer, partners=bound.surface.select(told), followed=shown.select(told))


def solved(work: Retargeting, answer: Answer, bound: Bound, heard: Bool[Tensor, " frames"], iterations: int) -> Answer:
    """The motion that bound tracks of some frames want."""
    assert answer.ties is not None
    weights = bound.weights(work.shown) * heard[:, None]
    frame, index = torch.nonzero(weights, as_tuple=True)
    shown = bound.shown(work.shown)
    pairs = Pairs(frame, index, shown.points[frame, index], weights[frame, index])
    objective = TrackObjective(shown, bound.surface, lambda s, o, q: pairs, ROBUST * work.unit, work.priors)
    at, losses = solve_trajectory(
        objective.linearize, objective.loss, answer.at, work.tree, answer.ties, iterations, 1e-3
    )
    return replace(answer, at=at, loss=losses[-1], history=[*answer.history, losses])


def at_mid_life(
    work: Retargeting, q: Float[Tensor, "frames dof"], bound: Bound, known: Bool[Tensor, " frames"]
) -> list[Bound]:
    """Partners of the tracks that have none yet, read off in the middle of the known frames in which they are seen."""
    visible = work.shown.visible & known[:, None]
    free = visible.any(dim=0)
    free[bound.track] = False
    order = visible.float().cumsum(dim=0)
    middle = (order >= (0.5 * order[-1]).ceil().clamp(min=1.0)).float().argmax(dim=0)
    frames = middle[free].unique().tolist()
    return [read_off(work, q[f], f, torch.nonzero(free & (middle == f))[:, 0]) for f in frames]


def read_off(work: Retargeting, q: Float[Tensor, " dof"], frame: int, tracks: Int[Tensor, " n"]) -> Bound:
    """What lies under some tracks in one frame; those that miss our surface are left out."""
    surface, miss = work.everything(torch.tensor([frame])).under(q, work.shown.points[frame, tracks])
    met = miss < MISS * work.unit
    points = replace(surface.select(met), camera=work.camera)
    return Bound(tracks[met], torch.full((int(met.sum()),), frame), points)


def misfit(work: Retargeting, answer: Answer) -> float:
    """How badly a motion explains the demonstration: mean robust squared distance of its points from their partners.

    A point without a partner counts as one that is infinitely far [px^2 of a picture of 256 px].
    """
    seen, limit = int(work.shown.visible.sum()), (ROBUST * work.unit) ** 2
    if answer.followed is None or answer.partners is None:
        return ROBUST**2
    away = answer.partners.pixels(answer.partners.in_camera(answer.at.q)) - answer.followed.points
    cost, _ = geman_mcclure(away.square().sum(dim=-1)[answer.followed.visible], ROBUST * work.unit)
    return (float(cost.sum()) + limit * (seen - len(cost))) / max(seen, 1) / work.unit**2
