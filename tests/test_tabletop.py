"""The tabletop world: its policy reaches, its pictures show what MuJoCo holds, motion is checked and executed."""

import json

import mujoco
import pytest
import torch

from kinesplat.description import load_description
from kinesplat.errors import InputError
from kinesplat.imagination.execution import SETTLE_S, check_trajectory, execute, executing
from kinesplat.imagination.joints import joint_ids, joints_of, place, robot_qpos, start_state
from kinesplat.imagination.tabletop import COLOURS, Scene, Tabletop, camera, inverse_kinematics

UNSOLID = """<mujoco>
  <worldbody>
    <body name="link" pos="0 0 .2"><joint name="turn"/><geom size=".1" contype="0" conaffinity="0"/></body>
    <body name="table"><geom size=".3"/></body>
  </worldbody>
  <actuator><position joint="turn" kp="5" kv="1"/></actuator>
</mujoco>"""
"""A link that passes through the table."""


@pytest.fixture(scope="module")
def world() -> Tabletop:
    return Tabletop()


def scene(seed: int = 0) -> Scene:
    return Scene.random(torch.Generator().manual_seed(seed))


def test_inverse_kinematics_by_mujoco_s_forward_kinematics(world: Tabletop) -> None:
    model = world.robot.mj_model
    for seed in range(4):
        setting = scene(seed)
        for colour in COLOURS:
            target = world.goal(setting, colour)
            q = inverse_kinematics(world.robot, target, setting.q_start)
            data = mujoco.MjData(model)
            data.qpos[model.jnt_qposadr] = robot_qpos(world.robot, q)
            mujoco.mj_kinematics(model, data)
            torch.testing.assert_close(torch.from_numpy(data.site("grip").xpos.copy()), target, atol=1e-4, rtol=0)
            assert data.site("grip").xmat.reshape(3, 3)[2, 2] < -0.999
    with pytest.raises(InputError, match="out of reach"):
        inverse_kinematics(world.robot, torch.tensor([2.0, 0.0, 0.1]).double(), setting.q_start)


def test_the_policy_passes_its_check_and_reaches_when_executed(world: Tabletop) -> None:
    reached = 0
    for seed in range(6):
        setting = scene(seed)
        colour = list(COLOURS)[seed % 3]
        q, state = world.reaching(setting, colour), world.data(setting)
        torch.testing.assert_close(q[0], setting.q_start)
        assert check_trajectory(world.robot, q, 0.05, world.data(setting)).passed
        blocks = state.qpos.copy()
        execution = execute(world.robot, q, 0.05, state)
        reached += world.reached(state, setting, colour)
        assert not world.reached(world.data(setting), setting, colour)
        assert execution.error < 0.01
        assert execution.contacts == ()
        for name in COLOURS:
            address = world.model.joint(f"{name} block").qposadr[0]
            assert abs(state.qpos[address : address + 2] - blocks[address : address + 2]).max() < 1e-3
    assert reached == 6


def test_another_block_is_not_the_asked_one(world: Tabletop) -> None:
    setting = scene()
    state = world.data(setting)
    execute(world.robot, world.reaching(setting, "red"), 0.05, state)
    assert world.reached(state, setting, "red")
    assert not world.reached(state, setting, "blue")
    with pytest.raises(InputError, match="unknown block 'pink'"):
        world.goal(setting, "pink")


def test_a_bad_motion_is_told(world: Tabletop) -> None:
    setting = scene()
    start = setting.q_start
    below = start.clone()
    below[1] = 1.5  # upper arm forward: into the table
    q = torch.stack([start, below])
    check = check_trajectory(world.robot, q, 0.2, world.data(setting))
    assert set(check.too_fast) == {"shoulder"}
    assert not check.passed
    assert any(thing == "world" for _, _, thing in check.contacts or ())
    assert "runs into" in check.report()
    beyond = start.clone()
    beyond[0] = 3.0
    check = check_trajectory(world.robot, torch.stack([start, beyond]), 100.0)
    assert check.beyond_limits == pytest.approx({"waist": 0.2})
    assert check.contacts is None  # there is no scene
    assert "collision with a scene unknown" in check.report()
    folded = start.clone()
    folded[1], folded[2], folded[4] = -1.9, -2.4, -1.8
    assert check_trajectory(world.robot, torch.stack([start, folded]), 100.0).self_collisions == (1,)


def test_no_collision_is_said_only_where_shapes_could_tell(world: Tabletop) -> None:
    setting = scene()
    q = torch.stack([setting.q_start, setting.q_start + 0.001])
    whole = check_trajectory(world.robot, q, 1.0, world.data(setting))
    assert (whole.self_collisions, whole.contacts) == ((), ())
    assert whole.report() == "checked: within limits and speeds, no collision"
    model = mujoco.MjModel.from_xml_string(UNSOLID)
    robot = load_description(model)
    q = torch.tensor([[0.0], [0.1]], dtype=torch.float64)
    check = check_trajectory(robot, q, 1.0, mujoco.MjData(model))
    assert check.passed
    assert "self-collision unknown" in check.report()
    assert "no collision" not in check.report()
    written = json.loads(json.dumps(check.to_json(), allow_nan=False))
    assert (written["self_collision_frames"], written["contacts"]) == (None, None)
    execution = execute(robot, q, 0.1, mujoco.MjData(model))
    assert execution.contacts is None
    assert "no contact" not in execution.report()


def test_executing_stops_at_the_times_of_the_frames(world: Tabletop) -> None:
    setting = scene()
    state = world.data(setting)
    q = torch.stack([setting.q_start, setting.q_start + 0.1, setting.q_start])
    q[:, -1] = setting.q_start[-1]
    looked: list[int] = []
    times = [state.time for _ in executing(world.robot, q, 0.25, state, after_step=looked.append)]
    assert len(looked) == 1 + round(state.time / world.model.opt.timestep)  # after every step, not at frames alone
    assert looked == sorted(looked)
    assert set(looked) == {0, 1, 2, 3}
    assert times == pytest.approx([0.0, 0.25, 0.5, 0.5 + SETTLE_S])
    torch.testing.assert_close(joints_of(world.robot, state), q[-1], atol=2e-2, rtol=0)


def test_a_pushed_block_is_a_contact(world: Tabletop) -> None:
    setting = scene()
    goal, arm = world.goal(setting, "red"), world.robot
    beside, through = (goal + torch.tensor([0.0, y, -0.05]) for y in (0.08, -0.03))
    above = inverse_kinematics(arm, goal + torch.tensor([0.0, 0.08, 0.1]), setting.q_start)
    down = inverse_kinematics(arm, beside, above)
    q = torch.stack([setting.q_start, above, down, inverse_kinematics(arm, through, down)])
    execution = execute(arm, q, 1.0, world.data(setting))
    assert any(thing == "red block" for _, _, thing in execution.contacts or ())
    assert "touched red block" in execution.report()


def test_worlds_that_do_not_fit(world: Tabletop) -> None:
    q = torch.stack([scene().q_start] * 2)
    with pytest.raises(InputError, match="two frames or more"):
        check_trajectory(world.robot, q[:1], 0.1)
    with pytest.raises(InputError, match="positive time"):
        check_trajectory(world.robot, q, 0.0)
    bare = mujoco.MjModel.from_xml_string("<mujoco><worldbody><body><geom size='.1'/></body></worldbody></mujoco>")
    with pytest.raises(InputError, match="no joint 'waist'"):
        joint_ids(world.robot, bare)
    unactuated = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body name='b'><joint name='j'/><geom size='.1'/></body></worldbody></mujoco>"
    )
    robot = load_description(unactuated)
    with pytest.raises(InputError, match="no position actuator for j"):
        execute(robot, torch.zeros(2, 1, dtype=torch.float64), 0.1, mujoco.MjData(unactuated))


def test_a_scene_begins_where_it_says(world: Tabletop) -> None:
    setting = scene(3)
    state = world.data(setting)
    torch.testing.assert_close(joints_of(world.robot, state), setting.q_start)
    moved = setting.q_start + 0.05
    place(world.robot, state, moved)
    torch.testing.assert_close(joints_of(world.robot, state), moved)
    torch.testing.assert_close(joints_of(world.robot, start_state(world.robot, world.model, moved)), moved)
    centres = torch.tensor([[x, y, 0.0225] for x, y in setting.blocks.values()])
    pixels, depth = camera(48).project(centres)
    assert (depth > 0).all()
    assert ((pixels > 0) & (pixels < 48)).all()
