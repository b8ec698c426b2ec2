"""Which actuators of a MuJoCo world hold a robot's joints where they are told, and what tells them."""

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.description import Robot
from kinesplat.errors import InputError
from kinesplat.imagination.joints import joint_ids, robot_qpos

STEP = 1e-3
"""Change of a joint by which actuators that move it are found [rad]/[m]."""
TRANSMISSIONS = {
    int(kind) for kind in (mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_JOINTINPARENT, mujoco.mjtTrn.mjTRN_TENDON)
}
FILTERS = {
    int(kind) for kind in (mujoco.mjtDyn.mjDYN_NONE, mujoco.mjtDyn.mjDYN_FILTER, mujoco.mjtDyn.mjDYN_FILTEREXACT)
}


def position_controls(
    robot: Robot, q: Float[Tensor, "frames dof"], state: mujoco.MjData
) -> tuple[list[int], Float[np.ndarray, "frames actuators"]]:
    """The position actuators of the robot's joints and tendons, and the controls at which they hold q.

    The force of a position actuator, ``gain * control + b0 + b1 * length + b2 * speed`` with ``b1 < 0``, is none at
    rest where ``control = -(b0 + b1 * length) / gain``. Its length at q is MuJoCo's, so gears, tendons and controls in
    other units than the joint's (a gripper's 0 to 255) are right. Actuators of other kinds are left as they are. Joints
    that one tendon drives together are told its length, not each its own value.

    Raises:
        InputError: the world lacks a joint of the robot, or no position actuator moves one of q.
    """
    world = state.model
    holding = [a for a in range(world.nu) if _holds_a_length(world, a)]
    q = q.double()
    moved = q[:1] + STEP * torch.eye(q.shape[-1], dtype=q.dtype)
    lengths = _lengths(robot, torch.cat([q, moved]), state)[:, holding]
    moves = np.abs(lengths[len(q) :] - lengths[0]) > 1e-3 * STEP
    missing = [name for name, driven in zip(robot.tree.joint_names, moves.any(axis=1), strict=True) if not driven]
    if missing:
        raise InputError(
            f"the scene has no position actuator for {', '.join(missing)}; <position joint=.../> is one: "
            "gain fixed, bias affine and against the joint's or its tendon's displacement"
        )
    used = moves.any(axis=0)
    indices = np.array(holding)[used]
    gain, bias = world.actuator_gainprm[indices, 0], world.actuator_biasprm[indices]
    return indices.tolist(), -(bias[:, 0] + bias[:, 1] * lengths[: len(q), used]) / gain


def _holds_a_length(world: mujoco.MjModel, actuator: int) -> bool:
    """Whether it pushes a joint or a tendon to a length that its control says."""
    return bool(
        world.actuator_trntype[actuator] in TRANSMISSIONS
        and world.actuator_dyntype[actuator] in FILTERS
        and world.actuator_gaintype[actuator] == mujoco.mjtGain.mjGAIN_FIXED
        and world.actuator_biastype[actuator] == mujoco.mjtBias.mjBIAS_AFFINE
        and world.actuator_gainprm[actuator, 0] != 0.0
        and world.actuator_biasprm[actuator, 1] < 0.0
    )


def _lengths(robot: Robot, q: Float[Tensor, "n dof"], state: mujoco.MjData) -> Float[np.ndarray, "n actuators"]:
    """Length of every actuator with the robot at q and all else as it is."""
    world, data = state.model, mujoco.MjData(state.model)
    data.qpos[:] = state.qpos
    addresses, out = world.jnt_qposadr[joint_ids(robot, world)], np.empty((len(q), world.nu))
    for row, values in zip(out, robot_qpos(robot, q), strict=True):
        data.qpos[addresses] = values
        for follow in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_tendon, mujoco.mj_transmission):
            follow(world, data)
        row[:] = data.actuator_length
    return out
