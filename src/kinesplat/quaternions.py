"""Unit quaternions wxyz, batched and differentiable."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotations_to_quats(R: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """Unit quaternions wxyz: of the four rows of ``4 q q^T``, the one with the largest diagonal (Shepperd 1978)."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in R.unbind(-2))
    rows = [
        [1 + a + e + i, h - f, c - g, d - b],
        [h - f, 1 + a - e - i, b + d, c + g],
        [c - g, b + d, 1 - a + e - i, f + h],
        [d - b, c + g, f + h, 1 - a - e + i],
    ]
    outer = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    row = torch.take_along_dim(outer, best[..., None, None], dim=-2)[..., 0, :]
    return torch.nn.functional.normalize(row, dim=-1)


def quat_product(a: Float[Tensor, "*#batch 4"], b: Float[Tensor, "*#batch 4"]) -> Float[Tensor, "*b 4"]:
    """Hamilton product, wxyz."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    w = aw * bw - ax * bx - ay * by - az * bz
    x = aw * bx + ax * bw + ay * bz - az * by
    y = aw * by - ax * bz + ay * bw + az * bx
    z = aw * bz + ax * by - ay * bx + az * bw
    return torch.stack([w, x, y, z], dim=-1)
