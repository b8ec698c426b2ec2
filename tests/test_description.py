"""Loading by path, name and model; surfaces against MuJoCo's rays and renderer; what is refused."""

from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

from kinesplat.camera import Camera
from kinesplat.description import Robot, load_description, names
from kinesplat.description.model import mujoco_qpos
from kinesplat.errors import DescriptionError

PRIMITIVES = """<mujoco><compiler angle="radian"/><asset>
  <texture name="t" type="2d" builtin="checker" rgb1="1 0.2 0.1" rgb2="0.1 0.3 0.9" width="64" height="64"/>
  <material name="m" texture="t" texrepeat="3 2" rgba="0.9 1 0.8 1"/>
  <material name="u" texture="t" texrepeat="9 14" texuniform="true"/></asset>
  <worldbody><geom type="plane" size="1 1 1" group="2"/><body name="b" pos="0.1 0.2 0.3" quat="0.9 0.1 -0.3 0.2">
  <joint axis="1 2 3" pos="0.1 0 0"/>
  <geom group="2" type="box" size="0.1 0.15 0.2" material="m" pos="-0.4 0 0"/>
  <geom group="2" type="sphere" size="0.15" material="m" pos="0 0.4 0"/>
  <geom group="2" type="capsule" size="0.1 0.2" material="m" pos="0 -0.4 0" euler="0.5 0.4 0.3"/>
  <geom group="2" type="cylinder" size="0.1 0.2" material="u" pos="0.4 0 0" euler="1.5 0.4 0.3"/>
  <geom group="2" type="ellipsoid" size="0.1 0.2 0.15" material="u" pos="0.05 0.02 0.4"/>
  <geom group="3" type="box" size="1 1 1"/></body></worldbody></mujoco>"""


def posed_samples(robot: Robot, q: torch.Tensor, count: int) -> list[tuple[np.ndarray, ...]]:
    """Random points on every mesh: point, face normal and shading normal in the world, colour."""
    rng = np.random.default_rng(0)
    Ts = robot.tree.forward_kinematics(q.double()).numpy()
    found = []
    for mesh in robot.link_meshes:
        R, t = Ts[mesh.link, :3, :3], Ts[mesh.link, :3, 3]
        corners = mesh.vertices[mesh.faces]
        cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        area = np.linalg.norm(cross, axis=-1)
        face = rng.choice(len(area), size=count, p=area / area.sum())
        weights = rng.dirichlet(np.ones(3), size=count)
        points = np.einsum("nc,nci->ni", weights, corners[face]) @ R.T + t
        shading = np.einsum("nc,nci->ni", weights, mesh.normals[face]) @ R.T
        shading /= np.linalg.norm(shading, axis=-1, keepdims=True)
        colours = np.broadcast_to(mesh.rgba[:3], (count, 3)).copy()
        if mesh.texture is not None and mesh.uv is not None:
            uv = np.einsum("nc,nci->ni", weights, mesh.uv[face]) % 1.0
            size = np.array(mesh.texture.shape[1::-1])
            column, row = np.minimum((uv * size).astype(int), size - 1).T
            colours *= mesh.texture[row, column] / 255.0
        found.append((points, cross[face] @ R.T / area[face, None], shading, colours))
    return found


def assert_rays_hit_the_surface(robot: Robot, tolerance: float) -> None:
    """A ray of MuJoCo's, shot from just outside onto a sampled point, ends there."""
    model, data = robot.mj_model, mujoco.MjData(robot.mj_model)
    data.qpos[:] = mujoco_qpos(robot, robot.tree.q_canonical)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    groups = np.array([0, 0, 1, 0, 0, 0], dtype=np.uint8)
    distances = []
    for points, normals, _, _ in posed_samples(robot, robot.tree.q_canonical, 20):
        for point, normal in zip(points, normals, strict=True):
            start = point + 1e-3 * normal
            distances.append(mujoco.mj_ray(model, data, start, -normal, groups, 1, -1, np.zeros(1, np.int32)))
    assert np.median(np.abs(np.array(distances) - 1e-3)) < tolerance
    assert np.mean(np.abs(np.array(distances) - 1e-3) < 6e-4) > 0.93  # other pieces may lie within the millimetre


def test_packaged_robot() -> None:
    robot = load_description("kinearm")
    tree = robot.tree
    assert tree.joint_names == (
        "waist", "shoulder", "elbow", "forearm_roll", "wrist_pitch", "wrist_roll", "left_finger",
    )  # fmt: skip
    assert bool(tree.q_limited.all())
    assert ((tree.q_canonical >= tree.q_lower) & (tree.q_canonical <= tree.q_upper)).all()
    assert tree.q_canonical[1] == pytest.approx(0.35)
    assert robot.licence.startswith("Apache-2.0")
    assert robot.warnings == ()
    fingers = [tree.link_names.index(n) for n in ("left_finger", "right_finger")]
    q = tree.q_canonical.clone()
    q[-1] = 0.03
    Ts = tree.forward_kinematics(q)
    palm = torch.linalg.inv(Ts[tree.link_names.index("palm")])
    y = [(palm @ Ts[f])[1, 3].item() for f in fingers]
    assert y == pytest.approx([0.043, -0.043])


def test_colours_of_the_packaged_robot_tell_links_apart() -> None:
    robot = load_description("kinearm")
    colours = {tuple(m.rgba) for m in robot.link_meshes}
    assert len(colours) >= 8
    assert {m.link for m in robot.link_meshes} == set(range(len(robot.tree.link_names)))


def test_surfaces_lie_where_the_rays_of_mujoco_end() -> None:
    assert_rays_hit_the_surface(load_description("kinearm"), 1e-5)
    assert_rays_hit_the_surface(load_description(mujoco.MjModel.from_xml_string(PRIMITIVES)), 4e-4)


def test_fitted_meshes_lie_where_the_rays_of_mujoco_end(shared: Path) -> None:
    for name in ("ufactory_xarm7/xarm7.xml", "shadow_hand/left_hand.xml", "trossen_vx300s/vx300s.xml"):
        assert_rays_hit_the_surface(load_description(shared / "robots" / name), 1e-5)


def assert_colours_match_the_renderer(robot: Robot) -> None:
    """Visible sampled points have the colour that the ray tracer gives their pixel under a headlight."""
    pytest.importorskip("mujoco_warp", reason="needs the renderer (extra 'render')")
    from kinesplat.dataset.capture import Capture

    q = robot.tree.q_canonical
    samples = posed_samples(robot, q, 3000)
    points, _, normals, colours = (np.concatenate(part) for part in zip(*samples, strict=True))
    centre, radius = points.mean(0), np.linalg.norm(points - points.mean(0), axis=-1).max()
    differences = []
    for direction in ([0.6, 0.5, 0.5], [-0.7, 0.3, -0.4]):
        eye = centre + 3.0 * radius * np.array(direction)
        camera = Camera.look_at(eye.tolist(), centre.tolist(), width=256, height=256)
        image = Capture(robot, samples=1).render(q.float(), camera)
        assert image.depth is not None
        assert image.rgb is not None
        pixels, depth = camera.project(torch.from_numpy(points).float())
        column, row = pixels.long().clamp(0, 255).unbind(-1)
        view = camera.T_cam_world[2, :3].double().numpy()
        facing = -(normals @ view)
        seen = ((image.depth[row, column] - depth).abs() < 0.003 * radius).numpy() & (facing > 0.2)
        expected = np.clip(colours * (0.5 + 0.5 * facing[:, None]), 0, 1)
        differences.append(np.abs(image.rgb[row, column].numpy() - expected)[seen])
        assert seen.sum() > 1000
    assert np.median(np.concatenate(differences)) < 0.02
    assert np.mean(np.concatenate(differences) < 0.1) > 0.9


def test_textures_normals_and_colours_match_the_renderer() -> None:
    assert_colours_match_the_renderer(load_description(mujoco.MjModel.from_xml_string(PRIMITIVES)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["google_robot/robot.xml", "trossen_vx300s/vx300s.xml", "ufactory_xarm7/xarm7.xml"])
def test_menagerie_colours_match_the_renderer(shared: Path, name: str) -> None:
    assert_colours_match_the_renderer(load_description(shared / "robots" / name))


def test_visual_geoms_of_a_model() -> None:
    robot = load_description(mujoco.MjModel.from_xml_string(PRIMITIVES))
    assert len(robot.link_meshes) == 5
    assert (robot.mj_model.geom_group == 2).sum() == 5
    assert robot.tree.link_names == ("b",)
    grouped = PRIMITIVES.replace('group="2" type="box"', 'group="0" type="box"').replace('group="2"', 'group="4"')
    assert len(load_description(mujoco.MjModel.from_xml_string(grouped)).link_meshes) == 1


def test_model_of_the_caller_stays_as_it_is() -> None:
    model = mujoco.MjModel.from_xml_string(PRIMITIVES)
    groups = model.geom_group.copy()
    load_description(model)
    assert np.array_equal(model.geom_group, groups)


def test_normals_are_unit_and_face_outwards() -> None:
    robot = load_description(mujoco.MjModel.from_xml_string(PRIMITIVES))
    for mesh in robot.link_meshes:
        np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=-1), 1.0, atol=1e-9)
        corners = mesh.vertices[mesh.faces]
        outward = corners.mean(1) - mesh.vertices.mean(0)
        face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        assert (np.einsum("fi,fi->f", face_normals, outward) > 0).all()
        assert (np.einsum("fci,fi->fc", mesh.normals, face_normals) > 0).all()


def test_names_of_the_ten_robots(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MENAGERIE_ROOT", str(shared / "robots"))
    expected = {
        "shadow_hand": 24, "unitree_g1_37dof_2024": 37, "unitree_h1": 19, "franka_emika_panda": 8, "google_robot": 9,
        "trossen_vx300s": 7, "ufactory_xarm7": 8, "unitree_go1": 12, "unitree_go2": 12, "universal_robots_ur5e": 6,
    }  # fmt: skip
    assert set(expected) <= set(names())
    for name, dof in expected.items():
        robot = load_description(name)
        assert (robot.name, robot.tree.dof) == (name, dof)
        assert robot.licence.split(":")[0] in ("Apache-2.0", "BSD-3-Clause")
    assert load_description("shadow_hand").tree.link_names[0] == "rh_forearm"
    assert load_description("shadow_hand/left_hand").tree.link_names[0] == "lh_forearm"
    assert load_description("franka_emika_panda/hand.xml").tree.dof == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("frank_emika_panda", "unknown robot 'frank_emika_panda': did you mean 'franka_emika_panda'"),
        ("kinearm/kinarm", "unknown file of robot kinearm 'kinarm': did you mean 'kinearm'"),
        ("no/such/file.xml", "no/such/file.xml: no such file"),
        ("robot.step", "no such file"),
    ],
)
def test_unknown_names_and_files(source: str, message: str) -> None:
    with pytest.raises(DescriptionError, match=message) as caught:
        load_description(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<mujoco><worldbody>", ["bad.xml"]),
        ("<mujoco><worldbody><bodi/></worldbody></mujoco>", ["bad.xml", "bodi"]),
        ('<mujoco><asset><mesh name="m" file="gone.stl"/></asset></mujoco>', ["gone.stl"]),
        ("<mujoco/>", ["no link"]),
        ("", ["bad.xml"]),
    ],
)
def test_broken_files_are_one_line_with_file_and_element(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.xml"
    path.write_text(text)
    with pytest.raises(DescriptionError) as caught:
        load_description(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_flat_meshes_and_old_inertia_attributes_load(tmp_path: Path) -> None:
    """MuJoCo finds no volume in a flat mesh; that is no reason not to draw it."""
    (tmp_path / "flat.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3\nf 1 3 4\n")
    (tmp_path / "r.xml").write_text(
        """<mujoco><asset><mesh file="flat.obj"/></asset><worldbody><body>
        <geom type="mesh" mesh="flat" shellinertia="true"/></body></worldbody></mujoco>"""
    )
    (mesh,) = load_description(tmp_path / "r.xml").link_meshes
    assert np.ptp(mesh.vertices, axis=0) == pytest.approx([1, 1, 0], abs=1e-6)


def test_circular_equalities_are_named() -> None:
    xml = """<mujoco><worldbody><body><joint name="a"/><geom size="1"/><body><joint name="b"/><geom size="1"/></body>
      </body></worldbody><equality><joint joint1="a" joint2="b"/><joint joint1="b" joint2="a"/></equality></mujoco>"""
    with pytest.raises(DescriptionError, match="circle: a -> b -> a"):
        load_description(mujoco.MjModel.from_xml_string(xml))
