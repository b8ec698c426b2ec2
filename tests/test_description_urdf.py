"""URDF against an independent library; meshes, materials, packages, xacro, names, combinations."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from kinesplat.camera import Camera
from kinesplat.description import LinkMesh, Part, Robot, inspect, inspection_text, load_description
from kinesplat.description import meshes as mesh_files
from kinesplat.description.mesh_cache import cache_folder
from kinesplat.errors import DescriptionError

CUBE = trimesh.creation.box((2.0, 4.0, 6.0))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINESPLAT_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in ("ROS_PACKAGE_PATH", "AMENT_PREFIX_PATH", "CMAKE_PREFIX_PATH"):
        monkeypatch.delenv(name, raising=False)


def write_urdf(folder: Path, visual: str, name: str = "robot.urdf") -> Path:
    """A robot of one link with the given <visual> content."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f'<robot name="r"><link name="base"><visual>{visual}</visual></link></robot>')
    return path


def mesh_visual(name: str, extra: str = "", material: str = "") -> str:
    return f'<geometry><mesh filename="{name}" {extra}/></geometry>{material}'


def only_mesh(robot: Robot) -> LinkMesh:
    (mesh,) = robot.link_meshes
    return mesh


def pixels_of(mesh: LinkMesh) -> np.ndarray:
    assert mesh.texture is not None
    return mesh.texture


def random_urdf(seed: int) -> str:
    rng = np.random.default_rng(seed)

    def numbers(count: int) -> str:
        return " ".join(f"{v:.6f}" for v in rng.normal(size=count))

    text, movable = '<link name="l0"/>', []
    for i in range(1, 20):
        kind = rng.choice(["revolute", "continuous", "prismatic", "fixed"])
        limit = (
            '<limit lower="-1.5" upper="0.75" effort="1" velocity="1"/>' if kind in ("revolute", "prismatic") else ""
        )
        mimic = ""
        if kind != "fixed":
            if movable and rng.random() < 0.3:
                factor, offset = rng.uniform(-2, 2), rng.uniform(-1, 1)
                mimic = f'<mimic joint="{rng.choice(movable)}" multiplier="{factor:.6f}" offset="{offset:.6f}"/>'
            else:
                movable.append(f"j{i}")
        origin = f'<origin xyz="{numbers(3)}" rpy="{numbers(3)}"/>' if rng.random() < 0.9 else ""
        axis = ""
        if rng.random() < 0.9:
            direction = rng.normal(size=3)  # of unit length: the other library takes a slide's axis as it stands
            axis = '<axis xyz="{} {} {}"/>'.format(*direction / np.linalg.norm(direction))
        text += f"""<link name="l{i}"/><joint name="j{i}" type="{kind}"><parent link="l{rng.integers(0, i)}"/>
            <child link="l{i}"/>{origin}{axis}{limit}{mimic}</joint>"""
    return f'<?xml version="1.0"?><robot name="random">{text}</robot>'


def assert_matches_yourdfpy(path: Path, configurations: int = 3) -> None:
    yourdfpy = pytest.importorskip("yourdfpy", reason="needs yourdfpy (extra 'dev')")
    robot = load_description(path)
    tree = robot.tree
    other = yourdfpy.URDF.load(str(path), load_meshes=False, load_collision_meshes=False)
    assert set(other.actuated_joint_names) == set(tree.joint_names)
    for _ in range(configurations):
        q = tree.q_lower + (tree.q_upper - tree.q_lower) * torch.rand(tree.dof, dtype=torch.float64)
        values = dict(zip(tree.joint_names, q.tolist(), strict=True))
        other.update_cfg(np.array([values[name] for name in other.actuated_joint_names]))
        expected = [other.get_transform(name, other.base_link) for name in tree.link_names]
        np.testing.assert_allclose(tree.forward_kinematics(q).numpy(), np.stack(expected), atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_equals_another_library_on_random_robots(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "random.urdf"
    path.write_text(random_urdf(seed))
    assert_matches_yourdfpy(path)


def test_equals_another_library_on_real_robots(shared: Path) -> None:
    files = sorted((shared / "urdf").rglob("*.urdf"))
    assert len(files) >= 7
    for file in files:
        assert_matches_yourdfpy(file)


def test_links_and_joints_keep_their_names_and_fixed_joints_stay(tmp_path: Path) -> None:
    (tmp_path / "r.urdf").write_text(
        """<robot name="r"><link name="base"/><link name="a"/><link name="tool"/>
        <joint name="turn" type="continuous"><parent link="base"/><child link="a"/><axis xyz="0 0 2"/></joint>
        <joint name="glue" type="fixed"><parent link="a"/><child link="tool"/><origin xyz="1 2 3"/></joint></robot>"""
    )
    tree = load_description(tmp_path / "r.urdf").tree
    assert tree.link_names == ("base", "a", "tool")
    assert tree.parents.tolist() == [-1, 0, 1]
    assert (tree.joint_names, tree.q_limited.tolist()) == (("turn",), [False])
    tool = tree.forward_kinematics(torch.tensor([np.pi / 2]))[2, :3, 3]
    torch.testing.assert_close(tool, torch.tensor([-2.0, 1.0, 3.0]), atol=1e-6, rtol=0)


def test_mimic_with_multiplier_and_offset(shared: Path) -> None:
    folder = shared / "urdf" / "panda_hand" / "example-robot-data" / "robots" / "panda_description" / "urdf"
    tree = load_description(folder / "panda.urdf").tree
    assert tree.dof == 8
    q = tree.q_canonical.clone()
    q[-1] = 0.03
    fingers = tree.coordinates(q)[-2:]
    torch.testing.assert_close(fingers, torch.tensor([0.03, 0.03], dtype=torch.float64))


def test_floating_root_is_the_base(tmp_path: Path) -> None:
    (tmp_path / "r.urdf").write_text(
        """<robot name="r"><link name="world"/><link name="body"/><link name="leg"/>
        <joint name="root" type="floating"><parent link="world"/><child link="body"/><origin xyz="0 0 1"/></joint>
        <joint name="hip" type="revolute"><parent link="body"/><child link="leg"/><axis xyz="0 1 0"/>
          <limit lower="-1" upper="1"/></joint></robot>"""
    )
    robot = load_description(tmp_path / "r.urdf")
    assert robot.tree.link_names == ("body", "leg")
    assert robot.tree.joint_names == ("hip",)
    assert robot.base_qpos == 0
    assert robot.tree.T_world_base[2, 3] == 1.0
    T = torch.eye(4)
    T[0, 3] = 5.0
    torch.testing.assert_close(robot.tree.forward_kinematics(torch.zeros(1), T)[0], T)


def test_planar_root_and_floating_joint_inside_become_joints(tmp_path: Path) -> None:
    (tmp_path / "r.urdf").write_text(
        """<robot name="r"><link name="odom"/><link name="base"/><link name="ball"/>
        <joint name="drive" type="planar"><parent link="odom"/><child link="base"/><axis xyz="0 0 1"/></joint>
        <joint name="loose" type="floating"><parent link="base"/><child link="ball"/><origin xyz="0 0 1"/></joint>
        </robot>"""
    )
    tree = load_description(tmp_path / "r.urdf").tree
    assert tree.joint_names == (
        "drive.x", "drive.y", "drive.theta", "loose.px", "loose.py", "loose.pz", "loose.x", "loose.y", "loose.z",
    )  # fmt: skip
    q = torch.tensor([1.0, 2.0, np.pi / 2, 0.5, 0.0, 0.0, 0.0, 0.0, 0.3])
    Ts = tree.forward_kinematics(q)
    torch.testing.assert_close(Ts[1, :3, 3], torch.tensor([1.0, 2.0, 0.0]))
    torch.testing.assert_close(Ts[2, :3, 3], torch.tensor([1.0, 2.5, 1.0]))
    expected = torch.from_numpy(Rotation.from_rotvec([0, 0, np.pi / 2 + 0.3]).as_matrix()).float()
    torch.testing.assert_close(Ts[2, :3, :3], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("suffix", ["stl", "STL", "obj", "ply", "glb", "dae"])
def test_mesh_formats_and_scale(tmp_path: Path, suffix: str) -> None:
    CUBE.export(tmp_path / f"cube.{suffix}", file_type=suffix.lower())
    visual = '<origin xyz="1 0 0" rpy="0 0 1.5707963267948966"/>' + mesh_visual(f"cube.{suffix}", 'scale="0.1 0.1 0.2"')
    mesh = only_mesh(load_description(write_urdf(tmp_path, visual)))
    np.testing.assert_allclose(mesh.vertices.max(0), [1.2, 0.1, 0.6], atol=1e-6)
    np.testing.assert_allclose(mesh.vertices.min(0), [0.8, -0.1, -0.6], atol=1e-6)
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces)
    assert surface.volume == pytest.approx(0.2 * 0.4 * 1.2, rel=1e-5)
    face_normals = surface.face_normals
    assert (np.einsum("fci,fi->fc", mesh.normals, face_normals) > 0.5).all()


def test_mirrored_scale_keeps_the_outside_outside(tmp_path: Path) -> None:
    trimesh.creation.icosphere().apply_translation([2, 0, 0]).export(tmp_path / "ball.obj")
    mesh = only_mesh(load_description(write_urdf(tmp_path, mesh_visual("ball.obj", 'scale="-1 1 1"'))))
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces)
    assert surface.volume > 4.0
    assert surface.center_mass[0] == pytest.approx(-2.0, abs=1e-3)


def test_urdf_colours_named_inline_and_default(tmp_path: Path) -> None:
    box = "<geometry><box size='1 1 1'/></geometry>"
    (tmp_path / "r.urdf").write_text(
        f"""<robot name="r"><material name="teal"><color rgba="0 0.5 0.5 0.8"/></material><link name="a">
        <visual>{box}<material name="teal"/></visual>
        <visual>{box}<material name="own"><color rgba="0.1 0.2 0.3 1"/></material></visual>
        <visual>{box}</visual></link></robot>"""
    )
    colours = [m.rgba for m in load_description(tmp_path / "r.urdf").link_meshes]
    np.testing.assert_allclose(colours, [[0, 0.5, 0.5, 0.8], [0.1, 0.2, 0.3, 1], [0.7, 0.7, 0.7, 1]], atol=1e-6)


def test_primitives(tmp_path: Path) -> None:
    shapes = ['<box size="1 2 3"/>', '<cylinder radius="0.5" length="2"/>', '<sphere radius="0.5"/>']
    visuals = "".join(f"<visual><geometry>{s}</geometry></visual>" for s in shapes)
    (tmp_path / "r.urdf").write_text(f'<robot name="r"><link name="a">{visuals}</link></robot>')
    robot = load_description(tmp_path / "r.urdf")
    extents = [m.vertices.max(0) for m in robot.link_meshes]
    np.testing.assert_allclose(extents, [[0.5, 1, 1.5], [0.5, 0.5, 1], [0.5, 0.5, 0.5]], atol=1e-6)


def test_collision_shapes_are_drawn_where_nothing_else_is(tmp_path: Path) -> None:
    box = "<collision><geometry><box size='1 1 1'/></geometry></collision>"
    (tmp_path / "r.urdf").write_text(f'<robot name="r"><link name="a">{box}</link></robot>')
    robot = load_description(tmp_path / "r.urdf")
    assert len(robot.link_meshes) == 1
    assert any("<collision> shapes are drawn" in w for w in robot.warnings)


def test_materials_of_the_mesh_win_over_the_urdf_and_stl_takes_the_urdf(tmp_path: Path) -> None:
    coloured = CUBE.copy()
    coloured.visual = TextureVisuals(material=PBRMaterial(baseColorFactor=[255, 0, 0, 255]))
    coloured.export(tmp_path / "red.glb")
    CUBE.export(tmp_path / "plain.stl")
    material = '<material name="m"><color rgba="0 0 1 1"/></material>'
    red = only_mesh(load_description(write_urdf(tmp_path, mesh_visual("red.glb", material=material))))
    blue = only_mesh(load_description(write_urdf(tmp_path, mesh_visual("plain.stl", material=material))))
    np.testing.assert_allclose([red.rgba, blue.rgba], [[1, 0, 0, 1], [0, 0, 1, 1]], atol=1e-6)


def test_gltf_colours_are_linear(tmp_path: Path) -> None:
    grey = CUBE.copy()
    factor = [0.21586 * 255] * 3 + [255]
    grey.visual = TextureVisuals(material=PBRMaterial(baseColorFactor=np.round(factor).astype(np.uint8)))
    grey.export(tmp_path / "grey.glb")
    assert only_mesh(load_description(write_urdf(tmp_path, mesh_visual("grey.glb")))).rgba[0] == pytest.approx(
        0.5, abs=0.01
    )


def test_vertex_colours_become_a_palette(tmp_path: Path) -> None:
    cube: Any = CUBE.copy()
    cube.visual.face_colors = np.random.default_rng(0).integers(0, 255, size=(12, 4)) | [0, 0, 0, 255]
    cube.unmerge_vertices()
    cube.visual.vertex_colors = np.repeat(cube.visual.face_colors, 3, axis=0)
    cube.export(tmp_path / "cube.ply")
    mesh = only_mesh(load_description(write_urdf(tmp_path, mesh_visual("cube.ply"))))
    assert mesh.texture is not None
    assert mesh.uv is not None
    size = np.array(mesh.texture.shape[1::-1])
    column, row = (mesh.uv.mean(1) * size).astype(int).T
    seen = {tuple(c) for c in mesh.texture[row, column]}
    assert seen == {tuple(c) for c in cube.visual.face_colors[:, :3]}


def quad_obj(folder: Path) -> None:
    """A square with a texture: red above green at the left, blue above white at the right."""
    pixels = np.array([[[255, 0, 0], [0, 0, 255]], [[0, 255, 0], [255, 255, 255]]], dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "t.png")
    (folder / "quad.mtl").write_text("newmtl m\nKd 1 1 1\nmap_Kd t.png\n")
    (folder / "quad.obj").write_text(
        "mtllib quad.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
        "usemtl m\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\n"
    )


def colour_at(mesh: LinkMesh, point: tuple[float, float]) -> tuple[int, ...]:
    assert mesh.uv is not None
    assert mesh.texture is not None
    for face, uv in zip(mesh.faces, mesh.uv, strict=True):
        corners = mesh.vertices[face][:, :2]
        weights = np.linalg.solve(np.vstack([corners.T, np.ones(3)]), [*point, 1.0])
        if weights.min() > -1e-9:
            u, v = weights @ uv
            height, width = mesh.texture.shape[:2]
            return tuple(int(c) for c in mesh.texture[int(v * height), int(u * width)])
    raise AssertionError(f"{point} is not on the mesh")


@pytest.mark.parametrize("kind", ["obj", "glb", "dae"])
def test_textures_lie_the_right_way_up(tmp_path: Path, kind: str) -> None:
    quad_obj(tmp_path)
    if kind == "glb":
        trimesh.load(tmp_path / "quad.obj", process=False).export(tmp_path / "quad.glb")
    if kind == "dae":
        (tmp_path / "quad.dae").write_text(TEXTURED_DAE)
    mesh = only_mesh(load_description(write_urdf(tmp_path, mesh_visual(f"quad.{kind}"))))
    corners = [colour_at(mesh, p) for p in ((0.2, 0.8), (0.8, 0.8), (0.2, 0.2), (0.8, 0.2))]
    assert corners == [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 255)]


TEXTURED_DAE = """<?xml version="1.0"?><COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1">
<asset><unit name="meter" meter="1"/><up_axis>Z_UP</up_axis></asset>
<library_images><image id="i"><init_from>t.png</init_from></image></library_images>
<library_effects><effect id="e"><profile_COMMON><newparam sid="s"><surface type="2D"><init_from>i</init_from></surface>
</newparam><newparam sid="p"><sampler2D><source>s</source></sampler2D></newparam><technique sid="c"><lambert><diffuse>
<texture texture="p" texcoord="UV"/></diffuse></lambert></technique></profile_COMMON></effect></library_effects>
<library_materials><material id="m"><instance_effect url="#e"/></material></library_materials>
<library_geometries><geometry id="g"><mesh>
<source id="v"><float_array id="va" count="12">0 0 0 1 0 0 1 1 0 0 1 0</float_array><technique_common>
<accessor source="#va" count="4" stride="3"><param name="X" type="float"/><param name="Y" type="float"/>
<param name="Z" type="float"/></accessor></technique_common></source>
<source id="t"><float_array id="ta" count="8">0 0 1 0 1 1 0 1</float_array><technique_common>
<accessor source="#ta" count="4" stride="2"><param name="S" type="float"/><param name="T" type="float"/></accessor>
</technique_common></source><vertices id="w"><input semantic="POSITION" source="#v"/></vertices>
<triangles count="2" material="k"><input semantic="VERTEX" source="#w" offset="0"/>
<input semantic="TEXCOORD" source="#t" offset="1" set="0"/><p>0 0 1 1 2 2 0 0 2 2 3 3</p></triangles></mesh></geometry>
</library_geometries><library_visual_scenes><visual_scene id="vs"><node id="n"><instance_geometry url="#g">
<bind_material><technique_common><instance_material symbol="k" target="#m"/></technique_common></bind_material>
</instance_geometry></node></visual_scene></library_visual_scenes><scene><instance_visual_scene url="#vs"/></scene>
</COLLADA>"""


def test_unit_of_a_dae_and_a_broken_texture_in_it(tmp_path: Path) -> None:
    quad_obj(tmp_path)
    text = TEXTURED_DAE.replace('meter="1"', 'meter="0.01"').replace("<source>s</source>", "<source>gone</source>")
    (tmp_path / "quad.dae").write_text(text)
    robot = load_description(write_urdf(tmp_path, mesh_visual("quad.dae")))
    assert only_mesh(robot).vertices.max() == pytest.approx(0.01)
    assert any("quad.dae has broken references" in w for w in robot.warnings)


def test_missing_texture_is_said(tmp_path: Path) -> None:
    quad_obj(tmp_path)
    (tmp_path / "t.png").unlink()
    robot = load_description(write_urdf(tmp_path, mesh_visual("quad.obj")))
    assert any("t.png" in w and "missing" in w for w in robot.warnings)


def test_heavy_mesh_is_loaded_whole(tmp_path: Path) -> None:
    trimesh.creation.icosphere(subdivisions=7).export(tmp_path / "ball.stl")
    mesh = only_mesh(load_description(write_urdf(tmp_path, mesh_visual("ball.stl"))))
    assert len(mesh.faces) > 300_000


@pytest.mark.parametrize("route", ["own name", "package.xml", "beside", "ros path", "ros parent", "ament", "mapping"])
def test_package_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    folders = {"own name": "arm_description", "package.xml": "checkout", "beside": "arm_description"}
    folder = tmp_path / folders.get(route, "elsewhere/arm_description")
    (folder / "meshes").mkdir(parents=True)
    CUBE.export(folder / "meshes" / "cube.stl")
    if route == "package.xml":
        (folder / "package.xml").write_text("<package><name>arm_description</name></package>")
    urdf_folder = folder / "urdf" if route in ("own name", "package.xml") else tmp_path / "urdf"
    packages = None
    if route == "ros path":
        monkeypatch.setenv("ROS_PACKAGE_PATH", f"/nowhere:{folder}")
    elif route == "ros parent":
        monkeypatch.setenv("ROS_PACKAGE_PATH", str(folder.parent))
    elif route == "ament":
        (tmp_path / "install" / "share").mkdir(parents=True)
        folder.rename(tmp_path / "install" / "share" / "arm_description")
        monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path / "install"))
    elif route == "mapping":
        packages = {"arm_description": folder}
    path = write_urdf(urdf_folder, mesh_visual("package://arm_description/meshes/cube.stl"))
    assert len(load_description(path, packages=packages).link_meshes) == 1


def test_file_urls_and_parent_folders(tmp_path: Path) -> None:
    (tmp_path / "my meshes").mkdir()
    CUBE.export(tmp_path / "my meshes" / "cube.stl")
    url = f"file://{str(tmp_path).replace(' ', '%20')}/my%20meshes/cube.stl"
    for name in (url, "../my meshes/cube.stl", str(tmp_path / "my meshes" / "cube.stl")):
        assert len(load_description(write_urdf(tmp_path / "urdf", mesh_visual(name))).link_meshes) == 1


def test_cache_serves_the_second_load_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quad_obj(tmp_path)
    path = write_urdf(tmp_path, mesh_visual("quad.obj"))
    reads = []
    original = mesh_files._read
    monkeypatch.setattr(mesh_files, "_read", lambda *a: (reads.append(1), original(*a))[1])
    before = sorted(tmp_path.iterdir())
    first = only_mesh(load_description(path))
    second = only_mesh(load_description(path))
    assert len(reads) == 1
    assert np.array_equal(first.vertices, second.vertices)
    assert np.array_equal(pixels_of(first), pixels_of(second))
    assert sorted(tmp_path.iterdir()) == before
    Image.fromarray(np.zeros((2, 2, 3), dtype=np.uint8)).save(tmp_path / "t.png")
    assert not pixels_of(only_mesh(load_description(path))).any()
    assert len(reads) == 2
    (entry,) = cache_folder().rglob("*.npz")
    entry.write_bytes(entry.read_bytes()[:100])
    load_description(path)
    assert len(reads) == 3
    monkeypatch.setenv("KINESPLAT_CACHE", str(path / "not" / "a" / "folder"))
    load_description(path)
    assert len(reads) == 4


def test_xacro_with_arguments_includes_and_find(tmp_path: Path) -> None:
    pytest.importorskip("xacro", reason="needs xacro (extra 'descriptions')")
    package = tmp_path / "arm_description"
    (package / "urdf").mkdir(parents=True)
    (package / "package.xml").write_text("<package><name>arm_description</name></package>")
    (package / "urdf" / "part.xacro").write_text(
        """<robot xmlns:xacro="http://www.ros.org/wiki/xacro"><xacro:macro name="part" params="n size">
        <link name="${n}"><visual><geometry><box size="${size} ${2*size} 1"/></geometry></visual></link></xacro:macro>
        </robot>"""
    )
    path = package / "urdf" / "arm.urdf.xacro"
    path.write_text(
        """<robot name="arm" xmlns:xacro="http://www.ros.org/wiki/xacro"><xacro:arg name="size" default="1"/>
        <xacro:include filename="$(find arm_description)/urdf/part.xacro"/>
        <xacro:part n="base" size="$(arg size)"/></robot>"""
    )
    for arguments, half in (({}, 0.5), ({"size": "3"}, 1.5)):
        robot = load_description(path, xacro_args=arguments)
        assert only_mesh(robot).vertices.max(0)[0] == pytest.approx(half)
    path.write_text(path.read_text().replace("arm_description)", "gone)"))
    with pytest.raises(DescriptionError, match="'gone' not found"):
        load_description(path)


def test_robot_descriptions_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urdf = write_urdf(tmp_path / "data", '<geometry><box size="1 1 1"/></geometry>')
    package = tmp_path / "robot_descriptions"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "toy_description.py").write_text(f"URDF_PATH = {str(urdf)!r}")
    (package / "empty_description.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] == "robot_descriptions"]:
        monkeypatch.delitem(sys.modules, name)
    robot = load_description("toy_description")
    assert (robot.name, robot.source) == ("toy_description", "toy_description")
    with pytest.raises(DescriptionError, match="did you mean 'toy_description'"):
        load_description("tory_description")
    with pytest.raises(DescriptionError, match="no URDF, MJCF or xacro"):
        load_description("empty_description")


def test_two_arms_and_a_tool() -> None:
    left, right = np.eye(4), np.eye(4)
    left[1, 3], right[1, 3] = 0.3, -0.3
    robot = load_description([Part("kinearm", T_parent_part=left, prefix="l"), Part("kinearm", "", right, "r")])
    single = load_description("kinearm")
    assert robot.tree.dof == 2 * single.tree.dof
    assert robot.tree.joint_names[0] == "l/waist"
    assert len(robot.link_meshes) == 2 * len(single.link_meshes)
    torch.testing.assert_close(robot.tree.q_canonical, single.tree.q_canonical.repeat(2))
    Ts, alone = (r.tree.forward_kinematics(r.tree.q_canonical) for r in (robot, single))
    torch.testing.assert_close(Ts[: len(alone)], torch.from_numpy(left) @ alone)
    torch.testing.assert_close(Ts[len(alone) :], torch.from_numpy(right) @ alone)
    T_tool = np.eye(4)
    T_tool[2, 3] = 0.1
    tooled = load_description(["kinearm", Part("kinearm", attach_to="palm", T_parent_part=T_tool, prefix="tool")])
    Ts = tooled.tree.forward_kinematics(tooled.tree.q_canonical)
    names = tooled.tree.link_names
    assert tooled.tree.parents[names.index("tool/base")] == names.index("palm")
    torch.testing.assert_close(Ts[names.index("tool/base")], Ts[names.index("palm")] @ torch.from_numpy(T_tool))
    with pytest.raises(DescriptionError, match="unknown link 'plam': did you mean 'palm'"):
        load_description(["kinearm", Part("kinearm", attach_to="plam")])


def test_subtree_stands_at_the_origin() -> None:
    whole, part = load_description("kinearm"), load_description("kinearm", subtree="forearm")
    assert part.tree.link_names == whole.tree.link_names[3:]
    assert part.tree.joint_names == whole.tree.joint_names[3:]
    torch.testing.assert_close(part.tree.q_canonical, whole.tree.q_canonical[3:])
    Ts = whole.tree.forward_kinematics(whole.tree.q_canonical)
    expected = torch.linalg.inv(Ts[3]) @ Ts[3:]
    torch.testing.assert_close(part.tree.forward_kinematics(part.tree.q_canonical), expected, atol=1e-9, rtol=0)
    assert len(part.link_meshes) == sum(m.link >= 3 for m in whole.link_meshes)


def test_nothing_is_written_beside_the_robot_or_into_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load_description(["kinearm", "kinearm"])
    load_description("kinearm", subtree="forearm")
    assert list(tmp_path.iterdir()) == []


def test_inspection_tells_what_is_there() -> None:
    robot = load_description("kinearm")
    data = inspect(robot)
    assert data["dof"] == 7
    assert [link["name"] for link in data["links"]] == list(robot.tree.link_names)
    assert data["joints"][0]["lower_rad"] == -2.8
    assert data["joints"][-1]["upper_m"] == 0.035
    assert data["couplings"] == [{"joint": "right_finger", "driver": "left_finger", "rule": "1 x"}]
    text = inspection_text(robot)
    assert all(word in text for word in ("waist", "right_finger follows left_finger", "Apache-2.0", "#ed731a"))


def test_silhouettes_of_go2_from_urdf_and_mjcf_agree(shared: Path) -> None:
    pytest.importorskip("mujoco_warp", reason="needs the renderer (extra 'render')")
    from kinesplat.dataset.capture import Capture

    folder = shared / "urdf" / "go2" / "example-robot-data" / "robots" / "go2_description" / "urdf"
    urdf = load_description(folder / "go2.urdf")
    mjcf = load_description(shared / "robots" / "unitree_go2" / "go2.xml")
    order = [mjcf.tree.joint_names.index(name) for name in urdf.tree.joint_names]
    span = mjcf.tree.q_upper - mjcf.tree.q_lower
    q = mjcf.tree.q_lower + span * torch.rand(4, mjcf.tree.dof, dtype=torch.float64)
    camera = Camera.look_at(torch.nn.functional.normalize(torch.randn(4, 3), dim=-1), (0.0, 0.0, 0.0))
    images = (
        Capture(mjcf, samples=1).render(q, camera, torch.eye(4)),
        Capture(urdf, samples=1).render(q[:, order], camera, torch.eye(4)),
    )
    first, second = (image.alpha.gt(0.5) for image in images if image.alpha is not None)
    iou = (first & second).sum((-1, -2)) / (first | second).sum((-1, -2))
    assert iou.min() >= 0.98


def test_many_robots_of_example_robot_data() -> None:
    folder = example_robot_data()
    few = ("ur_description/urdf/ur10_robot", "solo_description/robots/solo12", "z1_description/urdf/z1",
           "talos_data/robots/talos_left_arm", "hyq_description/robots/hyq_no_sensors")  # fmt: skip
    for name in few:
        assert_matches_yourdfpy(folder / f"{name}.urdf")


@pytest.mark.slow
def test_every_robot_of_example_robot_data() -> None:
    """All but four files that are broken in the package: no links, a missing mesh, a mimic of an unknown joint."""
    broken = {"ur3.urdf", "romeo_laas_small.urdf", "alex_psyonic_hands.urdf"}
    files = sorted(f for f in example_robot_data().rglob("*.urdf") if f.name not in broken)
    assert len(files) >= 60
    for file in files:
        assert_matches_yourdfpy(file, 1)


def example_robot_data() -> Path:
    for entry in sys.path:
        folder = Path(entry) / "cmeel.prefix" / "share" / "example-robot-data" / "robots"
        if folder.is_dir():
            return folder
    pytest.skip("needs the package example-robot-data (pip install example-robot-data)")
