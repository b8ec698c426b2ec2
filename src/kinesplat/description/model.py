"""Robot of a compiled MuJoCo model: the one way in for every kind of description."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.description.mujoco_tree import body_name, tree_of
from kinesplat.description.robot import Robot
from kinesplat.description.visuals import DRAWN_TYPES, HIDDEN_GROUP, VISUAL_GROUP, link_mesh, visual_geoms
from kinesplat.kinematics import BALL


def robot_from_model(
    model: mujoco.MjModel,
    name: str,
    source: str,
    licence: str,
    warnings: tuple[str, ...] = (),
    canonical: Mapping[str, float] | None = None,
) -> Robot:
    """Kinematics and surfaces of `model`, which stays as it is.

    `canonical` gives the home configuration by joint name [rad or m] where the model's keyframes do not.

    Raises:
        DescriptionError: the model has no body, or its joint equalities contradict each other.
    """
    model = copy.copy(model)
    geoms = visual_geoms(model)
    model.geom_group[:] = HIDDEN_GROUP
    model.geom_group[geoms] = VISUAL_GROUP
    kinematics = tree_of(model)
    tree = kinematics.tree
    if canonical is not None:
        home = [canonical.get(n, float(q)) for n, q in zip(tree.joint_names, tree.q_canonical, strict=True)]
        tree = replace(tree, q_canonical=tree.clamp(torch.tensor(home, dtype=torch.float64)))
    return Robot(
        name=name,
        tree=tree,
        link_meshes=tuple(link_mesh(model, g) for g in geoms),
        licence=licence,
        source=source,
        mj_model=model,
        coordinate_qpos=kinematics.coordinate_qpos,
        base_qpos=kinematics.base_qpos,
        warnings=(*warnings, *kinematics.warnings, *_warnings(model, geoms)),
    )


def mujoco_qpos(
    robot: Robot, q: Float[Tensor, "*batch dof"], T_world_base: Float[Tensor, "*batch 4 4"] | None = None
) -> Float[np.ndarray, "*batch nq"]:
    """MuJoCo's qpos of a configuration, couplings applied; free base from `T_world_base`, by default the tree's.

    A fixed base stays where the model has it: there `T_world_base` is not part of qpos.
    """
    tree, model = robot.tree, robot.mj_model
    theta = tree.coordinates(q.detach().double()).numpy()
    qpos = np.broadcast_to(model.qpos0, (*theta.shape[:-1], model.nq)).copy()
    balls = set(tree.node_coordinate[tree.node_type == BALL].tolist())
    for coordinate in range(theta.shape[-1]):
        if not balls & {coordinate, coordinate - 1, coordinate - 2}:
            qpos[..., robot.coordinate_qpos[coordinate]] = theta[..., coordinate]
    for first in balls:
        address = robot.coordinate_qpos[first]
        qpos[..., address : address + 4] = _quaternion(theta[..., first : first + 3])
    if robot.base_qpos >= 0:
        T = tree.T_world_base if T_world_base is None else T_world_base.detach().double()
        qpos[..., robot.base_qpos : robot.base_qpos + 3] = T[..., :3, 3].numpy()
        quaternion = np.empty((*T.shape[:-2], 4))
        for index in np.ndindex(*T.shape[:-2]):
            mujoco.mju_mat2Quat(quaternion[index], T[index][:3, :3].numpy().reshape(9).copy())
        qpos[..., robot.base_qpos + 3 : robot.base_qpos + 7] = quaternion
    return qpos


def _quaternion(vector: np.ndarray) -> np.ndarray:
    """wxyz quaternion of a rotation vector."""
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    return np.concatenate([np.cos(0.5 * angle), 0.5 * np.sinc(angle / (2.0 * np.pi)) * vector], axis=-1)


def _warnings(model: mujoco.MjModel, geoms: list[int]) -> list[str]:
    """What of the model is not taken over."""
    found = []
    scenery = int(((model.geom_bodyid == 0) & np.isin(model.geom_type, list(DRAWN_TYPES))).sum())
    if scenery:
        found.append(f"{scenery} geom(s) on the world body are scenery and are left out")
    if not geoms:
        found.append("the description has no visible geom: nothing of this robot can be drawn")
    bare = sorted(set(range(1, model.nbody)) - {int(model.geom_bodyid[g]) for g in geoms})
    if bare and geoms:
        names = ", ".join(body_name(model, b) for b in bare)
        found.append(f"{len(bare)} link(s) without visible geometry: {names}")
    materials = model.geom_matid[geoms]
    textures = model.mat_texid[materials[materials >= 0], int(mujoco.mjtTextureRole.mjTEXROLE_RGB)]
    cubes = int((model.tex_type[textures[textures >= 0]] != int(mujoco.mjtTexture.mjTEXTURE_2D)).sum())
    if cubes:
        found.append(f"{cubes} geom(s) with a cube texture are drawn in their material's plain colour")
    if model.nskin or model.nflex:
        found.append(f"{model.nskin} skin(s) and {model.nflex} flexible(s) are left out")
    return found
