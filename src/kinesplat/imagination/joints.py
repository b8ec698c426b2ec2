"""A robot's joints in a MuJoCo world that holds the robot and more."""

import mujoco
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.description import Robot, mujoco_qpos
from kinesplat.errors import InputError

SCALAR = {int(mujoco.mjtJoint.mjJNT_HINGE), int(mujoco.mjtJoint.mjJNT_SLIDE)}


def joint_ids(robot: Robot, world: mujoco.MjModel) -> Int[np.ndarray, " joints"]:
    """The world's joints that are the robot's, by name, in the order of the robot's own model.

    Raises:
        InputError: the world lacks a joint of the robot, or one is neither hinge nor slide.
    """
    own = robot.mj_model
    if not SCALAR.issuperset(own.jnt_type.tolist()):
        raise InputError(f"robot {robot.name} has a free base or a ball joint; only hinges and slides are executed")
    there = {world.joint(j).name: j for j in range(world.njnt)}
    names = [own.joint(j).name for j in range(own.njnt)]
    missing = [name for name in names if name not in there]
    if missing:
        raise InputError(f"the scene has no joint {missing[0]!r} of the robot {robot.name}; it has {sorted(there)}")
    return np.array([there[name] for name in names], dtype=np.int64)


def robot_qpos(robot: Robot, q: Float[Tensor, "*batch dof"]) -> Float[np.ndarray, "*batch joints"]:
    """Value of every joint in the order of the robot's own model, couplings applied [rad]/[m]."""
    return mujoco_qpos(robot, q)[..., robot.mj_model.jnt_qposadr]


def place(robot: Robot, data: mujoco.MjData, q: Float[Tensor, " dof"]) -> None:
    """Put the robot in a state of the world at q; velocities and everything that follows from q stay as they are."""
    data.qpos[data.model.jnt_qposadr[joint_ids(robot, data.model)]] = robot_qpos(robot, q)


def joints_of(robot: Robot, data: mujoco.MjData) -> Float[Tensor, " dof"]:
    """Where the robot's independent joints are in a state of the world [rad]/[m]."""
    world = data.model
    addresses = [int(world.jnt_qposadr[world.joint(name).id]) for name in robot.tree.joint_names]
    return torch.from_numpy(data.qpos[addresses].copy())


def robot_bodies(robot: Robot, world: mujoco.MjModel) -> set[int]:
    """The world's bodies that are links of the robot."""
    names = set(robot.tree.link_names)
    return {body for body in range(1, world.nbody) if world.body(body).name in names}


def start_state(robot: Robot, world: mujoco.MjModel, q: Float[Tensor, " dof"]) -> mujoco.MjData:
    """The world as its model says, with the robot at q [rad]/[m]."""
    data = mujoco.MjData(world)
    place(robot, data, q)
    mujoco.mj_forward(world, data)
    return data
