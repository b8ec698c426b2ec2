"""Adaptive density control (Kerbl et al. 2023, section 5.2): splats are added where the pictures pull at them.

A splat whose place on the screen is pulled at strongly, averaged over the views that see it, stands for too much of
the scene. A small one is joined by a copy of itself (clone), a large one is replaced by two smaller ones drawn from it
(split). Splats that have become transparent are dropped (prune).
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.gaussians import PARAMETERS, Parameters
from kinesplat.rasterizer.projection import quats_to_rotations
from kinesplat.training.splat_optimizer import SplatOptimizer

SHRINK = 1.6


@dataclass(frozen=True)
class Thresholds:
    """When splats come and go.

    Attributes:
        gradient: mean norm of the loss's gradient with respect to the splat's place on the screen, whose half width
            is 1, above which a splat is densified.
        large: largest scale above which it is split, and below which cloned, as a share of the scene's size.
        opacity: below which a splat is pruned.
        most: splats in all; the strongest gradients go first.
    """

    gradient: float = 2e-4
    large: float = 0.01
    opacity: float = 0.005
    most: int = 20_000


class ScreenGradients:
    """Norms of view-space gradients, summed over views until the next densification."""

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        """No views yet, of `n` splats."""
        self.total = torch.zeros(n, device=device)
        self.views = torch.zeros(n, device=device)

    @torch.no_grad()
    def add(self, means: Float[Tensor, "n 3"], gradient: Float[Tensor, "n 3"], camera: Camera) -> None:
        """Take note of one view's gradient with respect to the means in the world.

        A mean that moves by d across the ray moves on the screen by ``f/z d``, so the part of the gradient across the
        ray times ``z/f`` is the gradient with respect to the pixel; times half the width, to the screen.
        """
        ray = means - camera.T_world_cam[:3, 3].to(means)
        depth = ray @ camera.T_cam_world[2, :3].to(means)
        direction = torch.nn.functional.normalize(ray, dim=-1)
        across = gradient - (gradient * direction).sum(-1, keepdim=True) * direction
        self.total += across.norm(dim=-1) * depth.abs() / camera.K[0, 0].to(means) * (0.5 * camera.width)
        self.views += (gradient != 0.0).any(-1)

    @property
    def mean(self) -> Float[Tensor, " n"]:
        """Over the views in which the splat took part; 0 where it never did."""
        return self.total / self.views.clamp(min=1.0)


@torch.no_grad()
def densify_and_prune(
    splats: SplatOptimizer,
    gradients: ScreenGradients,
    thresholds: Thresholds,
    scene_size: float,
    generator: torch.Generator,
) -> None:
    """Clone, split and prune; new splats have no past in the optimiser.

    Args:
        splats: what changes.
        gradients: of the views since the last time.
        thresholds: when splats come and go.
        scene_size: [m].
        generator: of the places of split splats.
    """
    parameters, pull = splats.parameters, gradients.mean
    transparent = parameters.logit_opacities < math.log(thresholds.opacity / (1.0 - thresholds.opacity))
    chosen = (pull > thresholds.gradient) & ~transparent
    room = max(0, thresholds.most - int((~transparent).sum()))
    if int(chosen.sum()) > room:
        strongest = torch.where(chosen, pull, -1.0).topk(room).indices
        chosen = torch.zeros_like(chosen).index_fill_(0, strongest, True)
    large = parameters.log_scales.amax(-1) > math.log(thresholds.large * scene_size)
    clones, parents = parameters.select(chosen & ~large), parameters.select(chosen & large)
    halves = [_drawn_from(parents, generator) for _ in range(2)]
    splats.rearrange(~transparent & ~(chosen & large), _joined([clones, *halves]))


def _drawn_from(parents: Parameters, generator: torch.Generator) -> Parameters:
    """One smaller splat inside each parent, its mean drawn from the parent's own distribution."""
    gaussians = parents.activate()
    noise = torch.randn(gaussians.means.shape, generator=generator).to(gaussians.means)
    offset = (quats_to_rotations(gaussians.quats) @ (gaussians.scales * noise)[..., None])[..., 0]
    return replace(parents, means=parents.means + offset, log_scales=parents.log_scales - math.log(SHRINK))


def _joined(parts: list[Parameters]) -> Parameters:
    joined = {name: torch.cat([getattr(part, name).detach() for part in parts]) for name in PARAMETERS}
    return replace(parts[0], **joined)
