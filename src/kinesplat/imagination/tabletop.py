"""A small world of our own: the packaged arm before a table with coloured blocks, and instructions to reach them."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.dataset.device import Device
from kinesplat.dataset.lights import HEADLIGHT_AMBIENT, HEADLIGHT_DIFFUSE
from kinesplat.dataset.tracer import RayTracer
from kinesplat.description import Robot, load_description
from kinesplat.description.sources import named_file
from kinesplat.description.visuals import VISUAL_GROUP
from kinesplat.errors import InputError, unknown
from kinesplat.imagination.joints import place, robot_qpos

ROBOT = "kinearm"
TOOL = "grip"
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.08, 0.08),
    "green": (0.10, 0.62, 0.14),
    "blue": (0.10, 0.20, 0.85),
}
HALF_BLOCK = 0.0225
"""Half of a block's edge [m]."""
HOVER = 0.03
"""Height of the gripper's tip over the block that it has reached [m]."""
REACHED = 0.04
"""Distance from that place up to which the block counts as reached [m]."""
APART = 0.11
"""Least distance between two blocks' centres [m]."""
WORKSPACE = ((0.22, 0.40), (-0.2, 0.2))
Q_START = (0.0, 0.13, 1.62, 0.0, 1.39, 0.0, 0.02)
START_SPREAD = (0.25, 0.08, 0.08, 0.0, 0.08, 0.0, 0.0)
TABLE_RGB, TABLE_HALF, TABLE_CENTRE = (0.80, 0.77, 0.72), (0.38, 0.42, 0.02), (0.20, 0.0)
ROBOT_BIT, THING_BIT = 1, 2


@dataclass(frozen=True)
class Scene:
    """One arrangement of the world.

    Attributes:
        blocks: centre ``(x, y)`` of every block on the table by colour [m].
        q_start: ``(dof,)`` where the arm begins [rad]/[m].
    """

    blocks: Mapping[str, tuple[float, float]]
    q_start: Float[Tensor, " dof"]

    @classmethod
    def random(cls, generator: torch.Generator) -> "Scene":
        """Blocks of all colours apart from each other in the arm's reach, the arm near its start."""
        low, high = torch.tensor(WORKSPACE).double().T
        placed: list[Tensor] = []
        while len(placed) < len(COLOURS):
            spot = low + (high - low) * torch.rand(2, generator=generator, dtype=torch.float64)
            if all((spot - other).norm() >= APART for other in placed):
                placed.append(spot)
        spread = 2.0 * torch.rand(len(Q_START), generator=generator, dtype=torch.float64) - 1.0
        q = torch.tensor(Q_START).double() + torch.tensor(START_SPREAD) * spread
        return cls({name: (s[0].item(), s[1].item()) for name, s in zip(COLOURS, placed, strict=True)}, q)


class Tabletop:
    """The compiled world: arm, table and blocks, gravity of the arm compensated, joints driven to positions.

    Attributes:
        robot: the arm alone, its shapes allowed to collide with each other.
        model: ``mujoco.MjModel`` of everything; the blocks lie freely.
    """

    def __init__(self) -> None:
        """Compile the world; needs no mesh but the packaged arm's."""
        self.robot: Robot = load_description(_arm_spec(ROBOT_BIT, ROBOT_BIT))
        self.model: mujoco.MjModel = _world_spec().compile()

    def data(self, scene: Scene) -> mujoco.MjData:
        """A fresh state of the world with the scene's blocks and arm."""
        data = mujoco.MjData(self.model)
        for name, spot in scene.blocks.items():
            data.joint(f"{name} block").qpos[:] = (*spot, HALF_BLOCK, 1.0, 0.0, 0.0, 0.0)
        place(self.robot, data, scene.q_start)
        mujoco.mj_forward(self.model, data)
        return data

    def goal(self, scene: Scene, colour: str) -> Float[Tensor, "3"]:
        """Where the gripper's tip belongs for a block [m].

        Raises:
            InputError: there is no such block.
        """
        if colour not in scene.blocks:
            raise InputError(unknown("block", colour, scene.blocks))
        return torch.tensor([*scene.blocks[colour], 2.0 * HALF_BLOCK + HOVER], dtype=torch.float64)

    def reaching(self, scene: Scene, colour: str, steps: int = 40) -> Float[Tensor, "steps dof"]:
        """The scripted policy: joints that go above the block, then down to it, ``(steps, dof)`` [rad]/[m]."""
        goal = self.goal(scene, colour)
        below = inverse_kinematics(self.robot, goal, scene.q_start)
        above = inverse_kinematics(self.robot, goal + torch.tensor([0.0, 0.0, 0.06]), below)
        knots = torch.stack([scene.q_start, above, below])
        return _through(knots, (0.0, 0.6, 1.0), steps)

    def tip(self, data: mujoco.MjData) -> Float[Tensor, "3"]:
        """Where the gripper's tip is [m]."""
        return torch.from_numpy(data.site(TOOL).xpos.copy())

    def reached(self, data: mujoco.MjData, scene: Scene, colour: str) -> bool:
        """Whether the tip is within 4 cm of its place over the asked block, and nearer to it than to any other's."""
        tip = self.tip(data)
        away = {name: float((tip - self.goal(scene, name)).norm()) for name in scene.blocks}
        return away[colour] < REACHED and min(away, key=lambda name: away[name]) == colour


class TabletopPictures:
    """Renders states of the world: headlight, white beyond the table, as the packaged models were trained."""

    def __init__(self, world: Tabletop, size: int, samples: int = 16, device: Device = "auto") -> None:
        """Prepare a world; the first picture compiles kernels.

        Args:
            world: what to look at.
            size: width and height of the pictures [px].
            samples: rays a pixel.
            device: where to trace.

        Raises:
            BackendError: `mujoco_warp` is not installed.
        """
        model = copy.copy(world.model)
        light = model.vis.headlight
        light.active, light.ambient[:], light.diffuse[:], light.specular[:] = 1, HEADLIGHT_AMBIENT, HEADLIGHT_DIFFUSE, 0
        self.camera = camera(size)
        self._tracer = RayTracer(model, samples, False, device)

    def picture(self, data: mujoco.MjData) -> Float[Tensor, "height width 3"]:
        """The world as its camera sees it now, in [0, 1]."""
        geoms = data.geom_xpos, data.geom_xmat.reshape(-1, 3, 3)
        K, T = self.camera.K.double().numpy(), self.camera.T_cam_world.double().numpy()
        colours, _, geom = self._tracer.image(geoms, K, T, (self.camera.width, self.camera.height), None)
        colours = colours.astype(np.float32) + self._tracer.bias * ((geom[..., None] >= 0) & (colours < 255))
        return torch.from_numpy(colours.mean(axis=2) / np.float32(255.0))


def camera(size: int) -> Camera:
    """The camera of the world: beside and above the table [m]."""
    return Camera.look_at((0.88, -0.62, 0.72), (0.18, 0.0, 0.16), math.radians(36.0), size, size)


def instruction(colour: str) -> str:
    """The sentence that asks for a block."""
    return f"reach the {colour} block"


def inverse_kinematics(
    robot: Robot, target: Float[Tensor, "3"], q_init: Float[Tensor, " dof"], iterations: int = 200
) -> Float[Tensor, " dof"]:
    """Joints that bring the tool's site to a place, pointing down, by damped least squares from `q_init`.

    Raises:
        InputError: the place is out of reach.
    """
    model, data = robot.mj_model, mujoco.MjData(robot.mj_model)
    site, tree = model.site(TOOL).id, robot.tree
    columns = [int(model.joint(name).dofadr[0]) for name in tree.joint_names]
    q = q_init.clone()
    q[0] = math.atan2(float(target[1]), float(target[0]))
    J, turn = np.zeros((3, model.nv)), np.zeros((3, model.nv))
    for _ in range(iterations):
        data.qpos[:] = robot_qpos(robot, q)
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_jacSite(model, data, J, turn, site)
        axis = data.site_xmat[site].reshape(3, 3)[:, 2]
        off = target.numpy() - data.site_xpos[site]
        tilt = np.cross(axis, [0.0, 0.0, -1.0])
        if np.linalg.norm(off) < 1e-4 and np.linalg.norm(tilt) < 1e-3:
            return q
        A, b = np.concatenate([J, 0.1 * turn])[:, columns], np.concatenate([off, 0.1 * tilt])
        step = A.T @ np.linalg.solve(A @ A.T + 1e-5 * np.eye(6), b)
        q = tree.clamp(q + torch.from_numpy(np.clip(step, -0.2, 0.2)))
    raise InputError(f"{[round(x, 3) for x in target.tolist()]} m is out of reach of {robot.name}")


def _through(knots: Float[Tensor, "knots dof"], times: tuple[float, ...], steps: int) -> Float[Tensor, "steps dof"]:
    """Joints that pass the knots, at rest at the first and the last (Fritsch and Carlson's monotone cubic)."""
    t = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    eased = 0.5 * (t + t.pow(2) * (3.0 - 2.0 * t))
    return torch.from_numpy(PchipInterpolator(times, knots.numpy())(eased.numpy()))


def _arm_spec(contype: int, conaffinity: int) -> mujoco.MjSpec:
    spec = mujoco.MjSpec.from_file(str(named_file(ROBOT, "")))
    for geom in spec.geoms:
        geom.contype, geom.conaffinity = contype, conaffinity
    return spec


def _world_spec() -> mujoco.MjSpec:
    spec = _arm_spec(ROBOT_BIT, THING_BIT)
    spec.modelname = "tabletop"
    for key in list(spec.keys):
        spec.delete(key)
    for body in spec.bodies:
        body.gravcomp = 1.0
    box, both = mujoco.mjtGeom.mjGEOM_BOX, ROBOT_BIT | THING_BIT
    spec.worldbody.add_geom(
        name="table",
        type=box,
        size=TABLE_HALF,
        pos=(*TABLE_CENTRE, -TABLE_HALF[2]),
        rgba=(*TABLE_RGB, 1.0),
        group=VISUAL_GROUP,
        contype=THING_BIT,
        conaffinity=both,
    )
    for name, colour in COLOURS.items():
        body = spec.worldbody.add_body(name=f"{name} block", pos=(0.3, 0.0, HALF_BLOCK))
        body.add_freejoint(name=f"{name} block")
        body.add_geom(
            type=box,
            size=[HALF_BLOCK] * 3,
            rgba=(*colour, 1.0),
            group=VISUAL_GROUP,
            contype=THING_BIT,
            conaffinity=both,
            mass=0.05,
        )
    return spec
