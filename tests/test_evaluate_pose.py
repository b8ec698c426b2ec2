"""Pose benchmarks: generated folders in the DREAM (NDDS) format, errors against closed forms, the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from scipy.spatial.transform import Rotation

import kinesplat as ks
from kinesplat import cli
from kinesplat.commands.evaluate_pose import Evaluated, distinct_names, markdown
from kinesplat.errors import InputError
from kinesplat.evaluation.pose import PoseSequence, add_auc, match_names, pose_errors, rigid_alignment
from kinesplat.files import write_png

LINKS = ("base", "upper_arm", "forearm", "palm")


def write_ndds(folder: Path, model: ks.SelfModel, q: torch.Tensor, camera: ks.Camera, unit: float) -> None:
    """Frames, masks and annotations as NDDS lays them out; `unit` scales the locations, 100 for centimetres."""
    folder.mkdir(parents=True)
    K = camera.K
    intrinsics = {"fx": K[0, 0].item(), "fy": K[1, 1].item(), "cx": K[0, 2].item(), "cy": K[1, 2].item(), "s": 0.0}
    settings = {
        "intrinsic_settings": intrinsics,
        "captured_image_size": {"width": camera.width, "height": camera.height},
    }
    (folder / "_camera_settings.json").write_text(json.dumps({"camera_settings": [settings]}))
    (folder / "_object_settings.json").write_text(
        json.dumps({"exported_object_classes": ["arm"], "exported_objects": []})
    )
    out = model.render(q, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    index = [model.tree.link_names.index(name) for name in LINKS]
    world = model.tree.forward_kinematics(q)[:, index, :3, 3].float()
    for i in range(len(q)):
        pixels, _ = camera.project(world[i])
        points = world[i] @ camera.T_cam_world[:3, :3].T + camera.T_cam_world[:3, 3]
        keypoints = [
            {"name": f"arm_{n}", "location": (unit * p).tolist(), "projected_location": x.tolist()}
            for n, p, x in zip(LINKS, points, pixels, strict=True)
        ]
        joints = [
            {"name": f"robot/arm_{n}", "position": v, "velocity": 0.0}
            for n, v in zip(model.tree.joint_names, q[i].tolist(), strict=True)
        ]
        frame = {"objects": [{"class": "arm", "keypoints": keypoints}], "sim_state": {"joints": joints}}
        (folder / f"{i:06}.json").write_text(json.dumps(frame))
        write_png(folder / f"{i:06}.rgb.png", out.rgb[i])
        write_png(folder / f"{i:06}.mask.png", out.alpha[i])


@pytest.fixture(scope="module")
def arm(kinearm: ks.SelfModel) -> ks.SelfModel:
    return kinearm.subsample(2_000)


@pytest.fixture
def recorded(arm: ks.SelfModel, tmp_path: Path) -> tuple[Path, torch.Tensor, ks.Camera]:
    q = arm.tree.q_canonical.float() + torch.linspace(0.0, 0.1, 4)[:, None] * torch.tensor([1.0, 1, -1, 1, 1, 1, 0])
    q = arm.tree.clamp(q)
    camera = ks.Camera.framing(arm.posed(q).means.flatten(0, 1), width=72, height=64)
    write_ndds(tmp_path / "video", arm, q, camera, 100.0)
    return tmp_path / "video", q, camera


def test_reading(arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera]) -> None:
    folder, q, camera = recorded
    sequence = PoseSequence.read(folder, arm.tree)
    assert torch.allclose(sequence.q, q)
    assert bool(sequence.annotated.all())
    assert torch.allclose(sequence.K, camera.K)
    assert sequence.keypoints.shape == (4, len(LINKS), 3)
    assert torch.allclose(sequence.camera(arm.tree).T_cam_world, camera.T_cam_world, atol=1e-4)  # centimetres undone
    perfect = pose_errors(arm.tree, sequence, q, camera.T_cam_world)
    assert perfect.add_mm < 0.01
    assert perfect.add_auc > 0.9999
    assert perfect.joint_error_mean_rad < 1e-6


def real_style(folder: Path, unit: float, named: bool, sizes: str) -> None:
    """The folder as recordings and the exporter lay it out: their keys and order, and what belongs to other objects."""
    for path in sorted(folder.glob("0*.json")):
        data = json.loads(path.read_text())
        keypoints = data["objects"][0]["keypoints"]
        for point in keypoints:
            point["location"] = [unit * v for v in point["location"]]
        joints = (
            data["sim_state"]["joints"] if named else [{"position": j["position"]} for j in data["sim_state"]["joints"]]
        )
        arm = {
            "class": "arm",
            "instance_id": 15578836,
            "visibility": 1,
            "location": keypoints[0]["location"],
            "quaternion_xyzw": [0.5, -0.5, 0.5, -0.5],
            "pose_transform": [[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [*keypoints[0]["location"], 1]],
            "cuboid_centroid": keypoints[1]["location"],
            "projected_cuboid_centroid": keypoints[1]["projected_location"],
            "bounding_box": {"top_left": [1.0, 2.0], "bottom_right": [40.0, 50.0]},
            "keypoints": list(reversed(keypoints)) if path.stem == "000002" else keypoints,
        }
        table = {"class": "table", "visibility": 0.5, "location": [0.0, 0.0, 1.0], "keypoints": []}
        camera = {"location_worldframe": [166.5, 64.8, 199.0], "quaternion_xyzw_worldframe": [0.4, 0.08, -0.9, 0.17]}
        path.write_text(
            json.dumps({"camera_data": camera, "objects": [table, arm], "sim_state": {"joints": joints}}, indent="\t")
        )
    settings = json.loads((folder / "_camera_settings.json").read_text())["camera_settings"][0]
    size, inner = settings["captured_image_size"], settings["intrinsic_settings"]
    if sizes == "old exporter":
        entry = {"name": "Viewpoint", "horizontal_fov": 90, "intrinsic_settings": {"resX": size["width"], **inner}}
        entry["intrinsic_settings"]["resY"] = size["height"]
    else:
        entry = {"id": "", "name": "", "intrinsic_settings": {**inner, "hfov": 90, "resolution": size}}
    (folder / "_camera_settings.json").write_text(json.dumps({"camera_settings": [entry]}, indent="\t"))


@pytest.mark.parametrize(
    ("unit", "named", "sizes"), [(0.01, True, "recording"), (1.0, False, "old exporter"), (0.01, False, "recording")]
)
def test_reading_what_others_write(
    unit: float, named: bool, sizes: str, arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera]
) -> None:
    """Metres or centimetres, joints with names or in order, keypoints in any order, another object first."""
    folder, q, camera = recorded
    real_style(folder, unit, named, sizes)
    sequence = PoseSequence.read(folder, arm.tree)
    assert torch.allclose(sequence.q, q)
    assert (sequence.width, sequence.height) == (camera.width, camera.height)
    assert pose_errors(arm.tree, sequence, q, camera.T_cam_world).add_mm < 0.01


def test_keypoints_of_another_robot(arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera]) -> None:
    folder, _, _ = recorded
    real_style(folder, 0.1, True, "recording")
    with pytest.raises(InputError, match="neither metres nor centimetres fit"):
        PoseSequence.read(folder, arm.tree)


def test_errors_have_closed_forms(arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera]) -> None:
    folder, q, camera = recorded
    sequence = PoseSequence.read(folder, arm.tree)
    aside = camera.T_cam_world.clone()
    aside[0, 3] += 0.03
    turned = q.clone()
    turned[:, 0] += 2.0 * torch.pi
    turned[:, 1] += 0.1
    off = pose_errors(arm.tree, sequence, q, aside)
    assert off.add_mm == pytest.approx(30.0, rel=1e-3)
    assert off.add_auc == pytest.approx(0.7, rel=1e-3)
    errors = pose_errors(arm.tree, sequence, turned, camera.T_cam_world).joint_error_rad
    assert list(errors.values())[:3] == pytest.approx([0.0, 0.1, 0.0], abs=1e-5)
    assert add_auc(torch.tensor([0.0, 0.05, 0.2])) == pytest.approx(0.5)


def test_alignment_against_scipy() -> None:
    a = torch.randn(6, 3).double()
    R = torch.from_numpy(Rotation.random(random_state=0).as_matrix())
    b = a @ R.T + torch.tensor([0.3, -1.0, 2.0]) + 0.01 * torch.randn(6, 3)
    expected, _ = Rotation.align_vectors((b - b.mean(0)).numpy(), (a - a.mean(0)).numpy())
    T = rigid_alignment(a, b)
    assert torch.allclose(T[:3, :3], torch.from_numpy(expected.as_matrix()), atol=1e-8)
    assert torch.allclose(T[:3, :3] @ a.mean(0) + T[:3, 3], b.mean(0))


def test_points_on_one_line_put_no_camera() -> None:
    line = torch.linspace(0.0, 1.0, 4).double()[:, None] * torch.tensor([0.3, -0.2, 0.9]).double()
    with pytest.raises(InputError, match="lie on one line"):
        rigid_alignment(line + 1e-3 * torch.randn(4, 3), line)
    with pytest.raises(InputError, match="2 point"):
        rigid_alignment(torch.randn(2, 3).double(), torch.randn(2, 3).double())


@pytest.mark.parametrize("names", [("base", "turret", "upper_arm"), ("base", "palm")])
def test_too_few_keypoints_for_a_camera(
    names: tuple[str, ...], arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera]
) -> None:
    """The first links are on the waist's axis: the camera may turn about it."""
    folder, q, camera = recorded
    shutil.rmtree(folder)
    with patch(f"{__name__}.LINKS", names):
        write_ndds(folder, arm, q, camera, 100.0)
    sequence = PoseSequence.read(folder, arm.tree)
    with pytest.raises(InputError, match=r"video: .* do not say where the camera is.*--camera free"):
        sequence.camera(arm.tree)


def test_one_keypoint_has_no_unit(arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera]) -> None:
    folder, q, camera = recorded
    shutil.rmtree(folder)
    with patch(f"{__name__}.LINKS", ("palm",)):
        write_ndds(folder, arm, q, camera, 100.0)
    with pytest.raises(InputError, match="a single keypoint"):
        PoseSequence.read(folder, arm.tree)


def test_videos_that_annotate_different_joints(
    arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera]
) -> None:
    """Every number of the table stands under its own joint."""
    folder, q, camera = recorded
    sequence = PoseSequence.read(folder, arm.tree)
    annotated = sequence.annotated.clone()
    annotated[0] = False
    first, *others = arm.tree.joint_names
    T, found = camera.T_cam_world, []
    moved = q + 0.1 * torch.arange(arm.tree.dof)
    for own in (replace(sequence, annotated=annotated), sequence):
        errors = pose_errors(arm.tree, own, moved, T)
        result = ks.TrackResult(arm.tree.joint_names, q, camera, q, (0.0,) * 4, ("tracked",) * 4, 1.0, 0.5)
        found.append(Evaluated(own, result, errors))
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(found).splitlines())
    assert len({len(row) for row in (head, *rows)}) == 1
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    assert (cells[0][first], cells[1][first]) == ("-", "0.0000")
    for name in found[0].errors.joint_error_rad:
        assert cells[0][name] == cells[1][name] == f"{found[0].errors.joint_error_rad[name]:.4f}"
    assert cells[1][others[0]] == "0.1000"


def test_names_of_folders() -> None:
    assert distinct_names((Path("a/cam"), Path("b/arm"))) == ["cam", "arm"]
    assert distinct_names((Path("a/cam"), Path("b/cam"))) == ["a_cam", "b_cam"]
    assert len(set(distinct_names((Path("a_b/c"), Path("a/b_c"), Path("x/c"), Path("y/b_c"))))) == 4
    with pytest.raises(InputError, match="given twice"):
        distinct_names((Path("a/cam"), Path("b"), Path("a/../a/cam")))


def test_names() -> None:
    joints = ("joint1", "joint2", "finger_joint2")
    assert match_names(["panda_joint1", "franka/panda_finger_joint2", "velocity"], joints) == {0: 0, 1: 2}
    assert match_names(["panda_link0", "panda_hand"], ("link0", "hand")) == {0: 0, 1: 1}


@pytest.mark.parametrize("frames", [2, 4])
def test_command(
    frames: int, arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera], tmp_path: Path
) -> None:
    folder, _, _ = recorded
    arm.save(tmp_path / "arm.safetensors")
    words = ["kinesplat", "evaluate-pose", str(tmp_path / "arm.safetensors"), str(folder), "--masks"]
    words += ["--camera", "known", "--start", "annotation", "-o", str(tmp_path / "out")]
    words += ["--frames", str(frames)]
    with patch("sys.argv", words):
        cli.main()
    data = json.loads((tmp_path / "out" / "errors.json").read_text())
    assert data["videos"][0]["frames"] == frames
    assert data["videos"][0]["lost_frames"] == data["videos"][0]["doubtful_frames"] == 0
    assert data["all"]["add_mm"] < 10.0
    assert data["all"]["add_auc"] > 0.9
    assert "ADD" in (tmp_path / "out" / "errors.md").read_text()
    assert list((tmp_path / "out").glob("video_*.png"))


def test_a_location_of_one_number(arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera]) -> None:
    folder, _, _ = recorded
    frame = json.loads((folder / "000001.json").read_text())
    frame["objects"][0]["keypoints"][1]["location"] = [0.5]
    (folder / "000001.json").write_text(json.dumps(frame))
    with pytest.raises(InputError, match=r"000001\.json.*expected three numbers"):
        PoseSequence.read(folder, arm.tree)


def test_no_frames_asked_for(
    arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arm.save(tmp_path / "arm.safetensors")
    words = ["kinesplat", "evaluate-pose", str(tmp_path / "arm.safetensors"), str(recorded[0]), "--frames", "-1"]
    with patch("sys.argv", words), pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "expected at least 1" in " ".join(capsys.readouterr().err.split())


def test_broken_folders(arm: ks.SelfModel, recorded: tuple[Path, torch.Tensor, ks.Camera], tmp_path: Path) -> None:
    folder, _, _ = recorded
    with pytest.raises(InputError, match="No such file"):
        PoseSequence.read(tmp_path / "nothing", arm.tree)
    (folder / "000001.rgb.png").unlink()
    with pytest.raises(InputError, match=r"no picture 000001\.rgb\.jpg"):
        PoseSequence.read(folder, arm.tree)
    (folder / "000001.json").write_text("{")
    with pytest.raises(InputError, match=r"000001\.json: no NDDS annotation"):
        PoseSequence.read(folder, arm.tree)
    frame = json.loads((folder / "000000.json").read_text())
    frame["sim_state"]["joints"] = [{"name": "other", "position": 0.0}]
    for i in range(4):
        (folder / f"{i:06}.json").write_text(json.dumps(frame))
    with pytest.raises(InputError, match="no joint of the robot is annotated"):
        PoseSequence.read(folder, arm.tree)
    for joints in ([{"name": "joint1", "position": 0.0}, {"position": 0.0}], [{"name": 3, "position": 0.0}]):
        frame["sim_state"]["joints"] = joints
        (folder / "000000.json").write_text(json.dumps(frame))
        with pytest.raises(InputError, match=r"000000\.json: no NDDS annotation"):
            PoseSequence.read(folder, arm.tree)
    settings = json.loads((folder / "_camera_settings.json").read_text())
    entry = settings["camera_settings"][0]
    for inner, message in (({**entry["intrinsic_settings"], "fx": 0}, "fx is 0"), ([], "no NDDS camera settings")):
        text = json.dumps({"camera_settings": [{**entry, "intrinsic_settings": inner}]})
        (folder / "_camera_settings.json").write_text(text)
        with pytest.raises(InputError, match=message):
            PoseSequence.read(folder, arm.tree)
    (folder / "_camera_settings.json").write_text("{}")
    with pytest.raises(InputError, match="no NDDS camera settings"):
        PoseSequence.read(folder, arm.tree)
