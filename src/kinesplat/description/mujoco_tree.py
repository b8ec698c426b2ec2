"""KinematicTree of a compiled MuJoCo model."""

from dataclasses import dataclass, field, replace

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial.transform import Rotation
from torch import Tensor

from kinesplat.couplings import Couplings
from kinesplat.description.equalities import couplings_of, joint_equalities
from kinesplat.description.frames import rotation_of, transform
from kinesplat.description.linkages import Passive, Solved, pins_of, solve_linkages
from kinesplat.errors import DescriptionError
from kinesplat.kinematics import BALL, FIXED, HINGE, SLIDE, KinematicTree

_JOINT = mujoco.mjtJoint
_FREE = int(_JOINT.mjJNT_FREE)
_TYPE_NAMES = {HINGE: "hinge", SLIDE: "slide", BALL: "ball"}
_KINDS = {int(_JOINT.mjJNT_HINGE): HINGE, int(_JOINT.mjJNT_SLIDE): SLIDE, int(_JOINT.mjJNT_BALL): BALL}
_SPAN = {HINGE: np.pi, SLIDE: 1.0, BALL: np.pi}


@dataclass(frozen=True)
class MujocoTree:
    """A tree and where its coordinates live in MuJoCo's qpos (see `Robot`)."""

    tree: KinematicTree
    coordinate_qpos: np.ndarray
    base_qpos: int
    warnings: tuple[str, ...]


@dataclass
class _Coordinate:
    """One scalar of one joint, as it stands in the model."""

    name: str
    kind: int
    joint: int
    qpos: int
    limited: bool
    lower: float
    upper: float


@dataclass
class _Nodes:
    """Node arrays while they grow; node 0 is the root."""

    parent: list[int] = field(default_factory=lambda: [0])
    kind: list[int] = field(default_factory=lambda: [FIXED])
    coordinate: list[int] = field(default_factory=lambda: [-1])
    transform: list[np.ndarray] = field(default_factory=lambda: [np.eye(4)])
    axis: list[np.ndarray] = field(default_factory=lambda: [np.zeros(3)])
    anchor: list[np.ndarray] = field(default_factory=lambda: [np.zeros(3)])

    def add(
        self,
        parent: int,
        transform: np.ndarray,
        kind: int = FIXED,
        coordinate: int = -1,
        axis=(0, 0, 0),
        anchor=(0, 0, 0),
    ) -> int:
        """Append a node and return its number; arguments as the attributes `node_...` of `KinematicTree`."""
        self.parent.append(parent)
        self.kind.append(kind)
        self.coordinate.append(coordinate)
        self.transform.append(transform)
        self.axis.append(np.array(axis, dtype=np.float64))
        self.anchor.append(np.array(anchor, dtype=np.float64))
        return len(self.parent) - 1


def body_name(model: mujoco.MjModel, body: int) -> str:
    """Name of a body, or ``body<i>`` when the description gives none."""
    return model.body(body).name or f"body{body}"


def joint_name(model: mujoco.MjModel, joint: int) -> str:
    """Name of a joint, or one made of its body's when the description gives none."""
    body = int(model.jnt_bodyid[joint])
    number = joint - int(model.body_jntadr[body])
    return model.joint(joint).name or f"{body_name(model, body)}_joint{number or ''}"


def tree_of(model: mujoco.MjModel) -> MujocoTree:
    """Kinematics of every body but the world.

    The free joint with most joints below it is the base (`T_world_base`); any further free joint becomes three slides
    and a ball. Joint equalities and closed linkages become couplings. Tendons, actuators and contacts do not move
    anything here.

    Raises:
        DescriptionError: the model has no body, or its joint equalities contradict each other.
    """
    if model.nbody < 2:
        raise DescriptionError("the description has no link (its world is empty)")
    base_joint = _base_joint(model)
    nodes, coordinates, link_node = _Nodes(), [], []
    for body in range(1, model.nbody):
        parent = int(model.body_parentid[body])
        link_node.append(_add_body(model, body, link_node[parent - 1] if parent else 0, base_joint, nodes, coordinates))
    names = [c.name for c in coordinates]
    rows = joint_equalities(model, {c.joint: i for i, c in enumerate(coordinates) if c.kind != BALL}, names)
    couplings = couplings_of(rows, names)
    tree = _assembled(model, base_joint, nodes, coordinates, link_node, couplings)
    solved = _linkage_solution(model, tree, [coordinates[i] for i in couplings.independent.tolist()])
    if solved.rows:
        for entry, limits in solved.limits.items():
            driver = coordinates[int(couplings.independent[entry])]
            driver.lower, driver.upper = limits
        tree = _assembled(
            model, base_joint, nodes, coordinates, link_node, couplings_of({**rows, **solved.rows}, names)
        )
    base_qpos = int(model.jnt_qposadr[base_joint]) if base_joint >= 0 else -1
    qpos = np.array([c.qpos for c in coordinates], dtype=np.int64)
    return MujocoTree(tree, qpos, base_qpos, tuple(solved.warnings))


def _assembled(
    model: mujoco.MjModel,
    base_joint: int,
    nodes: _Nodes,
    coordinates: list[_Coordinate],
    link_node: list[int],
    couplings: Couplings,
) -> KinematicTree:
    base_body = int(model.jnt_bodyid[base_joint]) if base_joint >= 0 else 0
    independent = [coordinates[i] for i in couplings.independent.tolist()]
    limits = np.array([[c.lower, c.upper] for c in independent]).reshape(-1, 2)
    rest = _canonical_qpos(model)
    canonical = np.array([_coordinate_value(rest, c) for c in independent], dtype=np.float64)
    tree = KinematicTree(
        link_names=tuple(body_name(model, b) for b in range(1, model.nbody)),
        joint_names=tuple(c.name for c in independent),
        joint_types=tuple(_TYPE_NAMES[c.kind] for c in independent),
        parents=torch.from_numpy(model.body_parentid[1:].astype(np.int64) - 1),
        q_lower=torch.from_numpy(limits[:, 0].copy()),
        q_upper=torch.from_numpy(limits[:, 1].copy()),
        q_limited=torch.tensor([c.limited for c in independent], dtype=torch.bool),
        q_canonical=torch.from_numpy(canonical),
        T_world_base=_matrix(transform(model.body_pos[base_body], model.body_quat[base_body])),
        base_node=link_node[base_body - 1] if base_body else 0,
        node_parent=torch.tensor(nodes.parent),
        node_type=torch.tensor(nodes.kind),
        node_coordinate=torch.tensor(nodes.coordinate),
        node_transform=_matrix(np.stack(nodes.transform)),
        node_axis=_matrix(np.stack(nodes.axis)),
        node_anchor=_matrix(np.stack(nodes.anchor)),
        link_node=torch.tensor(link_node),
        couplings=couplings,
    )
    return replace(tree, q_canonical=tree.clamp(tree.q_canonical))


def _matrix(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))


def _base_joint(model: mujoco.MjModel) -> int:
    """The free joint with most joints below it; -1 when there is none, or it is a loose object beside the robot."""
    free = np.flatnonzero(model.jnt_type == _FREE)
    roots = model.body_rootid[model.jnt_bodyid]
    below = [int((roots == roots[j]).sum()) for j in free]
    if not below or (max(below) == 1 and (model.jnt_type != _FREE).any()):
        return -1
    return int(free[int(np.argmax(below))])


def _add_body(
    model: mujoco.MjModel, body: int, parent: int, base_joint: int, nodes: _Nodes, coordinates: list[_Coordinate]
) -> int:
    """Append the nodes of a body's joints; returns the node that carries the body."""
    first, count = int(model.body_jntadr[body]), int(model.body_jntnum[body])
    place = transform(model.body_pos[body], model.body_quat[body])
    if count == 1 and first == base_joint:
        return nodes.add(parent, np.eye(4))
    if count == 1 and model.jnt_type[first] == _FREE:
        return _add_free(model, first, parent, nodes, coordinates)
    if count == 0:
        return nodes.add(parent, place)
    for joint in range(first, first + count):
        kind = _KINDS[int(model.jnt_type[joint])]
        axis, anchor, qpos = model.jnt_axis[joint], model.jnt_pos[joint], int(model.jnt_qposadr[joint])
        if kind != BALL:
            place = place @ _at_reference(kind, axis, anchor, model.qpos0[qpos])
        parent = nodes.add(parent, place, kind, len(coordinates), axis, anchor)
        lower, upper = (float(v) for v in model.jnt_range[joint])
        limited, name = bool(model.jnt_limited[joint]), joint_name(model, joint)
        if kind == BALL:
            lower = -upper
        if not limited:
            lower, upper = -_SPAN[kind], _SPAN[kind]
        suffixes = (".x", ".y", ".z") if kind == BALL else ("",)
        coordinates += [_Coordinate(name + s, kind, joint, qpos, limited, lower, upper) for s in suffixes]
        place = np.eye(4)
    return parent


def _add_free(model: mujoco.MjModel, joint: int, parent: int, nodes: _Nodes, coordinates: list[_Coordinate]) -> int:
    """A free joint that is not the base: three slides along the world's axes, then a ball."""
    name, qpos = joint_name(model, joint), int(model.jnt_qposadr[joint])
    for axis, letter in zip(np.eye(3), "xyz", strict=True):
        parent = nodes.add(parent, np.eye(4), SLIDE, len(coordinates), axis)
        here = qpos + "xyz".index(letter)
        centre = float(model.qpos0[here])
        coordinates.append(_Coordinate(f"{name}.p{letter}", SLIDE, joint, here, False, centre - 1.0, centre + 1.0))
    parent = nodes.add(parent, np.eye(4), BALL, len(coordinates))
    coordinates += [_Coordinate(f"{name}.{s}", BALL, joint, qpos + 3, False, -np.pi, np.pi) for s in "xyz"]
    return parent


def _at_reference(kind: int, axis: np.ndarray, anchor: np.ndarray, reference: float) -> Float[np.ndarray, "4 4"]:
    """Motion of a joint by minus its reference value: what the model's own frame stands at."""
    T = np.eye(4)
    if kind == SLIDE:
        T[:3, 3] = -reference * axis
        return T
    T[:3, :3] = Rotation.from_rotvec(-reference * axis).as_matrix()
    T[:3, 3] = anchor - T[:3, :3] @ anchor
    return T


def _canonical_qpos(model: mujoco.MjModel) -> Float[np.ndarray, " nq"]:
    """Keyframe ``home``, else the first keyframe, else the reference configuration."""
    if not model.nkey:
        return model.qpos0
    names = [model.key(i).name for i in range(model.nkey)]
    return model.key_qpos[names.index("home") if "home" in names else 0]


def _coordinate_value(qpos: np.ndarray, coordinate: _Coordinate) -> float:
    if coordinate.kind != BALL:
        return float(qpos[coordinate.qpos])
    vector = rotation_of(qpos[coordinate.qpos : coordinate.qpos + 4]).as_rotvec()
    return float(vector["xyz".index(coordinate.name[-1])])


def _linkage_solution(model: mujoco.MjModel, tree: KinematicTree, independent: list[_Coordinate]) -> Solved:
    """Closed loops of `tree`, whose couplings hold the joint equalities alone."""
    pins = pins_of(model)
    if not pins:
        return Solved({}, {}, [])
    driven = _actuated_joints(model)
    ball = np.array([c.kind == BALL for c in independent], dtype=bool)
    rest = [0.0 if c.kind == BALL else float(model.qpos_spring[c.qpos]) for c in independent]
    stiffness = [float(np.ravel(model.jnt_stiffness[c.joint])[0]) for c in independent]
    actuated = np.array([c.joint in driven for c in independent], dtype=bool)
    start = np.array([_coordinate_value(model.qpos0, c) for c in independent])
    return solve_linkages(tree, pins, Passive(np.array(stiffness), np.array(rest), actuated, ball), start)


def _actuated_joints(model: mujoco.MjModel) -> set[int]:
    """Joints that an actuator moves, directly or through a tendon."""
    joint_kinds = {int(mujoco.mjtTrn.mjTRN_JOINT), int(mujoco.mjtTrn.mjTRN_JOINTINPARENT)}
    joints = set()
    for kind, target in zip(model.actuator_trntype.tolist(), model.actuator_trnid[:, 0].tolist(), strict=True):
        if kind in joint_kinds:
            joints.add(target)
        if kind == int(mujoco.mjtTrn.mjTRN_TENDON):
            wraps = range(model.tendon_adr[target], model.tendon_adr[target] + model.tendon_num[target])
            is_joint = int(mujoco.mjtWrap.mjWRAP_JOINT)
            joints |= {int(model.wrap_objid[w]) for w in wraps if model.wrap_type[w] == is_joint}
    return joints
