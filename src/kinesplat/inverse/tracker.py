"""From frame to frame: a robot in a video, each frame solved from those before it, or searched where it was lost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import UnseenError
from kinesplat.inverse.calibration import Level
from kinesplat.inverse.clip import Clip
from kinesplat.inverse.levenberg_marquardt import Linearization, levenberg_marquardt
from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.inverse.reconstruct import reconstruct
from kinesplat.inverse.result import FitResult, Hypothesis, covariance_of
from kinesplat.inverse.search import AliasMoves, joint_scale
from kinesplat.inverse.track_result import TrackedFrame
from kinesplat.rasterizer import Render
from kinesplat.self_model import SelfModel

LEVELS = (Level(64, 1_000, 5), Level(128, 3_000, 3, 0.5), Level(256, 10_000, 3, 0.35))
VELOCITY_SHARE = 0.9
ACCELERATION_RAD = 0.05
CORRELATED_PX = 30.0
LOST_RATIO = 2.0
MEMORY = 30
RETRY_FRAMES = 10
SEARCH_STARTS = (16, 48)
RESIDUAL_VARIANCE = 1e-3
MISFIT_PX, MISFIT_COLOUR, MISFIT_SHARE = 128, 0.2, 0.25
VISIBLE = 0.5
HALO_PX = 2
BACKDROP_STEP = 16
FIRST_CANDIDATES = 4
TRIAL_FRAMES = 6


@dataclass
class Tracker:
    """A robot, a video of it, and how to go from frame to frame; arguments as of `kinesplat.track`."""

    model: SelfModel
    clip: Clip
    camera: Camera
    q_init: Float[Tensor, " dof"] | None
    camera_free: bool
    camera_known: bool
    colour_weight: float
    seed: int

    def frames(self, done: Sequence[TrackedFrame] = ()) -> Iterator[TrackedFrame]:
        """One frame after the other, those that are `done` left out."""
        step = max(BACKDROP_STEP, len(self.clip.rgb) // 8)
        found, worker = list(done), self.behind(done[: len(done) // step * step])
        for index in range(len(done), len(self.clip.rgb)):
            if found and index % step == 0:
                worker = self.behind(found)
            found.append(worker.next_frame(index, found[-MEMORY:]))
            yield found[-1]

    def behind(self, found: Sequence[TrackedFrame]) -> "Tracker":
        """The same with a backdrop from which the robot is cut out, in the frames in which it has been found."""
        pictures, rows = self.clip.some()
        known = [n for n, i in enumerate(rows.tolist()) if i < len(found) and found[i].state != "lost"]
        if not known or not self.clip.guessed:
            return self
        frames = [found[i] for i in rows[known].tolist()]
        camera = replace(self.clip.camera, T_cam_world=torch.stack([frame.T_cam_world for frame in frames]))
        q = torch.stack([frame.q for frame in frames])
        alpha = self.rendered(LEVELS[-1].splats, q, camera, ("alpha",)).alpha
        assert alpha is not None
        covered = torch.zeros(pictures.shape[:3], dtype=torch.bool)
        halo = torch.nn.functional.max_pool2d(alpha[:, None], 2 * HALO_PX + 1, stride=1, padding=HALO_PX)
        covered[known] = halo[:, 0] > 0.05
        return replace(self, clip=self.clip.with_median(covered))

    def next_frame(self, index: int, before: Sequence[TrackedFrame]) -> TrackedFrame:
        """One frame from those before it."""
        if self.clip.empty(index):
            return replace(before[-1], state="lost") if before else self.unseen()
        if not before or index == self.clip.begin:
            return self.first_frame(index)
        last, predicted = before[-1], predict(self.model, before)
        known = sorted(f.loss for f in before if f.state != "lost")
        usual = LOST_RATIO * known[len(known) // 2] if known else 0.0
        frame = self.solve(index, [replace(last, q=predicted), last], predicted, "tracked")
        if frame.loss <= usual or not self.misfits(index, frame):
            return frame
        found = [f for f in self.search(index, last, before) if not self.misfits(index, f)]
        return min(found, key=lambda f: f.loss, default=replace(last, loss=frame.loss, state="lost"))

    def unseen(self) -> TrackedFrame:
        """What is said of frames before the robot comes into view: where it would begin, and nothing sure about it."""
        q = self.model.tree.q_canonical.float() if self.q_init is None else self.q_init.float()
        q = self.model.tree.clamp(q.cpu())
        return TrackedFrame(q, self.camera.T_cam_world.float(), torch.full_like(q, torch.inf), 0.0, "lost")

    def misfits(self, index: int, frame: TrackedFrame) -> bool:
        """Whether much of the rendered robot is off the mask or, without masks, of another colour than the frame.

        So is a robot that is out of the picture while the frame shows something.
        """
        observation = self.clip.observation(index).resized(MISFIT_PX)
        camera = replace(observation.camera, T_cam_world=frame.T_cam_world[None])
        out = self.rendered(LEVELS[1].splats, frame.q, camera, ("rgb", "alpha"))
        assert out.rgb is not None
        assert out.alpha is not None
        if not bool((out.alpha > VISIBLE).any()):
            return bool((observation.silhouette() > 0.5).any())
        inside = out.alpha > 0.9
        if observation.mask is not None:
            wrong = observation.mask < 0.5
        else:
            wrong = (out.rgb - observation.rgb).abs().amax(dim=-1) > MISFIT_COLOUR
        return bool((wrong & inside).sum() > MISFIT_SHARE * inside.sum())

    def first_frame(self, index: int) -> TrackedFrame:
        """The best explanation of a frame without any before it; of several, the one that the next frames bear out."""
        try:
            fit = self.reconstructed(index, self.q_init, SEARCH_STARTS[self.q_init is None])
        except UnseenError:  # an answer with the camera inside the robot
            fit = None
        if fit is None or self.failed(index, fit):
            fit = self.reconstructed(index, self.q_init, None)
        state = "lost" if self.failed(index, fit) else "searched"
        rivals = [h for h in fit.hypotheses[:FIRST_CANDIDATES] if h.loss < LOST_RATIO * fit.loss]
        if fit.verdict == "converged":
            rivals = rivals[:1]
        found = [self.solve(index, [started(rival, state)], rival.q, state) for rival in rivals]
        best = found[0] if len(found) == 1 else min(found, key=lambda frame: self.trial(index, frame))
        if self.q_init is not None:
            return best
        turned = self.model.tree.clamp(AliasMoves.of(self.model.tree).apply_all(best.q[None]))
        if not len(turned):
            return best
        alias = self.solve(index, [replace(best, q=q) for q in turned], best.q, state)
        return min(best, alias, key=lambda frame: frame.loss)

    def trial(self, index: int, start: TrackedFrame) -> float:
        """Sum of the losses of a frame and of those that follow from it."""
        frames = [start]
        for later in range(index + 1, min(index + 1 + TRIAL_FRAMES, len(self.clip.rgb))):
            if self.clip.empty(later):
                continue
            predicted = predict(self.model, frames)
            frames.append(self.solve(later, [replace(frames[-1], q=predicted), frames[-1]], predicted, "tracked"))
        return sum(frame.loss for frame in frames)

    def failed(self, index: int, fit: FitResult) -> bool:
        """Whether a frame's own answer is none: a backdrop with the robot in it leaves much unexplained beside it."""
        return fit.verdict == "failed" and self.misfits(index, started(fit.hypotheses[0], "searched"))

    def search(self, index: int, last: TrackedFrame, before: Sequence[TrackedFrame]) -> Iterator[TrackedFrame]:
        """Answers for a frame that could not be followed: near the last one, then, now and then, from everywhere."""
        lost = next((n for n, frame in enumerate(reversed(before)) if frame.state != "lost"), len(before))
        near = [(last.q, SEARCH_STARTS[0])] if lost < RETRY_FRAMES else []
        again = lost % RETRY_FRAMES == 0 or (not near and self.clip.empty(index - 1))  # or it is back in the picture
        everywhere = [(None, SEARCH_STARTS[1])] if again else []
        for q, starts in [*near, *everywhere]:
            try:
                fit = self.reconstructed(index, q, starts)
            except UnseenError:  # an answer with the camera inside the robot
                continue
            if self.failed(index, fit):
                continue
            guess = replace(last, q=fit.q, T_cam_world=fit.camera.T_cam_world)
            yield self.solve(index, [guess], fit.q, "searched")

    def reconstructed(self, index: int, q_init: Tensor | None, starts: int | None) -> FitResult:
        """The frame solved without the others."""
        observation = self.clip.observation(index)
        return reconstruct(
            self.model,
            observation,
            observation.camera if self.camera_known or not self.camera_free else None,
            K=observation.camera.K,
            q_init=q_init,
            optimize_camera=self.camera_free,
            starts=starts,
            colour_weight=self.colour_weight,
            seed=self.seed,
        )

    def solve(self, index: int, starts: Sequence[TrackedFrame], predicted: Tensor, state: str) -> TrackedFrame:
        """Levenberg-Marquardt from several starts, fewer of them from level to level."""
        observation, tree = self.clip.observation(index), self.model.tree
        q, T = torch.stack([s.q for s in starts]), torch.stack([s.T_cam_world for s in starts])
        at = Configurations(tree, tree.clamp(q), T[:, None], self.camera_free)
        for level in self._levels:
            model = self._models[level.splats]
            objective = PhotometricObjective(
                model, observation.resized(level.px), self.colour_weight, robust=level.robust, device=self._device
            )
            prior = Prior(predicted, ACCELERATION_RAD * joint_scale(tree), objective)
            solution = levenberg_marquardt(
                prior.linearize, at, iterations=level.iterations, damping=1e-3, tolerance=1e-3
            )
            best = solution.linearization.loss.argmin()[None]
            at = solution.state.select(best)
        loss, hessian = solution.linearization.loss[best].item(), solution.linearization.hessian[best[0]]
        std = covariance_of(hessian, loss, objective.residual_count).diagonal().sqrt()
        return TrackedFrame(at.q[0], at.T_cam_world[0, 0], std[: tree.dof], loss, state)

    def rendered(self, splats: int, q: Tensor, camera: Camera, outputs: tuple[str, ...]) -> Render:
        """Pictures of the model with so many splats, made on its device, on the CPU."""
        out = self._models[splats].render(q.to(self._device), camera.to(self._device), outputs=outputs)
        return Render(**{name: getattr(out, name).cpu() for name in outputs})

    @property
    def _device(self) -> torch.device:
        return self.model.parameters.means.device

    @cached_property
    def _levels(self) -> list[Level]:
        """The levels that the size of the frames allows; the last one, at full size, gets the others' iterations."""
        long_side = max(self.clip.rgb.shape[1:3])
        coarse = [level for level in LEVELS[:-1] if level.px < long_side]
        spared = sum(level.iterations for level in LEVELS[:-1]) - sum(level.iterations for level in coarse)
        return [*coarse, replace(LEVELS[-1], iterations=LEVELS[-1].iterations + spared)]

    @cached_property
    def _models(self) -> dict[int, SelfModel]:
        whole = self.model.to("cpu")
        return {level.splats: whole.subsample(level.splats).to(self._device) for level in LEVELS}


@dataclass(frozen=True)
class Prior:
    """A photometric objective with a pull towards predicted joints, as strong as noise of images and motion demand.

    Attributes:
        predicted: ``(dof,)`` [rad]/[m].
        deviation: ``(dof,)`` standard deviations of the prediction [rad]/[m].
        objective: what the images say.
    """

    predicted: Float[Tensor, " dof"]
    deviation: Float[Tensor, " dof"]
    objective: PhotometricObjective

    def linearize(self, at: Configurations) -> Linearization:
        """Loss, gradient and Gauss-Newton Hessian of both."""
        seen, dof = self.objective.linearize(at), len(self.predicted)
        pixels = self.objective.observation.rgb[..., 0].numel()
        weight = CORRELATED_PX * RESIDUAL_VARIANCE / pixels / self.deviation.square()
        away = at.q - self.predicted
        gradient, hessian = seen.gradient.clone(), seen.hessian.clone()
        gradient[:, :dof] += weight * away
        hessian.diagonal(dim1=-2, dim2=-1)[:, :dof] += weight
        return Linearization(seen.loss + (weight * away.square()).sum(dim=1), gradient, hessian)


def started(guess: Hypothesis, state: str) -> TrackedFrame:
    """An answer of `reconstruct` as a frame to start from."""
    return TrackedFrame(guess.q, guess.camera.T_cam_world, torch.zeros_like(guess.q), guess.loss, state)


def predict(model: SelfModel, before: Sequence[TrackedFrame]) -> Float[Tensor, " dof"]:
    """Joints that the last two frames let expect: nine tenths of their velocity, none after a loss."""
    last = before[-1]
    if len(before) < 2 or "lost" in (last.state, before[-2].state) or last.state == "searched":
        return last.q
    return model.tree.clamp(last.q + VELOCITY_SHARE * (last.q - before[-2].q))
