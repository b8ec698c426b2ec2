"""Table 1's K-planes baseline: splats whose changes with the configuration are read from planes of features.

Deformable Gaussians as in 4D Gaussian splatting (Wu et al. 2024), with q in the place of time: a point of the space
of canonical position and q, ``3 + dof`` dimensions, is projected onto every coordinate plane, features are read
there by bilinear interpolation and multiplied over the planes (Fridovich-Keil et al. 2023, "K-planes", eq. 1), and a
small network turns the product into changes of position, rotation, scale, opacity and spherical harmonics. It knows
nothing of links.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.gaussians import GAUSSIANS, Gaussians, Parameters
from kinesplat.kinematics import KinematicTree
from kinesplat.quaternions import quat_product
from kinesplat.rasterizer import DEFAULT_OUTPUTS, WHITE, Render, rasterize
from kinesplat.rasterizer.render import Background
from kinesplat.training.joint import JointSettings
from kinesplat.training.splat_optimizer import Rates

MARGIN = 1.2


class Planes(torch.nn.Module):
    """Features of canonical position and q: one plane for each pair of the ``3 + dof`` axes.

    Planes of two spatial axes start at random, all others at one: before training nothing depends on q.
    """

    centre: Float[Tensor, "3"]
    radius: Float[Tensor, ""]
    pairs: Int64[Tensor, "pairs 2"]
    q_lower: Float[Tensor, " dof"]
    q_upper: Float[Tensor, " dof"]

    def __init__(
        self,
        points: Float[Tensor, "n 3"],
        tree: KinematicTree,
        *,
        features: int = 16,
        cells: int = 64,
        joint_cells: int = 16,
        seed: int = 0,
    ) -> None:
        """Planes around the canonical cloud `points` [m] and within the joint limits.

        Args:
            points: what the planes must cover, with 20 % to spare.
            tree: the robot.
            features: per plane.
            cells: along a spatial axis.
            joint_cells: along a joint's axis.
            seed: of the spatial planes.
        """
        super().__init__()
        low, high = points.amin(dim=0), points.amax(dim=0)
        self.register_buffer("centre", 0.5 * (low + high))
        self.register_buffer("radius", MARGIN * 0.5 * (high - low).amax())
        self.register_buffer("q_lower", tree.q_lower.float())
        self.register_buffer("q_upper", tree.q_upper.float())
        generator = torch.Generator().manual_seed(seed)
        space = 0.1 + 0.4 * torch.rand(3, cells, cells, features, generator=generator)
        pairs = torch.combinations(torch.arange(tree.dof), 2)
        self.register_buffer("pairs", pairs)
        self.space = torch.nn.Parameter(space)  # of (y, z), (x, z) and (x, y)
        self.mixed = torch.nn.Parameter(torch.ones(tree.dof, joint_cells, 3, cells, features))
        self.joints = torch.nn.Parameter(torch.ones(len(pairs), joint_cells, joint_cells, features))

    def forward(self, points: Float[Tensor, "n 3"], q: Float[Tensor, " dof"]) -> Float[Tensor, "n features"]:
        """Product over all planes at canonical positions [m] and one configuration."""
        places = ((points - self.centre) / self.radius).clamp(-1.0, 1.0)
        x, y, z = places.unbind(-1)
        grid = torch.stack([torch.stack(pair, dim=-1) for pair in ((z, y), (z, x), (y, x))])[:, :, None]
        read = torch.nn.functional.grid_sample(self.space.permute(0, 3, 1, 2), grid, align_corners=True)
        product = read[..., 0].prod(dim=0).T
        along = _hats((q - self.q_lower) / (self.q_upper - self.q_lower), self.mixed.shape[1])  # (dof, cells)
        lines = torch.einsum("jc,jcaif->aijf", along, self.mixed)  # every mixed plane cut at q: lines in space
        for axis in range(3):
            here = _hats(0.5 * (places[:, axis] + 1.0), self.mixed.shape[3])
            product = product * (here @ lines[axis].flatten(1)).unflatten(1, lines.shape[2:]).prod(dim=1)
        first, second = along[self.pairs[:, 0]], along[self.pairs[:, 1]]
        return product * torch.einsum("pa,pb,pabf->pf", first, second, self.joints).prod(dim=0)


class Decoder(torch.nn.Module):
    """Features to changes of a splat: one hidden layer for all, one for each kind of change; zero to begin with."""

    def __init__(self, features: int, k: int, width: int = 64, seed: int = 0) -> None:
        """A decoder that changes nothing; `k` spherical-harmonic coefficients per colour."""
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk = torch.nn.Sequential(torch.nn.Linear(features, width), torch.nn.ReLU())
            self.heads = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, outputs))
                for outputs in (3, 4, 3, 1, 3 * k)
            )
        for head in self.heads:
            for values in list(head.parameters())[-2:]:
                torch.nn.init.zeros_(values)

    def forward(self, features: Float[Tensor, "n features"]) -> tuple[Tensor, ...]:
        """Changes of mean (in radii), quaternion, log scale, logit of the opacity, and spherical harmonics, flat."""
        shared = self.trunk(features)
        return tuple(head(shared) for head in self.heads)


@dataclass(frozen=True)
class KPlanesModel:
    """Splats of the canonical configuration and what moves them; renders like a `SelfModel`.

    Attributes:
        tree: the robot; only its joint limits are used.
        parameters: splats in the world, in the canonical configuration.
        planes: features of canonical position and q.
        decoder: features to changes.
        eps2d: screen dilation [px^2].
    """

    tree: KinematicTree
    parameters: Parameters
    planes: Planes
    decoder: Decoder
    eps2d: float = 0.3

    @classmethod
    def around(
        cls, parameters: Parameters, tree: KinematicTree, *, features: int = 16, joint_cells: int = 16, seed: int = 0
    ) -> "KPlanesModel":
        """A model whose splats do not move yet."""
        planes = Planes(parameters.means, tree, features=features, joint_cells=joint_cells, seed=seed)
        decoder = Decoder(features, parameters.sh.shape[1], seed=seed + 1)
        return cls(tree, parameters, planes.to(parameters.means.device), decoder.to(parameters.means.device))

    @property
    def networks(self) -> Mapping[str, torch.nn.Module]:
        """What learns beside the splats."""
        return {"planes": self.planes, "decoder": self.decoder}

    def posed(self, q: Float[Tensor, "*batch dof"]) -> Gaussians:
        """The splats of configuration `q` in the world, batch ``*batch``."""
        flat = [self._posed_once(one.to(self.parameters.means)) for one in q.reshape(-1, q.shape[-1])]
        stacked = {name: torch.stack([getattr(g, name) for g in flat]) for name in GAUSSIANS}
        shaped = {name: value.reshape(*q.shape[:-1], *value.shape[1:]) for name, value in stacked.items()}
        return replace(flat[0], **shaped)

    def _posed_once(self, q: Float[Tensor, " dof"]) -> Gaussians:
        gaussians = self.parameters.activate()
        dm, dR, dS, do, dc = self.decoder(self.planes(gaussians.means, q))
        turn = torch.nn.functional.normalize(dR + dR.new_tensor([1.0, 0.0, 0.0, 0.0]), dim=-1)
        return replace(
            gaussians,
            means=gaussians.means + self.planes.radius * dm,
            quats=quat_product(turn, gaussians.quats),
            scales=gaussians.scales * dS.exp(),
            opacities=(gaussians.opacities.logit(1e-6) + do[:, 0]).sigmoid(),
            sh=gaussians.sh + dc.unflatten(-1, (-1, 3)),
        )

    def render(
        self,
        q: Float[Tensor, "*#batch dof"],
        camera: Camera,
        background: Background = WHITE,
        *,
        outputs: Sequence[str] = DEFAULT_OUTPUTS,
    ) -> Render:
        """Images of configuration `q`, as `SelfModel.render`."""
        return rasterize(self.posed(q), camera, background, eps2d=self.eps2d, outputs=outputs)


def kplanes_settings(model: KPlanesModel) -> JointSettings:
    """The rates of the joint stage: those of the recipe `paper` for the splats, and for the planes what K-planes take.

    That is 1e-2 with the six planes of space and time. A product of hundreds of planes would explode at this rate (24
    joints make 351), so it is divided by their number: a step then changes the product as much as with six.
    """
    rates = Rates(means=4e-4, quats=3e-3, log_scales=1e-2, logit_opacities=2e-2, sh=5e-3)
    dof = model.tree.dof
    planes = 3 + 3 * dof + len(model.planes.pairs)
    return JointSettings(rates, {"planes": 1e-2 * min(1.0, 6.0 / planes), "decoder": 1e-3})


def _hats(at: Float[Tensor, " n"], cells: int) -> Float[Tensor, "n cells"]:
    """Weights of linear interpolation between `cells` values spread over [0, 1]."""
    place = at.clamp(0.0, 1.0)[:, None] * (cells - 1)
    return (1.0 - (place - torch.arange(cells).to(at)).abs()).clamp(min=0.0)
