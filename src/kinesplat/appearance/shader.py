"""A light that is fixed in the world: what it adds to each splat, and the shadows that the robot casts on itself.

Under a directional light the colour of a matte splat is a function of the light's direction in the frame of its link,
as it is a function of the optical axis under a headlight: low-order spherical harmonics again, bound to the link and
exact in every configuration (of the clamped cosine, degree 2 keeps 99 %: Ramamoorthi and Hanrahan 2001). What remains
are cast shadows. They need no network either: the splats themselves, rasterised from where the light is, say which of
them the light reaches (Williams 1978).
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import rasterize_links
from kinesplat.rasterizer.spherical_harmonics import SH_C0, sh_basis, sh_degree

MAP_SIZE = 384
DISTANCE = 40.0
"""Of the light's camera from the robot, in radii of the robot: nearly parallel rays."""


class Shader(torch.nn.Module):
    """Colours under a directional light of fixed direction, with shadows.

    Attributes:
        direction: ``(3,)`` unit vector in which the light travels, in the world.
        sh: ``(n, k, 3)`` what the light adds to each splat's colour where it reaches it, as a function of its direction
            in the link's frame; the values themselves, without the offset of 0.5.
        log_bias: logarithm of how far behind the lit surface a splat still counts as lit [log m].
        log_blur: logarithm of the depth over which light turns into shadow [log m].
        parts: ``(3,)`` ambient, diffuse and headlight of the light (`kinesplat.dataset.lights`); zeros where not known.
            They matter to `relit` alone.
    """

    direction: Float[Tensor, "3"]
    parts: Float[Tensor, "3"]

    def __init__(
        self,
        direction: Float[Tensor, "3"],
        sh: Float[Tensor, "n k 3"],
        reach: float = 0.01,
        parts: Float[Tensor, "3"] | None = None,
    ) -> None:
        """A shader that begins with the responses `sh`; `reach` is about the size of a splat [m].

        Without `parts` nothing is known of the light but its direction, and `relit` will refuse.
        """
        super().__init__()
        self.register_buffer("direction", torch.nn.functional.normalize(direction.to(sh), dim=0))
        self.register_buffer("parts", (torch.zeros(3) if parts is None else parts).to(sh))
        self.sh = torch.nn.Parameter(sh.clone())
        self.log_bias = torch.nn.Parameter(torch.tensor(math.log(reach)))
        self.log_blur = torch.nn.Parameter(torch.tensor(math.log(0.3 * reach)))

    def forward(
        self,
        gaussians: Gaussians,
        link_index: Int[Tensor, " n"],
        Ts_world_link: Float[Tensor, "*batch links 4 4"],
    ) -> Float[Tensor, "*batch n 3"]:
        """What the light adds to the colour of each splat.

        Args:
            gaussians: splats in link frames, without batch.
            link_index: ``(n,)`` link of each splat.
            Ts_world_link: ``(*batch, links, 4, 4)`` [m].
        """
        T = Ts_world_link.to(gaussians.means)
        towards = (T[..., :3, :3].mT @ self.direction.to(T)[:, None])[..., 0]
        basis = sh_basis(towards, sh_degree(self.sh.shape[-2]))[..., link_index.long(), :]
        response = (basis[..., None] * self.sh).sum(-2).clamp(min=0.0)
        return self.visibility(gaussians, link_index, T)[..., None] * response

    def select(self, rows: Int[Tensor, " m"]) -> "Shader":
        """The same light on some of the splats, in their order."""
        fresh = Shader(self.direction, self.sh.detach()[rows], parts=self.parts)
        fresh.log_bias.data.copy_(self.log_bias.detach())
        fresh.log_blur.data.copy_(self.log_blur.detach())
        return fresh.to(self.sh.device)

    @classmethod
    def like(cls, state: dict[str, Tensor]) -> "Shader":
        """The shader of a saved ``state_dict()``.

        Raises:
            KeyError: an array is missing.
            RuntimeError: their sizes contradict each other.
        """
        shader = cls(state["direction"].float(), state["sh"].float())
        shader.load_state_dict({"parts": shader.parts, **state})  # files of the first versions have no parts
        return shader

    def relit(self, sh: Float[Tensor, "n k 3"], light: Float[Tensor, "7"]) -> "tuple[Float[Tensor, 'n k 3'], Shader]":
        """What the splats look like under another light; differentiable in `sh` and in this shader.

        A matte surface of colour c shines with ``c ambient + R(axis) headlight`` and, where the light reaches it,
        ``R(direction) diffuse``: both parts of this model tell c and the response R, whatever its own light.

        Args:
            sh: ``(n, k, 3)`` the splats' own spherical harmonics, along the optical axis, with the offset of 0.5.
            light: a row of `kinesplat.dataset.lights`; it casts shadows.

        Returns:
            their spherical harmonics and the shader under that light.

        Raises:
            InputError: the model's own light has no ambient or no diffuse part, or is not known.
        """
        ambient, diffuse, headlight = self.parts.tolist()
        if min(ambient, diffuse) <= 0.0:
            raise InputError("a model can be relit if the light it was made for is known, ambient and diffuse part")
        if sh.shape != self.sh.shape:
            raise InputError(f"harmonics {tuple(sh.shape)} beside a response {tuple(self.sh.shape)}; expected the same")
        of_ambient, of_world, of_camera = light[3:6].tolist()
        offset = torch.zeros_like(sh[0])
        offset[0] = 0.5 / SH_C0
        response = self.sh / diffuse
        colour = (sh + offset - headlight * response) / ambient
        fresh = Shader(light[:3].to(sh), self.sh.detach(), parts=light[3:6])
        del fresh.sh, fresh.log_bias, fresh.log_blur
        fresh.sh, fresh.log_bias, fresh.log_blur = of_world * response, self.log_bias, self.log_blur
        return of_ambient * colour + of_camera * response - offset, fresh

    def visibility(
        self, gaussians: Gaussians, link_index: Int[Tensor, " n"], Ts_world_link: Float[Tensor, "*batch links 4 4"]
    ) -> Float[Tensor, "*batch n"]:
        """Share of the light that reaches each splat: its depth against a depth map from the light (no gradient to the
        geometry)."""
        with torch.no_grad():
            detached = replace(gaussians, **{k: v.detach() for k, v in vars(gaussians).items() if k != "sh_direction"})
            plain, Ts = replace(detached, sh=detached.sh[:, :1]), Ts_world_link.detach()
            of_splat = Ts[..., link_index.long(), :3, :]
            points = (of_splat[..., :3] @ plain.means[..., None])[..., 0] + of_splat[..., 3]
            camera = self._camera(points)
            seen = rasterize_links(plain, link_index, Ts, camera, eps2d=0.1, outputs=("alpha", "depth"))
            assert seen.alpha is not None
            assert seen.depth is not None
            pixels, depth = camera.project(points)
            covered, gaps, weights = _neighbours(seen.alpha, seen.depth, pixels, depth)
        behind = torch.sigmoid((gaps - self.log_bias.exp()) / self.log_blur.exp())
        return 1.0 - (weights * covered * behind).sum(-1)

    def _camera(self, points: Float[Tensor, "*batch n 3"]) -> Camera:
        """From where the light comes, framing the points."""
        centre = 0.5 * (points.amin(-2) + points.amax(-2))
        radius = (points - centre[..., None, :]).norm(dim=-1).amax(-1)
        eye = centre - DISTANCE * radius[..., None] * self.direction.to(points)
        up = (1.0, 0.0, 0.0) if abs(float(self.direction[2])) > 0.9 else (0.0, 0.0, 1.0)
        fov_y = 2.0 * math.atan(1.0 / (DISTANCE - 1.0))
        return Camera.look_at(eye, centre, fov_y, MAP_SIZE, MAP_SIZE, up)


def _neighbours(
    alpha: Float[Tensor, "*batch h w"],
    depth: Float[Tensor, "*batch h w"],
    pixels: Float[Tensor, "*batch n 2"],
    z: Float[Tensor, "*batch n"],
) -> tuple[Float[Tensor, "*batch n 4"], Float[Tensor, "*batch n 4"], Float[Tensor, "*batch n 4"]]:
    """Of the four pixels round each point: coverage, how far the point lies behind, bilinear weight."""
    height, width = alpha.shape[-2:]
    corner = (pixels - 0.5).floor()
    share = pixels - 0.5 - corner
    covered, gaps, weights = [], [], []
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = (corner[..., 0] + dx).clamp(0, width - 1), (corner[..., 1] + dy).clamp(0, height - 1)
            index = (y * width + x).long()
            covered.append(alpha.flatten(-2).gather(-1, index))
            gaps.append(z - depth.flatten(-2).gather(-1, index))
            weights.append(
                (share[..., 0] if dx else 1.0 - share[..., 0]) * (share[..., 1] if dy else 1.0 - share[..., 1])
            )
    return torch.stack(covered, -1), torch.stack(gaps, -1), torch.stack(weights, -1)


def lit(gaussians: Gaussians, added: Float[Tensor, "*batch n 3"]) -> Gaussians:
    """The splats with colours added, in the constant term of their spherical harmonics; batch ``*batch``.

    Args:
        gaussians: batch ``*batch`` or none.
        added: ``(*batch, n, 3)``.
    """
    batch = added.shape[:-2]
    fields = {k: v.expand(*batch, *v.shape[v.ndim - d :]) for k, d, v in _events(gaussians)}
    first = fields["sh"][..., :1, :] + (added / SH_C0)[..., None, :]
    return replace(gaussians, **{**fields, "sh": torch.cat([first, fields["sh"][..., 1:, :]], dim=-2)})


def _events(gaussians: Gaussians) -> list[tuple[str, int, Tensor]]:
    dims = {"means": 2, "quats": 2, "scales": 2, "opacities": 1, "sh": 3}
    return [(name, d, getattr(gaussians, name)) for name, d in dims.items()]


def split_headlight(
    sh: Float[Tensor, "n k 3"],
    normals: Float[Tensor, "n 3"],
    light: Float[Tensor, "7"],
    ambient: float,
    diffuse: float,
) -> tuple[Float[Tensor, "n k 3"], Float[Tensor, "n k 3"]]:
    """Spherical harmonics made for a headlight, turned into those of a camera light and of a world light.

    Args:
        sh: ``(n, k, 3)`` colours under a headlight, with the offset of 0.5.
        normals: ``(n, 3)`` unit outward normals in the link frame.
        light: a row of `kinesplat.dataset.lights`.
        ambient: of the headlight that `sh` was made for.
        diffuse: of the same.

    Returns:
        of the camera's light, with the offset of 0.5; and of the world's light, without.
    """
    values = sh.clone()
    values[:, 0] += 0.5 / SH_C0
    basis = sh_basis(-normals, sh_degree(sh.shape[-2]))
    albedo = (basis[..., None] * values).sum(-2).clamp(0.0, 1.0) / (ambient + diffuse)
    of_ambient, of_world, of_camera = (float(x) for x in light[3:6])
    camera, world = values * (of_camera / diffuse), values * (of_world / diffuse)
    camera[:, 0] += albedo * (of_ambient - of_camera * ambient / diffuse) / SH_C0 - 0.5 / SH_C0
    world[:, 0] -= albedo * (of_world * ambient / diffuse) / SH_C0
    return camera, world
