import pytest
import torch
from scipy.special import sph_harm_y

from kinesplat.errors import InputError
from kinesplat.rasterizer.spherical_harmonics import sh_basis, sh_degree, sh_to_rgb


def directions(n: int) -> torch.Tensor:
    d = torch.randn(n, 3, dtype=torch.float64)
    return d / d.norm(dim=-1, keepdim=True)


def test_basis_is_scipys_real_harmonics() -> None:
    """Y_(l,m) with the Condon-Shortley phase, ordered l then m = -l..l: the convention of 3DGS files."""
    d = directions(50)
    theta, phi = torch.arccos(d[:, 2]), torch.atan2(d[:, 1], d[:, 0])
    expected = []
    for degree in range(4):
        for m in range(-degree, degree + 1):
            y = torch.from_numpy(sph_harm_y(degree, abs(m), theta.numpy(), phi.numpy()))
            real = y.real if m >= 0 else y.imag
            expected.append(real * (2**0.5 if m else 1.0))
    torch.testing.assert_close(sh_basis(d, 3), torch.stack(expected, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_basis_is_orthonormal_on_the_sphere(degree: int) -> None:
    """By exact quadrature: Gauss-Legendre in z times equidistant azimuths."""
    from numpy.polynomial.legendre import leggauss

    z, w = (torch.from_numpy(a) for a in leggauss(8))
    phi = torch.arange(16, dtype=torch.float64) * (2 * torch.pi / 16)
    rho = (1 - z * z).sqrt()[:, None]
    d = torch.stack([rho * phi.cos(), rho * phi.sin(), z[:, None].expand(8, 16)], -1)
    Y = sh_basis(d, degree)
    gram = torch.einsum("zpk,zpl,z->kl", Y, Y, w) * (2 * torch.pi / 16)
    torch.testing.assert_close(gram, torch.eye((degree + 1) ** 2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_colour_is_offset_and_clamped() -> None:
    sh = torch.zeros(2, 1, 3)
    sh[1] = -10.0
    rgb = sh_to_rgb(sh, directions(2).float())
    torch.testing.assert_close(rgb[0], torch.full((3,), 0.5))
    assert (rgb[1] == 0).all()


def test_unknown_number_of_coefficients() -> None:
    with pytest.raises(InputError, match=r"5 coefficients.*1, 4, 9 or 16"):
        sh_degree(5)
