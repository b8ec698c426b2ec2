"""Other people's trackers by their own classes, with random weights: arguments fit, and answers have our form.

Random weights follow nothing, so that conventions of pixels are tested by stand-ins alone (`test_point_tracks`).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kinesplat.vision.track_networks import load_tracker

FRAMES, HEIGHT, WIDTH = 4, 64, 96
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # their code warns of what is theirs


def tapir() -> dict[str, Any]:
    return pytest.importorskip("tapnet.torch.tapir_model").TAPIR(pyramid_level=1).state_dict()


def alltracker() -> dict[str, Any]:
    return {"model": pytest.importorskip("nets.alltracker").Net(16, init_weights=False).state_dict()}


def cotracker3() -> dict[str, Any]:
    return pytest.importorskip("cotracker.predictor").CoTrackerPredictor(checkpoint=None).model.state_dict()


@pytest.mark.parametrize("weights", [tapir, alltracker, cotracker3], ids=lambda f: f.__name__)
def test_the_real_class_takes_our_video_and_its_answer_has_our_form(weights: Any, tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "weights.pt")
    tracker = load_tracker(weights.__name__, tmp_path / "weights.pt")
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
    assert slope.abs().sum() > 0.0
