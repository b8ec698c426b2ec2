"""Position actuators of a world: which they are, and that their controls lead where the joints should go."""

from pathlib import Path

import mujoco
import pytest
import torch

import kinesplat as ks
from kinesplat.errors import InputError
from kinesplat.imagination.actuators import position_controls
from kinesplat.imagination.execution import execute
from kinesplat.imagination.joints import start_state

GRIPPER = """<mujoco>
  <option gravity="0 0 0" timestep="0.004"/>
  <worldbody>
    <body name="arm">
      <joint name="turn" axis="0 0 1" damping="0.1" armature="0.02"/>
      <geom type="capsule" fromto="0 0 0 .2 0 0" size=".02"/>
      <body name="left" pos=".25 0 0">
        <joint name="left" type="slide" axis="0 1 0" range="0 .04" damping="5" armature="0.05"/>
        <geom size=".005"/>
      </body>
      <body name="right" pos=".25 0 0">
        <joint name="right" type="slide" axis="0 -1 0" range="0 .04" damping="5" armature="0.05"/>
        <geom size=".005"/>
      </body>
    </body>
  </worldbody>
  <tendon><fixed name="split"><joint joint="left" coef=".5"/><joint joint="right" coef=".5"/></fixed></tendon>
  <equality><joint joint1="right" joint2="left"/></equality>
  <actuator>
    {}
    <general tendon="split" biastype="affine" gainprm=".0156862745" biasprm="0 -100 -10" ctrlrange="0 255"/>
  </actuator>
</mujoco>"""
HINGES = {
    "position": "<position joint='turn' kp='20'/>",
    "a position and a velocity servo": "<position joint='turn' kp='20'/><velocity joint='turn' kv='2'/>",
    "the other way round": "<velocity joint='turn' kv='2'/><position joint='turn' kp='20'/>",
    "a gear": "<position joint='turn' kp='20' gear='-2'/>",
    "controls from 0 to 255": "<general joint='turn' gainprm='.2' biastype='affine' biasprm='-5 -20 -2'/>",
    "a slow servo": "<position joint='turn' kp='20' kv='2' timeconst='.02'/>",
}


def gripper(folder: Path, hinge: str) -> tuple[ks.Robot, mujoco.MjModel]:
    path = folder / "gripper.xml"
    path.write_text(GRIPPER.format(hinge))
    return ks.load_description(path), mujoco.MjModel.from_xml_path(str(path))


@pytest.mark.parametrize("hinge", HINGES.values(), ids=HINGES)
def test_joints_go_where_they_are_told(tmp_path: Path, hinge: str) -> None:
    robot, world = gripper(tmp_path, hinge)
    ends = {"turn": 0.8, "left": 0.03, "right": 0.03}
    q = torch.linspace(0.0, 1.0, 4).double()[:, None] * torch.tensor([ends[name] for name in robot.tree.joint_names])
    state = start_state(robot, world, q[0])
    execution = execute(robot, q, 0.5, state)
    assert execution.error < 0.02
    torch.testing.assert_close(execution.q_end, q[-1], atol=2e-2, rtol=0)
    fingers = [float(state.joint(name).qpos[0]) for name in ("left", "right")]
    assert fingers == pytest.approx([0.03, 0.03], abs=1e-3)
    _, controls = position_controls(robot, q, state)
    assert controls[-1, -1] == pytest.approx(0.03 / 0.04 * 255.0)


@pytest.mark.parametrize(
    "hinge",
    [
        "<velocity joint='turn' kv='2'/>",
        "<motor joint='turn'/>",
        "<intvelocity joint='turn' kp='20' actrange='-3 3'/>",
        "<general joint='turn' gainprm='20' biastype='affine' biasprm='0 20 0'/>",
    ],
)
def test_other_actuators_hold_no_position(tmp_path: Path, hinge: str) -> None:
    robot, world = gripper(tmp_path, hinge)
    q = torch.zeros(2, robot.tree.dof, dtype=torch.float64)
    with pytest.raises(InputError, match="no position actuator for turn; "):
        execute(robot, q, 0.1, start_state(robot, world, q[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "scene", "most"),
    [
        ("franka_emika_panda/panda.xml", "franka_emika_panda/scene.xml", 0.02),
        ("shadow_hand/right_hand.xml", "shadow_hand/scene_right.xml", 0.2),  # two joints of a finger share a tendon
    ],
)
def test_robots_in_menagerie_s_own_scenes(shared: Path, model: str, scene: str, most: float) -> None:
    """A quarter of the way to the upper limits, the Panda's gripper by its tendon and controls from 0 to 255."""
    robot = ks.load_description(shared / "robots" / model)
    world = mujoco.MjModel.from_xml_path(str(shared / "robots" / scene))
    begin = robot.tree.q_canonical.double()
    end = robot.tree.clamp(begin + 0.25 * (robot.tree.q_upper - begin).clamp(max=1.0))
    q = begin + torch.linspace(0.0, 1.0, 6).double()[:, None] * (end - begin)
    execution = execute(robot, q, 0.5, start_state(robot, world, q[0]))
    assert execution.error < most
    slides = torch.tensor([kind == "slide" for kind in robot.tree.joint_types])
    torch.testing.assert_close(execution.q_end[slides], end[slides], atol=2e-3, rtol=0)
