"""Variations of pictures: what they keep, and what they refuse."""

import math

import pytest
import torch

from kinesplat.errors import InputError
from kinesplat.inverse.augmentation import Augmentation

STILL = Augmentation(copies=2, crop=1.0, turn=0.0, perspective=0.0, colour=0.0, backdrop=0.0)


def test_no_variation_leaves_the_picture_before_white() -> None:
    rgb, alpha = torch.rand(2, 10, 14, 3), torch.rand(2, 10, 14)
    rgb = rgb * alpha[..., None]
    seen = STILL(rgb, alpha, torch.Generator().manual_seed(0))
    plain = rgb + (1.0 - alpha[..., None])
    torch.testing.assert_close(seen, plain.repeat_interleave(2, dim=0), rtol=0.0, atol=1e-5)


def test_turned_pictures_are_not_sheared() -> None:
    """Of a picture twice as wide as high, in pixels: where it is read from is turned and scaled, angles are kept."""
    turns = Augmentation(copies=1, crop=0.8, turn=0.6, perspective=0.0, colour=0.0, backdrop=0.0)
    grid = turns._grid(20, 30, 60, torch.Generator().manual_seed(0))
    pixels = 0.5 * grid * torch.tensor([60.0, 30.0])
    right, down = pixels[:, 10, 11] - pixels[:, 10, 10], pixels[:, 11, 10] - pixels[:, 10, 10]
    torch.testing.assert_close(right.norm(dim=1), down.norm(dim=1), rtol=1e-3, atol=1e-4)
    assert (right * down).sum(dim=1).abs().max() < 1e-4
    assert (right[:, 1].abs() > 0.2).any()


def test_variations_differ_stay_in_range_and_hide_no_robot() -> None:
    rgb, alpha = torch.zeros(1, 64, 64, 3), torch.zeros(1, 64, 64)
    alpha[:, 24:40, 24:40] = 1.0
    varied = Augmentation(copies=200)
    seen = varied(rgb, alpha, torch.Generator().manual_seed(0))
    assert seen.shape == (200, 64, 64, 3)
    assert 0.0 <= seen.min() <= seen.max() <= 1.0
    assert (seen[1:] - seen[:-1]).abs().amax(dim=(1, 2, 3)).min() > 0.01
    corner = seen[:, 0, 0]
    white = (corner > 0.7).all(dim=1).float().mean()
    assert 0.4 < white < 0.75  # half of the copies, and a few of the random colours
    dark = (seen.amax(dim=-1) < 0.25).float().sum(dim=(1, 2))
    assert (dark > 0.7 * 256).float().mean() > 0.95


@pytest.mark.usefixtures("unchecked_types")
def test_bad_variations_are_refused() -> None:
    for wrong in ({"copies": 0}, {"crop": 0.0}, {"backdrop": 1.5}, {"turn": -1.0}, {"colour": math.nan}):
        with pytest.raises(InputError, match="augmentation"):
            Augmentation(**wrong)
