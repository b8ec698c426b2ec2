"""The demo, scored: its packaged pictures, its answers, and the page it writes."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kinesplat import demo, zoo
from kinesplat.files import read_image
from kinesplat.inverse import reconstruct


def test_packaged_targets_start_well_off_and_show_the_packaged_robot() -> None:
    robot, targets = demo.packaged_targets()
    model = zoo.load(robot)
    assert len(targets) >= 4
    for target in targets:
        assert demo.joint_error(model, target.q_start, target.q_true) > 0.1
        alpha = model.render(target.q_true, target.camera).alpha
        assert alpha is not None
        overlap = ((alpha > 0.5) & (target.mask > 0.5)).sum() / ((alpha > 0.5) | (target.mask > 0.5)).sum()
        assert overlap > 0.93


def test_one_target_is_solved_from_its_picture_alone() -> None:
    robot, targets = demo.packaged_targets()
    model, target = zoo.load(robot), targets[2]
    fit = reconstruct(model, target.rgb, target.camera, masks=target.mask, q_init=target.q_start)
    assert demo.joint_error(model, fit.q, target.q_true) < 0.02


def test_camera_error_is_distance_and_angle() -> None:
    _, targets = demo.packaged_targets()
    camera = targets[0].camera
    T = torch.tensor([[0.0, -1.0, 0.0, 0.3], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.4], [0.0, 0.0, 0.0, 1.0]])
    moved = type(camera)(camera.K, T @ camera.T_cam_world, camera.width, camera.height)
    metres, degrees = demo.camera_error(moved, camera)
    assert metres == pytest.approx(0.5, abs=1e-5)
    assert degrees == pytest.approx(90.0, abs=1e-3)


@pytest.mark.slow
def test_the_whole_demo_meets_its_promise_and_writes_its_report(tmp_path: Path) -> None:
    text = io.StringIO()
    demo.run(tmp_path / "demo", seed=0, console=Console(file=text))
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert len(report["targets"]) >= 4
    for target in report["targets"]:
        assert target["joint_error_rad"] < 0.02
        for kind in ("target", "start", "fit", "overlay", "error"):
            assert read_image(tmp_path / "demo" / f"{target['name']}_{kind}.png").shape == (256, 256, 3)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<img") == 6 * len(report["targets"])
    assert page.endswith("</html>\n")
