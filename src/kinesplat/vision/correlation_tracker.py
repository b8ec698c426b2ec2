"""A small differentiable point tracker of our own: correlation of features, soft arg-max near the last place.

For gradients through a tracker where no trained one is installed; untrained features follow what looks the same.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.vision.point_tracks import PointTracks

VISIBLE_SHARE = 0.5


class CorrelationTracker(torch.nn.Module):
    """Two convolutions make features; a point goes to where they correlate with those of its query.

    A softmax over a window around the place in the frame before gives the place as a mean, so that tracks are
    differentiable in the frames and in the weights.
    """

    def __init__(self, channels: int = 24, radius: int = 6, temperature: float = 0.02, seed: int = 0) -> None:
        """Random weights.

        Args:
            channels: of the features.
            radius: of the window [px]: how far a point may move between two frames.
            temperature: of the softmax over the cosine of features; the smaller the sharper.
            seed: of the weights.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Conv2d(3, channels, 5, padding=2, padding_mode="replicate", bias=False)
        self.second = torch.nn.Conv2d(channels, channels, 5, padding=2, padding_mode="replicate", bias=False)
        with torch.no_grad():
            for layer in (self.first, self.second):
                fan = layer.weight[0].numel()
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / fan**0.5)
        self.radius, self.temperature = radius, temperature

    def features(self, frames: Float[Tensor, "frames height width 3"]) -> Float[Tensor, "frames k height width"]:
        """Unit features of every pixel."""
        weight = self.first.weight.dtype
        pictures = (frames.to(weight) - 0.5).permute(0, 3, 1, 2)
        hidden = torch.tanh(4.0 * self.first(pictures))
        return torch.nn.functional.normalize(self.second(hidden), dim=1)

    def forward(self, frames: Float[Tensor, "frames height width 3"], queries: Float[Tensor, "n 3"]) -> PointTracks:
        """Tracks ``(frames, n)`` of the queries (frame, x [px], y [px]), both ways from their frame."""
        features = self.features(frames)
        start = queries[:, 0].round().long()
        wanted = self._queried(features, start, queries[:, 1:].to(features))
        places: dict[int, Tensor] = {}
        shares: dict[int, Tensor] = {}
        for order in (range(len(frames)), range(len(frames) - 1, -1, -1)):
            place = queries[:, 1:].to(features)
            for i in order:
                due = (start < i) if order.step > 0 else (start > i)
                moved, share = self._step(features[i], wanted, place)
                place = torch.where(due[:, None], moved, place)
                places[i] = torch.where(due[:, None], place, places.get(i, queries[:, 1:].to(features)))
                shares[i] = torch.where(due, share, shares.get(i, torch.ones_like(share)))
        points = torch.stack([places[i] for i in range(len(frames))])
        return PointTracks(points, torch.stack([shares[i] for i in range(len(frames))]) > VISIBLE_SHARE)

    def _queried(self, features: Tensor, start: Tensor, places: Tensor) -> Float[Tensor, "n k"]:
        """The features at the queries, each in its frame."""
        order = start.argsort(stable=True)
        frames, counts = start.unique(return_counts=True)
        parts = places[order].split(counts.tolist())
        found = [_sampled(features[i : i + 1], part[None, :, None]) for i, part in zip(frames, parts, strict=True)]
        return torch.cat([part[0, :, :, 0].T for part in found])[order.argsort()]

    def _step(self, feature: Tensor, wanted: Tensor, place: Tensor) -> tuple[Float[Tensor, "n 2"], Float[Tensor, " n"]]:
        """Where the points are in a frame, and how alike they look there (cosine)."""
        reach = torch.arange(-self.radius, self.radius + 1, dtype=place.dtype)
        window = place[:, None, None] + torch.stack(torch.meshgrid(reach, reach, indexing="xy"), dim=-1)
        around = _sampled(feature[None], window.flatten(0, 1)[None])[0].unflatten(1, (len(place), -1))
        cosine = torch.einsum("knhw,nk->nhw", around, wanted).flatten(1)
        share = torch.softmax(cosine / self.temperature, dim=1)
        return torch.einsum("np,npi->ni", share, window.flatten(1, 2)), (share * cosine).sum(dim=1).detach()


def _sampled(features: Float[Tensor, "n k height width"], places: Float[Tensor, "n h w 2"]) -> Float[Tensor, "n k h w"]:
    """Features at places [px], bilinear; the border's beyond it."""
    size = torch.tensor([features.shape[3], features.shape[2]]).to(places)
    grid = places / size * 2.0 - 1.0
    return torch.nn.functional.grid_sample(features, grid, align_corners=False, padding_mode="border")
