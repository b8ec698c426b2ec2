"""Other people's point trackers behind one function type: TAPIR, TAPNext, AllTracker and CoTracker3.

Each needs its own package, which no package registry has, and its weights, which are never fetched unasked; an error
says how to get either. All are differentiable in the frames as far as their authors made them so.
"""

import inspect
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.errors import BackendError, InputError, unknown
from kinesplat.vision.correlation_tracker import CorrelationTracker
from kinesplat.vision.loading import absent, library
from kinesplat.vision.point_tracks import PointTracker, PointTracks, lucas_kanade

TAPIR_PX = (256, 256)
STRIDE = 8
ALLTRACKER_WINDOW = 16
ALLTRACKER_PX = 128
"""Least side that its pyramid of correlations can halve; smaller videos are enlarged."""
ALLTRACKER_CONFIDENT = 0.1
COTRACKER_WINDOW = 60
TAPNET = "pip install git+https://github.com/google-deepmind/tapnet.git"
COTRACKER = "pip install git+https://github.com/facebookresearch/co-tracker.git"
ALLTRACKER = "git clone https://github.com/aharley/alltracker.git, and put that folder on PYTHONPATH"
WEIGHTS = {
    "tapir": "https://storage.googleapis.com/dm-tapnet/bootstap/bootstapir_checkpoint_v2.pt",
    "tapnext": "https://storage.googleapis.com/dm-tapnet/tapnext/bootstapnext_ckpt.npz",
    "alltracker": "https://huggingface.co/aharley/alltracker/resolve/main/alltracker.pth",
    "cotracker3": "https://huggingface.co/facebook/cotracker3/resolve/main/scaled_offline.pth",
}
NON_COMMERCIAL = "CoTracker3, code and weights, is licensed CC BY-NC 4.0: not for commercial use"


def load_tracker(name: str, weights: str | Path | None = None) -> PointTracker:
    """A tracker by name: ``lucas-kanade``, ``correlation``, ``tapir``, ``tapnext``, ``alltracker``, ``cotracker3``.

    Args:
        name: which one.
        weights: file of weights; default: where `torch.hub` keeps them.

    Raises:
        InputError: an unknown name, weights for a tracker that has none, or a file that is not of that tracker.
        BackendError: the package or the weights are not on this machine; says how to get them.
    """
    ready: dict[str, PointTracker] = {"lucas-kanade": lucas_kanade, "correlation": CorrelationTracker()}
    if name in ready:
        if weights is not None:
            raise InputError(f"tracker {name} has no weights, but {weights} was given")
        return ready[name]
    if name not in LOADERS:
        raise InputError(unknown("tracker", name, (*ready, *LOADERS)))
    return LOADERS[name](weights)


def tapir(weights: str | Path | None = None) -> PointTracker:
    """BootsTAPIR in PyTorch (Doersch et al. 2023, 2024; Apache-2.0)."""
    model = _module("tapnet.torch.tapir_model", TAPNET).TAPIR(pyramid_level=1)
    _load(model, _state(_file("tapir", weights)), "tapir")
    for part, module in model.named_modules():
        if part.startswith("extra_convs.") and part.endswith(".conv"):
            # its caller adds to this input in place afterwards, which gradients could not pass
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
    return partial(_tapir, model.eval())


def tapnext(weights: str | Path | None = None) -> PointTracker:
    """BootsTAPNext in PyTorch (Zholus et al. 2025; Apache-2.0); it looks forward only, so it runs both ways."""
    model = _module("tapnet.tapnext.tapnext_torch", TAPNET).TAPNext(image_size=TAPIR_PX)
    restore = _module("tapnet.tapnext.tapnext_torch_utils", TAPNET).restore_model_from_jax_checkpoint
    path = _file("tapnext", weights)
    try:
        model = restore(model, str(path))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path}: no weights of tapnext ({' '.join(str(error).split())[:200]})") from error
    return _both_ways(partial(_tapnext, model.eval()))


def alltracker(weights: str | Path | None = None) -> PointTracker:
    """AllTracker (Harley et al. 2025): flow from the query's frame to every other; it runs both ways, too."""
    model = _module("nets.alltracker", ALLTRACKER).Net(ALLTRACKER_WINDOW, init_weights=False)  # or it fetches some
    state = _state(_file("alltracker", weights))
    _load(model, state.get("model", state), "alltracker")
    window = model.forward_window
    model.forward_window = lambda *given, **named: _last_guess(*window(*given, **named))
    return _both_ways(partial(_alltracker, model.eval()))


def _last_guess(flows: list[Tensor], sure: list[Tensor], *rest: Any) -> tuple[Any, ...]:
    """Of what AllTracker keeps of a window, a guess after every iteration, the last; all of them fill the memory."""
    return flows[-1:], sure[-1:], *rest


def cotracker3(weights: str | Path | None = None) -> PointTracker:
    """CoTracker3, offline (Karaev et al. 2024). Warns of its licence, CC BY-NC 4.0: not for commercial use."""
    predictor = _module("cotracker.predictor", COTRACKER).CoTrackerPredictor
    path = _file("cotracker3", weights)
    warnings.warn(NON_COMMERCIAL, UserWarning, stacklevel=3)
    model = predictor(checkpoint=None, offline=True, v2=False, window_len=COTRACKER_WINDOW)
    state = _state(path)
    _load(model.model, state.get("model", state), "cotracker3")
    return partial(_cotracker, model.eval())


LOADERS: dict[str, Callable[[str | Path | None], PointTracker]] = {
    "tapir": tapir,
    "tapnext": tapnext,
    "alltracker": alltracker,
    "cotracker3": cotracker3,
}


def _tapir(model: Any, frames: Float[Tensor, "frames height width 3"], queries: Float[Tensor, "n 3"]) -> PointTracks:
    """Video in [-1, 1], queries (t, y, x), tracks (x, y); pixel centres at +0.5."""
    video, factor = _resized(frames, *TAPIR_PX)
    out = model(_signed(video), _yx(queries, factor))
    doubt = torch.sigmoid(out["occlusion"][0]), torch.sigmoid(out["expected_dist"][0])
    points = out["tracks"][0].transpose(0, 1) / factor
    return _pinned(points, ((1.0 - doubt[0]) * (1.0 - doubt[1]) > 0.5).T, queries)


def _tapnext(model: Any, frames: Float[Tensor, "frames height width 3"], queries: Float[Tensor, "n 3"]) -> PointTracks:
    """Video in [-1, 1], queries (t, y, x), tracks (y, x), for frames from the query's on."""
    video, factor = _resized(frames, *TAPIR_PX)
    tracks, _, visible, _ = model(_signed(video), _yx(queries, factor))
    return _pinned(tracks[0].flip(-1) / factor, visible[0, ..., 0] > 0.0, queries)


def _alltracker(
    model: Any, frames: Float[Tensor, "frames height width 3"], queries: Float[Tensor, "n 3"]
) -> PointTracks:
    """Video in [0, 255] of a multiple of 8 px; flow at integer pixels and its confidence, from the query's frame on.

    It is run as in training: otherwise it detaches its answer, moves pictures to a GPU, and has another form for two
    frames. In training videos must be whole windows, each half a window after the one before.
    """
    height, width = (max(ALLTRACKER_PX, round(side / STRIDE) * STRIDE) for side in frames.shape[1:3])
    video, factor = _resized(frames, height, width)
    video = 255.0 * video.permute(0, 3, 1, 2)[None]
    points = torch.zeros(len(frames), len(queries), 2).to(frames)
    visible = torch.zeros(len(frames), len(queries), dtype=torch.bool)
    half = ALLTRACKER_WINDOW // 2
    for first in queries[:, 0].round().long().unique().tolist():
        rows = torch.nonzero(queries[:, 0].round().long() == first)[:, 0]
        places = queries[rows, 1:].to(frames) * factor
        count = len(frames) - first
        if count == 1:
            continue
        more = -(-max(count - ALLTRACKER_WINDOW, 0) // half) * half + ALLTRACKER_WINDOW - count
        whole = torch.cat([video[:, first:], video[:, -1:].expand(-1, more, -1, -1, -1)], dim=1)
        _, _, *windows = model.forward_sliding(whole, iters=4, sw=None, is_training=True)
        grid = places / torch.tensor([width, height]).to(places) * 2.0 - 1.0
        grid = grid[None, None].expand(count, 1, -1, 2)
        flow, sure = (
            torch.nn.functional.grid_sample(maps, grid, align_corners=False, padding_mode="border")[:, :, 0]
            for maps in (torch.cat([w[-1][0, half * (i > 0) :] for i, w in enumerate(k)])[:count] for k in windows)
        )
        points[first:, rows] = (places + flow.transpose(1, 2)) / factor
        visible[first:, rows] = (sure[:, 1] > ALLTRACKER_CONFIDENT).cpu()
    return _pinned(points, visible, queries)


def _cotracker(
    model: Any, frames: Float[Tensor, "frames height width 3"], queries: Float[Tensor, "n 3"]
) -> PointTracks:
    """Video in [0, 255], queries (t, x, y) and tracks (x, y) with pixel centres at integers; both ways by itself."""
    video = 255.0 * frames.permute(0, 3, 1, 2)[None]
    asked = torch.cat([queries[:, :1], queries[:, 1:] - 0.5], dim=1).to(frames)[None]
    forward = inspect.unwrap(type(model).forward)  # without the no_grad that wraps it, so that gradients pass
    with torch.set_grad_enabled(frames.requires_grad):
        tracks, visible = forward(model, video, queries=asked, backward_tracking=True)
    return _pinned(tracks[0] + 0.5, visible[0] > 0.5 if visible.is_floating_point() else visible[0], queries)


def _both_ways(tracker: PointTracker) -> PointTracker:
    """A tracker that looks forward only, run on the video and on its reverse."""

    def track(frames: Tensor, queries: Tensor) -> PointTracks:
        last = len(frames) - 1
        mirrored = torch.cat([last - queries[:, :1], queries[:, 1:]], dim=1)
        forth, back = tracker(frames, queries), tracker(frames.flip(0), mirrored)
        before = torch.arange(len(frames))[:, None] < queries[:, 0].round().cpu()
        points = torch.where(before[..., None], back.points.flip(0), forth.points)
        return PointTracks(points, torch.where(before, back.visible.flip(0), forth.visible))

    return track


def _resized(frames: Float[Tensor, "frames height width 3"], height: int, width: int) -> tuple[Tensor, Tensor]:
    """The video at another size, and how many of its pixels (x, y) are one of the given."""
    factor = torch.tensor([width / frames.shape[2], height / frames.shape[1]]).to(frames)
    planes = frames.permute(0, 3, 1, 2)
    planes = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1), factor


def _signed(video: Float[Tensor, "frames height width 3"]) -> Float[Tensor, "1 frames height width 3"]:
    return (2.0 * video - 1.0)[None].contiguous()


def _yx(queries: Float[Tensor, "n 3"], factor: Float[Tensor, "2"]) -> Float[Tensor, "1 n 3"]:
    """Queries (frame, y, x) in the resized video."""
    return torch.cat([queries[:, :1].to(factor), (queries[:, 1:].to(factor) * factor).flip(-1)], dim=1)[None]


def _pinned(points: Tensor, visible: Tensor, queries: Float[Tensor, "n 3"]) -> PointTracks:
    """Tracks that are visible and exact in the frame of their query."""
    own = torch.arange(len(points))[:, None] == queries[:, 0].round().long().cpu()
    exact = queries[None, :, 1:].to(points).expand_as(points)
    return PointTracks(torch.where(own[..., None].to(points.device), exact, points), visible.cpu() | own)


def _module(name: str, command: str) -> Any:
    try:
        return library(name)
    except BackendError as error:
        raise absent(name.partition(".")[0], command) from error


def _file(name: str, weights: str | Path | None) -> Path:
    """The file of weights, given or where `torch.hub` keeps it."""
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise InputError(f"{path}: no such file of weights for {name}")
        return path
    url = WEIGHTS[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        raise absent(f"the weights of {name}", f"curl -L --create-dirs -o {path} {url}")
    return path


def _state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: no file of weights ({' '.join(str(error).split())[:200]})") from error


def _load(model: torch.nn.Module, state: dict[str, Any], name: str) -> None:
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"weights that are not of {name} ({' '.join(str(error).split())[:200]})") from error
