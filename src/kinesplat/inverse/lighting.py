"""The light of a photograph: what turns a model's colours, made under a headlight, into those of the picture."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.gaussians import Gaussians
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.robust import geman_mcclure
from kinesplat.rasterizer import rasterize_links
from kinesplat.rasterizer.spherical_harmonics import SH_C0, sh_to_rgb
from kinesplat.self_model import SelfModel

ROUNDS = 6
OUTLIER = 0.15
RIDGE = 1e-3
INSIDE = 0.95


@dataclass(frozen=True)
class Light:
    """Irradiance that depends on the direction of the surface alone, to first order.

    A surface of albedo a and world normal n shows ``a * (c0 + c1 n_x + c2 n_y + c3 n_z)`` per colour channel: the
    spherical harmonics of degree 1 of the light around (Ramamoorthi & Hanrahan 2001), without shadows and highlights.

    Attributes:
        coefficients: ``(4, 3)`` c, per channel.
    """

    coefficients: Float[Tensor, "4 3"]

    def shine_on(
        self,
        splats: Gaussians,
        link_index: Int[Tensor, " n"],
        Ts_world_link: Float[Tensor, "*batch links 4 4"],
    ) -> Gaussians:
        """The splats of every configuration in this light, with one colour each; batch ``*batch``."""
        normals = normals_of(splats)
        turned = (Ts_world_link[..., link_index, :3, :3].to(normals) @ normals[..., None])[..., 0]
        basis = torch.cat([torch.ones_like(turned[..., :1]), turned], dim=-1)
        colours = albedo_of(splats) * (basis @ self.coefficients.to(basis))
        batch = colours.shape[:-2]
        fields = {name: getattr(splats, name) for name in ("means", "quats", "scales", "opacities")}
        return replace(
            splats,
            **{name: value.expand(*batch, *value.shape).contiguous() for name, value in fields.items()},
            sh=((colours - 0.5) / SH_C0)[..., None, :],
            sh_direction="splat",
        )


def fit_light(
    model: SelfModel, seen: Observation, q: Float[Tensor, " dof"], T_cam_world: Float[Tensor, "views 4 4"]
) -> Light | None:
    """The light that explains the observed colours best, given joints and cameras; robust against what the model lacks.

    None where masks leave too few pixels to tell.
    """
    splats, Ts = model.parameters.activate(), model.tree.forward_kinematics(q)
    camera = Camera(seen.camera.K, T_cam_world, seen.camera.width, seen.camera.height)
    turned = (Ts[model.link_index, :3, :3].to(splats.means) @ normals_of(splats)[..., None])[..., 0]
    pictures = []
    for values in (albedo_of(splats), 0.5 + 0.5 * turned):
        plain = replace(splats, sh=((values - 0.5) / SH_C0)[:, None], sh_direction="splat")
        out = rasterize_links(plain, model.link_index, Ts, camera, (0.0, 0.0, 0.0), eps2d=model.eps2d)
        assert out.rgb is not None
        assert out.alpha is not None
        pictures.append(out.rgb / out.alpha.clamp(min=1e-3)[..., None])
        inside = out.alpha > INSIDE
    if seen.mask is not None:
        inside = inside & (seen.mask > INSIDE)
    if int(inside.sum()) < 50:
        return None
    albedo, normals, colours = pictures[0][inside], 2.0 * pictures[1][inside] - 1.0, seen.rgb[inside]
    return Light(_robust_regression(torch.cat([torch.ones_like(normals[:, :1]), normals], dim=1), albedo, colours))


def normals_of(splats: Gaussians) -> Float[Tensor, "n 3"]:
    """Outward normals of flat splats in link frames: their third axes."""
    w, x, y, z = splats.quats.unbind(-1)
    return torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], dim=-1)


def albedo_of(splats: Gaussians) -> Float[Tensor, "n 3"]:
    """Colours that the splats show a headlight straight in front of them."""
    return sh_to_rgb(splats.sh, -normals_of(splats))


def _robust_regression(
    basis: Float[Tensor, "m 4"], albedo: Float[Tensor, "m 3"], colours: Float[Tensor, "m 3"]
) -> Float[Tensor, "4 3"]:
    """Least squares of every channel, weighted anew some times so that outliers lose their say."""
    weight = torch.ones(len(basis))
    solution = torch.zeros(4, 3)
    for _ in range(ROUNDS):
        columns = basis[..., None] * albedo[:, None]
        hessian = torch.einsum("mac,mbc,m->cab", columns, columns, weight) + RIDGE * len(basis) * torch.eye(4)
        gradient = torch.einsum("mac,mc,m->ca", columns, colours, weight)
        solution = torch.linalg.solve(hessian, gradient[..., None])[..., 0].T
        predicted = torch.einsum("mac,ac->mc", columns, solution)
        _, weight = geman_mcclure((predicted - colours).square().sum(dim=1), OUTLIER)
    return solution
