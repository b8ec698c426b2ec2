"""From joints over time to motion: what is wrong with a trajectory, and what MuJoCo makes of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.dataset.collision import LEAST_DEPTH, SelfCollision
from kinesplat.description import Robot
from kinesplat.errors import InputError
from kinesplat.imagination.actuators import position_controls
from kinesplat.imagination.joints import joints_of, place, robot_bodies

MAX_SPEED = {"hinge": 3.0, "ball": 3.0, "slide": 0.5}
"""Speed that a joint is trusted with [rad/s], [m/s]."""
LIMIT_TOLERANCE = 1e-3
SETTLE_S = 0.5
Contact = tuple[int, str, str]


@dataclass(frozen=True)
class TrajectoryCheck:
    """What is wrong with a trajectory; nothing that could be told, where all four are empty.

    Attributes:
        beyond_limits: by joint, how far the trajectory goes beyond its limits [rad]/[m].
        too_fast: by joint, the greatest speed where it is above what the joint is trusted with [rad/s]/[m/s].
        self_collisions: frames in which two links run into each other; None where the description has no shapes for it.
        contacts: first frame in which a link runs into a thing of the scene, the link, the thing; None without a scene,
            or where no shape of the robot can collide with one of the scene.
    """

    beyond_limits: dict[str, float]
    too_fast: dict[str, float]
    self_collisions: tuple[int, ...] | None
    contacts: tuple[Contact, ...] | None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong, as far as it could be told."""
        return not (self.beyond_limits or self.too_fast or self.self_collisions or self.contacts)

    def report(self) -> str:
        """One line for a person."""
        words = [f"{name} {value:.3g} beyond its limit" for name, value in self.beyond_limits.items()]
        words += [f"{name} at {value:.3g} per second" for name, value in self.too_fast.items()]
        words += [f"self-collision in {len(self.self_collisions)} frame(s)"] if self.self_collisions else []
        words += [f"{link} runs into {thing} in frame {frame}" for frame, link, thing in self.contacts or ()]
        unknown = [] if self.self_collisions is not None else ["self-collision unknown, for want of collision shapes"]
        unknown += [] if self.contacts is not None else ["collision with a scene unknown"]
        fine = "within limits and speeds" + ("" if unknown else ", no collision")
        return "checked: " + "; ".join((words or [fine]) + unknown)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return {
            "passed": self.passed,
            "beyond_limits": self.beyond_limits,
            "too_fast_per_s": self.too_fast,
            "self_collision_frames": None if self.self_collisions is None else list(self.self_collisions),
            "contacts": None if self.contacts is None else [list(contact) for contact in self.contacts],
        }


@dataclass(frozen=True)
class Execution:
    """How a trajectory went in MuJoCo.

    Attributes:
        q: ``(frames, dof)`` where the joints were at the frames' times [rad]/[m].
        q_end: ``(dof,)`` where they were half a second after the last.
        error: greatest distance of a hinge from what it was told, at the end [rad].
        contacts: every contact of a link with a thing of the scene: the frame towards which the robot went when it
            began, even if it ended before that frame's time; None where no shape of the robot can collide with one of
            the scene.
    """

    q: Float[Tensor, "frames dof"]
    q_end: Float[Tensor, " dof"]
    error: float
    contacts: tuple[Contact, ...] | None

    def report(self) -> str:
        """One line for a person."""
        touched = ", ".join(f"{link} touched {thing} in frame {frame}" for frame, link, thing in self.contacts or ())
        none = "no shapes that could touch" if self.contacts is None else "no contact"
        return f"executed: {len(self.q)} frames, at the end {self.error:.3f} rad off at most; {touched or none}"

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return {
            "q": self.q.tolist(),
            "q_end": self.q_end.tolist(),
            "error_rad": self.error,
            "contacts": None if self.contacts is None else [list(contact) for contact in self.contacts],
        }


def check_trajectory(
    robot: Robot,
    q: Float[Tensor, "frames dof"],
    seconds: float,
    state: mujoco.MjData | None = None,
) -> TrajectoryCheck:
    """Joint limits, speeds, and collisions of the frames, without dynamics.

    Args:
        robot: tells links that collide with each other, as far as its description has shapes for that.
        q: ``(frames, dof)`` [rad]/[m].
        seconds: time from one frame to the next.
        state: of a world with the robot and what stands around it, which stays as it is; default: nothing does.

    Raises:
        InputError: fewer than two frames, NaN, a time that is none, or the world lacks a joint of the robot.
    """
    _refuse(robot, q, seconds)
    tree = robot.tree
    q = q.double()
    beyond = torch.where(tree.q_limited, torch.maximum(tree.q_lower - q, q - tree.q_upper), -torch.inf).amax(dim=0)
    speed = (q.diff(dim=0).abs() / seconds).amax(dim=0)
    trusted = [MAX_SPEED[kind] for kind in tree.joint_types]
    collision = SelfCollision(robot)
    colliding = tuple((~collision.free(q)).nonzero()[:, 0].tolist()) if collision.can_tell else None
    return TrajectoryCheck(
        {n: b for n, b in zip(tree.joint_names, beyond.tolist(), strict=True) if b > LIMIT_TOLERANCE},
        {n: s for n, s, most in zip(tree.joint_names, speed.tolist(), trusted, strict=True) if s > most},
        colliding,
        None if state is None else _contacts_of_frames(robot, q, state),
    )


def execute(robot: Robot, q: Float[Tensor, "frames dof"], seconds: float, state: mujoco.MjData) -> Execution:
    """Drive the world's position actuators along a trajectory, and half a second on; `state` moves along.

    Args:
        robot: whose joints q are.
        q: ``(frames, dof)`` [rad]/[m]; the first frame is where the robot should be already.
        seconds: time from one frame to the next.
        state: of a world in which a position actuator, of the joint or of a tendon, drives every joint of q
            (`kinesplat.imagination.actuators.position_controls`); the robot goes on from where it is.

    Raises:
        InputError: as `check_trajectory`, or a joint has no position actuator; a motor or <velocity> is none.
    """
    bodies, contacts, reached = robot_bodies(robot, state.model), {}, []

    def touch(frame: int) -> None:
        for pair in _touching(state, bodies):
            contacts.setdefault(pair, frame)

    for _ in executing(robot, q, seconds, state, after_step=touch):
        reached.append(joints_of(robot, state))
    hinges = torch.tensor([kind == "hinge" for kind in robot.tree.joint_types])
    off = (reached[-1] - q[-1].double()).abs()[hinges]
    told = _can_touch(state.model, bodies)
    found = tuple((frame, link, thing) for (link, thing), frame in contacts.items()) if told else None
    return Execution(torch.stack(reached[:-1]), reached[-1], float(off.max()) if len(off) else 0.0, found)


def executing(
    robot: Robot,
    q: Float[Tensor, "frames dof"],
    seconds: float,
    state: mujoco.MjData,
    after_step: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """`execute` frame by frame: yields its number whenever `state` has come to a frame's time, and after settling.

    `after_step` is called with the number of the frame that comes next, at the start and after every step.
    """
    look = after_step or (lambda _: None)
    _refuse(robot, q, seconds)
    world = state.model
    indices, targets = position_controls(robot, q, state)
    state.ctrl[indices] = targets[0]
    look(0)
    yield 0
    steps = max(1, round(seconds / world.opt.timestep))
    settling = max(1, round(SETTLE_S / world.opt.timestep))
    for frame in range(1, len(targets)):
        for step in range(1, steps + 1):
            state.ctrl[indices] = targets[frame - 1] + step / steps * (targets[frame] - targets[frame - 1])
            mujoco.mj_step(world, state)
            look(frame)
        yield frame
    for _ in range(settling):
        mujoco.mj_step(world, state)
        look(len(targets))
    mujoco.mj_forward(world, state)
    yield len(targets)


def _can_touch(world: mujoco.MjModel, bodies: set[int]) -> bool:
    """Whether the world lets any shape of these bodies collide with one of another body."""
    inside = np.isin(world.geom_bodyid, list(bodies))
    kind, with_kind = world.geom_contype, world.geom_conaffinity
    pairs = (kind[inside, None] & with_kind[~inside]) | (with_kind[inside, None] & kind[~inside])
    return bool(pairs.any()) or world.npair > 0


def _contacts_of_frames(robot: Robot, q: Tensor, state: mujoco.MjData) -> tuple[Contact, ...] | None:
    data, bodies = mujoco.MjData(state.model), robot_bodies(robot, state.model)
    if not _can_touch(state.model, bodies):
        return None
    data.qpos[:] = state.qpos
    found: dict[tuple[str, str], int] = {}
    for frame, row in enumerate(q):
        place(robot, data, row)
        mujoco.mj_forward(data.model, data)
        for pair in _touching(data, bodies):
            found.setdefault(pair, frame)
    return tuple((frame, link, thing) for (link, thing), frame in found.items())


def _touching(data: mujoco.MjData, bodies: set[int]) -> set[tuple[str, str]]:
    """Names of links and things that run into each other."""
    world, found = data.model, set()
    for contact in data.contact:
        pair = [int(world.geom_bodyid[geom]) for geom in contact.geom]
        inside = [body in bodies for body in pair]
        if contact.dist < -LEAST_DEPTH and inside[0] != inside[1]:
            link, thing = pair if inside[0] else pair[::-1]
            found.add((world.body(link).name, world.body(thing).name))
    return found


def _refuse(robot: Robot, q: Tensor, seconds: float) -> None:
    robot.tree.coordinates(q)  # raises on a wrong size or NaN
    if q.dim() != 2 or len(q) < 2:
        raise InputError(f"a trajectory has two frames or more, got q of shape {tuple(q.shape)}")
    if not seconds > 0.0:
        raise InputError(f"{seconds} s from frame to frame; expected a positive time")
