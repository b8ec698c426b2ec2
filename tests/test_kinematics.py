"""Forward kinematics against MuJoCo, its derivatives against finite differences, and its laws."""

import itertools
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from kinesplat.couplings import Couplings
from kinesplat.description import Robot, load_description, mujoco_qpos
from kinesplat.description.mujoco_tree import tree_of
from kinesplat.description.sources import Options, loaded
from kinesplat.errors import InputError, ModelFileError
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel


def random_xml(seed: int) -> str:
    """A tree of bodies with every kind of joint, anchors off the origin, references, and coupled joints."""
    rng = np.random.default_rng(seed)

    def numbers(values: np.ndarray) -> str:
        return " ".join(repr(float(v)) for v in np.atleast_1d(values))

    scalar: list[str] = []
    count = 0

    def joints() -> str:
        nonlocal count
        text, kinds = "", rng.choice(["hinge", "slide", "ball", "none"], size=rng.integers(0, 4))
        for kind in kinds:
            if kind == "none" or (kind == "ball" and "<joint" in text):
                continue
            count += 1
            reference = f' ref="{rng.uniform(-1, 1)}"' if kind != "ball" else ""
            axis = numbers(rng.normal(size=3))
            text += (
                f'<joint name="j{count}" type="{kind}" axis="{axis}" pos="{numbers(rng.normal(size=3))}"{reference}/>'
            )
            if kind == "ball":
                break
            scalar.append(f"j{count}")
        return text

    def body(depth: int, name: str) -> str:
        placed = f'pos="{numbers(rng.normal(size=3))}" quat="{numbers(rng.normal(size=4))}"'
        children = "".join(body(depth - 1, f"{name}{i}") for i in range(rng.integers(0, 3))) if depth else ""
        inner = f'<inertial mass="1" pos="0 0 0" diaginertia="1 1 1"/>{joints()}{children}'
        return f'<body name="{name}" {placed}>{inner}</body>'

    free = '<freejoint name="root"/>' if seed % 2 else ""
    torso = f'<body name="base" pos="{numbers(rng.normal(size=3))}" quat="{numbers(rng.normal(size=4))}">{free}'
    limbs = "".join(body(int(rng.integers(1, 7)), f"limb{i}_") for i in range(3))
    torso += f'<inertial mass="1" pos="0 0 0" diaginertia="1 1 1"/>{limbs}</body>'
    order = list(rng.permutation(scalar))
    pairs = itertools.pairwise(order[: len(order) // 3 + 1])
    sizes = np.array([0.3, 1.0, 0.1, 0.01, 0.002])
    equalities = "".join(
        f'<joint joint1="{a}" joint2="{b}" polycoef="{numbers(rng.uniform(-1, 1, size=5) * sizes)}"/>' for a, b in pairs
    )
    loose = '<body name="loose" pos="1 2 3"><freejoint/><inertial mass="1" pos="0 0 0" diaginertia="1 1 1"/></body>'
    return f"""<mujoco><compiler angle="radian" autolimits="true"/><worldbody>{torso}{loose}
        <body name="target" mocap="true" pos="3 2 1" quat="0 1 0 1"/></worldbody>
        <equality>{equalities}</equality></mujoco>"""


def random_robot(seed: int) -> Robot:
    return load_description(mujoco.MjModel.from_xml_string(random_xml(seed)))


def random_q(tree: KinematicTree, *batch: int) -> torch.Tensor:
    span = tree.q_upper - tree.q_lower
    return tree.q_lower + span * torch.rand(*batch, tree.dof, dtype=torch.float64)


def random_transforms(*batch: int) -> torch.Tensor:
    T = torch.eye(4, dtype=torch.float64).repeat(*batch, 1, 1)
    quaternions = np.random.default_rng(0).normal(size=(int(np.prod(batch)), 4))
    rotations = Rotation.from_quat(quaternions).as_matrix().reshape(*batch, 3, 3)
    T[..., :3, :3] = torch.from_numpy(rotations)
    T[..., :3, 3] = torch.randn(*batch, 3, dtype=torch.float64)
    return T


def mujoco_transforms(robot: Robot, qpos: np.ndarray) -> np.ndarray:
    data = mujoco.MjData(robot.mj_model)
    data.qpos[:] = qpos
    mujoco.mj_kinematics(robot.mj_model, data)
    T = np.tile(np.eye(4), (robot.mj_model.nbody - 1, 1, 1))
    T[:, :3, :3] = data.xmat[1:].reshape(-1, 3, 3)
    T[:, :3, 3] = data.xpos[1:]
    return T


def assert_matches_mujoco(robot: Robot, configurations: int) -> None:
    tree = robot.tree
    q = random_q(tree, configurations)
    T_world_base = random_transforms(configurations) if robot.base_qpos >= 0 else None
    Ts = tree.forward_kinematics(q, T_world_base)
    expected = [mujoco_transforms(robot, qpos) for qpos in mujoco_qpos(robot, q, T_world_base)]
    np.testing.assert_allclose(Ts.numpy(), np.stack(expected), atol=1e-9, rtol=0)


@pytest.mark.parametrize("seed", range(24))
def test_equals_mujoco_on_random_trees(seed: int) -> None:
    robot = random_robot(seed)
    assert_matches_mujoco(robot, 4)
    default = mujoco_transforms(robot, mujoco_qpos(robot, robot.tree.q_canonical))
    np.testing.assert_allclose(robot.tree.forward_kinematics(robot.tree.q_canonical).numpy(), default, atol=1e-9)


def test_random_trees_hold_every_kind_of_joint() -> None:
    robots = [random_robot(seed) for seed in range(24)]
    assert {t for r in robots for t in r.tree.joint_types} == {"hinge", "slide", "ball"}
    assert max(len(r.tree.couplings.dependent) for r in robots) >= 3
    assert max(int(r.tree.couplings.level.max()) for r in robots if len(r.tree.couplings.level)) >= 2
    assert any(r.base_qpos >= 0 for r in robots)
    assert any(r.base_qpos < 0 for r in robots)


def test_mocap_and_world_fixed_bodies_stay() -> None:
    robot = random_robot(0)
    Ts = robot.tree.forward_kinematics(random_q(robot.tree, 3))
    target = Ts[:, robot.tree.link_names.index("target")]
    expected = torch.tensor([[-1.0, 0, 0, 3], [0, 1, 0, 2], [0, 0, -1, 1], [0, 0, 0, 1]], dtype=torch.float64)
    expected[:3, :3] = torch.from_numpy(Rotation.from_quat([0, 1, 0, 1], scalar_first=True).as_matrix())
    torch.testing.assert_close(target, expected.expand(3, 4, 4))


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,), (300,)])
def test_batch_shapes_agree_with_single_calls(batch: tuple[int, ...]) -> None:
    robot = random_robot(3)
    q, T = random_q(robot.tree, *batch), random_transforms(*batch) if batch != (0,) else torch.eye(4).double()
    Ts = robot.tree.forward_kinematics(q, T)
    assert Ts.shape == (*batch, len(robot.tree.link_names), 4, 4)
    for index in list(np.ndindex(*batch))[:5]:
        single = robot.tree.forward_kinematics(q[index], T[index])
        torch.testing.assert_close(Ts[index], single, atol=1e-12, rtol=0)


def test_base_and_q_broadcast() -> None:
    tree = random_robot(1).tree
    q, T = random_q(tree, 4, 1), random_transforms(3)
    Ts = tree.forward_kinematics(q, T)
    assert Ts.shape[:2] == (4, 3)
    torch.testing.assert_close(Ts[2, 1], tree.forward_kinematics(q[2, 0], T[1]))


def test_fixed_base_moves_everything() -> None:
    tree = random_robot(0).tree
    q, T = random_q(tree), random_transforms(2)[0]
    torch.testing.assert_close(tree.forward_kinematics(q, T), T @ tree.forward_kinematics(q))


def test_answers_in_the_dtype_of_q() -> None:
    tree = random_robot(2).tree
    q = random_q(tree, 7)
    single, double = tree.forward_kinematics(q.float()), tree.forward_kinematics(q)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("seed", [1, 2, 5, 8, 11])
def test_gradients(seed: int) -> None:
    tree = random_robot(seed).tree
    q, T = random_q(tree, 1).requires_grad_(), random_transforms(1).requires_grad_()
    assert torch.autograd.gradcheck(tree.forward_kinematics, (q, T))


def test_second_derivatives() -> None:
    tree = random_robot(8).tree
    q = random_q(tree).requires_grad_()
    assert torch.autograd.gradgradcheck(tree.forward_kinematics, (q,))


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-4, 0.0099, 0.0101, 3.1])
def test_ball_joint_near_and_far_from_zero(size: float) -> None:
    xml = '<mujoco><worldbody><body><joint type="ball" pos="1 2 3"/><geom size="1"/></body></worldbody></mujoco>'
    tree = load_description(mujoco.MjModel.from_xml_string(xml)).tree
    direction = torch.tensor([0.48, -0.6, 0.64], dtype=torch.float64)
    q = (size * direction).requires_grad_()
    R = tree.forward_kinematics(q)[0, :3, :3]
    np.testing.assert_allclose(R.detach().numpy(), Rotation.from_rotvec(q.detach().numpy()).as_matrix(), atol=1e-14)
    assert torch.autograd.gradcheck(tree.forward_kinematics, (q,))
    assert torch.autograd.gradgradcheck(tree.forward_kinematics, (q,))


@pytest.mark.parametrize("seed", range(6))
def test_link_jacobian_is_the_derivative(seed: int) -> None:
    tree = random_robot(seed).tree
    q, T = random_q(tree, 2), random_transforms(2)
    J = tree.link_jacobian(q, T)
    dT = torch.stack([torch.func.jacrev(tree.forward_kinematics)(q[i], T[i]) for i in range(2)])
    v, w = J[..., :3, :], J[..., 3:, :]
    hat = torch.zeros(*J.shape[:2], tree.dof, 4, 4, dtype=J.dtype)
    for row, column, axis, sign in ((0, 1, 2, -1), (0, 2, 1, 1), (1, 2, 0, -1)):
        hat[..., row, column] = sign * w[..., axis, :]
        hat[..., column, row] = -sign * w[..., axis, :]
    hat[..., :3, 3] = v.mT
    expected = (hat @ tree.forward_kinematics(q, T)[:, :, None]).movedim(2, -1)
    torch.testing.assert_close(dT, expected, atol=1e-9, rtol=1e-9)


def test_q_of_coupled_joints_follows_the_polynomial() -> None:
    xml = """<mujoco><compiler angle="radian"/><worldbody><body><joint name="a" ref="0.3"/><geom size="1"/>
      <body><joint name="b" ref="-0.2"/><geom size="1"/><body><joint name="c"/><geom size="1"/></body></body></body>
      </worldbody><equality><joint joint1="b" joint2="a" polycoef="0.1 2 -0.5 0.3 0.2"/>
      <joint joint1="c" polycoef="0.7 0 0 0 0"/></equality></mujoco>"""
    tree = load_description(mujoco.MjModel.from_xml_string(xml)).tree
    assert tree.joint_names == ("a",)
    x = 1.1 - 0.3
    b = -0.2 + 0.1 + 2 * x - 0.5 * x**2 + 0.3 * x**3 + 0.2 * x**4
    expected = torch.tensor([1.1, b, 0.7], dtype=torch.float64)
    torch.testing.assert_close(tree.coordinates(torch.tensor([1.1], dtype=torch.float64)), expected)


def test_tables_are_piecewise_polynomials() -> None:
    """Two cubic segments beside a plain polynomial that they depend on."""
    coefficients = torch.zeros(2, 2, 4, dtype=torch.float64)
    coefficients[0, :, 1] = 2.0
    coefficients[1, 0], coefficients[1, 1] = torch.tensor([1.0, 0, 3, 0]), torch.tensor([1.75, 3, 0, 0])
    index = torch.tensor([1, 2])
    couplings = Couplings(
        3, torch.tensor([0]), index, index - 1, index, torch.tensor([0.0, -1.0]).double(),
        torch.tensor([0.0, 0.5]).double(), coefficients,
    )  # fmt: skip
    q = torch.tensor([[-0.45], [-0.3], [0.1]], dtype=torch.float64, requires_grad=True)
    x = 2 * q.detach()[:, 0]
    expected = torch.where(x < -0.5, 1 + 3 * (x + 1) ** 2, 1.75 + 3 * (x + 0.5))
    torch.testing.assert_close(couplings.coordinates_of(q)[:, 2].detach(), expected)
    assert torch.autograd.gradcheck(couplings.coordinates_of, (q,))
    derivative = torch.func.vmap(torch.func.jacrev(couplings.coordinates_of))(q.detach())
    torch.testing.assert_close(couplings.jacobian(q.detach()), derivative)


def test_clamp_moves_into_limits_only_where_there_are_limits() -> None:
    xml = """<mujoco><compiler angle="radian" autolimits="true"/><worldbody><body><joint name="a" range="-1 2"/>
      <geom size="1"/><body><joint name="b"/><geom size="1"/><body><joint name="c" type="ball" range="0 0.5"/>
      <geom size="1"/></body></body></body></worldbody></mujoco>"""
    tree = load_description(mujoco.MjModel.from_xml_string(xml)).tree
    q = torch.tensor([[5.0, 9.0, 3.0, 0.0, 4.0], [0.5, -9.0, 0.1, 0.2, 0.0]])
    clamped = tree.clamp(q)
    torch.testing.assert_close(clamped[:, :2], torch.tensor([[2.0, 9.0], [0.5, -9.0]]))
    assert clamped[0, 2:].norm() <= 0.5 + 1e-6
    torch.testing.assert_close(clamped[1, 2:], q[1, 2:])
    torch.testing.assert_close(tree.clamp(clamped), clamped)
    assert tree.q_limited.tolist() == [True, False, True, True, True]
    assert tree.q_upper[1] == pytest.approx(np.pi)


def test_tensors_round_trip() -> None:
    tree = random_robot(5).tree
    again = KinematicTree.from_tensors(tree.to_tensors())
    q = random_q(tree, 3)
    assert (again.link_names, again.joint_names, again.joint_types) == (
        tree.link_names, tree.joint_names, tree.joint_types,
    )  # fmt: skip
    assert torch.equal(again.forward_kinematics(q), tree.forward_kinematics(q))


@pytest.mark.parametrize("name", ["header", "node_parent", "couplings.driver"])
def test_missing_array_is_named(name: str) -> None:
    tensors = random_robot(5).tree.to_tensors()
    del tensors[name]
    with pytest.raises(ModelFileError, match=name):
        KinematicTree.from_tensors(tensors)


@pytest.mark.parametrize(
    ("name", "value"), [("node_parent", 1000), ("link_node", -1), ("node_type", 7), ("parents", 99)]
)
def test_index_out_of_range_is_named(name: str, value: int) -> None:
    tensors = random_robot(5).tree.to_tensors()
    tensors[name] = tensors[name].clone()
    tensors[name][1] = value
    with pytest.raises(ModelFileError, match=name):
        KinematicTree.from_tensors(tensors)


def test_lists_and_batches_that_do_not_fit_are_refused(kinearm: SelfModel, unchecked_types: None) -> None:
    tree = kinearm.tree
    with pytest.raises(InputError, match="q is a list; expected a torch tensor"):
        tree.forward_kinematics([0.0] * tree.dof)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"q \(3, 7\) and T_world_base \(2, 4, 4\) do not broadcast"):
        tree.forward_kinematics(torch.zeros(3, tree.dof), torch.eye(4).expand(2, 4, 4))


def test_wrong_q_is_refused_with_the_joints() -> None:
    robot = random_robot(2)
    tree = robot.tree
    with pytest.raises(InputError, match=rf"{tree.dof} joints \({tree.joint_names[0]}"):
        tree.forward_kinematics(torch.zeros(3, tree.dof + 1))
    bad = torch.zeros(2, tree.dof)
    bad[1, 2] = float("nan")
    with pytest.raises(InputError, match=repr(tree.joint_names[2])):
        tree.forward_kinematics(bad)
    with pytest.raises(InputError, match="floating point"):
        tree.coordinates(torch.zeros(tree.dof, dtype=torch.int64))


def test_robot_without_joints() -> None:
    xml = '<mujoco><worldbody><body pos="1 2 3"><geom size="1"/></body></worldbody></mujoco>'
    tree = load_description(mujoco.MjModel.from_xml_string(xml)).tree
    assert tree.dof == 0
    assert tree.forward_kinematics(torch.zeros(4, 0)).shape == (4, 1, 4, 4)
    assert tree.link_jacobian(torch.zeros(4, 0)).shape == (4, 1, 6, 0)
    torch.testing.assert_close(tree.forward_kinematics(torch.zeros(0))[0, :3, 3], torch.tensor([1.0, 2.0, 3.0]))


def test_equals_mujoco_on_every_menagerie_robot(shared: Path) -> None:
    files = [f for f in model_files(shared) if "scene" not in f.stem]
    assert len(files) >= 20
    for file in files:
        assert_matches_mujoco(without_surface(file), 3)


@pytest.mark.slow
def test_equals_mujoco_on_every_menagerie_scene(shared: Path) -> None:
    for file in model_files(shared):
        if "scene" in file.stem:
            assert_matches_mujoco(without_surface(file), 3)


def without_surface(file: Path) -> Robot:
    model = loaded(file, Options()).compile()
    found = tree_of(model)
    return Robot(file.stem, found.tree, (), "", str(file), model, found.coordinate_qpos, found.base_qpos)


def model_files(shared: Path) -> list[Path]:
    return [f for f in sorted((shared / "robots").glob("*/*.xml")) if f.stem != "keyframes"]
