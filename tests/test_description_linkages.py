"""Closed linkages against the configuration at which MuJoCo's simulation of them comes to rest."""

from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

from kinesplat.description import Robot, load_description, mujoco_qpos
from kinesplat.kinematics import KinematicTree

BODY = '<inertial mass="0.02" pos="0 0.005 0.01" diaginertia="9e-6 7e-6 5e-6"/>'
STIFF = 'solimp="0.95 0.99 0.001" solref="0.005 1"'
STOP = 'solimplimit="0.95 0.99 0.001" solreflimit="0.005 1"'


def finger(side: str, turn: str) -> str:
    """A five-bar: the spring presses the coupler against its stop, which makes it a four-bar."""
    return f"""<body name="{side}_crank" pos="0 {0.03 if side == "right" else -0.03} 0.055" {turn}>{BODY}
      <joint name="{side}_crank" axis="1 0 0" range="0 0.75" armature="0.005" damping="0.1" {STOP}/>
      <body name="{side}_coupler" pos="0 0.032 -0.004">{BODY}
        <joint name="{side}_coupler" axis="1 0 0" range="-1.5 0" {STOP}/></body></body>
    <body name="{side}_link" pos="0 {0.013 if side == "right" else -0.013} 0.061" {turn}>{BODY}
      <joint name="{side}_link" axis="1 0 0" range="-0.3 0.8" stiffness="0.04" springref="2.5" damping="0.001"/>
      <body name="{side}_tip" pos="0 0.056 0.038">{BODY}
        <joint name="{side}_tip" axis="1 0 0" range="-0.87 0.87" pos="0 -0.018 0.006" {STOP}/></body></body>"""


GRIPPER = f"""<mujoco><compiler angle="radian" autolimits="true"/><worldbody><body name="palm">
  <geom type="box" size=".01 .01 .01"/>{finger("right", "")}{finger("left", 'quat="0 0 0 1"')}</body></worldbody>
  <equality><connect anchor="0 0 0" body1="right_tip" body2="right_coupler" {STIFF}/>
    <connect anchor="0 0 0" body1="left_tip" body2="left_coupler" {STIFF}/>
    <joint joint1="right_crank" joint2="left_crank" {STIFF}/></equality>
  <actuator><position joint="left_crank" kp="50"/></actuator></mujoco>"""

SPATIAL = """<mujoco><compiler angle="radian" autolimits="true"/><worldbody><body name="base">
  <geom size="0.01"/>
  <body name="crank" pos="0 0 0"><geom size="0.01"/><joint name="crank" axis="0 0 1" range="-3 3"/>
    <body name="rod" pos="0.05 0 0"><geom size="0.01"/><joint name="rod" type="ball"/></body></body>
  <body name="rocker" pos="0.2 0.05 0.05"><geom size="0.01"/><joint name="rocker" axis="0 1 0.2"/></body></body>
  </worldbody>
  <equality><connect body1="rod" body2="rocker" anchor="0.18 0.05 0.12"/></equality>
  <actuator><position joint="crank"/></actuator></mujoco>"""

FIVE_BAR = """<mujoco><compiler angle="radian"/><worldbody><body name="base"><geom size="0.01"/>
  <body name="a"><geom size="0.01"/><joint name="a" axis="0 1 0"/>
    <body name="b" pos="0.1 0 0.1"><geom size="0.01"/><joint name="b" axis="0 1 0"/></body></body>
  <body name="c" pos="0.2 0 0"><geom size="0.01"/><joint name="c" axis="0 1 0"/>
    <body name="d" pos="0.1 0 0.1"><geom size="0.01"/><joint name="d" axis="0 1 0"/></body></body></body></worldbody>
  <equality><connect body1="b" body2="d" anchor="0.05 0 0.1"/></equality>
  <actuator><position joint="a"/><position joint="c"/></actuator></mujoco>"""


def settled_positions(model: mujoco.MjModel, target: float) -> tuple[mujoco.MjData, np.ndarray]:
    """Rest of the simulation without gravity, the last actuator aiming at `target`."""
    model.opt.gravity[:] = 0
    data = mujoco.MjData(model)
    data.ctrl[-1] = target
    for _ in range(6000):
        mujoco.mj_step(model, data)
    assert np.abs(data.qvel).max() < 1e-3
    mujoco.mj_kinematics(model, data)
    return data, data.xpos[1:]


def worst_position(robot: Robot, model: mujoco.MjModel, driver: str, targets: list[float]) -> float:
    """Largest distance of a link from where MuJoCo settles [m]; q is the driver's settled value."""
    worst = 0.0
    for target in targets:
        data, positions = settled_positions(model, target)
        q = robot.tree.q_canonical.clone()
        q[robot.tree.joint_names.index(driver)] = float(data.joint(driver).qpos[0])
        Ts = robot.tree.forward_kinematics(q).numpy()
        worst = max(worst, np.linalg.norm(Ts[:, :3, 3] - positions, axis=-1).max())
    return worst


def loop_gap(robot: Robot, q: torch.Tensor) -> float:
    """Largest gap of the model's own connect constraints [m]."""
    model, data = robot.mj_model, mujoco.MjData(robot.mj_model)
    data.qpos[:] = mujoco_qpos(robot, q)
    mujoco.mj_fwdPosition(model, data)
    return float(np.abs(data.efc_pos[: data.ne]).max())


def test_spring_loaded_gripper_settles_as_in_mujoco() -> None:
    model = mujoco.MjModel.from_xml_string(GRIPPER)
    robot = load_description(model)
    assert robot.tree.joint_names == ("left_crank",)
    assert not any("linkage" in w for w in robot.warnings)
    assert worst_position(robot, model, "left_crank", [0.0, 0.2, 0.4, 0.6, 0.75]) < 5e-4


def test_gripper_of_xarm7_settles_as_in_mujoco(shared: Path) -> None:
    path = shared / "robots" / "ufactory_xarm7" / "hand.xml"
    robot = load_description(path)
    assert robot.tree.joint_names == ("right_driver_joint",)
    model = mujoco.MjModel.from_xml_path(str(path))
    assert worst_position(robot, model, "right_driver_joint", [0.0, 60.0, 120.0, 200.0, 255.0]) < 5e-4


@pytest.mark.parametrize("xml", [GRIPPER, SPATIAL])
def test_loop_stays_closed_between_the_table_entries(xml: str) -> None:
    robot = load_description(mujoco.MjModel.from_xml_string(xml))
    tree = robot.tree
    assert tree.dof == 1
    for x in np.linspace(0.013, 0.987, 31):
        q = tree.q_lower + x * (tree.q_upper - tree.q_lower)
        assert loop_gap(robot, q) < 2e-6


def test_linkage_is_differentiable_and_saved_with_the_tree() -> None:
    tree = load_description(mujoco.MjModel.from_xml_string(GRIPPER)).tree
    q = torch.tensor([[0.111], [0.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tree.forward_kinematics, (q,))
    again = KinematicTree.from_tensors(tree.to_tensors())
    assert torch.equal(again.forward_kinematics(q.detach()), tree.forward_kinematics(q.detach()))


def test_driver_stops_where_the_linkage_does() -> None:
    """A crank of 0.1 m on a rod of 0.12 m, sliding pin at most 0.15 m away: it cannot turn all the way."""
    xml = """<mujoco><compiler angle="radian" autolimits="true"/><worldbody><body name="base"><geom size="0.01"/>
      <body name="crank"><geom size="0.01"/><joint name="crank" axis="0 1 0" range="-3 3"/>
        <body name="rod" pos="0.1 0 0"><geom size="0.01"/><joint name="rod" axis="0 1 0"/></body></body>
      <body name="slider"><geom size="0.01"/><joint name="slider" type="slide" axis="1 0 0"/></body></body></worldbody>
      <equality><connect body1="rod" body2="slider" anchor="0.08 0 0"/></equality>
      <actuator><position joint="crank"/></actuator></mujoco>"""
    tree = load_description(mujoco.MjModel.from_xml_string(xml)).tree
    assert tree.joint_names == ("crank",)
    reach = np.arcsin(0.08 / 0.1)
    assert 0.9 * reach < float(tree.q_upper[0]) <= reach + 1e-3
    assert -reach - 1e-3 <= float(tree.q_lower[0]) < -0.9 * reach


def test_weld_holds_the_whole_pose() -> None:
    xml = """<mujoco><compiler angle="radian"/><worldbody><body name="base"><geom size="0.01"/>
      <body name="a"><geom size="0.01"/><joint name="a" axis="0 0 1" range="-1 1"/></body>
      <body name="b" pos="0.1 0 0"><geom size="0.01"/><joint name="x" type="slide" axis="1 0 0"/>
        <joint name="y" type="slide" axis="0 1 0"/><joint name="turn" axis="0 0 1"/></body></body></worldbody>
      <equality><weld body1="a" body2="b"/></equality><actuator><position joint="a"/></actuator></mujoco>"""
    tree = load_description(mujoco.MjModel.from_xml_string(xml)).tree
    assert tree.joint_names == ("a",)
    q = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    Ts = tree.forward_kinematics(q)
    relative = torch.linalg.inv(Ts[:, 1]) @ Ts[:, 2]
    torch.testing.assert_close(relative, relative[4].expand(9, 4, 4), atol=1e-6, rtol=0)
    assert relative[4, 0, 3] == pytest.approx(0.1)


def test_linkage_with_two_drivers_is_left_open_and_says_so() -> None:
    robot = load_description(mujoco.MjModel.from_xml_string(FIVE_BAR))
    assert robot.tree.dof == 4
    assert any("2 free joints (a, c)" in w for w in robot.warnings)
