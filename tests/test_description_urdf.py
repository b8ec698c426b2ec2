"""URDF against an independent library; packages, xacro, names, combinations."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from urdf_files import CUBE, mesh_visual, only_mesh, own_cache, write_urdf

from kinesplat.camera import Camera
from kinesplat.description import Part, inspect, inspection_text, load_description
from kinesplat.errors import DescriptionError

__all__ = ["own_cache"]


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
