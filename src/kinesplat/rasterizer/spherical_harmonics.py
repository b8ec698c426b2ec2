"""Real spherical harmonics of degree 0 to 3 in the order and signs that 3DGS files use."""

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.errors import InputError

SH_C0 = 0.28209479177387814
SH_C1 = 0.4886025119029199
SH_C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
SH_C3 = (
    -0.5900435899266435,
    2.890611442640554,
    -0.4570457994644658,
    0.3731763325901154,
    -0.4570457994644658,
    1.445305721320277,
    -0.5900435899266435,
)


def sh_degree(coefficients: int) -> int:
    """Degree of an expansion that holds `coefficients` = (degree + 1)^2 terms.

    Raises:
        InputError: `coefficients` is none of 1, 4, 9, 16.
    """
    if coefficients not in (1, 4, 9, 16):
        raise InputError(f"sh holds {coefficients} coefficients per colour; expected 1, 4, 9 or 16 (degree 0 to 3)")
    return (1, 4, 9, 16).index(coefficients)


def sh_basis(directions: Float[Tensor, "*batch 3"], degree: int) -> Float[Tensor, "*batch k"]:
    """Values Y_k of the basis at unit `directions`, ``k = (degree + 1)^2`` (Kerbl et al. 2023, as gsplat orders it)."""
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, SH_C0)]
    if degree > 0:
        basis += [-SH_C1 * y, SH_C1 * z, -SH_C1 * x]
    if degree > 1:
        quadratic = (x * y, y * z, 2.0 * z * z - x * x - y * y, x * z, x * x - y * y)
        basis += [c * term for c, term in zip(SH_C2, quadratic, strict=True)]
    if degree > 2:
        cubic = (
            y * (3.0 * x * x - y * y),
            x * y * z,
            y * (4.0 * z * z - x * x - y * y),
            z * (2.0 * z * z - 3.0 * x * x - 3.0 * y * y),
            x * (4.0 * z * z - x * x - y * y),
            z * (x * x - y * y),
            x * (x * x - 3.0 * y * y),
        )
        basis += [c * term for c, term in zip(SH_C3, cubic, strict=True)]
    return torch.stack(basis, dim=-1)


def sh_to_rgb(sh: Float[Tensor, "*#batch k 3"], directions: Float[Tensor, "*#batch 3"]) -> Float[Tensor, "*b 3"]:
    """Colours ``max(0, 0.5 + sum_k Y_k(direction) sh_k)`` seen along unit `directions`.

    Raises:
        InputError: `sh` holds none of 1, 4, 9 or 16 coefficients.
    """
    basis = sh_basis(directions, sh_degree(sh.shape[-2]))
    return ((basis[..., None] * sh).sum(-2) + 0.5).clamp(min=0.0)
