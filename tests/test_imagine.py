"""From a video to motion: what is behind the robot, joints of coarse frames, the whole of `imagine`, its command."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tiny_video_models import FRAMES, SIZE, tiny_model

import kinesplat as ks
from kinesplat import cli
from kinesplat.description.sources import named_file
from kinesplat.errors import InputError
from kinesplat.files import write_png
from kinesplat.imagination.behind import behind_robot, silhouettes
from kinesplat.imagination.following import follow
from kinesplat.imagination.joints import joints_of
from kinesplat.imagination.lerobot import Episode, write_episodes
from kinesplat.imagination.tabletop import COLOURS, HALF_BLOCK, Scene, Tabletop, camera
from kinesplat.video import write_video
from kinesplat.vision.video_diffusion import load_video_model

PX = 48
PROMPT = "reach the [red] block [/now] :cat:"
"""Brackets and colons that are no markup."""
theirs = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(scope="module")
def world() -> Tabletop:
    return Tabletop()


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene.random(torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def motion(world: Tabletop, scene: Scene) -> torch.Tensor:
    """Three frames of the way to the red block."""
    return world.reaching(scene, "red", 41)[::5][:3].float()


@pytest.fixture(scope="module")
def table(scene: Scene) -> torch.Tensor:
    """A table with blocks, drawn by hand: grey below a line, squares where blocks are."""
    picture = torch.ones(PX, PX, 3)
    picture[PX // 2 :] = torch.tensor([0.6, 0.57, 0.55])
    for name, (x, y) in scene.blocks.items():
        pixel, _ = camera(PX).project(torch.tensor([[x, y, HALF_BLOCK]]))
        column, row = pixel[0].long().tolist()
        picture[row - 1 : row + 2, column - 1 : column + 2] = torch.tensor(COLOURS[name])
    return picture


@pytest.fixture(scope="module")
def video(kinearm: ks.SelfModel, motion: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return drawn(kinearm, motion, table)


def drawn(arm: ks.SelfModel, q: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = arm.render(q, camera(PX), (0.0, 0.0, 0.0))
    assert out.rgb is not None
    assert out.alpha is not None
    return (out.rgb + (1.0 - out.alpha[..., None]) * table).clamp(0.0, 1.0)


def test_what_the_robot_uncovers_is_behind_it(
    kinearm: ks.SelfModel, motion: torch.Tensor, table: torch.Tensor, video: torch.Tensor
) -> None:
    behind = behind_robot(kinearm, video, motion, camera(PX))
    ever = ~silhouettes(kinearm, motion, camera(PX)).all(dim=0)
    assert (behind - table)[ever].abs().max() < 0.03
    assert 0.8 < ever.float().mean() < 1.0
    assert torch.isfinite(behind).all()
    one = behind_robot(kinearm, video[:1], motion[:1], camera(PX))
    free = ~silhouettes(kinearm, motion[:1], camera(PX))[0]
    assert torch.equal(one[free], video[0][free])


def test_joints_of_coarse_frames(kinearm: ks.SelfModel, motion: torch.Tensor, video: torch.Tensor) -> None:
    found = follow(kinearm, video, camera(PX), motion[0])
    off = (found.q - motion).abs()
    assert torch.equal(found.q[0], motion[0])
    assert off[:, :3].max() < 0.03
    assert off[:, :6].mean() < 0.05
    assert found.verdict == "tracked"


def test_a_frame_that_shows_no_robot_is_lost(kinearm: ks.SelfModel, motion: torch.Tensor, video: torch.Tensor) -> None:
    noise = torch.rand(video[:1].shape, generator=torch.Generator().manual_seed(0))
    arm = kinearm.subsample(500)
    assert follow(arm, torch.cat([video[:1], noise]), camera(PX), motion[0]).states == ("tracked", "lost")
    elsewhere = motion[0] + torch.tensor([1.5, 0, 0, 0, 0, 0, 0])
    table = torch.where(silhouettes(kinearm, motion[:1], camera(PX))[0, ..., None], noise[0], video[0])
    alone = follow(arm, video[:1], camera(PX), elsewhere, table)
    assert (alone.states, alone.verdict) == (("lost",), "failed")


class Drawn:
    """A video model that knows the answer."""

    def __init__(self, frames: torch.Tensor, fps: float) -> None:
        self.frames = frames
        self.fps = fps
        self.asked: list[tuple[tuple[int, ...], str, int]] = []

    def generate(self, image: torch.Tensor, prompt: str, *, seed: int = 0) -> torch.Tensor:
        self.asked.append((tuple(image.shape), prompt, seed))
        return self.frames


def test_a_sentence_becomes_motion(
    kinearm: ks.SelfModel, world: Tabletop, scene: Scene, motion: torch.Tensor, video: torch.Tensor
) -> None:
    maker = Drawn(video[:2].clone(), 4.0)
    maker.frames[0] = 0.0  # what a model makes of the first frame is not used: the picture is
    motion, video = motion[:2], video[:2]
    big = torch.nn.functional.interpolate(video[0].movedim(-1, 0)[None], (96, 72))[0].movedim(0, -1)
    state = world.data(scene)
    result = ks.imagine(
        kinearm,
        big,
        "reach the red block",
        camera(PX).resized(72, 96),
        video_model=maker,
        q_init=motion[0],
        robot=world.robot,
        state=state,
        seed=3,
    )
    assert result.seconds == 0.25  # the video model's own
    assert maker.asked == [((96, 72, 3), "reach the red block", 3)]
    assert (result.video[0] - video[0]).abs().mean() < 0.03
    assert (result.q - motion)[:, :3].abs().max() < 0.05
    assert result.check is not None
    assert result.check.passed
    assert result.execution is not None
    torch.testing.assert_close(result.execution.q_end.float(), result.q[-1], atol=0.02, rtol=0)
    torch.testing.assert_close(joints_of(world.robot, state), result.execution.q_end, atol=0.01, rtol=0)
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(written) == {"prompt", "seconds_per_frame", "track", "check", "execution"}
    assert "executed: 2 frames" in result.report()


def test_what_imagine_refuses(kinearm: ks.SelfModel, world: Tabletop, scene: Scene, video: torch.Tensor) -> None:
    view = camera(PX)
    with pytest.raises(InputError, match="not the robot in it"):
        ks.imagine(kinearm, video[0], "x", view, video=video, state=world.data(scene))
    with pytest.raises(InputError, match="its camera 24 x 24 px"):
        ks.imagine(kinearm, video[0], "x", view.resized(24, 24), video=video)
    for broken, words in (
        ([], "no frame"),
        ([video[0], video[1, :24]], "frame 1 of the video is 48 x 24 px, the first 48 x 48 px"),
        ([video[0], 255.0 * video[1]], r"frame 1 of the video: .*expected \[0, 1\]"),
    ):
        with pytest.raises(InputError, match=words):
            ks.imagine(kinearm, video[0], "x", view, video=broken)
    with pytest.raises(InputError, match="fps is 0"):
        ks.imagine(kinearm, video[0], "x", view, video=video, fps=0.0)


@pytest.fixture
def files(tmp_path: Path, video: torch.Tensor, motion: torch.Tensor) -> list[str]:
    """The command's words for a ready video."""
    write_png(tmp_path / "now.png", video[0])
    folder = tmp_path / "video"
    folder.mkdir()
    for i, frame in enumerate(video[:2]):
        write_png(folder / f"{i}.png", frame)
    (tmp_path / "camera.json").write_text(json.dumps(camera(PX).to_json()))
    words = ["kinesplat", "imagine", "kinearm", str(tmp_path / "now.png"), PROMPT]
    words += ["--camera", str(tmp_path / "camera.json"), "--video", str(folder), "-o", str(tmp_path / "out")]
    return [*words, "--q-init", *(f"{value:.5f}" for value in motion[0].tolist())]


def test_the_command(tmp_path: Path, files: list[str], motion: torch.Tensor, capsys: pytest.CaptureFixture) -> None:
    scene = str(named_file("kinearm", ""))
    with patch("sys.argv", [*files, "--robot", "kinearm", "--scene", scene, "--fps", "2"]):
        cli.main()
    assert f"{PROMPT!r}: 2 frames" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "imagine.json").read_text())
    off = torch.tensor(written["track"]["q"]) - motion[:2]
    assert off[:, :3].abs().max() < 0.05
    assert written["execution"]["error_rad"] < 0.5  # the packaged arm sags under its own weight
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "imagined.gif",
        "overlay.gif",
        "track.csv",
        "imagine.json",
    }


def test_a_file_is_followed_at_its_own_rate(
    tmp_path: Path, files: list[str], video: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float | None] = []

    def imagined(*given: object, fps: float | None, **named: object) -> None:
        asked.append(fps)
        raise InputError("the rate was seen")

    monkeypatch.setattr("kinesplat.commands.imagine.imagine_motion", imagined)
    film = write_video(tmp_path / "film.gif", video[:2], 20.0)
    for shown, more in ((film, []), (film, ["--fps", "4"]), (tmp_path / "video", [])):
        with patch("sys.argv", [*files, "--video", str(shown), *more]), pytest.raises(SystemExit):
            cli.main()
    assert asked == [20.0, 4.0, None]


def test_the_command_s_refusals(files: list[str], capsys: pytest.CaptureFixture) -> None:
    for more, words in (
        (["--scene", "scene.xml"], "--scene needs --robot"),
        (["--robot", "kinearm", "--scene", "none.xml"], "cannot read this scene"),
    ):
        with patch("sys.argv", [*files, *more]), pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


@theirs
def test_the_fine_tuning_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("accelerate", "peft", "diffusers", "pyarrow"):
        pytest.importorskip(name)
    tiny_model().save_pretrained(tmp_path / "base")
    frames = torch.randint(256, (5, SIZE, SIZE, 3), dtype=torch.uint8)
    write_episodes(tmp_path / "data", [Episode(frames, "wave", None, 5.0)] * 2, "arm")
    words = ["kinesplat", "finetune-video", str(tmp_path / "data"), "-o", str(tmp_path / "out")]
    words += ["--base", str(tmp_path / "base"), "--frames", str(FRAMES), "--height", str(SIZE), "--width", str(SIZE)]
    with patch("sys.argv", [*words, "--steps", "2", "--rank", "2", "--minutes", "0"]):
        cli.main()
    said = capsys.readouterr().out
    assert "2 clips of 3 frames, 2.5 per second" in said
    assert "after 1 steps of 2; --resume goes on" in " ".join(said.split())
    tuned = load_video_model(tmp_path / "out")
    assert tuned.fps == 2.5  # two steps in 0.8 s
    made = tuned.generate(torch.rand(SIZE, SIZE, 3), "wave")
    write_video(tmp_path / "made.gif", made, 5.0)
    assert made.shape == (FRAMES, SIZE, SIZE, 3)
