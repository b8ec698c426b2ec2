"""Tracking: a moving arm before clutter, losses and recoveries, videos in and out, resumed runs."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import kinesplat as ks
from kinesplat import cli
from kinesplat.commands.track import origin, read_partial, row_of
from kinesplat.errors import InputError, UnseenError
from kinesplat.files import write_png
from kinesplat.inverse.mending import mended
from kinesplat.inverse.track import TrackOptions, start_tracker
from kinesplat.inverse.track_result import TrackedFrame
from kinesplat.video import frame_rate, read_frames, write_video

FRAMES = 8


@pytest.fixture(scope="module")
def arm(kinearm: ks.SelfModel) -> ks.SelfModel:
    return kinearm.subsample(2_000)


@pytest.fixture(scope="module")
def clip(arm: ks.SelfModel) -> tuple[torch.Tensor, ks.Camera, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Configurations, camera, frames before clutter, masks, and the clutter alone."""
    tree = arm.tree
    t = torch.linspace(0.0, 1.0, FRAMES)[:, None]
    swing = torch.linspace(0.5, 1.0, tree.dof) * torch.minimum(0.3 * (tree.q_upper - tree.q_lower), torch.tensor(0.2))
    q = tree.clamp(tree.q_canonical + swing.float() * torch.sin(2.0 * math.pi * t * 0.6 + torch.arange(tree.dof)))
    camera = ks.Camera.framing(arm.posed(q).means.flatten(0, 1), width=72, height=64)
    out = arm.render(q, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    clutter = torch.rand(1, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    clutter = torch.nn.functional.interpolate(clutter, size=(64, 72), mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1)
    frames = (out.rgb - (1.0 - out.alpha[..., None]) * (1.0 - clutter)).clamp(0, 1)
    return q, camera, frames, out.alpha.clamp(0, 1), clutter


def arm_off(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Largest error of waist, shoulder and elbow; what a picture of 64 px shows of the wrist is little."""
    return (a - b).abs()[:, :3].amax(dim=1)


def test_before_clutter(arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]) -> None:
    q, camera, frames, _, clutter = clip
    result = ks.track(arm, iter(frames), camera, backdrop=clutter, q_init=q[0] + 0.05)
    assert result.q.shape == q.shape
    assert arm_off(result.q, q).max() < 0.03
    assert result.states == ("searched", *["tracked"] * (FRAMES - 1))
    assert result.verdict == "tracked"
    assert "8 frames" in result.report()
    assert result.std.shape == q.shape


def test_lost_and_found_again(arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]) -> None:
    """Frames without the robot; afterwards it is elsewhere."""
    q, camera, frames, _, scene = clip
    order = [0, 1, None, None, 5, 6]
    shown = [scene if i is None else frames[i] for i in order]
    with patch("kinesplat.inverse.tracker.RETRY_FRAMES", 2):
        result = ks.track(arm, shown, camera, backdrop=scene, q_init=q[0])
    assert result.states[2:4] == ("lost", "lost")
    assert result.verdict == "partly lost"
    assert torch.equal(result.q[2], result.q[1])
    assert "lost" not in result.states[4:]
    assert arm_off(result.q[4:], q[5:7]).max() < 0.03


@pytest.mark.parametrize("masked", [True, False])
def test_frames_that_show_no_robot_are_lost(masked: bool, arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]) -> None:
    """Empty masks, or nothing but the plain background: before the robot comes, in the middle, and at the end."""
    q, camera, frames, masks, scene = clip
    order = [None, 0, None, 1, None]
    white = torch.ones_like(scene)
    plain = [white if i is None else frames[i] - (1.0 - masks[i, ..., None]) * (scene - 1.0) for i in order]
    shapes = [torch.zeros_like(masks[0]) if i is None else masks[i] for i in order] if masked else None
    shown = [scene if i is None else frames[i] for i in order] if masked else [p.clamp(0, 1) for p in plain]
    result = ks.track(arm, shown, camera, masks=shapes, q_init=q[0])
    assert result.states == ("lost", "searched", "lost", result.states[3], "lost")
    assert result.states[3] != "lost"
    assert arm_off(result.q[[1, 3]], q[:2]).max() < 0.03
    assert torch.equal(result.q[4], result.q[3])
    assert result.verdict == "failed"  # three of five
    json.dumps(result.to_json(), allow_nan=False)
    with pytest.raises(InputError, match="no robot in any frame"):
        ks.track(arm, [shown[0]] * 2, camera, masks=None if shapes is None else [shapes[0]] * 2)


def test_a_robot_across_the_border_of_a_frame(arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]) -> None:
    """Before a plain background a frame whose own border is of many colours is read before that of the others."""
    _, camera, _, _, _ = clip
    ones = torch.ones(64, 72, 3)
    many = torch.rand(64, 72, 3, generator=torch.Generator().manual_seed(1))
    square = ones.clone()
    square[20:40, 20:40] = 0.2
    read = start_tracker(arm, [square, square, many, square, square], camera).clip
    seen = read.observation(2)
    assert seen.backdrop is not None
    assert torch.equal(seen.backdrop[0], ones)
    assert read.observation(1).backdrop is None


def test_a_robot_out_of_the_picture_is_a_misfit(arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]) -> None:
    q, camera, frames, masks, _ = clip
    tracker = start_tracker(arm, frames, camera, TrackOptions(masks=masks))
    right = TrackedFrame(q[0].float(), camera.T_cam_world, torch.zeros_like(q[0]), 0.0, "tracked")
    assert not tracker.misfits(0, right)
    aside = camera.T_cam_world.clone()
    aside[0, 3] += 100.0
    assert tracker.misfits(0, replace(right, T_cam_world=aside))


def test_an_answer_with_the_camera_inside_the_robot_is_a_loss(
    arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]
) -> None:
    q, camera, frames, masks, _ = clip
    tracker = start_tracker(arm, frames, camera, TrackOptions(masks=masks))
    last = TrackedFrame(q[5].float(), camera.T_cam_world, torch.zeros_like(q[0]), 1e-9, "tracked")
    inside = patch("kinesplat.inverse.tracker.reconstruct", side_effect=UnseenError("inside the robot"))
    with inside, patch.object(tracker, "misfits", return_value=True):
        assert tracker.next_frame(1, [last]).state == "lost"


def test_a_robot_that_comes_back_after_long_is_looked_for_at_once(
    arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]
) -> None:
    q, camera, frames, masks, _ = clip
    shapes = masks.clone()
    shapes[1:4] = 0.0
    tracker = start_tracker(arm, frames, camera, TrackOptions(masks=shapes))
    last = TrackedFrame(q[0].float(), camera.T_cam_world, torch.zeros_like(q[0]), 1e-9, "lost")
    before = [replace(last, state="tracked"), last, last, last]
    tried = patch("kinesplat.inverse.tracker.reconstruct", side_effect=UnseenError("nothing"))
    with patch("kinesplat.inverse.tracker.RETRY_FRAMES", 2), tried as reconstruct:
        assert not list(tracker.search(4, last, before))
        assert reconstruct.call_count == 1
        assert not list(tracker.search(5, last, before))
        assert reconstruct.call_count == 1


def test_with_masks_and_a_moving_camera(arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]) -> None:
    q, camera, frames, masks, _ = clip
    first = ks.Camera(camera.K, camera.T_cam_world.clone(), camera.width, camera.height)
    result = ks.track(arm, frames[:4], first, masks=masks[:4], q_init=q[0], optimize_camera=True)
    assert result.camera.T_cam_world.shape == (4, 4, 4)
    assert result.verdict == "tracked"
    moved = result.camera.T_cam_world @ arm.tree.forward_kinematics(result.q)[:, -1].float()
    still = camera.T_cam_world @ arm.tree.forward_kinematics(q[:4])[:, -1].float()
    assert (moved - still)[:, :3, 3].norm(dim=-1).max() < 0.08  # the hand in the camera; base and joints trade off


def test_wrong_frames_are_mended_from_the_others(arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]) -> None:
    """The first frames were solved wrongly, as they are before a median that shows the robot; the others are right."""
    q, camera, frames, _, _ = clip
    tracker = start_tracker(arm, frames, camera)
    assert tracker.clip.guessed
    found = []
    for i, truth in enumerate(q.float()):
        start = TrackedFrame(truth, camera.T_cam_world, torch.zeros_like(truth), 0.0, "tracked")
        right = tracker.solve(i, [start], truth, "tracked")
        wrong = replace(right, q=arm.tree.clamp(truth + 0.3), loss=10.0 * right.loss)
        found.append(wrong if i < 3 else right)
    new = mended(tracker, found)
    assert arm_off(torch.stack([frame.q for frame in new]), q).max() < 0.03
    given = start_tracker(arm, frames, camera, TrackOptions(backdrop=frames[0]))
    assert mended(given, found) == found  # the user's own backdrop is not questioned


def test_a_robot_that_stands_still_is_its_own_backdrop(arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]) -> None:
    q, camera, frames, _, _ = clip
    result = ks.track(arm, [frames[0]] * 4, camera, q_init=q[0])
    assert set(result.states) == {"doubtful"}
    assert result.verdict == "ambiguous"
    assert "doubtful" in result.report()


@pytest.mark.slow
def test_a_short_clip_is_right_or_says_so(kinearm: ks.SelfModel) -> None:
    """32 frames before clutter; the robot moves by a fraction of its size, and nothing is known but the camera."""
    arm, t = kinearm.subsample(3_000), torch.arange(32.0)[:, None] / 32.0
    swing = (0.25 * (arm.tree.q_upper - arm.tree.q_lower)).clamp(max=0.4).float()
    q = arm.tree.clamp(arm.tree.q_canonical.float() + swing * torch.sin(2.0 * t + 1.7 * torch.arange(arm.tree.dof)))
    camera = ks.Camera.framing(arm.posed(q[::4]).means.flatten(0, 1), width=128, height=128)
    out = arm.render(q, camera)
    assert out.rgb is not None
    assert out.alpha is not None
    clutter = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16), size=(128, 128), mode="bicubic")[0]
    scene = clutter.permute(1, 2, 0).clamp(0, 1)
    result = ks.track(arm, (out.rgb - (1.0 - out.alpha[..., None]) * (1.0 - scene)).clamp(0, 1), camera)
    sure = torch.tensor([state in ("tracked", "searched") for state in result.states])
    assert not bool((arm_off(result.q, q)[sure] > 0.1).any())
    assert bool(sure.any())


def test_frames_do_not_depend_on_interruptions(arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]) -> None:
    q, camera, frames, _, _ = clip
    with patch("kinesplat.inverse.tracker.BACKDROP_STEP", 2):
        tracker = start_tracker(arm, frames, camera, TrackOptions(q_init=q[0]))
        whole = list(tracker.frames())
        rest = list(tracker.frames(whole[:5]))
    assert len(rest) == FRAMES - 5
    for a, b in zip(whole[5:], rest, strict=True):
        assert torch.equal(a.q, b.q)
        assert a.loss == b.loss


def test_resuming_only_what_is_the_same(arm: ks.SelfModel, clip: tuple[torch.Tensor, ...], tmp_path: Path) -> None:
    """Frames are taken over from a run with the same model, video, camera and options only."""
    q, camera, frames, masks, _ = clip
    asked = TrackOptions(masks=masks, q_init=q[0])
    tracker = start_tracker(arm, frames, camera, asked)
    frame = TrackedFrame(q[0].float(), camera.T_cam_world, torch.zeros(arm.tree.dof), 0.5, "searched")
    path = tmp_path / "partial.jsonl"
    path.write_text("\n".join([json.dumps(origin(tracker)), row_of(frame)]))
    assert torch.equal(read_partial(path, tracker)[0].q, frame.q)
    others = {
        "another model": start_tracker(arm.subsample(1_900), frames, camera, asked),
        "another video": start_tracker(arm, frames.flip(0), camera, asked),
        "another camera": start_tracker(arm, frames, replace(camera, K=1.01 * camera.K), asked),
        "other options": start_tracker(arm, frames, camera, replace(asked, q_init=None)),
    }
    for message, other in others.items():
        with pytest.raises(InputError, match=message):
            read_partial(path, other)
    for text in ("null", row_of(frame), "{", ""):
        path.write_text(text)
        with pytest.raises(InputError, match="without --resume"):
            read_partial(path, tracker)


def test_command(
    arm: ks.SelfModel, clip: tuple[torch.Tensor, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From a folder of pictures to a table and an overlay GIF; an interrupted run goes on."""
    q, camera, frames, masks, _ = clip
    for name, pictures in (("frames", frames), ("masks", masks)):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures[:4]):
            write_png(tmp_path / name / f"{i:03}.png", picture)
    arm.save(tmp_path / "arm.safetensors")
    (tmp_path / "camera.json").write_text(json.dumps(camera.to_json()))
    start = [f"{v:.4f}" for v in q[0].tolist()]
    words = ["kinesplat", "track", str(tmp_path / "arm.safetensors"), str(tmp_path / "frames")]
    words += ["--camera", str(tmp_path / "camera.json"), "-o", str(tmp_path / "out.csv"), "--q-init", *start]
    words += ["--masks", str(tmp_path / "masks")]
    with patch("sys.argv", [*words, "--overlay", str(tmp_path / "out.gif"), "--json", str(tmp_path / "out.json")]):
        cli.main()
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["searched", "tracked", "tracked", "tracked"]
    found = torch.tensor([[float(row[name]) for name in arm.tree.joint_names] for row in rows])
    assert arm_off(found, q[:4]).max() < 0.03
    assert len(list(read_frames(tmp_path / "out.gif"))) == 4
    assert not list(tmp_path.glob("*.partial.jsonl"))
    assert "4 frames" in capsys.readouterr().out
    before = (tmp_path / "out.csv").read_bytes()
    partial = tmp_path / "out.csv.partial.jsonl"
    cut_off = patch("kinesplat.commands.track.write_table", side_effect=KeyboardInterrupt)
    with patch("sys.argv", words), cut_off, pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    lines = partial.read_text().splitlines()
    for broken in (lines[3][:40], "null", '{"q": 1}', lines[3].replace("[", "[[0.0],", 1)):
        partial.write_text("\n".join([*lines[:3], broken]))
        with patch("sys.argv", [*words, "--resume"]), cut_off, pytest.raises(SystemExit):
            cli.main()
        assert partial.read_text().splitlines() == lines  # nothing is written behind what is broken
    with patch("sys.argv", [*words, "--resume"]):
        cli.main()
    assert (tmp_path / "out.csv").read_bytes() == before
    partial.write_text("\n".join(lines))
    for other, message in ((["--colour-weight", "0.5"], "other options"), (["--overlay", "a.avi"], ".mp4 or .gif")):
        with patch("sys.argv", [*words, "--resume", *other]), pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_videos(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = torch.rand(3, 1, 1, 3).expand(3, 33, 48, 3)
    write_video(tmp_path / "a.mp4", frames, 25.0)
    back = torch.stack(list(read_frames(tmp_path / "a.mp4"))).float() / 255.0
    assert back.shape == (3, 32, 48, 3)
    assert (back - frames[:, :32]).abs().mean() < 0.03
    assert frame_rate(tmp_path / "a.mp4") == pytest.approx(25.0)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match=r"b\.mp4: not a video"):
        list(read_frames(tmp_path / "b.mp4"))
    with pytest.raises(InputError, match=r"\.mp4 or \.gif"):
        write_video(tmp_path / "a.webm", frames, 25.0)
    with pytest.raises(InputError, match="no such file"):
        read_frames(tmp_path / "c.mp4")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(arm: ks.SelfModel, clip: tuple[torch.Tensor, ...]) -> None:
    _, camera, frames, masks, _ = clip
    with pytest.raises(InputError, match="no frame"):
        ks.track(arm, [], camera)
    with pytest.raises(InputError, match="no mask for frame 2"):
        ks.track(arm, frames, camera, masks=masks[:2])
    with pytest.raises(InputError, match="frame 1: images are"):
        ks.track(arm, [frames[0], frames[1, :-1]], camera)
    with pytest.raises(InputError, match="three frames or more"):
        ks.track(arm, frames[:2], camera)
    with pytest.raises(InputError, match="needs masks or a plain background"):
        ks.track(arm, frames, camera, optimize_camera=True)
    with pytest.raises(InputError, match="camera is None"):
        ks.track(arm, frames)
