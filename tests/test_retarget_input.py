"""Retargeting refuses what cannot work before it reads, tracks or searches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import kinesplat as ks
from kinesplat import cli
from kinesplat.errors import InputError
from kinesplat.vision.point_tracks import PointTracks

FRAMES, SIZE = 4, 64


@pytest.fixture(scope="module")
def camera(kinearm: ks.SelfModel) -> ks.Camera:
    points = kinearm.posed(kinearm.tree.q_canonical.float()).means.detach()
    return ks.Camera.framing(points, width=SIZE, height=SIZE)


def untouched(frames: Tensor, queries: Tensor) -> PointTracks:
    """A tracker that must not be asked."""
    raise AssertionError("the video was tracked first")


@pytest.mark.usefixtures("unchecked_types")
def test_bad_starts_are_refused_before_tracking(kinearm: ks.SelfModel, camera: ks.Camera) -> None:
    model, q = kinearm, kinearm.tree.q_canonical.float()
    frames = torch.rand(FRAMES, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0))
    cameras = ks.Camera(camera.K, camera.T_cam_world.repeat(3, 1, 1), SIZE, SIZE)
    grid = replace(camera, K=camera.K[None, None], T_cam_world=camera.T_cam_world[None, None])
    skinned: Any = object()
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"q has shape|joint", {"q_init": q[:3]}),
        (r"finite|NaN|nan", {"q_init": torch.full_like(q, torch.nan)}),
        (r"expected \(dof,\) or \(4, dof\)", {"q_init": q.expand(3, -1)}),
        (r"expected \(dof,\) or \(frames, dof\)", {"q_init": q.expand(2, 2, -1)}),
        (r"expected \(\) or \(4,\)", {"camera": cameras}),
        (r"expected \(\) or \(frames,\)", {"camera": grid}),
        ("skinning field", {"model": replace(model, skinning=skinned)}),
        ("no part of the rendered objective", {"objective": "rendered", "self_collision": 1.0}),
        ("only the objective 'tracks' searches", {"objective": "rendered", "starts": 4}),
        ("only the objective 'tracks' searches", {"objective": "frames", "starts": 4}),
    ]
    for message, given in cases:
        words: dict[str, Any] = {"model": model, "camera": camera, "q_init": q, **given}
        with pytest.raises(InputError, match=message):
            ks.retarget(words.pop("model"), frames, words.pop("camera"), tracker=untouched, **words)


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--save-tracks", "nowhere/tracks.npz", "no such folder"),
        ("--save-tracks", "tracks.txt", "written as .npz"),
        ("--film", "film.foo", "written as .mp4 or .gif"),
        ("--film", "nowhere/film.gif", "no such folder"),
        ("--json", "nowhere/fit.json", "no such folder"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture, option: str, name: str, message: str
) -> None:
    """Neither the model nor the video is looked at: both are missing."""
    words = ["kinesplat", "retarget", str(tmp_path / "none.safetensors"), str(tmp_path / "none.mp4")]
    words += ["-o", str(tmp_path / "q.csv"), option, str(tmp_path / name)]
    with patch("sys.argv", words), pytest.raises(SystemExit):
        cli.main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_film_that_fails_leaves_table_and_json(kinearm: ks.SelfModel, camera: ks.Camera, tmp_path: Path) -> None:
    """A full disk at the end must not lose the fit."""
    q = kinearm.tree.q_canonical.float()
    frames = torch.zeros(FRAMES, SIZE, SIZE, 3)
    tracks = PointTracks(torch.full((FRAMES, 3, 2), 20.0), torch.ones(FRAMES, 3, dtype=torch.bool))
    fit = ks.retarget(kinearm.subsample(500), tracks, camera, q_init=q)
    words = ["kinesplat", "retarget", "kinearm", str(tmp_path), "--camera", str(tmp_path / "camera.json")]
    words += ["-o", str(tmp_path / "q.csv"), "--film", str(tmp_path / "a.gif"), "--json", str(tmp_path / "a.json")]
    (tmp_path / "camera.json").write_text(json.dumps(camera.to_json()))

    def fails(*_: object) -> None:
        raise InputError("disk full")

    module = "kinesplat.commands.retarget"
    followed = patch(f"{module}.follow", lambda *_, **__: fit)
    read = patch(f"{module}.read_frames", lambda _: iter(frames))
    rate, film = patch(f"{module}.frame_rate", lambda _: 30.0), patch(f"{module}.write_video", fails)
    with followed, read, rate, film, patch("sys.argv", words), pytest.raises(SystemExit):
        cli.main()
    assert len((tmp_path / "q.csv").read_text().splitlines()) == FRAMES + 1
    assert json.loads((tmp_path / "a.json").read_text())["tracks"] == 3
