"""How sure a calibration may be: its outlines displaced as far as masks and rendered silhouettes disagree.

Residuals of neighbouring pixels have one cause: a mask that is too wide by a pixel along a whole link, a mesh without
its cables, a joint reading off by a quarter of a degree. Taken for independent they promise a camera that is right
within 0.1 mm where it is 25 mm off. So the outline, not the pixel, is what errs here: block by block, and everywhere
alike, for a mask that is too wide looks like a camera that is too near. How the answer follows is the covariance.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.inverse.calibration import CalibrationObjective, CameraGuesses, Level, at_level
from kinesplat.inverse.result import infinite_where_blind

PX, BLOCK_PX = 256, 16
STEP = 2e-3
SHORTEST = 0.25  # of a block's side: less outline than that tells no displacement
MEDIAN = 1.48  # standard deviation over the median of what is normally distributed
SYSTEMATIC = 3.0  # of standard deviations: between simulated calibrations (2.1) and photographs of a real robot (4.9)


def displaced_covariance(finest: CalibrationObjective, best: CameraGuesses) -> Float[Tensor, "p p"]:
    """Covariance of `Rig.variable_names`, cameras' twists about the pivot: ``H^-1 (S S^T + s s^T) H^-1``, scaled.

    The columns of S are the slopes of the loss when the outline within one block is displaced by its standard
    deviation, s is their sum. That deviation is the area in which mask and rendered silhouette disagree over the
    length of the outline: 1.48 times the median over the blocks, so that holes do not matter. All is scaled by what
    calibrations with disturbed masks, and photographs, are off (see docs/results.md). A variable that no picture shows
    has an infinite variance.

    Args:
        finest: objective of the last level.
        best: the answer, a batch of one.
    """
    seen = finest.observation
    objective = at_level(
        replace(finest, observation=replace(seen, mask=seen.silhouette(), backdrop=None)), Level(PX, 1_000_000, 0)
    )
    hessian = objective.pixels * objective.linearize(best).hessian[0].double()
    alpha = objective.render(best)[1][0].cpu()
    assert objective.observation.mask is not None
    edge = torch.stack(torch.gradient(alpha, dim=(1, 2))).norm(dim=0)
    length, area = (_blocks(t[None])[0] for t in (edge, (alpha - objective.observation.mask).abs()))
    told = length > SHORTEST * BLOCK_PX
    if not bool(told.any()):
        return torch.diag(torch.full((len(hessian),), torch.inf)).to(best.q.dtype)
    deviation = (MEDIAN * SYSTEMATIC * (area[told] / length[told]).median()).double()
    slopes = torch.stack(
        [_blocks(column[None] * edge)[0][told] for column in _columns(objective, best, alpha)]
    ).double()
    meat = slopes @ slopes.mT + slopes.sum(dim=1, keepdim=True) * slopes.sum(dim=1)
    return infinite_where_blind(hessian, deviation.square() * meat).to(best.q.dtype)


def _columns(objective: CalibrationObjective, best: CameraGuesses, alpha: Tensor) -> list[Tensor]:
    """Derivative of the silhouettes by every variable: ``(images, height, width)`` each."""
    steps = STEP * torch.eye(len(best.rig.variable_names))
    return [(objective.render(best.retract(step[None]))[1][0].cpu() - alpha) / STEP for step in steps]


def _blocks(values: Float[Tensor, "n images height width"]) -> Float[Tensor, "n blocks"]:
    """Sums over square blocks of every image."""
    sums = torch.nn.functional.avg_pool2d(values, BLOCK_PX, ceil_mode=True, divisor_override=1)
    return sums.flatten(1)
