"""From the rays of every pixel to images: in numpy where they were traced on the CPU, in torch where on a GPU."""

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

NOTHING = torch.iinfo(torch.int64).min


def averaged(
    colours: np.ndarray, depth: np.ndarray, links: np.ndarray, bias: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Average the rays of each pixel: rgb, alpha, depth, link_id; computed where a ray hits, the rest is white."""
    shape, samples = links.shape[:-1], links.shape[-1]
    rgb = np.ones((*shape, 3), dtype=np.float32)
    alpha, mean_depth = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    link_id = np.full(shape, fill_value=-1, dtype=np.int64)
    seen = (links >= 0).any(axis=-1)
    colours, depth, links = colours[seen].astype(np.float32), depth[seen], links[seen]
    hit = links >= 0
    colours += bias * (hit[..., None] & (colours < 255.0))
    hits = hit.sum(axis=-1)
    rgb[seen] = colours.mean(axis=1) / np.float32(255.0)
    alpha[seen] = hit.mean(axis=-1, dtype=np.float32)
    mean_depth[seen] = np.where(hit, depth, 0.0).sum(axis=-1, dtype=np.float32) / hits
    link_id[seen] = np.where(2 * hits >= samples, most_frequent(links), -1)
    return rgb, alpha, mean_depth, link_id


def most_frequent(links: Int[np.ndarray, "pixels samples"]) -> Int[np.ndarray, " pixels"]:
    """The link that occurs most often in each row, the lowest of several; -1, no link, never wins over a link."""
    winner = links[:, 0].copy()
    mixed = (links != links[:, :1]).any(axis=-1)
    rows = links[mixed]
    votes = (rows[:, :, None] == rows[:, None, :]).sum(axis=-1)
    rank = np.where(rows >= 0, votes * (links.max(initial=0) + 1) - rows, np.iinfo(np.int64).min)
    winner[mixed] = rows[np.arange(len(rows)), rank.argmax(axis=-1)]
    return winner


def averaged_there(
    colours: UInt8[Tensor, "h w samples 3"],
    depth: Float[Tensor, "h w samples"],
    links: Int[Tensor, "h w samples"],
    bias: float,
) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w"], Float[Tensor, "h w"], Int[Tensor, "h w"]]:
    """`averaged` on the device where the rays are."""
    hit = links >= 0
    hits, samples = hit.sum(-1), links.shape[-1]
    seen = hits > 0
    values = colours.float()
    values = values + bias * (hit[..., None] & (values < 255.0))
    rgb = torch.where(seen[..., None], values.mean(-2) / 255.0, 1.0)
    mean_depth = torch.where(hit, depth.float(), 0.0).sum(-1) / hits.clamp(min=1)
    link_id = torch.where(2 * hits >= samples, most_frequent_there(links), -1)
    return rgb, hits / samples, mean_depth, torch.where(seen, link_id, -1)


def most_frequent_there(links: Int[Tensor, "h w samples"]) -> Int[Tensor, "h w"]:
    """`most_frequent` on the device where the rays are."""
    links = links.long()
    winner = links[..., 0].clone()
    mixed = (links != links[..., :1]).any(-1)
    rows = links[mixed]
    votes = (rows[:, :, None] == rows[:, None, :]).sum(-1)
    rank = torch.where(rows >= 0, votes * (links.amax() + 1) - rows, NOTHING)
    winner[mixed] = rows.gather(1, rank.argmax(1, keepdim=True))[:, 0]
    return winner
