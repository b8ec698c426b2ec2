"""SelfModel: a kinematic tree and the Gaussians that ride on its links."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat import __version__
from kinesplat.appearance.field import AppearanceField
from kinesplat.appearance.shader import Shader, lit
from kinesplat.camera import Camera
from kinesplat.errors import InputError, ModelFileError, UnseenError
from kinesplat.gaussians import PARAMETERS, Gaussians, Parameters
from kinesplat.kinematics import KinematicTree
from kinesplat.model_file import read_model_file, write_model_file
from kinesplat.rasterizer import DEFAULT_OUTPUTS, WHITE, Render, rasterize_links
from kinesplat.rasterizer.render import Background
from kinesplat.skinning import SkinningField, blend_gaussians, link_motions, pose_gaussians
from kinesplat.surface.merging import merge_splats, nearest_splats
from kinesplat.surface.patches import OVERLAP

if TYPE_CHECKING:
    import kinesplat.description

EPS2D = 0.01
NEAR = 0.01
_HALF = ("quats", "log_scales", "logit_opacities", "sh")
_NETWORKS: dict[str, Any] = {"skinning": SkinningField, "appearance": AppearanceField, "shader": Shader}


@dataclass(frozen=True)
class SelfModel:
    """A robot that can be rendered in any configuration; differentiable in joints, camera and splats.

    Attributes:
        tree: the robot's kinematics.
        parameters: the splats, means, quats and spherical harmonics in the frame of their link; with a skinning field
            in the world, in the canonical configuration.
        link_index: ``(n,)`` the link that each splat rides on; with a skinning field its heaviest one.
        eps2d: screen dilation that the splats were made for [px^2].
        provenance: where the model comes from: robot, source, licence of the description, recipe, ...
        skinning: how splats follow several links at once; None where each is bound to its link.
        appearance: how their looks change with the configuration, of a model with a skinning field.
        shader: light that is fixed in the world, of a model whose splats are bound to links; None under a headlight.
    """

    tree: KinematicTree
    parameters: Parameters
    link_index: Int[Tensor, " n"]
    eps2d: float = EPS2D
    provenance: Mapping[str, Any] = field(default_factory=dict)
    skinning: SkinningField | None = None
    appearance: AppearanceField | None = None
    shader: Shader | None = None

    @classmethod
    def from_description(cls, robot: "kinesplat.description.Robot", n: int = 10_000, seed: int = 0) -> "SelfModel":
        """A self-model without any training: flat splats over the visible surface of the robot's meshes.

        Args:
            robot: a loaded description.
            n: number of splats.
            seed: of the surface samples.

        Raises:
            InputError: the robot has no visible surface, or `n` is smaller than the number of its visible links.
        """
        from kinesplat.surface.sampler import sample_surface  # needs the description package, and so MuJoCo

        parameters, link_index = sample_surface(robot.link_meshes, robot.tree, n, seed)
        provenance = {
            "robot": robot.name,
            "source": "/".join(Path(robot.source).parts[-2:]),
            "licence": robot.licence,
            "recipe": "mesh-bound",
            "gaussians": n,
            "dof": robot.tree.dof,
            "seed": seed,
            "kinesplat": __version__,
        }
        return cls(robot.tree, parameters, link_index, EPS2D, provenance)

    def posed(
        self, q: Float[Tensor, "*#batch dof"], T_world_base: Float[Tensor, "*#batch 4 4"] | None = None
    ) -> Gaussians:
        """The splats of configuration `q` in the world, batch ``*batch``; spherical harmonics are turned along.

        Args:
            q: ``(*batch, dof)`` joint values [rad or m].
            T_world_base: ``(*batch, 4, 4)`` where the base is; the description's own place by default.

        Raises:
            InputError: q has another number of joints or is not finite.
        """
        gaussians = self.parameters.activate()
        if self.skinning is not None:
            return self._posed_by_fields(gaussians, self.skinning, q, T_world_base)
        Ts_world_link = self.tree.forward_kinematics(q, T_world_base).to(gaussians.means.dtype)
        posed = pose_gaussians(gaussians, self.link_index, Ts_world_link)
        return posed if self.shader is None else lit(posed, self.shader(gaussians, self.link_index, Ts_world_link))

    def _posed_by_fields(
        self, gaussians: Gaussians, skinning: SkinningField, q: Tensor, T_world_base: Tensor | None
    ) -> Gaussians:
        """Liu et al. 2024, the argument of `render` in eq. 6: ``X(D(G, q), q)``; then the base carries all of it."""
        canonical, q = gaussians.means, q.to(gaussians.means)
        motions = link_motions(self.tree, q)
        posed = blend_gaussians(gaussians, skinning(canonical), motions, bool(skinning.turns_harmonics))
        if self.appearance is not None:
            posed = self.appearance(posed, canonical, q)
        if T_world_base is None:
            return posed
        moved = self.tree.forward_kinematics(q, T_world_base) @ torch.linalg.inv(self.tree.forward_kinematics(q))
        return pose_gaussians(posed, self.link_index, moved.to(canonical))

    def render(
        self,
        q: Float[Tensor, "*#batch dof"],
        camera: Camera,
        background: Background = WHITE,
        *,
        T_world_base: Float[Tensor, "*#batch 4 4"] | None = None,
        outputs: Sequence[str] = DEFAULT_OUTPUTS,
        backend: str | None = None,
    ) -> Render:
        """Images of configuration `q`; the same as rasterising `posed(q)`, but faster.

        Args:
            q: ``(*batch, dof)`` joint values [rad or m]; B configurations x C cameras are q ``(B, 1, dof)``.
            camera: cameras of batch ``(C,)``, OpenCV axes.
            background: ``(3,)`` colour composited last.
            T_world_base: ``(*batch, 4, 4)`` where the base is; the description's own place by default.
            outputs: which of "rgb", "alpha", "depth" [m], "link_id", "contribution" to compute.
            backend: as in `kinesplat.rasterize`.

        Raises:
            InputError: q, camera or background of the wrong shape, or not finite; an unknown output or backend.
        """
        gaussians, Ts = self.parameters.activate(), self.tree.forward_kinematics(q, T_world_base)
        if self.skinning is not None:  # posed in the world, but told apart by link
            gaussians, Ts = self.posed(q, T_world_base), torch.eye(4).to(gaussians.means).expand(Ts.shape[-3], 4, 4)
        elif self.shader is not None:
            gaussians = lit(gaussians, self.shader(gaussians, self.link_index, Ts))
        return rasterize_links(
            gaussians,
            self.link_index,
            Ts,
            camera,
            background,
            eps2d=self.eps2d,
            backend=backend,
            outputs=outputs,
        )

    def relit(self, light: Float[Tensor, "7"]) -> "SelfModel":
        """The same robot under another light; for models with a shader (see `kinesplat.appearance.shader`).

        Args:
            light: a row of `kinesplat.dataset.lights`: direction, ambient, diffuse, headlight, shadows (always cast).

        Raises:
            InputError: the model has no shader, or one that does not know its light well enough.
        """
        if self.shader is None:
            raise InputError("the model knows its headlight only; train it on pictures of --light world or random")
        with torch.no_grad():
            sh, shader = self.shader.relit(self.parameters.sh, light)
            fixed = Shader(shader.direction, shader.sh, parts=shader.parts)
            fixed.log_bias.copy_(self.shader.log_bias)
            fixed.log_blur.copy_(self.shader.log_blur)
        return replace(self, parameters=replace(self.parameters, sh=sh), shader=fixed.to(sh.device))

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """The networks that the model has, by the name of their attribute."""
        return {name: getattr(self, name) for name in _NETWORKS if getattr(self, name) is not None}

    def check_camera(
        self, q: Float[Tensor, " dof"], camera: Camera, T_world_base: Float[Tensor, "4 4"] | None = None
    ) -> None:
        """Refuse cameras from which the robot cannot be seen properly: inside it, or touching it.

        Inside is where the winding number of the robot's surface is above one half; every splat stands for a piece of
        surface with its normal (Barill et al. 2018, "Fast winding numbers for soups and clouds", eq. 3).

        Raises:
            UnseenError: a camera centre lies inside the robot in configuration `q`, or within the near plane (10 mm) of
                its surface; says which camera.
        """
        with torch.no_grad():
            centres = camera.T_world_cam[..., :3, 3].to(self.parameters.means).reshape(-1, 3)
            winding, distance = _winding_numbers(self.posed(q, T_world_base), centres)
        for index in torch.nonzero((winding > 0.5) | (distance < NEAR))[:, 0].tolist():
            where = "inside the robot" if winding[index] > 0.5 else f"{1000 * distance[index]:.1f} mm from the robot"
            place = ", ".join(f"{x:.3f}" for x in centres[index].tolist())
            which = f"camera {index}" if len(centres) > 1 else "the camera"
            raise UnseenError(f"{which} at ({place}) m is {where}; nothing sensible can be seen from there")

    def subsample(self, n: int, seed: int = 0) -> "SelfModel":
        """A coarser model of at most `n` splats: neighbours of one link and one facing are merged.

        Raises:
            InputError: `n` is smaller than the number of links that carry splats.
        """
        if n >= len(self.parameters):
            return self
        parameters, link_index = merge_splats(self.parameters, self.link_index, len(self.tree.link_names), n, seed)
        shader = self.shader
        if shader is not None:
            shader = shader.select(nearest_splats(self.parameters.means, self.link_index, parameters.means, link_index))
        return replace(self, parameters=parameters, link_index=link_index, shader=shader)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SelfModel":
        """The same model with its splats on another device or in another dtype; the tree answers in q's."""
        moved = {name: deepcopy(network).to(device, dtype) for name, network in self.networks.items()}
        parameters = self.parameters.to(device, dtype)
        return replace(self, parameters=parameters, link_index=self.link_index.to(device), **moved)

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write the model to one file, whole or not at all.

        Args:
            path: usually ``*.safetensors``.
            half: store all but the means in half precision, which costs less than 0.001 in the images.

        Raises:
            InputError: the file cannot be written.
        """
        splats = self.parameters.tensors()
        if half:
            splats |= {name: splats[name].half() for name in _HALF}
        tree = {f"tree.{name}": tensor for name, tensor in self.tree.to_tensors().items()}
        for name, network in self.networks.items():
            splats |= {f"{name}.{key}": tensor for key, tensor in network.state_dict().items()}
        if half and self.shader is not None:
            splats["shader.sh"] = self.shader.sh.half()
        header = {
            "eps2d": self.eps2d,
            "sh_direction": self.parameters.sh_direction,
            "provenance": dict(self.provenance),
        }
        write_model_file(path, {**splats, **tree, "link_index": self.link_index.to(torch.int16)}, header)

    @classmethod
    def load(cls, path: str | Path) -> "SelfModel":
        """Read a model, in float32; needs neither the description nor MuJoCo.

        Raises:
            ModelFileError: the file is missing, cut short, corrupt, no self-model, or of a newer version.
        """
        tensors, header = read_model_file(path)
        try:
            tree = KinematicTree.from_tensors({k[5:]: t for k, t in tensors.items() if k.startswith("tree.")})
            direction = header.get("sh_direction", "splat")  # version 1 knew no other
            parameters = Parameters(*(tensors[name].float() for name in PARAMETERS), sh_direction=direction)
            link_index, eps2d = tensors["link_index"].long(), float(header["eps2d"])
            networks = {name: kind.like(s) for name, kind in _NETWORKS.items() if (s := _part(tensors, name))}
            model = cls(tree, parameters, link_index, eps2d, header["provenance"], **networks)
        except KeyError as error:
            raise ModelFileError(f"{path}: {error} is missing") from error
        except (ModelFileError, RuntimeError) as error:
            raise ModelFileError(f"{path}: {' '.join(str(error).split())}") from error
        _check_contents(model, path)
        return model


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one network, under their own names."""
    return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}


def _check_contents(model: SelfModel, path: str | Path) -> None:
    values = list(model.parameters.tensors().values())
    if any(len(v) != len(model.link_index) for v in values):
        raise ModelFileError(f"{path}: arrays of {sorted({len(v) for v in values})} and {len(model.link_index)} splats")
    if not all(torch.isfinite(v).all() for v in values):
        raise ModelFileError(f"{path}: a splat parameter is NaN or infinite")
    if not all(torch.isfinite(p).all() for network in model.networks.values() for p in network.parameters()):
        raise ModelFileError(f"{path}: a weight of a network is NaN or infinite")
    links = len(model.tree.link_names)
    counts = {"links": (model.skinning and model.skinning.network.last.out_features, links)}
    counts["joints"] = (model.appearance and len(model.appearance.q_half), model.tree.dof)
    for kind, (found, expected) in counts.items():
        if found not in (None, expected):
            raise ModelFileError(f"{path}: a network for {found} {kind}, a robot with {expected}")
    if len(model.link_index) and not 0 <= int(model.link_index.min()) <= int(model.link_index.max()) < links:
        raise ModelFileError(f"{path}: a splat rides on a link outside 0 to {links - 1}")


def _winding_numbers(posed: Gaussians, points: Float[Tensor, "m 3"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Winding number of the splats' surface around each point, and distance to the nearest splat [m]."""
    w, x, y, z = posed.quats.unbind(-1)
    normals = torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], dim=-1)
    areas = math.pi * (2.0 / OVERLAP) ** 2 * posed.scales[..., 0] * posed.scales[..., 1]
    offsets = posed.means - points[:, None]
    distances = offsets.norm(dim=-1).clamp(min=1e-9)
    solid_angles = areas * (offsets * normals).sum(dim=-1) / distances**3
    return solid_angles.sum(dim=-1) / (4.0 * math.pi), distances.amin(dim=-1)
