"""Which configurations of a robot are free of collisions with itself, by MuJoCo's own geometry."""

import mujoco
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kinesplat.dataset.sampling import random_configurations
from kinesplat.description import Robot, mujoco_qpos
from kinesplat.errors import InputError

LEAST_DEPTH = 1e-4
"""Penetration below which two shapes count as touching, not as colliding [m]."""
MAX_ATTEMPTS = 10_000
"""Rejected configurations in a row after which a robot counts as always in collision."""


class SelfCollision:
    """Tells configurations in which two links of the robot run into each other.

    Looked at are the geoms that the description lets collide, bodies of the scene left out. Links that a joint or a
    weld makes neighbours are excepted, and so are pairs that the description excludes and pairs that already touch in
    the canonical configuration, since both are how the shapes were drawn, not how the robot moves. Meshes count as
    their convex hulls, as in MuJoCo.

    Attributes:
        pairs: ``(pairs, 2)`` geoms that are tested against each other.
        excepted: pairs of links that touch in the canonical configuration, by name.
    """

    pairs: Int[np.ndarray, "pairs 2"]

    def __init__(self, robot: Robot) -> None:
        """Find the pairs that can collide at all; `robot` is never changed."""
        self._robot = robot
        self._data = mujoco.MjData(robot.mj_model)
        self.pairs = _testable_pairs(robot.mj_model)
        touching = self.colliding_bodies(robot.tree.q_canonical)
        bodies = np.sort(robot.mj_model.geom_bodyid[self.pairs], axis=-1)
        excepted = np.array([tuple(pair) in touching for pair in bodies.tolist()], dtype=bool)
        self.pairs = self.pairs[~excepted]
        self.excepted = sorted(self._names(pair) for pair in touching)

    @property
    def can_tell(self) -> bool:
        """Whether the description has shapes that could collide at all; one with visual shapes only has none."""
        return len(self.pairs) > 0

    def colliding_bodies(self, q: Float[Tensor, " dof"]) -> set[tuple[int, int]]:
        """MuJoCo's ids of the bodies that run into each other in configuration `q`, the smaller first."""
        model = self._robot.mj_model
        found = set()
        for first, second in self._near(q).tolist():
            pair = sorted((int(model.geom_bodyid[first]), int(model.geom_bodyid[second])))
            if (pair[0], pair[1]) not in found and self._collide(first, second):
                found.add((pair[0], pair[1]))
        return found

    def free(self, q: Float[Tensor, "n dof"]) -> Bool[Tensor, " n"]:
        """Which of the configurations are free of collisions."""
        return torch.tensor([not any(self._collide(*pair) for pair in self._near(row).tolist()) for row in q])

    def sample(self, count: int, generator: torch.Generator) -> tuple[Float[Tensor, "count dof"], int]:
        """Configurations uniform over the free part of the joint limits, and how many were rejected for them.

        Raises:
            InputError: none is found among many.
        """
        kept: list[Tensor] = []
        rejected = in_a_row = 0
        while len(kept) < count:
            q = random_configurations(self._robot.tree, 1, generator)
            if bool(self.free(q)):
                kept.append(q[0])
                in_a_row = 0
                continue
            rejected, in_a_row = rejected + 1, in_a_row + 1
            if in_a_row >= MAX_ATTEMPTS:
                culprits = "; ".join(" and ".join(self._names(p)) for p in sorted(self.colliding_bodies(q[0])))
                raise InputError(
                    f"robot {self._robot.name}: {MAX_ATTEMPTS} random configurations in a row collide with "
                    f"themselves (the last: {culprits}); draw them with collisions allowed"
                )
        return torch.stack(kept) if kept else torch.zeros(0, self._robot.tree.dof, dtype=torch.float64), rejected

    def _near(self, q: Float[Tensor, " dof"]) -> Int[np.ndarray, "near 2"]:
        """Pairs whose bounding spheres overlap in configuration `q`, which the data then holds."""
        model, data = self._robot.mj_model, self._data
        data.qpos[:] = mujoco_qpos(self._robot, q)
        mujoco.mj_kinematics(model, data)
        first, second = self.pairs.T
        gap = np.linalg.norm(data.geom_xpos[first] - data.geom_xpos[second], axis=-1)
        return self.pairs[gap < model.geom_rbound[first] + model.geom_rbound[second]]

    def _collide(self, first: int, second: int) -> bool:
        return mujoco.mj_geomDistance(self._robot.mj_model, self._data, first, second, 0.0, None) < -LEAST_DEPTH

    def _names(self, pair: tuple[int, int]) -> tuple[str, str]:
        first, second = (self._robot.mj_model.body(body).name for body in pair)
        return first, second


def _testable_pairs(model: mujoco.MjModel) -> Int[np.ndarray, "pairs 2"]:
    """Pairs of geoms that may collide and whose bodies are not neighbours."""
    geoms = np.flatnonzero(((model.geom_contype != 0) | (model.geom_conaffinity != 0)) & (model.geom_bodyid > 0))
    first, second = (geoms[index] for index in np.triu_indices(len(geoms), 1))
    meets = (model.geom_contype[first] & model.geom_conaffinity[second]) | (
        model.geom_contype[second] & model.geom_conaffinity[first]
    )
    bodies = [model.geom_bodyid[first], model.geom_bodyid[second]]
    weld_a, weld_b = (model.body_weldid[body] for body in bodies)
    above_a, above_b = (model.body_weldid[model.body_parentid[weld]] for weld in (weld_a, weld_b))
    neighbours = (weld_a == weld_b) | (above_a == weld_b) | (above_b == weld_a)
    signatures = (np.minimum(*bodies).astype(np.int64) << 16) + np.maximum(*bodies)
    excluded = np.isin(signatures, model.exclude_signature)
    keep = (meets != 0) & ~neighbours & ~excluded
    return np.stack([first[keep], second[keep]], axis=-1)
