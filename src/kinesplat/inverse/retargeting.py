"""How retargeting finds a motion: from several starts on key frames to one motion on all frames, level by level."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.priors import Priors
from kinesplat.inverse.retarget_result import NEAR_SHARE, Alignment, Motion, RetargetResult, Start
from kinesplat.inverse.retarget_spread import spread
from kinesplat.inverse.retarget_stages import LAST, Stage
from kinesplat.inverse.search import joint_scale
from kinesplat.inverse.surface_tracks import SurfaceTracks
from kinesplat.inverse.track_matching import (
    Pairs,
    equal_pairs,
    first_distances,
    frame_pairs,
    mean_squared,
    nearest_tracks,
    track_pairs,
)
from kinesplat.inverse.track_objective import TrackObjective
from kinesplat.inverse.trajectory import Smoothness, Trajectory, solve_trajectory
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel
from kinesplat.vision.point_tracks import PointTracks

UNIT_SIDE = 256
COARSE_POINTS, DENSE_POINTS = 1_500, 6_000
REST, BEGIN = 1e-3, 100.0  # cost of one joint unit [px^2]: everywhere, and in the first frame where that is known
BACKWARD = 0.1
POLISHING = 4
BOX_SHARE = 0.01
APART = 0.05


@dataclass(frozen=True)
class Answer:
    """A motion, what it costs, and how it was found: losses by level.

    Attributes:
        rivals: other motions.
        partners: points of ours, polished.
        followed: the tracks that they are the partners of.
        ties: what tied its frames together; None for what `Retargeting.ties` says.
        ambiguous: whether the pixels of the key frames leave other beginnings possible.
    """

    at: Trajectory
    loss: float
    history: list[list[float]]
    rivals: tuple[Motion, ...] = ()
    partners: SurfaceTracks | None = None
    followed: PointTracks | None = None
    ties: Smoothness | None = None
    ambiguous: bool = False


@dataclass(frozen=True)
class Retargeting:
    """A robot, a demonstration, and how to go from one to the other; arguments as of `retarget`.

    Attributes:
        given: the demonstration's tracks.
        shown: the same, roughly aligned.
        first: that rough alignment.
    """

    model: SelfModel
    camera: Camera
    given: PointTracks
    shown: PointTracks
    first: Alignment
    q_init: Float[Tensor, "*frames dof"] | None
    align: bool
    smoothness: float
    priors: Priors | None

    @classmethod
    def create(
        cls,
        model: SelfModel,
        shown: PointTracks,
        camera: Camera,
        q_init: Tensor | None,
        align: bool,
        smoothness: float,
        self_collision: float,
    ) -> "Retargeting":
        """Check the start, and bring the demonstration to the size and place of our robot if asked to."""
        model, tree, frames = model.to("cpu"), model.tree, len(shown.points)
        if q_init is not None:
            tree.coordinates(q_init)  # raises on a wrong size or NaN
            if q_init.dim() > 1 and q_init.shape[:-1] != (frames,):
                raise InputError(f"q_init has shape {tuple(q_init.shape)}; expected (dof,) or ({frames}, dof)")
            q_init = tree.clamp(q_init.detach().float().cpu())
        work = cls(model, camera, shown, shown, Alignment(), q_init, align, smoothness, None)
        if self_collision:
            work = replace(work, priors=Priors.of(model, self_collision * work.unit**2))
        return work.roughly_aligned() if align else work

    @property
    def unit(self) -> float:
        """Pixels of the camera in one of a picture of 256 px."""
        return max(self.camera.width, self.camera.height) / UNIT_SIDE

    @property
    def tree(self) -> KinematicTree:
        """Of our robot."""
        return self.model.tree

    @property
    def every(self) -> Int[Tensor, " frames"]:
        """Indices of all frames."""
        return torch.arange(len(self.shown.points))

    @cached_property
    def _surfaces(self) -> dict[bool, SurfaceTracks]:
        dense = SurfaceTracks.on(self.model, self.camera, DENSE_POINTS)
        return {True: dense, False: dense.select(torch.arange(min(COARSE_POINTS, len(dense.links))))}

    def surface(self, dense: bool, frames: Int[Tensor, " keys"] | None = None) -> SurfaceTracks:
        """Our points, seen by the cameras of some frames."""
        surface = self._surfaces[dense]
        return surface if frames is None else self._seen_by(surface, frames)

    def everything(self, frames: Int[Tensor, " keys"]) -> SurfaceTracks:
        """All of our points, seen by the cameras of some frames."""
        return self._seen_by(self._whole, frames)

    @cached_property
    def _whole(self) -> SurfaceTracks:
        return SurfaceTracks.on(self.model, self.camera, len(self.model.link_index))

    def _seen_by(self, surface: SurfaceTracks, frames: Int[Tensor, " keys"]) -> SurfaceTracks:
        camera = self.camera
        if not camera.batch_shape:
            return surface
        K, T = camera.K.expand(*camera.batch_shape, 3, 3), camera.T_cam_world.expand(*camera.batch_shape, 4, 4)
        return replace(surface, camera=replace(camera, K=K[frames], T_cam_world=T[frames]))

    def ties(self, frames: int, held: bool = True) -> Smoothness:
        """Smoothness of a motion that has been thinned out to so many frames; a known first frame may be `held`."""
        scale, thinned = joint_scale(self.tree), (len(self.shown.points) - 1) / max(frames - 1, 1)
        acceleration = (self.smoothness * self.unit**2 / thinned**3) ** 0.5 / scale
        rest = self.tree.q_canonical.float() if self.q_init is None else self.q_init
        if rest.dim() > 1:
            rest = rest[torch.linspace(0, len(rest) - 1, frames).round().long()]
        weight = torch.full((frames, 1), REST * self.unit**2) / scale.square()
        if held and (self.q_init is not None or self.align):
            weight[0] = BEGIN * self.unit**2 / scale.square()
        return Smoothness(acceleration, weight.sqrt(), rest)

    def roughly_aligned(self) -> "Retargeting":
        """The demonstration scaled and moved so that its box of points is that of ours at the start."""
        q = self.tree.q_canonical.float() if self.q_init is None else self.q_init.reshape(-1, self.tree.dof)[0]
        ours = self.surface(False, torch.zeros(1, dtype=torch.long)).tracks(q[None])
        frame = int(self.shown.visible.sum(dim=1).argmax()) if self.q_init is None else 0
        a, b = self.shown.points[frame][self.shown.visible[frame]], ours.points[0][ours.visible[0]]
        if len(a) < 2 or len(b) < 2:
            raise InputError("nothing to align: too few points of the demonstration or of the robot are in the picture")
        (centre, size), (own_centre, own_size) = _box(a), _box(b)
        scale = own_size / max(size, 1e-6)
        x, y = (own_centre - Alignment(scale).apply(centre, self.camera.width, self.camera.height)).tolist()
        first = Alignment(scale, 0.0, (x, y))
        points = first.apply(self.shown.points, self.camera.width, self.camera.height)
        return replace(self, shown=PointTracks(points, self.shown.visible), first=first)

    def unmoved(self) -> Answer:
        """The first guess, with nothing done to it."""
        return Answer(Trajectory(self.start(self.every), self.nothing_shared()), math.inf, [])

    def along(self, answer: Answer, stages: tuple[Stage, ...], keys: Int[Tensor, " keys"]) -> Answer:
        """One stage after the other."""
        for stage in stages:
            answer = self.solve(answer, stage, keys)
        return answer

    def start(self, keys: Int[Tensor, " keys"]) -> Float[Tensor, "keys dof"]:
        """The first guess of a motion: what was given, or the canonical configuration throughout."""
        q = self.tree.q_canonical.float() if self.q_init is None else self.q_init
        return q[keys] if q.dim() > 1 else q.expand(len(keys), -1).clone()

    def nothing_shared(self) -> Float[Tensor, " p"]:
        """The alignment before any step: four variables, or none."""
        return torch.zeros(4 if self.align else 0)

    def objective(self, at: Trajectory, stage: Stage, keys: Int[Tensor, " keys"]) -> TrackObjective:
        """Of a stage, with the partners that are possible at a trajectory."""
        shown = PointTracks(self.shown.points[keys], self.shown.visible[keys])
        seen = shown.visible.sum(dim=1)
        most = int(seen.argmax()) if self.q_init is None else int((seen > 0).byte().argmax())
        anchor = None
        if not stage.late:
            shown = shown.select(shown.visible[most])
            anchor = torch.full((shown.points.shape[1],), most)
        shown = shown.select(shown.visible.any(dim=0)) if anchor is None else shown
        surface = self.surface(stage.dense, keys)
        aligned = TrackObjective(shown, surface, _nothing).aligned(at.shared)
        first = first_distances(aligned, surface.tracks(at.q), stage.reach * self.unit, anchor)
        width = None if stage.width is None else stage.width * self.unit
        robust = None if stage.robust is None else stage.robust * self.unit

        def pairing(s: PointTracks, o: Tensor, q: Tensor) -> Pairs:
            through = first if stage.held else torch.where(torch.isfinite(first), mean_squared(s, o), torch.inf)
            return track_pairs(s, through, width)

        return TrackObjective(shown, surface, pairing, robust, self.priors)

    def solve(self, answer: Answer, stage: Stage, keys: Int[Tensor, " keys"]) -> Answer:
        """One stage."""
        objective = self.objective(answer.at, stage, keys)
        at, losses = solve_trajectory(
            objective.linearize, objective.loss, answer.at, self.tree, self.ties(len(keys)), stage.iterations, 1e-3
        )
        return replace(answer, at=at, loss=losses[-1], history=[*answer.history, losses])

    def polished(self, answer: Answer) -> Answer:
        """Motion and partners in turn, the latter sliding along the surface."""
        shown, surface = self.partners(answer.at)
        robust = LAST.robust * self.unit if LAST.robust else math.inf
        for _ in range(POLISHING):
            probe = TrackObjective(shown, surface, _nothing)
            surface = surface.slid(answer.at.q, probe.aligned(answer.at.shared), robust)
            objective = TrackObjective(shown, surface, lambda s, o, q: equal_pairs(s), robust, self.priors)
            at, losses = solve_trajectory(
                objective.linearize,
                objective.loss,
                answer.at,
                self.tree,
                self.ties(len(self.every)),
                LAST.iterations,
                1e-3,
            )
            answer = replace(answer, at=at, loss=losses[-1], history=[*answer.history, losses])
        return replace(answer, partners=surface, followed=shown)

    def partners(self, at: Trajectory) -> tuple[PointTracks, SurfaceTracks]:
        """The tracks that have a partner, and the partners."""
        judge = self.objective(at, LAST, self.every)
        surface = judge.ours
        shown, ours = judge.aligned(at.shared), surface.tracks(at.q)
        first = first_distances(shown, ours, LAST.reach * self.unit)
        index = nearest_tracks(torch.where(torch.isfinite(first), mean_squared(shown, ours.points), torch.inf))
        return judge.shown.select(index >= 0), surface.select(index[index >= 0])

    def chamfer(self) -> Answer:
        """Eq. 10 as it stands, on the analytic tracks: far-off points count less from level to level."""
        answer, every = self.unmoved(), self.every
        for robust, dense, iterations in ((32.0, False, 15), (16.0, False, 15), (8.0, True, 10)):
            surface = self.surface(dense, every)

            def pairing(s: PointTracks, o: Tensor, q: Tensor, surface: SurfaceTracks = surface) -> Pairs:
                return frame_pairs(s, PointTracks(o, surface.visible(q)), BACKWARD)

            objective = TrackObjective(self.shown, surface, pairing, robust * self.unit, self.priors)
            at, losses = solve_trajectory(
                objective.linearize, objective.loss, answer.at, self.tree, self.ties(len(every)), iterations, 1e-3
            )
            answer = replace(answer, at=at, loss=losses[-1], history=[*answer.history, losses])
        return answer

    def result(self, answer: Answer, start: Start, sure: bool, seconds: float) -> RetargetResult:
        """What the user gets; residuals are those of partners as in the last stage, whatever was minimised.

        Args:
            answer: the motion.
            start: how it began.
            sure: whether the covariance is asked for.
            seconds: that it took.
        """
        shown, partners = answer.followed, answer.partners
        if shown is None or partners is None:
            shown, partners = self.partners(answer.at)
        judge = TrackObjective(shown, partners, lambda s, o, q: equal_pairs(s))
        away, share = self._distances(judge, answer.at)
        motions = [Motion(m.q, m.loss / self.unit**2) for m in (Motion(answer.at.q, answer.loss), *answer.rivals)]
        starts = np.cumsum([0, *(len(losses) for losses in answer.history)])[:-1]
        shared = answer.at.shared.tolist() or [0.0] * 4
        side = max(self.camera.width, self.camera.height)
        last = Alignment(math.exp(shared[0]), shared[1], (side * shared[2], side * shared[3]))
        ties = answer.ties or self.ties(len(self.every))
        covariance = spread(self.surface(False), shown, partners, answer.at, ties, self.unit) if sure else None
        return RetargetResult(
            joint_names=self.tree.joint_names,
            q=answer.at.q,
            camera=self.camera,
            covariance=covariance,
            loss_history=tuple(loss / self.unit**2 for losses in answer.history for loss in losses),
            level_starts=tuple(int(start) for start in starts),
            residuals_px=tuple(away),
            near_share=share,
            hypotheses=tuple(distinct(motions)),
            alignment=self.first.then(last),
            shown=self.given,
            start=start,
            ambiguous=answer.ambiguous,
            seconds=seconds,
        )

    def _distances(self, judge: TrackObjective, at: Trajectory) -> tuple[list[float], float]:
        """Median distance in every frame [px], and the share of the points that are near."""
        pairs = judge.found(at)
        pixels = judge.ours.pixels(judge.ours.in_camera(at.q))
        away = (pixels[pairs.frame, pairs.ours] - pairs.target).norm(dim=-1)
        frames = [away[pairs.frame == i] for i in range(len(at.q))]
        medians = [float(part.median()) if len(part) else math.nan for part in frames]
        near = int((away < NEAR_SHARE * max(self.camera.width, self.camera.height)).sum())
        return medians, near / max(int(self.shown.visible.sum()), 1)


def distinct(motions: list[Motion]) -> list[Motion]:
    """The motions that differ from all before them by more than 0.05 rad or m on average; the first stays."""
    out: list[Motion] = []
    for motion in motions:
        if all((motion.q - other.q).abs().mean() > APART for other in out):
            out.append(motion)
    return out


def between(q: Float[Tensor, "keys dof"], keys: Int[Tensor, " keys"], frames: int) -> Float[Tensor, "frames dof"]:
    """A motion known at some frames, at all of them: straight lines in between."""
    rows = [np.interp(np.arange(frames), keys.numpy(), column) for column in q.T.numpy()]
    return torch.from_numpy(np.stack(rows, axis=1)).to(q)


def _box(points: Float[Tensor, "n 2"]) -> tuple[Float[Tensor, "2"], float]:
    """Middle and diagonal of the box that holds nearly all of the points [px]."""
    low, high = torch.quantile(points, torch.tensor([BOX_SHARE, 1.0 - BOX_SHARE]), dim=0)
    return 0.5 * (low + high), float((high - low).norm())


def _nothing(shown: PointTracks, pixels: Tensor, q: Tensor) -> Pairs:
    empty = torch.zeros(0, dtype=torch.long)
    return Pairs(empty, empty, torch.zeros(0, 2), torch.zeros(0))
