"""Other people's trackers by their own classes, with random weights: arguments fit, and answers have our form.

Random weights follow nothing, so that conventions of pixels are tested by stand-ins alone (`test_point_tracks`); what
AllTracker makes of several windows is compared with its own inference. Classes that can be small are.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kinesplat.vision.point_tracks import PointTracker
from kinesplat.vision.track_networks import load_tracker

FRAMES, HEIGHT, WIDTH = 4, 64, 96
SMALL_ALLTRACKER = {"use_basicencoder": True, "no_split": True, "dim": 32, "hdim": 32, "num_blocks": 1}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # their code warns of what is theirs


def tapir(folder: Path) -> PointTracker:
    kind = pytest.importorskip("tapnet.torch.tapir_model").TAPIR
    with small(kind, num_mixer_blocks=2, mixer_hidden_dim=32):
        return loaded("tapir", kind(pyramid_level=1).state_dict(), folder)


def tapnext(folder: Path) -> PointTracker:
    kind = pytest.importorskip("tapnet.tapnext.tapnext_torch").TAPNext
    restored = "tapnet.tapnext.tapnext_torch_utils.restore_model_from_jax_checkpoint"  # knows the large model alone
    with small(kind, width=48, num_heads=2, lru_width=48, depth=2), patch(restored, stirred):
        return loaded("tapnext", {}, folder)


def alltracker(folder: Path) -> PointTracker:
    kind = pytest.importorskip("nets.alltracker").Net
    with small(kind, **SMALL_ALLTRACKER):
        return loaded("alltracker", {"model": kind(16, init_weights=False).state_dict()}, folder)


def cotracker3(folder: Path) -> PointTracker:
    kind = pytest.importorskip("cotracker.predictor").CoTrackerPredictor
    return loaded("cotracker3", kind(checkpoint=None).model.state_dict(), folder)


def small(kind: Any, **sizes: Any) -> Any:
    """While this holds, a class is made smaller than its loader asks for."""
    made = kind.__init__
    return patch.object(kind, "__init__", lambda self, *given, **named: made(self, *given, **{**sizes, **named}))


def stirred(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """Random instead of read from a file: its tokens begin as zeros."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def loaded(name: str, state: dict[str, Any], folder: Path) -> PointTracker:
    torch.save(state, folder / "weights.pt")
    return load_tracker(name, folder / "weights.pt")


@pytest.mark.parametrize("made", [tapir, tapnext, alltracker, cotracker3], ids=lambda f: f.__name__)
def test_the_real_class_takes_our_video_and_its_answer_has_our_form(made: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tracker = made(tmp_path)
    frames = torch.rand(FRAMES, HEIGHT, WIDTH, 3, requires_grad=True)
    queries = torch.tensor([[0.0, 20.5, 30.5], [2.0, 70.0, 10.0], [3.0, 90.0, 60.0]])
    tracks = tracker(frames, queries)
    assert tracks.points.shape == (FRAMES, 3, 2)
    assert tracks.visible.shape == (FRAMES, 3)
    assert torch.isfinite(tracks.points).all()
    own = queries[:, 0].long()
    torch.testing.assert_close(tracks.points[own, torch.arange(3)], queries[:, 1:])
    assert tracks.visible[own, torch.arange(3)].all()
    (slope,) = torch.autograd.grad(tracks.points.sum(), frames)
    assert torch.isfinite(slope).all()
    assert slope.abs().sum() > 0.0


def test_windows_of_alltracker_are_joined_as_it_joins_them(tmp_path: Path) -> None:
    tracker = alltracker(tmp_path)
    frames, places = torch.rand(21, 128, 136, 3), torch.tensor([[8.5, 9.5], [130.5, 60.5]])
    found = tracker(frames, torch.cat([torch.zeros(2, 1), places], dim=1))
    model = pytest.importorskip("nets.alltracker").Net(16, init_weights=False, **SMALL_ALLTRACKER).eval()
    model.load_state_dict(torch.load(tmp_path / "weights.pt")["model"])
    with torch.no_grad(), patch.object(torch.Tensor, "cuda", lambda pictures: pictures):
        flow, *_ = model.forward_sliding(255.0 * frames.permute(0, 3, 1, 2)[None], iters=4, sw=None, is_training=False)
    column, row = places.long().T
    torch.testing.assert_close(found.points[1:], (places + flow[0, :, :, row, column].transpose(1, 2))[1:])
    assert (found.points.std(dim=0) > 0.0).all()
