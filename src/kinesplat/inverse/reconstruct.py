"""From pixels to joints (and camera): many starts, coarse to fine, Levenberg-Marquardt at every image size."""

import functools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.attempts import Attempt, Problem, planned
from kinesplat.inverse.coarse_to_fine import Refinement, levels_for, refine, same_place
from kinesplat.inverse.contour_fit import NEIGHBOURS, reconstruct_by_contours
from kinesplat.inverse.initializer import Initializer
from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.inverse.observation import ImageLike, Observation, given_camera
from kinesplat.inverse.photograph import light_of, seen_again
from kinesplat.inverse.priors import Priors
from kinesplat.inverse.result import DISTINCT_RAD, SYSTEMATIC, FitResult, Hypothesis, covariance_of
from kinesplat.inverse.search import joined, joint_scale
from kinesplat.inverse.verdict import EQUAL_RATIO, evidence_of, settled, verdict
from kinesplat.self_model import SelfModel

DIM_WEIGHT = 0.1
REST_PX, REST_TOLERANCE = 256, 1.0 / 255.0
EXPLAINED = 0.01  # less is left over than any photograph leaves: no need for a second look


@torch.no_grad()
def reconstruct(
    model: SelfModel,
    images: ImageLike | Observation,
    camera: Camera | None = None,
    *,
    K: Float[Tensor, "*batch 3 3"] | None = None,
    masks: ImageLike | None = None,
    q_init: Float[Tensor, "*starts dof"] | None = None,
    optimize_camera: bool = False,
    starts: int | None = None,
    colour_weight: float = 1.0,
    initializer: Initializer | Literal[False] | None = None,
    priors: Priors | None = None,
    seed: int = 0,
) -> FitResult:
    """Recover the configuration (and, on request, the cameras) that explains the images (paper, eq. 8).

    With `q_init`: looks at it and a thousand random neighbours within 0.45 rad of it at 32 px and takes the best of
    them as starts. Without: searches the whole range of the joints (`kinesplat.inverse.search`), aliases included,
    which takes some twenty thousand small renderings. Either way the survivors are sharpened by Levenberg-Marquardt up
    to 256 px along the longer image side. Where the verdict is not "converged", further attempts follow that search
    harder (with `q_init` first around it, then everywhere), until two agree or three or four are made. Of answers that
    explain the pictures equally well, the one nearest to `q_init`, or to the canonical configuration, is taken; joints
    that no pixel shows are as there. Joint limits are respected. Pictures are rendered on the model's device; the
    result is on the CPU.

    A picture without a mask whose background is not of one colour is fitted by the robot's contours
    (`kinesplat.inverse.contour_fit`): joint by joint along the chain, then all of them up to 640 px, on
    the CPU whatever the model's device. Its loss is the share that is missing of the evidence that edges could give: 0
    is all of it, 1 what chance gives; it is "converged" only where no other answer has half of its evidence and no
    joint could stand elsewhere unnoticed (`kinesplat.inverse.contour_verdict`).

    A photograph, whose colours another light made, gets a second look in that light, up to 512 px
    (`kinesplat.inverse.photograph`); it is known by its mask and by colours that an estimated light explains better.

    Args:
        model: self-model of the robot.
        images: ``(height, width, 3)`` or ``(views, height, width, 3)`` of ONE configuration; float in [0, 1] or uint8.
            Or an `Observation`, which brings masks or a backdrop along, and K.
        camera: one camera or one per view; with `optimize_camera` it is the first guess, right within about 0.1 rad and
            5 % of the distance, or None: then every direction is tried, and the distance follows from the mask.
        K: ``(3, 3)`` intrinsics [px] that replace those of `camera`; needed where `camera` is None.
        masks: ``(height, width)`` or ``(views, height, width)``, 1 on the robot. Not needed before one colour; before
            anything else the camera must be known then.
        q_init: ``(dof,)`` start, or ``(m, dof)`` several, which get no neighbours [rad]/[m]; default: no idea.
        optimize_camera: also move every camera, six numbers a view.
        starts: number of starts that are optimised, in a single attempt; with 1, `q_init` gets no neighbours. Default:
            32, or 48 without `q_init`, in as many attempts as it takes. By contours the whole chain is searched in any
            case, and 16 of what was found are optimised, 4 at least.
        colour_weight: weight of the colours against the mask; 0.1 for photographs whose light is not a headlight.
            Refused where contours alone are looked for, as is an `initializer`.
        initializer: a learned start, which is tried before the search; default: the one that comes with the package for
            this robot, if there is one. False: none.
        priors: soft terms beside the pixels: links that must not pass through each other, joints off their limits.
        seed: of the random starts.

    Raises:
        InputError: images, masks, camera or q of the wrong type, shape or range; a camera inside the robot.
    """
    began = time.perf_counter()
    device, on_cpu = model.parameters.means.device, model.to("cpu")
    if isinstance(images, Observation):
        observation = images
    else:
        observation = Observation.create(
            images, masks, given_camera(camera, K, images, optimize_camera), unknown=not optimize_camera
        )
    learned = Initializer.packaged(on_cpu) if initializer is None else initializer or None
    if learned is not None:
        learned.check_fits(on_cpu)
    attempts = planned(q_init, starts, learned is not None)
    known = camera is not None
    problem = Problem(on_cpu, observation, q_init, seed, optimize_camera, known, learned, colour_weight, priors, device)
    if q_init is not None and known:
        on_cpu.check_camera(problem.reference[0], observation.camera)
    fit = before_anything(problem, starts, bool(initializer)) if observation.unknown else first_look(problem, attempts)
    light = None if fit.evidence["unexplained"] < EXPLAINED else light_of(on_cpu, observation, fit)
    if light is not None:
        fit = seen_again(on_cpu, observation, fit, light, seed, device)
    if not optimize_camera:
        on_cpu.check_camera(fit.q, fit.camera)
    return replace(at_rest(on_cpu, fit, problem.reference), seconds=time.perf_counter() - began)


def before_anything(problem: Problem, starts: int | None, initializer: bool) -> FitResult:
    """The answer where nothing tells the robot from what is behind it but its contours.

    Args:
        problem: what was asked.
        starts: see `reconstruct`.
        initializer: whether the caller gave one.

    Raises:
        InputError: free cameras, soft terms, colours, a learned start, or splats that do not ride on one link each.
    """
    if initializer or problem.colour_weight != 1.0:
        raise InputError(
            "the background is not plain and there are no masks: contours alone are looked for then, which know no "
            "initializer and no colour_weight; leave these out, or give masks or a backdrop"
        )
    if problem.camera_free or problem.priors is not None or problem.model.skinning is not None:
        raise InputError(
            "the background is not plain and there are no masks: only the joints of a model without a skinning field "
            "are found then, with known cameras and without priors; give masks or a backdrop"
        )
    several = problem.q_init is not None and torch.as_tensor(problem.q_init).dim() > 1
    alone, seed = len(problem.reference) if several or starts == 1 else NEIGHBOURS, problem.seed
    around = 0 if problem.q_init is None else alone
    return reconstruct_by_contours(problem.model, problem.observation, problem.reference, around, starts, seed)


def first_look(problem: Problem, attempts: list[Attempt]) -> FitResult:
    """The answer of all attempts; where colours lead astray, as those of photographs do, that of their outline."""
    answers = answers_of(problem, attempts)
    fit = next(answers)
    if fit.verdict == "failed" and problem.observation.mask is not None and problem.colour_weight > DIM_WEIGHT:
        for by_outline in answers_of(replace(problem, colour_weight=DIM_WEIGHT), attempts):
            lit = light_of(problem.model, problem.observation, by_outline) is not None
            if by_outline.verdict != "failed" and not lit:
                break
            if lit and settled(by_outline.evidence):
                return by_outline
            fit = by_outline if lit else fit
        if fit.verdict != "failed":
            return fit
    return [fit, *answers][-1]


def answers_of(problem: Problem, attempts: list[Attempt]) -> Iterator[FitResult]:
    """What is known after every attempt, until it is settled."""
    began = time.perf_counter()
    objective = functools.cache(problem.objective)
    found: list[Refinement] = []
    for number, attempt in enumerate(attempts):
        levels = levels_for(attempt.levels, max(problem.observation.rgb.shape[1:3]))
        objectives = [objective(level.px, level.splats) for level in levels]
        found.append(refine(levels, objectives, problem.starts(attempt, number, objectives[0])))
        fit = result_of(problem, objectives[-1], found, attempts)
        yield replace(fit, seconds=time.perf_counter() - began)
        if settled(fit.evidence):
            return


def result_of(
    problem: Problem, objective: PhotometricObjective, found: list[Refinement], attempts: list[Attempt]
) -> FitResult:
    """The answer of some attempts.

    Args:
        problem: what was asked.
        objective: of the finest level.
        found: what each attempt came upon.
        attempts: those that were made, and perhaps more.
    """
    ends = functools.reduce(joined, [f.last.state for f in found])
    losses = torch.cat([f.last.linearization.loss for f in found])
    order = ranked(ends, losses, problem.reference)
    hypotheses = tuple(hypothesis(ends, i, losses[i].item(), problem.observation.camera) for i in order)
    which, start = next((n, order[0] - begin) for n, begin, end in spans(found) if begin <= order[0] < end)
    loss_history, path, level_starts = found[which].path_to(start)
    names = list(problem.model.tree.joint_names)
    if ends.camera_free:
        views = range(ends.T_cam_world.shape[1])
        names += [f"camera{v}.{axis}" for v in views for axis in ("vx", "vy", "vz", "wx", "wy", "wz")]
    hessian = found[which].last.linearization.hessian[start]
    evidence = evidence_of(problem.model, objective, losses[order].tolist(), found)
    learned = "initializer" if attempts[which].learned else "search"
    evidence["start"] = "q_init" if attempts[which].near else learned
    return FitResult(
        q=hypotheses[0].q,
        camera=hypotheses[0].camera,
        loss_history=loss_history,
        level_starts=level_starts,
        q_history=path,
        covariance=SYSTEMATIC**2 * covariance_of(hessian, hypotheses[0].loss, objective.residual_count),
        variable_names=tuple(names),
        hypotheses=hypotheses,
        verdict=verdict(evidence),
        seconds=0.0,
        evidence=evidence,
        joint_types=tuple(problem.model.tree.joint_types),
    )


def at_rest(model: SelfModel, fit: FitResult, reference: Float[Tensor, "n dof"]) -> FitResult:
    """The fit with the joints that no pixel shows as in the first reference, unless that would change a picture."""
    blind = torch.isinf(fit.covariance.diagonal()[: model.tree.dof])
    rested = torch.where(blind, reference[0], fit.q)
    if not blind.any():
        return fit
    camera = fit.camera.resized(REST_PX, max(1, REST_PX * fit.camera.height // fit.camera.width))
    before, after = (model.render(q, camera).rgb for q in (fit.q, rested))
    assert before is not None
    assert after is not None
    if (before - after).abs().max() > REST_TOLERANCE:
        return fit
    return replace(fit, q=rested, hypotheses=(replace(fit.hypotheses[0], q=rested), *fit.hypotheses[1:]))


def spans(found: list[Refinement]) -> Iterator[tuple[int, int, int]]:
    """Number of every attempt, and where its last starts begin and end among those of all."""
    begin = 0
    for number, refinement in enumerate(found):
        end = begin + len(refinement.last.state.q)
        yield number, begin, end
        begin = end


def ranked(ends: Configurations, losses: Float[Tensor, " n"], reference: Float[Tensor, "_ dof"]) -> list[int]:
    """End points that differ by more than 0.1 rad (m) in some joint or camera direction, best first.

    Those that are as good as the best go by their distance to the nearest `reference`.
    """
    found: list[int] = []
    for i in losses.argsort().tolist():
        if all(not same_place(ends, i, j, DISTINCT_RAD) for j in found):
            found.append(i)
    equal = [i for i in found if losses[i] <= EQUAL_RATIO * losses[found[0]]]
    away = ((ends.q[equal][:, None] - reference) / joint_scale(ends.tree)).abs().mean(dim=2).amin(dim=1)
    return [*(equal[i] for i in away.argsort().tolist()), *found[len(equal) :]]


def hypothesis(ends: Configurations, index: int, loss: float, camera: Camera) -> Hypothesis:
    """One end point; its camera is no batch where there is a single view."""
    view = replace(camera, T_cam_world=ends.T_cam_world[index])
    view = view if len(camera.K) > 1 else replace(view, K=view.K[0], T_cam_world=view.T_cam_world[0])
    return Hypothesis(ends.q[index], view, loss)
