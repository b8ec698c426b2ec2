"""The analytic objective of retargeting: distances between demonstrated tracks and those of our own surface."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.inverse.levenberg_marquardt import Linearization
from kinesplat.inverse.priors import Priors
from kinesplat.inverse.robust import geman_mcclure
from kinesplat.inverse.surface_tracks import SurfaceTracks
from kinesplat.inverse.track_matching import Pairs
from kinesplat.inverse.trajectory import FrameBlocks, Trajectory
from kinesplat.vision.point_tracks import PointTracks

ALIGNMENT_SCALE = (0.1, 0.1, 0.05, 0.05)
ALIGNMENT_COST = (
    1e-4  # [image sides^2] in every frame, for an alignment of that scale: without it all shrinks to a point
)


@dataclass
class TrackObjective:
    """Squared distances of paired points, summed over time.

    The demonstration may be aligned first: scaled by ``exp(a[0])``, turned by ``a[1]`` [rad] and moved by ``a[2:]``
    [image sides] about the middle of the picture, the same in all frames; these are the variables that frames share.

    Attributes:
        shown: the demonstration's tracks.
        ours: our surface points.
        pairing: finds pairs from the demonstration's tracks, the pixels of our points, and q.
        robust: distance beyond which a pair counts less [px] (`geman_mcclure`); None: least squares.
        priors: soft terms in every frame.
        pairs: of the last linearization; their targets are not aligned.
    """

    shown: PointTracks
    ours: SurfaceTracks
    pairing: Callable[[PointTracks, Tensor, Tensor], Pairs]
    robust: float | None = None
    priors: Priors | None = None
    pairs: Pairs | None = field(default=None, repr=False)

    def loss(self, at: Trajectory) -> float:
        """The cost of a trajectory with the pairs of the last linearization: an upper bound of that with its own."""
        if self.pairs is None:
            return self.linearize(at).loss
        pixels = self.ours.pixels(self.ours.in_camera(at.q))[self.pairs.frame, self.pairs.ours]
        away = pixels - self._aligned(self.pairs.target, at.shared)
        cost, _ = geman_mcclure(away.square().sum(dim=-1), self.robust)
        total = (self.pairs.weight * cost).sum().item() + self._alignment_cost(at.shared)
        return total if self.priors is None else total + self._soft(at.q).loss.sum().item()

    def linearize(self, at: Trajectory) -> FrameBlocks:
        """Gauss-Newton's model at a trajectory; pairs are found anew."""
        pairs = self.found(at)
        self.pairs = replace(pairs, target=self._unaligned(pairs.target, at.shared))
        where, J = self.ours.pixel_jacobian(at.q, pairs.frame, pairs.ours)
        away = where - pairs.target
        cost, trust = geman_mcclure(away.square().sum(dim=-1), self.robust)
        weight = pairs.weight * trust
        frames, dof = at.q.shape
        S, std = self._alignment_jacobian(pairs.target.to(J), at.shared), self._std(at.shared)
        pull, weighted = (weight[:, None] * away)[:, None], weight[:, None, None] * J
        blocks = FrameBlocks(
            loss=(pairs.weight * cost).sum().item() + self._alignment_cost(at.shared),
            gradient=torch.zeros(frames, dof).to(J).index_add(0, pairs.frame, (pull @ J)[:, 0]),
            hessian=torch.zeros(frames, dof, dof).to(J).index_add(0, pairs.frame, weighted.mT @ J),
            shared_gradient=(pull @ S).sum(dim=(0, 1)) + at.shared / std.square(),
            shared_hessian=(weight[:, None, None] * S.mT @ S).sum(dim=0) + torch.diag(1.0 / std.square()),
            mixed=torch.zeros(frames, dof, len(at.shared)).to(J).index_add(0, pairs.frame, weighted.mT @ S),
        )
        if self.priors is None:
            return blocks
        soft = self._soft(at.q)
        return replace(
            blocks,
            loss=blocks.loss + soft.loss.sum().item(),
            gradient=blocks.gradient + soft.gradient,
            hessian=blocks.hessian + soft.hessian,
        )

    def aligned(self, shared: Float[Tensor, " p"]) -> PointTracks:
        """The demonstration's tracks where the alignment puts them."""
        return PointTracks(self._aligned(self.shown.points, shared), self.shown.visible)

    def found(self, at: Trajectory) -> Pairs:
        """The pairs at a trajectory, their targets aligned."""
        return self.pairing(self.aligned(at.shared), self.ours.pixels(self.ours.in_camera(at.q)), at.q)

    @property
    def _side(self) -> int:
        return max(self.ours.camera.width, self.ours.camera.height)

    @property
    def _middle(self) -> Float[Tensor, "2"]:
        return 0.5 * torch.tensor([float(self.ours.camera.width), float(self.ours.camera.height)])

    def _aligned(self, points: Float[Tensor, "*shape 2"], shared: Float[Tensor, " p"]) -> Float[Tensor, "*shape 2"]:
        if not len(shared):
            return points
        return (points.to(shared) - self._middle) @ _similarity(shared).T + self._middle + self._side * shared[2:]

    def _unaligned(self, points: Float[Tensor, "*shape 2"], shared: Float[Tensor, " p"]) -> Float[Tensor, "*shape 2"]:
        if not len(shared):
            return points
        return (points - self._middle - self._side * shared[2:]) @ torch.linalg.inv(
            _similarity(shared)
        ).T + self._middle

    def _alignment_jacobian(self, target: Float[Tensor, "k 2"], shared: Float[Tensor, " p"]) -> Float[Tensor, "k 2 p"]:
        """Derivative of the residual (ours minus target) by the alignment."""
        if not len(shared):
            return target.new_zeros(len(target), 2, 0)
        arm = target - self._middle - self._side * shared[2:]
        turned = torch.stack([-arm[:, 1], arm[:, 0]], dim=-1)
        shift = self._side * torch.eye(2).to(target).expand(len(target), 2, 2)
        return -torch.cat([arm[..., None], turned[..., None], shift], dim=-1)

    def _std(self, shared: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        each = (ALIGNMENT_COST * len(self.shown.points)) ** 0.5 * self._side
        return shared.new_tensor(ALIGNMENT_SCALE)[: len(shared)] / each

    def _alignment_cost(self, shared: Float[Tensor, " p"]) -> float:
        return (shared / self._std(shared)).square().sum().item()

    def _soft(self, q: Float[Tensor, "frames dof"]) -> Linearization:
        assert self.priors is not None
        frames, dof = q.shape
        nothing = Linearization(torch.zeros(frames).to(q), torch.zeros_like(q), torch.zeros(frames, dof, dof).to(q))
        return self.priors.added_to(nothing, self.ours.tree, q)


def _similarity(shared: Float[Tensor, " p"]) -> Float[Tensor, "2 2"]:
    c, s = shared[1].cos(), shared[1].sin()
    return shared[0].exp() * torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
