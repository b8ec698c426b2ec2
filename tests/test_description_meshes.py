"""Meshes of descriptions: formats, units, colours, textures, the cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial
from urdf_files import CUBE, mesh_visual, only_mesh, own_cache, write_urdf

from kinesplat.description import LinkMesh, load_description
from kinesplat.description import meshes as mesh_files
from kinesplat.description.mesh_cache import cache_folder

__all__ = ["own_cache"]


def pixels_of(mesh: LinkMesh) -> np.ndarray:
    assert mesh.texture is not None
    return mesh.texture


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
