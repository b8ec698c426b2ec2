"""Visible surfaces of a compiled MuJoCo model, as its renderers draw them."""

import mujoco
import numpy as np
from jaxtyping import Float, UInt8

from kinesplat.description import primitives
from kinesplat.description.primitives import Patch
from kinesplat.description.robot import LinkMesh

VISUAL_GROUP = 2
"""Menagerie's convention, and the group that holds a loaded robot's visible geoms."""

HIDDEN_GROUP = 3
SPHERE, CAPSULE, ELLIPSOID, CYLINDER, BOX, MESH, SDF = (
    int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}"))
    for name in ("SPHERE", "CAPSULE", "ELLIPSOID", "CYLINDER", "BOX", "MESH", "SDF")
)
DRAWN_TYPES = frozenset((SPHERE, CAPSULE, ELLIPSOID, CYLINDER, BOX, MESH, SDF))
_RGB = int(mujoco.mjtTextureRole.mjTEXROLE_RGB)
_TEXTURE_2D = int(mujoco.mjtTexture.mjTEXTURE_2D)


def visual_geoms(model: mujoco.MjModel) -> list[int]:
    """Geoms that show the robot: group 2 where the model uses it, else groups 0 and 1, else all; no world geometry.

    Planes, height fields, fully transparent geoms and everything fixed to the world body are scenery.
    """
    robot = [
        g
        for g in range(model.ngeom)
        if model.geom_bodyid[g] > 0 and int(model.geom_type[g]) in DRAWN_TYPES and geom_rgba(model, g)[3] > 0
    ]
    for groups in ((VISUAL_GROUP,), (0, 1)):
        chosen = [g for g in robot if model.geom_group[g] in groups]
        if chosen:
            return chosen
    return robot


def geom_rgba(model: mujoco.MjModel, geom: int) -> Float[np.ndarray, "4"]:
    """Colour as the renderers choose it: the material's where the geom keeps MuJoCo's default grey."""
    own = model.geom_rgba[geom]
    material = model.geom_matid[geom]
    if material >= 0 and np.array_equal(own, np.array([0.5, 0.5, 0.5, 1.0], dtype=own.dtype)):
        return model.mat_rgba[material].astype(np.float64)
    return own.astype(np.float64)


def link_mesh(model: mujoco.MjModel, geom: int) -> LinkMesh:
    """Surface of one geom in its link's frame; link i is body i + 1."""
    kind, size = int(model.geom_type[geom]), model.geom_size[geom].astype(np.float64)
    texture, uv = _texture(model, geom), None
    patch = _mesh_patch(model, geom) if kind in (MESH, SDF) else _primitive(kind, size)
    if texture is not None:
        uv = _repeated(model, geom, patch.uv)
    R = np.empty(9)
    mujoco.mju_quat2Mat(R, model.geom_quat[geom])
    R = R.reshape(3, 3)
    return LinkMesh(
        link=int(model.geom_bodyid[geom]) - 1,
        vertices=patch.vertices @ R.T + model.geom_pos[geom],
        faces=patch.faces,
        normals=patch.normals @ R.T,
        uv=uv,
        texture=texture,
        rgba=np.clip(geom_rgba(model, geom), 0.0, 1.0),
        colors=None,
    )


def _primitive(kind: int, size: Float[np.ndarray, "3"]) -> Patch:
    if kind == SPHERE:
        return primitives.sphere(float(size[0]))
    if kind == CAPSULE:
        return primitives.capsule(float(size[0]), float(size[1]))
    if kind == CYLINDER:
        return primitives.cylinder(float(size[0]), float(size[1]))
    if kind == ELLIPSOID:
        return primitives.ellipsoid(size)
    return primitives.box(size)


def _mesh_patch(model: mujoco.MjModel, geom: int) -> Patch:
    mesh = int(model.geom_dataid[geom])

    def rows(name: str, address: np.integer, count: np.integer) -> np.ndarray:
        return getattr(model, name)[address : address + count]

    face_start, face_count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    vertices = rows("mesh_vert", model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]).astype(np.float64)
    faces = rows("mesh_face", face_start, face_count).astype(np.int64)
    vertex_normals = rows("mesh_normal", model.mesh_normaladr[mesh], model.mesh_normalnum[mesh]).astype(np.float64)
    corners = vertices[faces]
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.linalg.norm(face_normals, axis=-1)
    solid = lengths > 0
    face_normals = face_normals[solid] / lengths[solid, None]
    normals = vertex_normals[rows("mesh_facenormal", face_start, face_count)[solid]]
    unusable = np.einsum("fci,fi->fc", normals, face_normals) < 0.8  # the renderers' rule
    normals = np.where(unusable[..., None], face_normals[:, None], normals)
    uv = _mesh_uv(model, geom, mesh, corners)[solid]
    return Patch(vertices, faces[solid], normals, uv)


def _mesh_uv(
    model: mujoco.MjModel, geom: int, mesh: int, corners: Float[np.ndarray, "f 3 3"]
) -> Float[np.ndarray, "f 3 2"]:
    """The mesh's own texture coordinates, else the projection along z that MuJoCo falls back to."""
    start, count = model.mesh_texcoordadr[mesh], model.mesh_texcoordnum[mesh]
    if start >= 0 and count:
        faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        return model.mesh_texcoord[start : start + count][model.mesh_facetexcoord[faces]].astype(np.float64)
    return corners[..., :2] * [0.5, -0.5] / np.maximum(model.geom_size[geom, :2], 1e-9)


def _repeated(model: mujoco.MjModel, geom: int, uv: Float[np.ndarray, "f 3 2"]) -> Float[np.ndarray, "f 3 2"]:
    material, kind = int(model.geom_matid[geom]), int(model.geom_type[geom])
    repeat = model.mat_texrepeat[material].astype(np.float64)
    mesh = int(model.geom_dataid[geom]) if kind in (MESH, SDF) else -1
    projected = mesh >= 0 and model.mesh_texcoordadr[mesh] < 0
    if model.mat_texuniform[material] and (mesh < 0 or projected):
        round_kinds = (SPHERE, CAPSULE, CYLINDER)
        repeat = repeat * model.geom_size[geom, [0, 0] if kind in round_kinds else [0, 1]]
    return uv * repeat - (0.5 if projected else 0.0)


def _texture(model: mujoco.MjModel, geom: int) -> UInt8[np.ndarray, "h w 3"] | None:
    """The material's 2d colour texture."""
    material = model.geom_matid[geom]
    texture = model.mat_texid[material, _RGB] if material >= 0 else -1
    if texture < 0 or int(model.tex_type[texture]) != _TEXTURE_2D:
        return None
    height, width, channels = model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture]
    start = model.tex_adr[texture]
    data = model.tex_data[start : start + height * width * channels].reshape(height, width, channels)
    return np.ascontiguousarray(np.broadcast_to(data[..., :3], (height, width, 3)), dtype=np.uint8)
