"""A second look at photographs: their light is no headlight, and wrists that look alike in silhouette differ in colour.

The light is estimated from the first answer, the answers and many variations of their last joints are compared in it,
and the best are sharpened at 512 px with a robust loss, each in the light in which it explains the photograph best; in
the end colours, weighted by how well they are predicted, say which of them it is.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.inverse.calibration import Level
from kinesplat.inverse.coarse_to_fine import same_place, survivors
from kinesplat.inverse.levenberg_marquardt import Solution, levenberg_marquardt
from kinesplat.inverse.lighting import Light, fit_light
from kinesplat.inverse.objective import CPU, Configurations, PhotometricObjective
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.result import DISTINCT_RAD, FitResult, Hypothesis, covariance_of
from kinesplat.inverse.search import AliasMoves, best_distinct, blurred_losses, collinear_turns, joint_scale
from kinesplat.inverse.verdict import verdict
from kinesplat.self_model import SelfModel

LOOK_PX, LOOK_SPLATS = 128, 3_000
DIM_COLOUR, LIT_SHARE = 0.015, 0.6
PARENTS, VARIATIONS, LAST_JOINTS, STEP = 3, 96, 4, 0.5
LEVELS = (
    (Level(128, 3_000, 10, 0.5), 24),
    (Level(256, 1_000_000, 12, 0.3), 8),
    (Level(512, 1_000_000, 10, 0.3), 5),
)
JUDGE = Level(512, 1_000_000, 6, 0.15)
LIT_WEIGHT, JUDGE_WEIGHT = 1.0, 8.0
LIGHT_PX = 256
STARTS, APART = 24, 0.3
SYSTEMATIC = 300.0  # of standard deviations: as far as fits of a real xArm7 are off its joint readings


def light_of(model: SelfModel, observation: Observation, fit: FitResult) -> Light | None:
    """The light of a photograph; None for pictures under the model's own headlight, or without masks."""
    if observation.mask is None or fit.verdict == "failed":
        return None
    small, at = observation.resized(LOOK_PX), state_of(model, fit)
    coarse = model.subsample(LOOK_SPLATS)
    light = fit_light(coarse, small, fit.q, at.T_cam_world[0])
    if light is None:
        return None
    errors = []
    for lit in (light, None):
        difference = PhotometricObjective(coarse, small, light=lit).difference(at)[0, ..., :3]
        errors.append(difference[(small.mask > 0.95) if small.mask is not None else ...].square().sum(dim=-1).mean())
    return light if errors[1] > DIM_COLOUR and errors[0] < LIT_SHARE * errors[1] else None


def seen_again(
    model: SelfModel,
    observation: Observation,
    fit: FitResult,
    light: Light,
    seed: int,
    device: torch.device = CPU,
) -> FitResult:
    """The fit after a second look; its losses are those by which hypotheses are judged, robust and in this light."""
    solution, losses = second_look(model, observation, fit, light, seed, device)
    order: list[int] = []
    for i in losses.argsort().tolist():
        if all(not same_place(solution.state, i, j, DISTINCT_RAD) for j in order):
            order.append(i)
    hypotheses = []
    for i in order:
        T = solution.state.T_cam_world[i].reshape(fit.camera.T_cam_world.shape)
        hypotheses.append(Hypothesis(solution.state.q[i], replace(fit.camera, T_cam_world=T), losses[i].item()))
    gap = hypotheses[1].loss / hypotheses[0].loss if len(hypotheses) > 1 else None
    evidence = {**fit.evidence, "gap": gap, "light": light.coefficients.tolist(), "gains": light.gains.tolist()}
    at = solution.linearization
    residuals = 4 * observation.resized(LEVELS[-1][0].px).rgb[..., 0].numel()
    return replace(
        fit,
        q=hypotheses[0].q,
        camera=hypotheses[0].camera,
        covariance=SYSTEMATIC**2 * covariance_of(at.hessian[order[0]], at.loss[order[0]].item(), residuals),
        hypotheses=tuple(hypotheses),
        verdict=verdict(evidence),
        evidence=evidence,
    )


def second_look(
    model: SelfModel,
    observation: Observation,
    fit: FitResult,
    light: Light,
    seed: int,
    device: torch.device = CPU,
) -> tuple[Solution[Configurations], Float[Tensor, " kept"]]:
    """The best distinct answers in this light, and the losses by which they are judged.

    Args:
        model: the robot.
        observation: the photographs, with masks.
        fit: the first answer.
        light: as found by `light_of`.
        seed: of the random variations.
        device: where pixels are rendered and compared.
    """
    at = varied(model, fit, torch.Generator().manual_seed(seed))
    coarse = PhotometricObjective(
        model.subsample(LOOK_SPLATS), observation.resized(LOOK_PX), JUDGE_WEIGHT, light=light, device=device
    )
    losses = blurred_losses(coarse, at, 1.0)
    at = at.select(best_distinct(at, losses, STARTS, APART))
    solution, lights = None, light
    for level, kept in LEVELS:
        if solution is not None:
            at = solution.state.select(survivors(solution, kept))
            lights = own_lights(model, observation, at, light)
        here = PhotometricObjective(
            model.subsample(level.splats),
            observation.resized(level.px),
            LIT_WEIGHT,
            robust=level.robust,
            light=lights,
            device=device,
        )
        solution = levenberg_marquardt(here.linearize, at, iterations=level.iterations)
    assert solution is not None
    lights = own_lights(model, observation, solution.state, light)
    judge = PhotometricObjective(
        model, observation.resized(JUDGE.px), JUDGE_WEIGHT, robust=JUDGE.robust, light=lights, device=device
    )
    judged = levenberg_marquardt(judge.linearize, solution.state, iterations=JUDGE.iterations)
    return solution, judged.linearization.loss


def own_lights(model: SelfModel, observation: Observation, at: Configurations, light: Light) -> Light:
    """For every configuration the light in which it explains the photographs best; `light` where that is unclear."""
    seen = observation.resized(LIGHT_PX)
    found = [fit_light(model, seen, q, T) for q, T in zip(at.q, at.T_cam_world, strict=True)]
    return Light.stacked([own or light for own in found])


def varied(model: SelfModel, fit: FitResult, generator: torch.Generator) -> Configurations:
    """The best hypotheses, their aliases, turns about common axes, and random variations of their last joints."""
    tree = model.tree
    parents = [h.q for h in fit.hypotheses[:PARENTS]]
    rows = [torch.stack(parents), AliasMoves.of(tree).apply_all(torch.stack(parents))]
    rows += [collinear_turns(tree, q) for q in parents]
    last = (torch.arange(tree.dof) >= tree.dof - LAST_JOINTS).float()
    for q in parents:
        moved = (torch.rand(VARIATIONS, tree.dof, generator=generator) < 0.6).float() * last
        rows.append(q + moved * STEP * torch.randn(VARIATIONS, tree.dof, generator=generator) * joint_scale(tree))
    q = tree.clamp(torch.cat(rows))
    start = state_of(model, fit)
    return replace(start, q=q, T_cam_world=start.T_cam_world.expand(len(q), -1, 4, 4))


def state_of(model: SelfModel, fit: FitResult) -> Configurations:
    """The answer of a fit as a batch of one."""
    free = len(fit.variable_names) > model.tree.dof
    return Configurations(model.tree, fit.q[None], fit.camera.T_cam_world.reshape(1, -1, 4, 4), free)
