"""KinematicTree of a compiled MuJoCo model."""

from dataclasses import dataclass, field

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import Polynomial
from scipy.spatial.transform import Rotation
from torch import Tensor

from kinesplat.couplings import Couplings
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


def transform(position: np.ndarray, quaternion: np.ndarray) -> Float[np.ndarray, "4 4"]:
    """``(4, 4)`` from a position [m] and a wxyz quaternion."""
    T = np.eye(4)
    T[:3, :3] = Rotation.from_quat(quaternion, scalar_first=True).as_matrix()
    T[:3, 3] = position
    return T


def tree_of(model: mujoco.MjModel) -> MujocoTree:
    """Kinematics of every body but the world.

    The free joint with most joints below it is the base (`T_world_base`); any further free joint becomes three slides
    and a ball. Joint equalities become couplings. Tendons, actuators and contacts do not move anything here.

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
    base_body = int(model.jnt_bodyid[base_joint]) if base_joint >= 0 else 0
    couplings = _couplings(model, coordinates)
    independent = [coordinates[i] for i in couplings.independent.tolist()]
    limits = np.array([[c.lower, c.upper] for c in independent]).reshape(-1, 2)
    rest = _canonical_qpos(model)
    canonical = np.array([_coordinate_value(rest, c, coordinates) for c in independent])
    tree = KinematicTree(
        link_names=tuple(body_name(model, b) for b in range(1, model.nbody)),
        joint_names=tuple(c.name for c in independent),
        joint_types=tuple(_TYPE_NAMES[c.kind] for c in independent),
        parents=torch.from_numpy(model.body_parentid[1:].astype(np.int64) - 1),
        q_lower=torch.from_numpy(limits[:, 0].copy()),
        q_upper=torch.from_numpy(limits[:, 1].copy()),
        q_limited=torch.tensor([c.limited for c in independent], dtype=torch.bool),
        q_canonical=torch.from_numpy(canonical.astype(np.float64)),
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
    clamped = tree.clamp(tree.q_canonical)
    tree.q_canonical.copy_(clamped)
    base_qpos = int(model.jnt_qposadr[base_joint]) if base_joint >= 0 else -1
    return MujocoTree(tree, np.array([c.qpos for c in coordinates], dtype=np.int64), base_qpos)


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


def _coordinate_value(qpos: np.ndarray, coordinate: _Coordinate, coordinates: list[_Coordinate]) -> float:
    if coordinate.kind != BALL:
        return float(qpos[coordinate.qpos])
    vector = Rotation.from_quat(qpos[coordinate.qpos : coordinate.qpos + 4], scalar_first=True).as_rotvec()
    return float(vector["xyz".index(coordinate.name[-1])])


def _couplings(model: mujoco.MjModel, coordinates: list[_Coordinate]) -> Couplings:
    """Joint equalities as polynomials, in an order in which every driver comes before what follows it."""
    of_joint = {c.joint: i for i, c in enumerate(coordinates) if c.kind != BALL}
    rows: dict[int, tuple[int, np.ndarray]] = {}
    active = model.eq_active0.astype(bool)
    for equality in np.flatnonzero((model.eq_type == int(mujoco.mjtEq.mjEQ_JOINT)) & active):
        follower, driver = of_joint[int(model.eq_obj1id[equality])], int(model.eq_obj2id[equality])
        polynomial = Polynomial(model.eq_data[equality, :5])
        follower_reference = float(model.qpos0[coordinates[follower].qpos])
        if driver < 0:
            rows[follower] = (-1, np.array([follower_reference + polynomial.coef[0]]))
            continue
        source = of_joint[driver]
        shifted = polynomial(Polynomial([-float(model.qpos0[coordinates[source].qpos]), 1.0])) + follower_reference
        rows[follower] = (source, shifted.coef)
    level = _coupling_levels(rows, coordinates)
    order = sorted(rows, key=lambda i: (level[i], i))
    coefficients = np.zeros((len(order), 1, 5))
    for row, follower in enumerate(order):
        coefficients[row, 0, : len(rows[follower][1])] = rows[follower][1]
    zeros = torch.zeros(len(order), dtype=torch.float64)
    return Couplings(
        coordinates=len(coordinates),
        independent=torch.tensor([i for i in range(len(coordinates)) if i not in rows], dtype=torch.int64),
        dependent=torch.tensor(order, dtype=torch.int64),
        driver=torch.tensor([max(rows[i][0], 0) for i in order], dtype=torch.int64),
        level=torch.tensor([level[i] for i in order], dtype=torch.int64),
        lower=zeros,
        step=zeros.clone(),
        coefficients=_matrix(coefficients),
    )


def _coupling_levels(rows: dict[int, tuple[int, np.ndarray]], coordinates: list[_Coordinate]) -> dict[int, int]:
    """How many couplings lie between a coordinate and an independent one, plus one."""
    level: dict[int, int] = {}
    for start in rows:
        chain = [start]
        while (above := rows[chain[-1]][0]) in rows and above not in level:
            if above in chain:
                names = " -> ".join(coordinates[i].name for i in [*chain, above])
                raise DescriptionError(f"joint equalities drive each other in a circle: {names}")
            chain.append(above)
        for follower in reversed(chain):
            level.setdefault(follower, level.get(rows[follower][0], 0) + 1)
    return level
