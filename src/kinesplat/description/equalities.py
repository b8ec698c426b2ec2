"""Joint equalities of a MuJoCo model as couplings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import Polynomial

from kinesplat.couplings import Couplings
from kinesplat.errors import DescriptionError


@dataclass(frozen=True)
class Follow:
    """How one coordinate follows another: the arrays of one row of `Couplings`; driver -1 for a constant."""

    driver: int
    coefficients: Float[np.ndarray, "segments powers"]
    lower: float = 0.0
    step: float = 0.0


def joint_equalities(model: mujoco.MjModel, of_joint: Mapping[int, int], names: Sequence[str]) -> dict[int, Follow]:
    """Follower coordinate to its polynomial, for every active joint equality.

    MuJoCo's rule: ``q1 - ref1 = polycoef(q2 - ref2)``. A joint that two linear equalities drive is the driver in the
    second one.

    Args:
        model: the compiled model.
        of_joint: coordinate of every hinge and slide.
        names: name of every coordinate, for messages.

    Raises:
        DescriptionError: two equalities drive one joint and cannot be turned round.
    """
    rows: dict[int, Follow] = {}
    chosen = (model.eq_type == int(mujoco.mjtEq.mjEQ_JOINT)) & model.eq_active0.astype(bool)
    for equality in np.flatnonzero(chosen):
        joint, driver_joint = int(model.eq_obj1id[equality]), int(model.eq_obj2id[equality])
        follower = of_joint[joint]
        reference = float(model.qpos0[model.jnt_qposadr[joint]])
        polynomial = Polynomial(model.eq_data[equality, :5])
        driver = -1
        if driver_joint < 0:
            polynomial = Polynomial([reference + polynomial.coef[0]])
        else:
            driver = of_joint[driver_joint]
            shift = Polynomial([-float(model.qpos0[model.jnt_qposadr[driver_joint]]), 1.0])
            polynomial = polynomial(shift) + reference
        if follower in rows:
            follower, driver, polynomial = _turned_round(follower, driver, polynomial, rows, names)
        rows[follower] = Follow(driver, polynomial.coef[None])
    return rows


def couplings_of(rows: Mapping[int, Follow], names: Sequence[str]) -> Couplings:
    """Couplings of all coordinates from the rows of those that follow, ordered by level.

    Raises:
        DescriptionError: coordinates drive each other in a circle.
    """
    level = _levels(rows, names)
    order = sorted(rows, key=lambda i: (level[i], i))
    segments = max((len(rows[i].coefficients) for i in order), default=1)
    powers = max((rows[i].coefficients.shape[1] for i in order), default=1)
    coefficients = np.zeros((len(order), segments, powers))
    for index, follower in enumerate(order):
        own = rows[follower].coefficients
        coefficients[index, : len(own), : own.shape[1]] = own
        coefficients[index, len(own) :] = coefficients[index, len(own) - 1]
    return Couplings(
        coordinates=len(names),
        independent=torch.tensor([i for i in range(len(names)) if i not in rows], dtype=torch.int64),
        dependent=torch.tensor(order, dtype=torch.int64),
        driver=torch.tensor([max(rows[i].driver, 0) for i in order], dtype=torch.int64),
        level=torch.tensor([level[i] for i in order], dtype=torch.int64),
        lower=torch.tensor([rows[i].lower for i in order], dtype=torch.float64),
        step=torch.tensor([rows[i].step for i in order], dtype=torch.float64),
        coefficients=torch.from_numpy(coefficients),
    )


def _turned_round(
    follower: int, driver: int, polynomial: Polynomial, rows: Mapping[int, Follow], names: Sequence[str]
) -> tuple[int, int, Polynomial]:
    """The same equality with its driver as the follower."""
    linear = polynomial.trim(1e-12)
    if driver < 0 or driver in rows or linear.degree() != 1:
        raise DescriptionError(f"two joint equalities drive joint {names[follower]!r}; keep one of them")
    offset, slope = linear.coef
    return driver, follower, Polynomial([-offset / slope, 1.0 / slope])


def _levels(rows: Mapping[int, Follow], names: Sequence[str]) -> dict[int, int]:
    """How many couplings lie between a coordinate and an independent one, plus one."""
    level: dict[int, int] = {}
    for start in rows:
        chain = [start]
        while (above := rows[chain[-1]].driver) in rows and above not in level:
            if above in chain:
                circle = " -> ".join(names[i] for i in [*chain, above])
                raise DescriptionError(f"joint equalities drive each other in a circle: {circle}")
            chain.append(above)
        for follower in reversed(chain):
            level.setdefault(follower, level.get(rows[follower].driver, 0) + 1)
    return level
