"""Self-collision against MuJoCo's own contacts."""

import mujoco
import pytest
import torch

from kinesplat.dataset.collision import LEAST_DEPTH, SelfCollision
from kinesplat.dataset.sampling import random_configurations
from kinesplat.description import Robot, load_description, mujoco_qpos
from kinesplat.errors import InputError

# Three links in a chain; the third can reach the first. A floor in the world that all of them run through.
CHAIN = """<mujoco><compiler angle="radian"/><worldbody><geom type="plane" size="2 2 1"/>
  <body name="a"><joint name="ja" axis="0 1 0" range="-3 3" limited="true"/>
    <geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.04"/>
    <body name="b" pos="0.3 0 0"><joint name="jb" axis="0 1 0" range="-3 3" limited="true"/>
      <geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.04"/>
      <body name="c" pos="0.3 0 0"><joint name="jc" axis="0 0 1" range="-3 3" limited="true"/>
        <geom type="box" pos="0.15 0 0" size="0.15 0.03 0.02"/></body></body></body></worldbody>{extra}</mujoco>"""


def robot_of(xml: str) -> Robot:
    return load_description(mujoco.MjSpec.from_string(xml))


def contacts(model: mujoco.MjModel, robot: Robot, q: torch.Tensor) -> set[tuple[int, int]]:
    """Bodies in contact by MuJoCo's collision pipeline, on a model compiled with collisions."""
    data = mujoco.MjData(model)
    data.qpos[:] = mujoco_qpos(robot, q)
    mujoco.mj_fwdPosition(model, data)
    pairs = set()
    for contact in data.contact[: data.ncon]:
        bodies = sorted(int(model.geom_bodyid[g]) for g in (contact.geom1, contact.geom2))
        if contact.dist < -LEAST_DEPTH and bodies[0] > 0:
            pairs.add(tuple(bodies))
    return pairs


def test_same_pairs_as_mujocos_contacts() -> None:
    xml = CHAIN.format(extra="")
    robot, model = robot_of(xml), mujoco.MjModel.from_xml_string(xml)
    collision = SelfCollision(robot)
    q = random_configurations(robot.tree, 300, torch.Generator().manual_seed(0))
    expected = [contacts(model, robot, row) for row in q]
    assert 20 < sum(map(bool, expected)) < 200
    assert [collision.colliding_bodies(row) for row in q] == expected
    assert torch.equal(collision.free(q), torch.tensor([not pairs for pairs in expected]))


def test_menagerie_hand_against_mujocos_contacts(shared) -> None:
    robot = load_description(shared / "robots" / "shadow_hand" / "right_hand.xml")
    model = mujoco.MjModel.from_xml_path(str(shared / "robots" / "shadow_hand" / "right_hand.xml"))
    collision = SelfCollision(robot)
    q = random_configurations(robot.tree, 100, torch.Generator().manual_seed(0))
    excepted = contacts(model, robot, robot.tree.q_canonical)
    expected = torch.tensor([not contacts(model, robot, row) - excepted for row in q])
    assert 5 < expected.sum() < 60
    assert (collision.free(q) == expected).float().mean() >= 0.98  # touching within a tenth of a millimetre


def test_sampled_configurations_are_free_and_counted() -> None:
    collision = SelfCollision(robot_of(CHAIN.format(extra="")))
    q, rejected = collision.sample(60, torch.Generator().manual_seed(3))
    assert q.shape == (60, 3)
    assert collision.free(q).all()
    assert rejected > 3
    again, _ = collision.sample(60, torch.Generator().manual_seed(3))
    assert torch.equal(q, again)


def test_pairs_that_touch_at_home_and_excluded_pairs_are_excepted() -> None:
    excluded = robot_of(CHAIN.format(extra='<contact><exclude body1="a" body2="c"/></contact>'))
    assert not SelfCollision(excluded).can_tell
    home = '<keyframe><key name="home" qpos="0 2.9 2.9"/></keyframe>'
    touching = SelfCollision(robot_of(CHAIN.format(extra=home)))
    assert touching.excepted == [("a", "c")]
    assert not touching.can_tell
    assert SelfCollision(robot_of(CHAIN.format(extra=""))).can_tell


def test_visual_shapes_do_not_collide() -> None:
    collision = SelfCollision(load_description("kinearm"))
    assert not collision.can_tell
    _, rejected = collision.sample(3, torch.Generator().manual_seed(0))
    assert rejected == 0


def test_robot_that_always_collides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinesplat.dataset.collision.MAX_ATTEMPTS", 1)
    collision = SelfCollision(robot_of(CHAIN.format(extra="")))
    with pytest.raises(InputError, match=r"1 random configurations in a row collide .*the last: a and c"):
        collision.sample(300, torch.Generator().manual_seed(0))
