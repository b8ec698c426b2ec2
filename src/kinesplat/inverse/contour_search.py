"""Joints of a robot in front of anything, by its contours: along the chain, from the base to the last link.

The base shows where it is; the first joints are tried all over their range with the links beyond left out, the best
stay, the next joint is tried, and so on. So tens of thousands of small renderings cover what is hopeless to sample at
once, and none of them needs a mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.inverse.contour_objective import ContourObjective, Poses
from kinesplat.inverse.contours import unlit
from kinesplat.inverse.edges import EdgePictures
from kinesplat.inverse.levenberg_marquardt import levenberg_marquardt
from kinesplat.inverse.objective import Configurations
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.search import best_distinct, joint_influence, joint_scale, one_turn
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel
from kinesplat.twists import adjoint

STEP = 0.26
MOST = 50_000
SCREENED, KEPT = 300, 120
APART = 0.1
BATCH = 64
RANDOM, CHANCE_SHARE = 48, 0.72


@dataclass(frozen=True)
class ContourLevel:
    """One image size.

    Attributes:
        px: longer image side [px].
        splats: size of the model that is rendered.
        sigma_px: deviation of edges from contours.
        iterations: Levenberg-Marquardt steps at most.
        points: contour points of a view.
    """

    px: int
    splats: int
    sigma_px: float
    iterations: int
    points: int


SCREEN = ContourLevel(240, 2_000, 3.0, 3, 150)
SHARPEN = ContourLevel(320, 3_000, 1.5, 4, 250)


def objective_at(model: SelfModel, seen: Observation, level: ContourLevel) -> ContourObjective:
    """The objective of a level for `Configurations`; what random configurations cost says what chance is."""
    pictures = EdgePictures.of(seen.resized(level.px))
    coarse = unlit(model.subsample(level.splats))
    objective = ContourObjective(coarse, pictures, poses_on(pictures), level.sigma_px, level.points)
    lower, upper = one_turn(model.tree)
    share = torch.rand(RANDOM, model.tree.dof, generator=torch.Generator().manual_seed(0))
    T = seen.camera.T_cam_world.expand(RANDOM, -1, 4, 4)
    random = Configurations(model.tree, lower + (upper - lower) * share, T, False)
    cost = objective.evidence(random).cost
    cost = cost[cost > 0.0]
    return replace(objective, chance=CHANCE_SHARE * cost.mean().item()) if len(cost) else objective


def poses_on(pictures: EdgePictures) -> Callable[[Configurations], Poses]:
    """From `Configurations` to poses before these pictures."""

    def poses(at: Configurations) -> Poses:
        K, T = pictures.camera.K.expand(*at.T_cam_world.shape[:2], 3, 3), at.T_cam_world
        camera = Camera(K, T, pictures.camera.width, pictures.camera.height)
        q = at.q[:, None].expand(-1, T.shape[1], -1)
        twists = (adjoint(T)[:, :, None] @ at.tree.link_jacobian(at.q)[:, None]).flatten(2, 3)
        return Poses(q, camera, twists)

    return poses


def sharpened(levels: Sequence[tuple[ContourObjective, ContourLevel]], state: Configurations) -> Configurations:
    """Every configuration after Levenberg-Marquardt on all levels in turn, some at a time."""
    for objective, level in levels:
        parts = [state.select(rows) for rows in torch.arange(len(state.q)).split(BATCH)]
        ends = [levenberg_marquardt(objective.linearize, part, iterations=level.iterations) for part in parts]
        state = replace(state, q=torch.cat([end.state.q for end in ends]))
    return state


def along_chain(model: SelfModel, seen: Observation, reference: Float[Tensor, " dof"]) -> Configurations:
    """The configurations whose contours explain the pictures best, best first, cameras known.

    Args:
        model: the robot.
        seen: the pictures and their cameras.
        reference: values of joints that have not had their turn.
    """
    tree = model.tree
    lower, upper = (bound.float() for bound in one_turn(tree))
    influence = joint_influence(model)
    both = [objective_at(model, seen, level) for level in (SCREEN, SHARPEN)]
    state = Configurations(tree, reference[None].float(), seen.camera.T_cam_world[None], False)
    for joint in range(tree.dof):
        values = grid(lower[joint].item(), upper[joint].item(), STEP * joint_scale(tree)[joint].item())
        state = state.select(torch.arange(len(state.q)).repeat_interleave(len(values)))
        state.q[:, joint] = values.repeat(len(state.q) // len(values))
        if len(state.q) > MOST:
            some = torch.randperm(len(state.q), generator=torch.Generator().manual_seed(joint))[:MOST]
            state = state.select(some)
        if len(state.q) <= SCREENED and joint < tree.dof - 1:
            continue
        links = fixed_links(tree, joint)
        if not torch.isin(model.link_index, links).any():
            continue
        coarse, fine = (replace(objective, model=only_links(objective.model, links)) for objective in both)
        state = best_by_evidence(coarse, state, SCREENED, influence)
        state = sharpened([(coarse, SCREEN)], state)
        state = best_by_evidence(coarse, state, KEPT, influence)
        state = sharpened([(fine, SHARPEN)], state)
        state = best_by_evidence(fine, state, KEPT, influence)
    return state


def best_by_evidence(
    objective: ContourObjective, state: Configurations, count: int, influence: Float[Tensor, " dof"]
) -> Configurations:
    """The `count` distinct configurations that the pictures speak for most, best first."""
    return state.select(best_distinct(state, -objective.evidence(state).total, count, APART, influence))


def grid(lower: float, upper: float, step: float) -> Float[Tensor, " n"]:
    """Evenly spread values about `step` apart, half a step off the bounds."""
    count = max(2, round((upper - lower) / step))
    return lower + (upper - lower) * (torch.arange(count) + 0.5) / count


def fixed_links(tree: KinematicTree, joint: int) -> Int64[Tensor, " some"]:
    """Links that no joint after `joint` moves."""
    lower, upper = one_turn(tree)
    q = lower + (upper - lower) * torch.rand(8, tree.dof, generator=torch.Generator().manual_seed(0))
    moved = (tree.link_jacobian(q.float())[..., joint + 1 :].abs() > 1e-6).flatten(2).any(dim=2).any(dim=0)
    return torch.nonzero(~moved)[:, 0]


def only_links(model: SelfModel, links: Int64[Tensor, " some"]) -> SelfModel:
    """The `unlit` model with the splats of these links alone."""
    kept = torch.nonzero(torch.isin(model.link_index, links))[:, 0]
    if len(kept) == len(model.link_index):
        return model
    return replace(model, parameters=model.parameters.select(kept), link_index=model.link_index[kept])
