"""The command line as a user meets it: files written, exit status, one line per mistake."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kinesplat.camera import Camera
from kinesplat.cli import main
from kinesplat.files import read_image, read_mask, write_png
from kinesplat.self_model import SelfModel


@dataclass(frozen=True)
class Ended:
    """What a finished command left."""

    returncode: int
    stdout: str
    stderr: str


def kinesplat(*arguments: str | Path) -> Ended:
    """Run a command in this process; `test_the_installed_program_runs` starts a real one."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["kinesplat", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Ended(code, stdout.getvalue(), stderr.getvalue())


def one_line(result: Ended) -> str:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def photo(kinearm: SelfModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with photo.png, mask.png and camera.json of the arm near its canonical configuration."""
    folder = tmp_path_factory.mktemp("photo")
    q = kinearm.tree.clamp(kinearm.tree.q_canonical.float() + 0.1)
    camera = Camera.framing(kinearm.posed(q).means)
    out = kinearm.render(q, camera)
    assert out.alpha is not None
    write_png(folder / "photo.png", out.rgb)
    write_png(folder / "mask.png", out.alpha)
    (folder / "camera.json").write_text(json.dumps(camera.to_json()))
    (folder / "q.json").write_text(json.dumps(q.tolist()))
    return folder


def test_build_then_render_writes_pictures_that_agree(tmp_path: Path) -> None:
    built = kinesplat(
        "build", "kinearm", "-o", tmp_path / "arm.safetensors", "--n", "2000", "--json", tmp_path / "b.json"
    )
    assert built.returncode == 0, built.stderr
    assert "wrote" in built.stdout
    assert json.loads((tmp_path / "b.json").read_text())["gaussians"] == 2000
    rendered = kinesplat(
        "render", tmp_path / "arm.safetensors", "-o", tmp_path / "arm.png", "--size", "128",
        "--q", *["0.1"] * 5, "-0.2", "0.01", "--mask", "--depth", "--link-id", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert rendered.returncode == 0, rendered.stderr
    rgb, mask = read_image(tmp_path / "arm.png"), read_mask(tmp_path / "arm_mask.png")
    depth = np.array(Image.open(tmp_path / "arm_depth.png"))
    assert rgb.shape == (128, 128, 3)
    assert 0.03 < mask.mean() < 0.9
    assert (rgb[mask == 0] == 1).all()
    assert ((depth > 0) == (mask.numpy() > 0))[mask.numpy() > 0.1].all()
    assert read_image(tmp_path / "arm_link_id.png").reshape(-1, 3).unique(dim=0).shape[0] > 4
    assert len(json.loads((tmp_path / "r.json").read_text())["files"]) == 4


def test_reconstruct_finds_the_joints_and_shows_them(kinearm: SelfModel, photo: Path, tmp_path: Path) -> None:
    start = [f"{value:.4f}" for value in kinearm.tree.q_canonical.tolist()]
    result = kinesplat(
        "reconstruct", "kinearm", photo / "photo.png", "--camera", photo / "camera.json", "--mask", photo / "mask.png",
        "--q-init", *start, "-o", tmp_path / "fit", "--json", tmp_path / "fit.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    fit = json.loads((tmp_path / "fit.json").read_text())
    error = torch.tensor(fit["q"]) - torch.tensor(json.loads((photo / "q.json").read_text()))
    assert error.abs().max() < 0.02
    assert json.loads((tmp_path / "fit" / "fit.json").read_text()) == fit
    for kind in ("target", "start", "fit", "overlay", "error"):
        assert read_image(tmp_path / "fit" / f"0_photo_{kind}.png").shape == (256, 256, 3)
    assert (tmp_path / "fit" / "0_photo_film.gif").stat().st_size > 1000


def test_inspect_tells_what_a_description_holds(tmp_path: Path) -> None:
    result = kinesplat("inspect", "kinearm", "-o", tmp_path / "arm.png", "--json", tmp_path / "arm.json")
    assert result.returncode == 0, result.stderr
    assert "wrist_roll" in result.stdout
    assert "right_finger" in result.stdout
    assert json.loads((tmp_path / "arm.json").read_text())["dof"] == 7
    assert read_image(tmp_path / "arm.png").mean() < 0.99


def test_names_are_printed_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets and colons are no markup, in lines, in titles of tables, and in refusals."""
    monkeypatch.chdir(tmp_path)
    name = "[bold]arm[/red]:cat:.safetensors"
    Path(name).parent.mkdir(parents=True)
    built = kinesplat("build", "kinearm", "-o", name, "--n", "500")
    assert f"wrote {name}: " in built.stdout
    assert name in kinesplat("models", name).stdout
    assert f"none{name}" in one_line(kinesplat("models", f"none{name}"))


def test_models_lists_the_packaged_ones_and_their_joints() -> None:
    listed = kinesplat("models")
    assert listed.returncode == 0
    assert "franka_emika_panda" in listed.stdout
    joints = kinesplat("models", "kinearm")
    assert "wrist_roll" in joints.stdout


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "build",
        "inspect",
        "render",
        "reconstruct",
        "retarget",
        "text",
        "models",
        "benchmark",
        "imagine",
        "finetune-video",
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    result = kinesplat(command, "--help")
    assert result.returncode == 0
    for option in ("--device", "--seed", "--json"):
        assert option in result.stdout


def test_bad_usage_and_input_end_with_status_2_and_leave_nothing(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked_types: None
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.safetensors"
    assert kinesplat("build", "kinearm", "-o", broken, "--n", "500").returncode == 0
    broken.write_bytes(broken.read_bytes()[:3000])
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.xml").write_text("<mujoco><body></mujoco>")
    camera, picture = photo / "camera.json", photo / "photo.png"
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("render", "kinearmm", "-o", "x.png"), "kinearm"),
        (("render", tmp_path / "none.safetensors", "-o", "x.png"), "none.safetensors"),
        (("render", broken, "-o", "x.png"), "broken.safetensors"),
        (("render", "kinearm", "-o", "x.png", "--q", "0.1", "0.2"), "7 joints"),
        (("render", "kinearm", "-o", "x.png", "--q", *["nan"] * 7), "nan"),
        (("render", "kinearm", "-o", "x.png", "--camera", tmp_path / "bad.json"), "bad.json"),
        (("render", "kinearm", "-o", "nowhere/x.png"), "nowhere"),
        (("render", "kinearm", "-o", "x.png", "--size", "0"), "image size"),
        (("render", "kinearm", "-o", "x.png", "--seed", "-1"), "--seed -1"),
        (("reconstruct", "kinearm", "--camera", camera, "-o", "x"), "no picture"),
        (("reconstruct", "kinearm", picture, "-o", "x"), "--intrinsics"),
        (("build", "no_such_robot_at_all", "-o", "x.safetensors"), "no_such_robot_at_all"),
        (("build", tmp_path / "bad.xml", "-o", "x.safetensors"), "bad.xml"),
        (("build", tmp_path / "none.xml", "-o", "x.safetensors"), "none.xml"),
        (("build", "kinearm", "-o", "x.safetensors", "--n", "1"), "links"),
        (("inspect", "kinearm", "-o", "x.png", "--package", "meshes"), "NAME=FOLDER"),
        (("reconstruct", "kinearm", tmp_path / "bad.json", "--camera", camera, "-o", "x"), "bad.json"),
        (("reconstruct", "kinearm", tmp_path / "none.png", "--camera", camera, "-o", "x"), "none.png"),
        (
            ("reconstruct", "kinearm", picture, "--camera", camera, "--mask", tmp_path / "bad.json", "-o", "x"),
            "bad.json",
        ),
    ]
    for arguments, says in cases:
        assert says in one_line(kinesplat(*arguments)), arguments
        assert not [*tmp_path.glob("x*"), *tmp_path.glob(".x*")], arguments


def test_an_absent_device_is_an_error() -> None:
    assert "cuda" in one_line(kinesplat("models", "--device", "cuda"))


def test_unknown_options_end_with_status_2() -> None:
    assert "--colour" in one_line(kinesplat("render", "kinearm", "-o", "x.png", "--colour"))
    assert "MODEL" in one_line(kinesplat("render", "-o", "x.png"))
    assert one_line(kinesplat("no-such-command"))


def test_the_installed_program_runs() -> None:
    command = [sys.executable, "-c", "from kinesplat.cli import main; main()", "render", "nobody", "-o", "x.png"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("kinesplat: unknown model 'nobody'")
    assert result.stderr.count("\n") == 1


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)  # as `kinesplat --help | head -1` does, only at once
    command = [sys.executable, "-c", "from kinesplat.cli import main; main()", "evaluate", "--help"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert ended.returncode == 1
    assert ended.stderr == ""
