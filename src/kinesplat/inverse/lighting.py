"""The light of a photograph: what turns a model's colours, made under a headlight, into those of the picture."""

from collections.abc import Sequence
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
RIDGE, GAIN_RIDGE = 1e-3, 1.0
INSIDE = 0.95
FEWEST_PX = 50


@dataclass(frozen=True)
class Light:
    """Irradiance that depends on the direction of the surface alone, to second order, and a gain for every link.

    A surface of albedo a and world normal n on link l shows ``g_l a * (c . Y(n))`` per colour channel, Y the nine
    polynomials of `basis`: matt surfaces show no more of the light around (Ramamoorthi & Hanrahan 2001), without
    shadows and highlights. The gains make good for materials that the description has brighter or darker.

    Attributes:
        coefficients: ``(*batch, 9, 3)`` c, per channel.
        gains: ``(*batch, links)`` g.
    """

    coefficients: Float[Tensor, "*batch 9 3"]
    gains: Float[Tensor, "*batch links"]

    def shine_on(
        self,
        splats: Gaussians,
        link_index: Int[Tensor, " n"],
        Ts_world_link: Float[Tensor, "*batch links 4 4"],
    ) -> Gaussians:
        """The splats of every configuration in this light, with one colour each; batch ``*batch``."""
        normals = normals_of(splats)
        turned = (Ts_world_link[..., link_index, :3, :3].to(normals) @ normals[..., None])[..., 0]
        coefficients, gains = (t.to(turned) for t in (self.coefficients, self.gains))
        colours = gains[..., link_index, None] * albedo_of(splats) * (basis(turned) @ coefficients)
        batch = colours.shape[:-2]
        fields = {name: getattr(splats, name) for name in ("means", "quats", "scales", "opacities")}
        return replace(
            splats,
            **{name: value.expand(*batch, *value.shape).contiguous() for name, value in fields.items()},
            sh=((colours - 0.5) / SH_C0)[..., None, :],
            sh_direction="splat",
        )

    @classmethod
    def stacked(cls, lights: Sequence["Light"]) -> "Light":
        """One light for each element of a batch of configurations with one axis of views."""
        coefficients = torch.stack([light.coefficients for light in lights])[:, None]
        return cls(coefficients, torch.stack([light.gains for light in lights])[:, None])


def basis(n: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 9"]:
    """Polynomials of a normal up to the second degree: spherical harmonics but for constant factors."""
    x, y, z = n.unbind(-1)
    return torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, x * z, x * x - y * y, 3.0 * z * z - 1.0], dim=-1)


def fit_light(
    model: SelfModel, seen: Observation, q: Float[Tensor, " dof"], T_cam_world: Float[Tensor, "views 4 4"]
) -> Light | None:
    """The light that explains the observed colours best, given joints and cameras; robust against what the model lacks.

    None where masks leave too few pixels to tell.
    """
    splats, Ts = model.parameters.activate(), model.tree.forward_kinematics(q)
    camera = Camera(seen.camera.K, T_cam_world, seen.camera.width, seen.camera.height)
    turned = (Ts[model.link_index, :3, :3].to(splats.means) @ normals_of(splats)[..., None])[..., 0]
    pictures, links = [], torch.zeros(0)
    for values in (albedo_of(splats), 0.5 + 0.5 * turned):
        plain = replace(splats, sh=((values - 0.5) / SH_C0)[:, None], sh_direction="splat")
        outputs = ("rgb", "alpha", "link_id")
        out = rasterize_links(plain, model.link_index, Ts, camera, (0.0, 0.0, 0.0), eps2d=model.eps2d, outputs=outputs)
        assert out.rgb is not None
        assert out.alpha is not None
        assert out.link_id is not None
        pictures.append(out.rgb / out.alpha.clamp(min=1e-3)[..., None])
        inside, links = out.alpha > INSIDE, out.link_id
    if seen.mask is not None:
        inside = inside & (seen.mask > INSIDE)
    inside = inside & (links >= 0)
    if int(inside.sum()) < FEWEST_PX:
        return None
    albedo, normals, colours = pictures[0][inside], 2.0 * pictures[1][inside] - 1.0, seen.rgb[inside]
    return _regression(basis(normals), albedo, colours, links[inside].long(), len(model.tree.link_names))


def normals_of(splats: Gaussians) -> Float[Tensor, "n 3"]:
    """Outward normals of flat splats in link frames: their third axes."""
    w, x, y, z = splats.quats.unbind(-1)
    return torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], dim=-1)


def albedo_of(splats: Gaussians) -> Float[Tensor, "n 3"]:
    """Colours that the splats show a headlight straight in front of them."""
    return sh_to_rgb(splats.sh, -normals_of(splats))


def _regression(
    columns: Float[Tensor, "m 9"],
    albedo: Float[Tensor, "m 3"],
    colours: Float[Tensor, "m 3"],
    links: Int[Tensor, " m"],
    count: int,
) -> Light:
    """Least squares of the light and of the gains in turn, weighted anew every time so that outliers lose their say."""
    weight, gains = torch.ones(len(columns)), torch.ones(count)
    for _ in range(ROUNDS):
        own = gains[links, None] * albedo
        terms = columns[..., None] * own[:, None]
        hessian = torch.einsum("mac,mbc,m->cab", terms, terms, weight) + RIDGE * len(columns) * torch.eye(9)
        gradient = torch.einsum("mac,mc,m->ca", terms, colours, weight)
        coefficients = torch.linalg.solve(hessian, gradient[..., None])[..., 0].T
        shown = albedo * (columns @ coefficients)
        _, weight = geman_mcclure((gains[links, None] * shown - colours).square().sum(dim=1), OUTLIER)
        ones = torch.zeros(count) + GAIN_RIDGE
        product = ones.index_add(0, links, weight * (shown * colours).sum(dim=1))
        gains = product / ones.index_add(0, links, weight * shown.square().sum(dim=1))
    return Light(coefficients, gains)
