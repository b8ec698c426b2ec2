"""URDF as a MuJoCo model: one kinematic tree, one set of meshes, whatever the file format was."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from kinesplat.description.mesh_cache import Piece
from kinesplat.description.meshes import load_pieces, load_texture
from kinesplat.description.packages import PackageFinder
from kinesplat.description.urdf_elements import MAX_METRES, Joint, Material, Urdf, Visual, urdf_elements
from kinesplat.description.visuals import VISUAL_GROUP
from kinesplat.description.xml_input import parsed, read_text
from kinesplat.errors import DescriptionError

_GEOM = mujoco.mjtGeom
_DEFAULT_RGBA = np.array([0.7, 0.7, 0.7, 1.0])
_PALETTE_WIDTH = 256
MIN_AREA = 1e-9
"""Surfaces below this [m^2] cannot be seen, and MuJoCo refuses them."""


def spec_of_urdf(
    path: Path, packages: Mapping[str, str | Path] | None = None, text: bytes | str | None = None
) -> tuple[mujoco.MjSpec, list[str]]:
    """MuJoCo specification of a URDF, and what had to be assumed or left out.

    Only what is seen and what moves is taken over: no collision shapes, transmissions or inertias (every link gets
    mass 1, so that MuJoCo accepts it).

    Args:
        path: the URDF; file names in it are resolved from here.
        packages: folders of ROS packages by name, see `PackageFinder`.
        text: the URDF's text if it is not what `path` holds (xacro).

    Raises:
        DescriptionError: the file, something in it, or a mesh is broken or missing.
    """
    urdf = urdf_elements(parsed(read_text(path) if text is None else text, str(path), "robot"), str(path))
    builder = _Builder(urdf, PackageFinder(path, packages))
    builder.build()
    return builder.spec, [*urdf.warnings, *builder.warnings]


class _Builder:
    """Adds links, joints and visuals of one URDF to a new specification."""

    def __init__(self, urdf: Urdf, files: PackageFinder) -> None:
        self.urdf = urdf
        self.files = files
        self.spec = mujoco.MjSpec()
        self.spec.modelname = urdf.name
        self.spec.compiler.degree = False
        self.spec.compiler.fusestatic = False
        self.warnings: list[str] = []
        self._pieces: dict[tuple[str, tuple[float, ...]], list[tuple[str, Piece]]] = {}
        self._textures: dict[str, str] = {}
        self._turned: list[str] = []

    def build(self) -> None:
        """Add every link below its parent, with its joint and visuals, from the root on; then the mimic joints.

        Raises:
            DescriptionError: a mesh or texture cannot be read; names the link.
        """
        children: dict[str, list[Joint]] = {}
        for joint in self.urdf.joints:
            children.setdefault(joint.parent, []).append(joint)
        root, world = self.urdf.root, self.spec.worldbody
        bodies = {root: world if root == "world" else self._body(world, root, np.eye(4))}
        self._add_visuals(bodies[root], root)
        pending = [root]
        while pending:
            parent = pending.pop()
            for joint in children.get(parent, []):
                free = joint.kind == "floating" and parent == root
                bodies[joint.child] = self._body(world if free else bodies[parent], joint.child, joint.T_parent_child)
                self._add_joint(bodies[joint.child], joint, free)
                self._add_visuals(bodies[joint.child], joint.child)
                pending.append(joint.child)
        for joint in self.urdf.joints:
            if joint.mimic is not None:
                self._add_mimic(joint.name, *joint.mimic)
        if self._turned:
            few = ", ".join(sorted(set(self._turned))[:3])
            self.warnings.append(f"DAE files that say Y_UP are read as RViz reads them, not turned: {few} ...")

    def _body(self, parent: mujoco.MjsBody, name: str, T: np.ndarray) -> mujoco.MjsBody:
        quat = Rotation.from_matrix(T[:3, :3]).as_quat(scalar_first=True)
        body = parent.add_body(name=name, pos=T[:3, 3], quat=quat)
        body.mass, body.inertia, body.explicitinertial = 1.0, np.ones(3), True
        return body

    def _add_joint(self, body: mujoco.MjsBody, joint: Joint, free: bool) -> None:
        hinge, slide = mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE
        if joint.kind in ("revolute", "continuous", "prismatic"):
            added = body.add_joint(name=joint.name, type=slide if joint.kind == "prismatic" else hinge, axis=joint.axis)
            if joint.limits is not None:
                added.range, added.limited = joint.limits, mujoco.mjtLimited.mjLIMITED_TRUE
        elif joint.kind == "floating" and free:
            body.add_freejoint(name=joint.name)
        elif joint.kind == "floating":
            for axis, letter in zip(np.eye(3), "xyz", strict=True):
                body.add_joint(name=f"{joint.name}.p{letter}", type=slide, axis=axis)
            body.add_joint(name=joint.name, type=mujoco.mjtJoint.mjJNT_BALL)
        elif joint.kind == "planar":
            R = Rotation.align_vectors(joint.axis[None], np.array([[0.0, 0.0, 1.0]]))[0].as_matrix()
            body.add_joint(name=f"{joint.name}.x", type=slide, axis=R[:, 0])
            body.add_joint(name=f"{joint.name}.y", type=slide, axis=R[:, 1])
            body.add_joint(name=f"{joint.name}.theta", type=hinge, axis=joint.axis)

    def _add_mimic(self, name: str, driver: str, multiplier: float, offset: float) -> None:
        equality = self.spec.add_equality(
            type=mujoco.mjtEq.mjEQ_JOINT, objtype=mujoco.mjtObj.mjOBJ_JOINT, name1=name, name2=driver
        )
        equality.data[:5] = offset, multiplier, 0.0, 0.0, 0.0

    def _add_visuals(self, body: mujoco.MjsBody, link: str) -> None:
        for visual in self.urdf.links[link]:
            if visual.shape == "mesh":
                self._add_mesh(body, visual)
            else:
                self._add_primitive(body, visual)

    def _add_primitive(self, body: mujoco.MjsBody, visual: Visual) -> None:
        kind, sizes = visual.shape, np.zeros(3)
        if kind == "box":
            sizes[:] = 0.5 * visual.sizes
        else:
            sizes[0] = visual.sizes[0]
            sizes[1] = 0.5 * visual.sizes[1] if kind != "sphere" else 0.0
        geom = self._geom(body, visual, getattr(_GEOM, f"mjGEOM_{kind.upper()}"))
        geom.size = sizes
        self._paint(geom, visual.material, visual.element)

    def _add_mesh(self, body: mujoco.MjsBody, visual: Visual) -> None:
        file = self.files.file(visual.file, visual.element)
        for name, piece in self._meshes(file, visual):
            geom = self._geom(body, visual, _GEOM.mjGEOM_MESH)
            geom.meshname = name
            if piece.texture is not None or piece.face_colors is not None:
                geom.material = name
                self.spec.material(name).rgba = np.ones(4) if piece.rgba is None else piece.rgba
            elif piece.rgba is not None:
                geom.rgba = piece.rgba
            else:
                self._paint(geom, visual.material, visual.element)

    def _geom(self, body: mujoco.MjsBody, visual: Visual, kind: mujoco.mjtGeom) -> mujoco.MjsGeom:
        T = visual.T_link_visual
        quat = Rotation.from_matrix(T[:3, :3]).as_quat(scalar_first=True)
        return body.add_geom(type=kind, pos=T[:3, 3], quat=quat, group=VISUAL_GROUP, contype=0, conaffinity=0)

    def _paint(self, geom: mujoco.MjsGeom, material: Material, element: str) -> None:
        rgba = _DEFAULT_RGBA if material.rgba is None else material.rgba
        if material.texture is None:
            geom.rgba = rgba
            return
        file = self.files.file(material.texture, f"{element} <texture>")
        if str(file) not in self._textures:
            name = f"texture_{len(self._textures)}"
            self._add_texture(name, load_texture(file))
            self._textures[str(file)] = name
        geom.material = self._textures[str(file)]
        self.spec.material(geom.material).rgba = np.ones(4) if material.rgba is None else material.rgba

    def _meshes(self, file: Path, visual: Visual) -> list[tuple[str, Piece]]:
        """Names of the pieces of a mesh file at the visual's scale, added on first use."""
        key = str(file), tuple(visual.sizes)
        if key in self._pieces:
            return self._pieces[key]
        loaded = load_pieces(file)
        self.warnings += loaded.warnings
        self._turned += [file.name] if loaded.y_up else []
        self._pieces[key] = named = []
        for piece in loaded.pieces:
            scaled = _scaled(piece, visual.sizes)
            extent = np.abs(scaled.vertices).max()
            if extent > MAX_METRES:
                problem = f"{visual.file!r} reaches {extent:g} m from its origin; is its scale right?"
                raise DescriptionError(f"{self.files.urdf}: {visual.element}: {problem}")
            if _area(scaled) > MIN_AREA:
                named.append((f"mesh_{len(self.spec.meshes)}", scaled))
                self._add_piece(*named[-1])
        if not named:
            self.warnings.append(f"{visual.element}: {visual.file!r} has no area and is left out")
        return named

    def _add_piece(self, name: str, piece: Piece) -> None:
        mesh = self.spec.add_mesh(name=name, inertia=mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL)
        faces = piece.faces.astype(np.int32).ravel()
        missing = max(0, 4 - len(piece.vertices))  # MuJoCo wants four vertices, even of a triangle
        mesh.uservert = np.pad(piece.vertices, ((0, missing), (0, 0)), mode="edge").astype(np.float32).ravel()
        mesh.userface = faces
        if piece.normals is not None:
            mesh.usernormal = piece.normals.astype(np.float32).ravel()
            mesh.userfacenormal = faces
        if piece.face_colors is not None:
            pixels, uv, entry = _palette(piece.face_colors)
            mesh.usertexcoord = uv.astype(np.float32).ravel()
            mesh.userfacetexcoord = np.repeat(entry, 3).astype(np.int32)
            self._add_texture(name, pixels)
        elif piece.uv is not None and piece.texture is not None:
            mesh.usertexcoord = piece.uv.astype(np.float32).ravel()
            mesh.userfacetexcoord = faces
            self._add_texture(name, piece.texture)

    def _add_texture(self, name: str, pixels: np.ndarray) -> None:
        height, width = pixels.shape[:2]
        texture = self.spec.add_texture(
            name=name, type=mujoco.mjtTexture.mjTEXTURE_2D, width=width, height=height, nchannel=3
        )
        texture.data = np.ascontiguousarray(pixels).tobytes()
        material = self.spec.add_material(name=name)
        material.textures[int(mujoco.mjtTextureRole.mjTEXROLE_RGB)] = name


def _scaled(piece: Piece, scale: np.ndarray) -> Piece:
    """The piece at the URDF's scale, turned inside out where the scale mirrors."""
    faces = piece.faces[:, ::-1] if np.prod(scale) < 0 else piece.faces
    normals = piece.normals
    if normals is not None:
        normals = normals / scale
        normals = normals / np.linalg.norm(normals, axis=-1, keepdims=True)
    return replace(piece, vertices=piece.vertices * scale, faces=faces, normals=normals)


def _area(piece: Piece) -> float:
    corners = piece.vertices[piece.faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return float(0.5 * np.linalg.norm(cross, axis=-1).sum())


def _palette(face_colors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texture of all colours, texture coordinate of each, and every face's colour: MuJoCo has no vertex colours."""
    colours, entry = np.unique(face_colors, axis=0, return_inverse=True)
    rows = -(-len(colours) // _PALETTE_WIDTH)
    pixels = np.zeros((rows * _PALETTE_WIDTH, 3), dtype=np.uint8)
    pixels[: len(colours)] = colours
    index = np.arange(len(colours))
    uv = np.stack([(index % _PALETTE_WIDTH + 0.5) / _PALETTE_WIDTH, (index // _PALETTE_WIDTH + 0.5) / rows], axis=-1)
    return pixels.reshape(rows, _PALETTE_WIDTH, 3), uv, entry.reshape(-1)
