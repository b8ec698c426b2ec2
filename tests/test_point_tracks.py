"""Point trackers: Lucas-Kanade and our own on pictures that move in a known way, other people's by stand-ins."""

import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from kinesplat.errors import BackendError, InputError
from kinesplat.vision import track_networks
from kinesplat.vision.correlation_tracker import CorrelationTracker
from kinesplat.vision.point_tracks import PointTracks, lucas_kanade, spread_points, track_video
from kinesplat.vision.track_networks import load_tracker

FRAMES, SIZE = 7, 96
VELOCITY = torch.tensor([2.313, -1.427])  # no multiple is whole: bilinear pictures have kinks there


def texture(dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    return torch.nn.functional.interpolate(noise, size=(SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)


def moving(velocity: Tensor, frames: int = FRAMES, size: int = SIZE) -> Tensor:
    """The texture, moved by `velocity` [px] from frame to frame; differentiable in it."""
    y, x = torch.meshgrid(*(torch.arange(size, dtype=velocity.dtype) + 0.5 for _ in range(2)), indexing="ij")
    places = torch.stack([x, y], dim=-1) - torch.arange(frames)[:, None, None, None] * velocity
    grid = places / size * 2.0 - 1.0
    pictures = texture(velocity.dtype).expand(frames, -1, -1, -1)
    sampled = torch.nn.functional.grid_sample(pictures, grid, align_corners=False, padding_mode="reflection")
    return sampled.permute(0, 2, 3, 1)


def queries(frame: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    places = 30.0 + 36.0 * torch.rand(12, 2, generator=generator)
    return torch.nn.functional.pad(places, (1, 0), value=float(frame))


@pytest.mark.parametrize("frame", [0, 3, FRAMES - 1])
def test_lucas_kanade_follows_both_ways(frame: int) -> None:
    tracks = lucas_kanade(moving(VELOCITY), queries(frame))
    truth = queries()[None, :, 1:] + (torch.arange(FRAMES) - frame)[:, None, None] * VELOCITY
    assert tracks.visible.float().mean() > 0.9
    assert (tracks.points - truth).norm(dim=-1)[tracks.visible].max() < 0.3
    assert tracks.visible[frame].all()


def test_lucas_kanade_loses_what_vanishes() -> None:
    frames = moving(VELOCITY)
    frames[4:] = 0.5
    tracks = lucas_kanade(frames, queries())
    assert tracks.visible[3].any()
    assert not tracks.visible[5:].any()
    assert torch.isfinite(tracks.points).all()


def test_gradient_of_lucas_kanade() -> None:
    """One more pixel per frame in the video is one more pixel per frame in the tracks."""
    velocity = VELOCITY.clone().requires_grad_()
    tracks = lucas_kanade(moving(velocity), queries())
    plain = lucas_kanade(moving(VELOCITY), queries())
    assert torch.equal(tracks.points, plain.points)
    seen = tracks.visible[4]
    for axis in (0, 1):
        (slope,) = torch.autograd.grad(tracks.points[4, seen, axis].mean(), velocity, retain_graph=True)
        expected = torch.zeros(2)
        expected[axis] = 4.0
        assert torch.allclose(slope, expected, atol=0.5)


def test_correlation_tracker_and_its_gradient() -> None:
    tracker = CorrelationTracker().double()
    velocity = VELOCITY.double().requires_grad_()
    asked = queries(2).double()
    tracks = tracker(moving(velocity), asked)
    truth = asked[None, :, 1:] + (torch.arange(FRAMES) - 2)[:, None, None] * VELOCITY
    assert (tracks.points - truth).norm(dim=-1)[tracks.visible].median() < 0.5
    weights = torch.randn(tracks.points.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (slope,) = torch.autograd.grad((weights * tracks.points).sum(), velocity)
    step = torch.randn(2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        at = [moving(velocity.detach() + sign * 1e-6 * step) for sign in (1, -1)]
        values = [(weights * tracker(frames, asked).points).sum() for frames in at]
    assert (slope @ step).item() == pytest.approx((values[0] - values[1]).item() / 2e-6, rel=1e-5)


def test_points_are_spread_inside_the_mask() -> None:
    mask = torch.zeros(SIZE, SIZE)
    mask[20:70, 10:60] = 1.0
    places = spread_points(moving(VELOCITY)[0], mask, 6.0)
    assert len(places) > 30
    assert ((places > torch.tensor([10.0, 20.0])) & (places < torch.tensor([60.0, 70.0]))).all()
    apart = torch.cdist(places, places) + 100.0 * torch.eye(len(places))
    assert apart.min() > 5.5


def test_new_points_where_none_is_followed() -> None:
    """Half of the picture appears late; points are found there, too."""
    frames, masks = moving(0.2 * VELOCITY), torch.ones(FRAMES, SIZE, SIZE)
    masks[:3, :, SIZE // 2 :] = 0.0
    tracks = track_video(frames, masks, lucas_kanade, count=60, refresh=3)
    right = tracks.points[4, :, 0] > SIZE // 2 + 6
    assert (tracks.visible[4] & right).sum() > 5
    with pytest.raises(InputError, match="no point could be followed"):
        track_video(frames, torch.zeros_like(masks), lucas_kanade)


def test_files(tmp_path: Path) -> None:
    tracks = PointTracks(torch.rand(4, 3, 2), torch.rand(4, 3) > 0.5)
    tracks.save(tmp_path / "a.npz")
    back = PointTracks.load(tmp_path / "a.npz")
    assert torch.equal(back.points, tracks.points)
    assert torch.equal(back.visible, tracks.visible)
    np.savez(tmp_path / "b.npz", points=np.zeros((4, 3, 2)))
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 cut off")
    for name in ("b.npz", "c.npz"):
        with pytest.raises(InputError, match="with points and visible"):
            PointTracks.load(tmp_path / name)
    with pytest.raises(InputError, match="No such file"):
        PointTracks.load(tmp_path / "d.npz")


@pytest.mark.usefixtures("unchecked_types")
def test_bad_tracks() -> None:
    with pytest.raises(InputError, match=r"expected \(frames, n, 2\)"):
        PointTracks(torch.zeros(3, 4, 3), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="expected floating point and bool"):
        PointTracks(torch.zeros(3, 4, 2), torch.ones(3, 4))
    points = torch.zeros(3, 4, 2)
    points[1, 2] = torch.nan
    visible = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(InputError, match="NaN"):
        PointTracks(points, visible)
    visible[1, 2] = False
    assert PointTracks(points, visible).seen(3).points.shape[1] == 3


class Fake(torch.nn.Module):
    """Stand-ins for other people's models: their signatures and conventions, a known motion for an answer.

    `motion` is what a point does from frame to frame, in pixels of the video that the model is given.
    """

    motion = torch.zeros(2)

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__()
        self.options = options
        self.weight = torch.nn.Parameter(torch.zeros(1))

    @staticmethod
    def arrow(video: Tensor) -> int:
        """-1 for a video that runs backward: the test's get brighter."""
        first, last = (float(picture.detach().mean()) for picture in video[0][[0, -1]])
        return 1 if first < last else -1

    def moved(self, start: Tensor, places: Tensor, frames: int, video: Tensor) -> Tensor:
        """``(n, frames, 2)`` in (x, y), with the gradient of the video's mean; knows time's arrow."""
        time = torch.arange(frames)[None, :, None] - start[:, None, None]
        time = time * self.arrow(video)
        return places[:, None] + time * self.motion + (video.mean() - video.mean().detach())


class FakeTapir(Fake):
    def forward(self, video: Tensor, query_points: Tensor) -> dict[str, Tensor]:
        assert video.shape == (1, FRAMES, 256, 256, 3)
        assert -1.01 < video.min() < -0.2
        t, places = query_points[0, :, 0], query_points[0, :, 1:].flip(-1)
        tracks = self.moved(t, places, FRAMES, video)[None]
        occluded = torch.full(tracks.shape[:3], -9.0)
        occluded[0, 0] = 9.0
        return {"tracks": tracks, "occlusion": occluded, "expected_dist": torch.full(tracks.shape[:3], -9.0)}


class FakeTapnext(Fake):
    def forward(self, video: Tensor, query_points: Tensor) -> tuple[Tensor, None, Tensor, None]:
        t, places = query_points[0, :, 0], query_points[0, :, 1:].flip(-1)
        tracks = self.moved(t, places, FRAMES, video).transpose(0, 1)
        blind = torch.arange(FRAMES)[:, None] < t  # it knows nothing of a point before its query
        tracks = torch.where(blind[..., None], -1e3, tracks)
        return tracks.flip(-1)[None], None, torch.where(blind, -5.0, 5.0)[None, ..., None], None


class FakeAlltracker(Fake):
    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        assert options == {"init_weights": False}  # it would fetch those of ConvNeXt

    def forward_sliding(
        self, rgbs: Tensor, iters: int, sw: None, is_training: bool
    ) -> tuple[Tensor, Tensor, list[list[Tensor]], list[list[Tensor]]]:
        frames, _, height, width = rgbs.shape[1:]
        assert height % 8 == width % 8 == frames % 8 == 0
        assert min(height, width) >= 128
        assert frames >= 16
        assert rgbs.max() > 100.0
        flow = (
            self.arrow(rgbs) * torch.arange(frames)[:, None] * self.motion
            + (rgbs.mean() - rgbs.mean().detach()) / 255.0
        )
        flow = flow[:, :, None, None].expand(frames, 2, height, width)[None]
        sure = torch.ones(1, frames, 2, height, width)
        flows, sures = ([[m[:, i : i + 16]] for i in range(0, frames - 8, 8)] for m in (flow, sure))
        return flow.detach(), sure, flows, sures

    def forward_window(self) -> None:
        """What the loader makes forget all guesses but the last."""


class FakeCotracker(Fake):
    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        assert options == {"checkpoint": None, "offline": True, "v2": False, "window_len": 60}
        self.model = Fake()

    @torch.no_grad()
    def forward(self, video: Tensor, queries: Tensor, backward_tracking: bool = False) -> tuple[Tensor, Tensor]:
        assert video.shape[2] == 3
        assert video.max() > 100.0
        assert backward_tracking
        tracks = self.moved(queries[0, :, 0], queries[0, :, 1:], FRAMES, video / 255.0).transpose(0, 1)
        return tracks[None], torch.ones(1, FRAMES, len(queries[0]), dtype=torch.bool)


def stood_in(name: str, scale: Tensor) -> dict[str, ModuleType]:
    """Modules under the names that the loaders import, and the motion in the pixels of the model's video."""
    Fake.motion = VELOCITY * scale
    classes = {
        "tapir": {"tapnet.torch.tapir_model": {"TAPIR": FakeTapir}},
        "tapnext": {
            "tapnet.tapnext.tapnext_torch": {"TAPNext": FakeTapnext},
            "tapnet.tapnext.tapnext_torch_utils": {"restore_model_from_jax_checkpoint": lambda model, path: model},
        },
        "alltracker": {"nets.alltracker": {"Net": FakeAlltracker}},
        "cotracker3": {"cotracker.predictor": {"CoTrackerPredictor": FakeCotracker}},
    }[name]
    modules = {}
    for path, names in classes.items():
        for parent in range(1, path.count(".") + 1):
            modules[".".join(path.split(".")[:parent])] = ModuleType("stand-in")
        modules[path] = ModuleType(path)
        modules[path].__dict__.update(names)
    return modules


@pytest.mark.parametrize("name", ["tapir", "tapnext", "alltracker", "cotracker3"])
@pytest.mark.parametrize("frame", [0, 2])
def test_other_trackers_by_stand_ins(name: str, frame: int, tmp_path: Path) -> None:
    """Conventions of pixels, axes and ranges come out right: a known motion comes back in our pixels."""
    frames = moving(VELOCITY)[:, :64] * torch.linspace(0.5, 1.0, FRAMES)[:, None, None, None]
    sides = {"tapir": (256.0, 256.0), "tapnext": (256.0, 256.0), "alltracker": (128.0, 128.0)}.get(name, (96.0, 64.0))
    scale = torch.tensor(sides) / torch.tensor([96.0, 64.0])
    state = {"model.weight": torch.ones(1)} if name == "cotracker3" else {"weight": torch.ones(1)}
    state = {key.removeprefix("model."): value for key, value in state.items()}
    torch.save({"model": state} if name == "alltracker" else state, tmp_path / "weights.pt")
    licence = pytest.warns(UserWarning, match="CC BY-NC") if name == "cotracker3" else None
    with patch.dict(sys.modules, stood_in(name, scale)):
        if licence is None:
            tracker = load_tracker(name, tmp_path / "weights.pt")
        else:
            with licence:
                tracker = load_tracker(name, tmp_path / "weights.pt")
        asked = queries(frame)
        tracks = tracker(frames.requires_grad_(), asked)
    truth = asked[None, :, 1:] + (torch.arange(FRAMES) - frame)[:, None, None] * VELOCITY
    assert torch.allclose(tracks.points, truth, atol=1e-3)
    hidden = int(name == "tapir")
    assert tracks.visible[:, hidden:].all()
    assert tracks.visible[frame].all()
    if hidden:
        assert tracks.visible[:, 0].sum() == 1
    (slope,) = torch.autograd.grad(tracks.points[FRAMES - 1].sum(), frames)
    assert slope.abs().sum() > 0.0


def test_what_is_absent_is_named_with_its_command(tmp_path: Path) -> None:
    for name, words in (("tapir", "tapnet"), ("cotracker3", "co-tracker"), ("alltracker", "PYTHONPATH")):
        absent = dict.fromkeys(("tapnet", "cotracker", "nets"))  # as if not installed, whatever is
        with patch.dict(sys.modules, absent), pytest.raises(BackendError, match=words):
            load_tracker(name)
    with patch.dict(sys.modules, stood_in("tapir", torch.ones(2))), patch("torch.hub.get_dir", lambda: str(tmp_path)):
        with pytest.raises(BackendError, match=r"curl -L .*bootstapir_checkpoint_v2\.pt"):
            load_tracker("tapir")
        with pytest.raises(InputError, match="no such file of weights"):
            load_tracker("tapir", tmp_path / "none.pt")
        (tmp_path / "bad.pt").write_bytes(b"no weights")
        with pytest.raises(InputError, match="no file of weights"):
            load_tracker("tapir", tmp_path / "bad.pt")
        torch.save({"other": torch.ones(1)}, tmp_path / "other.pt")
        with pytest.raises(InputError, match="not of tapir"):
            load_tracker("tapir", tmp_path / "other.pt")
    with pytest.raises(InputError, match="unknown tracker 'tapirr': did you mean 'tapir'"):
        load_tracker("tapirr")
    with pytest.raises(InputError, match="has no weights"):
        load_tracker("lucas-kanade", tmp_path / "x.pt")
    assert set(track_networks.WEIGHTS) == set(track_networks.LOADERS)
