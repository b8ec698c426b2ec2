"""LPIPS (Zhang et al. 2018), which needs trained weights: computed where they are, otherwise the reason why not."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

Distance = Callable[[Float[Tensor, "h w 3"], Float[Tensor, "h w 3"]], float]
BACKBONE = "alexnet-owt-7be5be79.pth"
"""The file of torchvision's AlexNet weights; nothing is downloaded here."""


def lpips_distance() -> tuple[Distance | None, str]:
    """The distance (AlexNet, version 0.1), or None and one sentence why it cannot be computed."""
    try:
        package = import_module("lpips")
    except ImportError:
        return None, "the lpips package is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    if not weights.is_file():
        return None, f"AlexNet's weights {BACKBONE} are not in torch.hub's checkpoints"
    network = package.LPIPS(net="alex", verbose=False).eval()

    def distance(rendered: Float[Tensor, "h w 3"], truth: Float[Tensor, "h w 3"]) -> float:
        pair = [2.0 * image.clamp(0.0, 1.0).permute(2, 0, 1)[None] - 1.0 for image in (rendered, truth)]
        with torch.no_grad():
            return float(network(*pair))

    return distance, ""
