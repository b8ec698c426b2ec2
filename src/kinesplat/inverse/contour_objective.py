"""Contours against the edges of photographs: least squares over distances along their normals, and what they prove.

From every point of a rendered contour we look along its normal for edges of that direction in the photograph (Harris &
Stennett 1990, "RAPID"; several candidates as Vacchetti et al. 2004). The candidates are a mixture of Gaussians of the
distance with a floor for none of them being right; its negative logarithm is the loss, and expectation maximisation
turns it into weighted least squares.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.inverse.contours import Contours, inner_choice
from kinesplat.inverse.edges import EdgePictures, sampled
from kinesplat.inverse.levenberg_marquardt import Linearization
from kinesplat.self_model import SelfModel

NONE_RIGHT = 0.1
REACH = 2.5
OUTPUTS = ("rgb", "alpha", "depth", "link_id")
CHUNK = 128
INNER_POINTS = 200
BRIGHT, DARK, STRAY = 1.6, 0.4, 0.12
CHANCE = 2.0
INNER_WEIGHT, STRAY_WEIGHT = 0.5, 0.5


@dataclass(frozen=True)
class Poses:
    """Where robot and cameras are, for a batch of guesses and some views each.

    Attributes:
        q: ``(batch, views, dof)`` [rad]/[m].
        camera: batch ``(batch, views)``, of the size of the pictures.
        twists: ``(batch, views, 6 links, p)`` twist of every link in the camera's frame for a unit of every variable.
    """

    q: Float[Tensor, "batch views dof"]
    camera: Camera
    twists: Float[Tensor, "batch views links6 p"]


@dataclass(frozen=True)
class Evidence:
    """What the pictures say about guesses, summed over views.

    Attributes:
        cost: ``(batch,)`` loss of the contours, mean of their points in units of the deviation squared; about 3 for a
            robot in front of clutter that is not there, half of that on its own edges.
        length: ``(batch,)`` weighted number of contour pixels.
        inner: ``(batch,)`` edges where the robot should have none, in pixels.
        stray: ``(batch,)`` pixels of the robot of a colour that it does not have in any light.
        chance: the cost from which on contours speak against a guess.
    """

    cost: Float[Tensor, " batch"]
    length: Float[Tensor, " batch"]
    inner: Float[Tensor, " batch"]
    stray: Float[Tensor, " batch"]
    chance: float

    @property
    def losses(self) -> Float[Tensor, " batch"]:
        """Share that is missing of the evidence that the contours of the best guess could give: 1 is mere chance."""
        most = self.chance * self.length[self.total.argmax()].clamp(min=1.0)
        return 1.0 - self.total / most

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The more, the better; below 0 where contours meet edges by chance."""
        return self.length * (self.chance - self.cost) - INNER_WEIGHT * self.inner - STRAY_WEIGHT * self.stray


@dataclass(frozen=True)
class ContourObjective:
    """Distances of contours from edges, per point averaged over all views.

    Attributes:
        model: what is rendered, `unlit`.
        seen: the photographs.
        poses: from a state that Levenberg-Marquardt moves to poses.
        sigma_px: deviation of the edges from the contours; edges are looked for 2.5 times as far.
        points: number of contour points of a view.
        chance: see `Evidence`.
    """

    model: SelfModel
    seen: EdgePictures
    poses: Callable[[Any], Poses]
    sigma_px: float
    points: int = 300
    chance: float = CHANCE

    def linearize(self, at: Any) -> Linearization:
        """Loss, gradient and Gauss-Newton Hessian in square pixels; the search for edges counts as constant."""
        poses = self.poses(at)
        batch, views, p = len(poses.q), poses.q.shape[1], poses.twists.shape[-1]
        loss, gradient, hessian = (torch.zeros(batch, *tail).to(poses.q) for tail in ((), (p,), (p, p)))
        for view in range(views):
            camera = view_of(poses.camera, view)
            render = self.model.render(poses.q[:, view], camera, outputs=OUTPUTS)
            contours = Contours.of(render, camera, self.points)
            cost, weight, distance = self.matched(contours, view)
            share = contours.weights / (contours.weights.sum(dim=1, keepdim=True).clamp(min=1.0) * views)
            loss = loss + (share * cost).sum(dim=1)
            rows = image_rows(contours, camera)
            g, H = by_link(rows, share * weight, -distance, contours.links, len(self.model.tree.link_names))
            A = poses.twists[:, view].unflatten(1, (-1, 6))
            gradient = gradient + torch.einsum("bla,blap->bp", g, A)
            hessian = hessian + torch.einsum("blap,blac,blcr->bpr", A, H, A)
        return Linearization(loss, gradient, hessian)

    def evidence(self, at: Any) -> Evidence:
        """What the pictures say about every guess."""
        poses = self.poses(at)
        chunks = [self._evidence(poses, rows) for rows in torch.arange(len(poses.q)).split(CHUNK)]
        return self._as_evidence(torch.cat(chunks).sum(dim=1))

    def of_views(self, at: Any) -> Evidence:
        """What every single view says about the first guess: a batch of views."""
        return self._as_evidence(self._evidence(self.poses(at), torch.zeros(1, dtype=torch.long))[0])

    def _as_evidence(self, sums: Float[Tensor, "batch 4"]) -> Evidence:
        cost, length, inner, stray = sums.unbind(-1)
        return Evidence(cost / length.clamp(min=1.0), length, inner, stray, self.chance)

    def _evidence(self, poses: Poses, rows: Tensor) -> Float[Tensor, "batch views 4"]:
        views = []
        for view in range(poses.q.shape[1]):
            every = view_of(poses.camera, view)
            camera = Camera(every.K[rows], every.T_cam_world[rows], every.width, every.height)
            render = self.model.render(poses.q[rows, view], camera, outputs=OUTPUTS)
            assert render.rgb is not None
            contours = Contours.of(render, camera, self.points)
            cost, _, _ = self.matched(contours, view)
            mean = (contours.weights * cost).sum(dim=1) / contours.weights.sum(dim=1).clamp(min=1.0)
            place, real, area = inner_choice(render, contours.lines, INNER_POINTS)
            area = area / real.sum(dim=1).clamp(min=1)
            inner = (self.seen.clear[view].flatten()[place] * real).sum(dim=1) * area
            shown = render.rgb.flatten(1, 2).gather(1, place[..., None].expand(-1, -1, 3))
            stray = strays(self.seen.rgb[view].flatten(0, 1)[place], shown, real).sum(dim=1) * area
            length = contours.length
            views.append(torch.stack([length * mean / self.sigma_px**2, length, inner, stray], dim=-1))
        return torch.stack(views, dim=1)

    def matched(
        self, contours: Contours, view: int
    ) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n"], Float[Tensor, "batch n"]]:
        """Cost of every point [px^2], the weight of its distance to the edges' mean, and that distance [px]."""
        t = self._steps
        x, y = contours.normals.unbind(-1)
        lines = contours.pixels[:, :, None] + t[:, None] * contours.normals[:, :, None]
        found = sampled(self.seen.oriented[view], lines)
        double = torch.stack([torch.ones_like(x), x * x - y * y, 2.0 * x * y], dim=-1)
        along = 0.5 * (found @ double[..., None])[..., 0].clamp(min=0.0)
        strength = along.square() / found[..., 0].clamp(min=1e-6)
        before, middle, after = strength[..., :-2], strength[..., 1:-1], strength[..., 2:]
        peak = (middle >= before) & (middle > after)
        bend = (before + after - 2.0 * middle).clamp(max=-1e-6)
        away = t[1:-1] + (0.5 * (before - after) / bend).clamp(-0.5, 0.5)
        likely = torch.where(peak, middle * torch.exp(-0.5 * (away / self.sigma_px) ** 2), 0.0)
        total = likely.sum(dim=-1)
        distance = (likely * away).sum(dim=-1) / total.clamp(min=1e-9)
        cost = -2.0 * self.sigma_px**2 * ((NONE_RIGHT + total) / (NONE_RIGHT + 1.0)).log()
        return cost.clamp(min=0.0), total / (NONE_RIGHT + total), distance

    @cached_property
    def _steps(self) -> Float[Tensor, " steps"]:
        half = math.ceil(REACH * self.sigma_px) + 1
        return torch.arange(-half, half + 1).to(self.seen.rgb)


def strays(
    seen: Float[Tensor, "batch n 3"], shown: Float[Tensor, "batch n 3"], real: Tensor
) -> Float[Tensor, "batch n"]:
    """1 where a colour is none that the shown one takes on in more or less light of one colour.

    The light is the median of the ratios; it may be 0.4 to 1.6 times as bright on a pixel.
    """
    ratio = torch.where(real[..., None], seen / shown.clamp(min=0.05), torch.nan)
    light = torch.nan_to_num(ratio.nanmedian(dim=1, keepdim=True).values)
    expected = light * shown
    brightness = (seen * expected).sum(dim=-1) / expected.square().sum(dim=-1).clamp(min=1e-6)
    away = (seen - brightness.clamp(DARK, BRIGHT)[..., None] * expected).abs().amax(dim=-1)
    return ((away > STRAY) & real).to(seen)


def image_rows(contours: Contours, camera: Camera) -> Float[Tensor, "batch n 6"]:
    """Movement of every point along its normal [px] for a unit of its link's twist in the camera's frame."""
    X, (nx, ny) = contours.points, contours.normals.unbind(-1)
    fx, fy, z = camera.K[..., 0, 0, None], camera.K[..., 1, 1, None], X[..., 2].clamp(min=1e-3)
    a = torch.stack([nx * fx / z, ny * fy / z, -(nx * fx * X[..., 0] + ny * fy * X[..., 1]) / z**2], dim=-1)
    return torch.cat([a, torch.linalg.cross(X, a)], dim=-1)


def by_link(
    rows: Float[Tensor, "batch n 6"],
    weight: Float[Tensor, "batch n"],
    residual: Float[Tensor, "batch n"],
    links: Tensor,
    count: int,
) -> tuple[Float[Tensor, "batch links 6"], Float[Tensor, "batch links 6 6"]]:
    """Sums over every link's points of ``w J r`` and ``w J^T J`` in its twist."""
    member = torch.nn.functional.one_hot(links, count).to(rows)
    weighted = weight[..., None] * rows
    gradient = member.mT @ (weighted * residual[..., None])
    squares = (weighted[..., :, None] * rows[..., None, :]).flatten(2)
    return gradient, (member.mT @ squares).unflatten(-1, (6, 6))


def view_of(camera: Camera, view: int) -> Camera:
    """One view of every element of a batch of cameras."""
    K, T = (t.expand(*camera.batch_shape, *t.shape[-2:])[:, view] for t in (camera.K, camera.T_cam_world))
    return Camera(K, T, camera.width, camera.height)
