"""Random pictures of a self-model to train an initializer on: backgrounds, colours, crops, occluders, cameras."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.inverse.alignment import random_views
from kinesplat.inverse.initializer_network import CELLS, SIZE
from kinesplat.inverse.keypoints import Keypoints
from kinesplat.inverse.search import one_turn
from kinesplat.self_model import SelfModel

NEAREST_RADII, FARTHEST_RADII = 1.6, 6.0
BLIND_SHARE = 0.35
CLEAN_SHARE = 0.4


@dataclass(frozen=True)
class Pictures:
    """A batch of inputs of the network and what it should say.

    Attributes:
        inputs: ``(n, 4, 128, 128)`` RGB and mask in [0, 1], or as bytes.
        places: ``(n, k, 2)`` of the keypoints in cells; outside of [0, 32] they are not in the picture.
    """

    inputs: Float[Tensor, "n 4 size size"] | UInt8[Tensor, "n 4 size size"]
    places: Float[Tensor, "n k 2"]


@torch.no_grad()
def random_pictures(model: SelfModel, keypoints: Keypoints, count: int, generator: torch.Generator) -> Pictures:
    """Configurations within the limits from all round; a third without mask, where the robot is anywhere.

    Args:
        model: what is rendered; a few thousand splats do.
        keypoints: what is looked for.
        count: number of pictures.
        generator: source of randomness.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    lower, upper = one_turn(model.tree)
    q = lower + (upper - lower) * torch.rand(count, model.tree.dof, generator=generator)
    Ts = model.tree.forward_kinematics(q)
    blind = torch.rand(count, generator=generator) < BLIND_SHARE
    camera = _cameras(model, q, blind, generator)
    out = _recoloured(model, generator).render(q, camera, outputs=("rgb", "alpha"), background=(0.0, 0.0, 0.0))
    assert out.rgb is not None
    assert out.alpha is not None
    alpha = out.alpha.clamp(0.0, 1.0)[..., None]
    p, _ = camera.project(keypoints.in_world(Ts))
    gain = uniform(0.55, 1.35, count, 1, 1, 1) * uniform(0.9, 1.1, count, 1, 1, 3)
    ramp = torch.einsum("nr,rhw->nhw", uniform(-0.35, 0.35, count, 2), _ramps())[..., None]
    lit = out.rgb * gain * (1.0 + ramp) + uniform(-0.05, 0.08, count, 1, 1, 1) * alpha
    clean = ~blind & (torch.rand(count, generator=generator) < CLEAN_SHARE)
    white = clean[:, None, None, None] | (torch.rand(count, 1, 1, 1, generator=generator) < 0.3)
    clutter = _clutter(count, generator)
    behind = torch.where(white, 1.0, clutter)
    rgb = torch.where(clean[:, None, None, None], out.rgb, lit) + (1.0 - alpha) * behind
    cover = _occluders(count, generator) & ~clean[:, None, None, None]
    rgb = torch.where(cover, clutter.roll(1, 0), rgb)
    seen = torch.where(cover, 0.0, alpha)
    rgb = torch.where((~blind & ~clean)[:, None, None, None] & (seen < 0.02), torch.where(white, 1.0, rgb), rgb)
    noise = uniform(0.0, 0.04, count, 1, 1, 1) * torch.randn(rgb.shape, generator=generator)
    rgb = (rgb + torch.where(clean[:, None, None, None], 0.0, noise)).clamp(0.0, 1.0)
    mask = torch.where(blind[:, None, None, None], 0.5, seen)
    inputs = torch.cat([rgb, mask], dim=-1).permute(0, 3, 1, 2).contiguous()
    return Pictures(inputs, p * (CELLS / SIZE))


def _cameras(model: SelfModel, q: Tensor, blind: Tensor, generator: torch.Generator) -> Camera:
    """From all round; the square of the picture lies around the robot, closely where there is a mask."""
    count = len(q)
    stride = max(1, len(model.parameters) // 500)
    means = model.posed(q).means[:, ::stride]
    low, high = means.amin(dim=1), means.amax(dim=1)
    centre, radius = 0.5 * (low + high), 0.5 * (high - low).norm(dim=-1)
    span = math.log(FARTHEST_RADII / NEAREST_RADII)
    distance = radius * NEAREST_RADII * torch.exp(span * torch.rand(count, generator=generator))
    T = random_views(count, generator)
    T[:, :3, 3] = -(T[:, :3, :3] @ centre[..., None])[..., 0]
    T[:, 2, 3] += distance
    p = means @ T[:, :3, :3].mT + T[:, None, :3, 3]
    image = p[..., :2] / p[..., 2:].clamp(min=0.05)
    low, high = image.amin(dim=1), image.amax(dim=1)
    close = 1.06 + 0.3 * torch.rand(count, generator=generator)
    loose = 0.8 * torch.exp(1.2 * torch.rand(count, generator=generator))
    side = (high - low).amax(dim=-1) * torch.where(blind, loose, close)
    slack = (side[:, None] - (high - low)).clamp(min=0.0)
    jitter = torch.where(blind[:, None], 0.5, 0.08) * (2.0 * torch.rand(count, 2, generator=generator) - 1.0)
    corner = 0.5 * (low + high) - 0.5 * side[:, None] + jitter * slack
    K = torch.eye(3).repeat(count, 1, 1)
    K[:, 0, 0] = K[:, 1, 1] = SIZE / side
    K[:, :2, 2] = -corner * (SIZE / side)[:, None]
    return Camera(K, T, SIZE, SIZE)


def _recoloured(model: SelfModel, generator: torch.Generator) -> SelfModel:
    """Every link brighter or darker than it is."""
    gain = 0.7 + 0.5 * torch.rand(len(model.tree.link_names), 1, generator=generator)
    sh = model.parameters.sh.clone()
    base = sh[:, 0] + 0.5 / 0.28209479177387814
    gains = gain[model.link_index]
    sh[:, 0] = base * gains - 0.5 / 0.28209479177387814
    sh[:, 1:] = sh[:, 1:] * gains[:, None]
    return replace(model, parameters=replace(model.parameters, sh=sh))


def _ramps() -> Float[Tensor, "2 size size"]:
    line = torch.linspace(-1.0, 1.0, SIZE)
    return torch.stack([line.expand(SIZE, SIZE), line[:, None].expand(SIZE, SIZE)])


def _clutter(count: int, generator: torch.Generator) -> Float[Tensor, "n size size 3"]:
    """Blotches of random size and contrast around a random colour."""
    total = torch.rand(count, 3, 1, 1, generator=generator).expand(count, 3, SIZE, SIZE).clone()
    for cells in (2, 6, 20, 64):
        blotches = torch.rand(count, 3, cells, cells, generator=generator) - 0.5
        strength = 0.8 * torch.rand(count, 1, 1, 1, generator=generator) ** 2
        mode = "bilinear" if cells < 10 else "nearest"
        total += strength * torch.nn.functional.interpolate(blotches, (SIZE, SIZE), mode=mode)
    return total.permute(0, 2, 3, 1)


def _occluders(count: int, generator: torch.Generator) -> Tensor:
    """``(n, size, size, 1)`` true on a rectangle in a third of the pictures."""
    ends = (torch.rand(count, 2, 2, generator=generator) * SIZE).sort(dim=-1).values
    ends[..., 1] = torch.minimum(ends[..., 1], ends[..., 0] + 0.4 * SIZE)
    line = torch.arange(SIZE)
    inside = (line >= ends[..., :1]) & (line < ends[..., 1:])
    some = (torch.rand(count, generator=generator) < 0.35)[:, None, None]
    return (inside[:, 0, None, :] & inside[:, 1, :, None] & some)[..., None]
