"""A learned start: where a network sees the keypoints, and the configurations (and cameras) that put them there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kinesplat.errors import InputError, ModelFileError
from kinesplat.inverse.initializer_network import CELLS, SIZE, KeypointNetwork
from kinesplat.inverse.keypoints import KeypointObjective, Keypoints
from kinesplat.inverse.levenberg_marquardt import levenberg_marquardt
from kinesplat.inverse.objective import Configurations
from kinesplat.inverse.observation import Observation
from kinesplat.model_file import read_model_file, write_model_file
from kinesplat.self_model import SelfModel

MARGIN = 0.12
WINDOW = 2
MODES = 2
LEAST_SPREAD = 0.3
SOLVED = 384
ITERATIONS = 20
KIND = "initializer"
FOLDER = Path(__file__).parent.parent / "models" / "initializers"


@dataclass(frozen=True)
class Initializer:
    """A network, the keypoints that it finds, and the robot that it was trained for.

    Attributes:
        network: from pictures to heat maps, as `KeypointNetwork`.
        keypoints: what the heat maps are of.
        joint_names: of the robot.
        provenance: how it was trained.
    """

    network: nn.Module
    keypoints: Keypoints
    joint_names: tuple[str, ...]
    provenance: Mapping[str, Any]

    def places(self, observation: Observation) -> KeypointObjective:
        """Up to two places of every keypoint in every view; the units are cells of a square around the robot."""
        inputs, K = network_input(observation)
        self.network.eval()
        with torch.no_grad():
            shares = self.network(inputs).softmax(dim=-1)
        return KeypointObjective(self.keypoints, K, *modes_of(shares[..., :-1].unflatten(-1, (CELLS, CELLS))))

    def propose(self, observation: Observation, drawn: Configurations) -> Configurations:
        """The drawn configurations moved to where they explain the keypoints, best first.

        The most promising of them are solved by least squares on kinematics alone.

        Args:
            observation: what was seen.
            drawn: random configurations, and cameras where these are free.
        """
        objective = self.places(observation)
        best = drawn.select(objective.losses(drawn).argsort()[:SOLVED])
        solution = levenberg_marquardt(objective.linearize, best, iterations=ITERATIONS)
        return solution.state.select(solution.linearization.loss.argsort())

    def check_fits(self, model: SelfModel) -> None:
        """Refuse another robot.

        Raises:
            InputError: the model's joints are not those of the initializer.
        """
        if tuple(model.tree.joint_names) != self.joint_names:
            raise InputError(
                f"the initializer is for joints {', '.join(self.joint_names)}; the model has "
                f"{', '.join(model.tree.joint_names)}"
            )

    def save(self, path: str | Path) -> None:
        """Write it to one file, in half precision, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        weights = {f"network.{k}": v.half() for k, v in self.network.state_dict().items() if v.is_floating_point()}
        points = {"keypoints.links": self.keypoints.links, "keypoints.points": self.keypoints.points}
        header = {"kind": KIND, "joint_names": list(self.joint_names), "provenance": dict(self.provenance)}
        write_model_file(path, weights | points, header)

    @classmethod
    def load(cls, path: str | Path) -> "Initializer":
        """Read one.

        Raises:
            ModelFileError: the file is missing, cut short, corrupt, no initializer, or of a newer version.
        """
        tensors, header = read_model_file(path)
        if header.get("kind") != KIND:
            raise ModelFileError(f"{path}: a model file, but not an initializer")
        try:
            keypoints = Keypoints(tensors["keypoints.links"], tensors["keypoints.points"].float())
            weights = {k[8:]: v.float() for k, v in tensors.items() if k.startswith("network.")}
            network = KeypointNetwork(len(keypoints.links))
            counters = {k: v for k, v in network.state_dict().items() if not v.is_floating_point()}
            network.load_state_dict(weights | counters)
            return cls(network, keypoints, tuple(header["joint_names"]), header["provenance"])
        except (KeyError, RuntimeError) as error:
            raise ModelFileError(f"{path}: incomplete initializer ({error})") from error

    @classmethod
    def packaged(cls, model: SelfModel) -> "Initializer | None":
        """The one that comes with the package for the model's robot, or None."""
        path = FOLDER / f"{model.provenance.get('robot', '')}.safetensors"
        if not path.is_file():
            return None
        found = cls.load(path)
        return found if found.joint_names == tuple(model.tree.joint_names) else None


def network_input(
    observation: Observation,
) -> tuple[Float[Tensor, "views 4 128 128"], Float[Tensor, "views 3 3"]]:
    """A square around every mask (around the picture, where there is none), and intrinsics onto its 32 x 32 cells."""
    squares, Ks = [], []
    masks = [None] * len(observation.rgb) if observation.mask is None else list(observation.mask)
    for rgb, mask, K in zip(observation.rgb, masks, observation.camera.K, strict=True):
        low, side = _square(observation.silhouette()[0] if mask is None else mask, MARGIN)
        channel = torch.full_like(rgb[..., 0], 0.5) if mask is None else mask
        squares.append(_resampled(torch.cat([rgb, channel[..., None]], dim=-1), low, side, observation.background))
        shift = torch.eye(3)
        shift[0, 0] = shift[1, 1] = CELLS / side
        shift[:2, 2] = -low * CELLS / side
        Ks.append(shift @ K.float())
    return torch.stack(squares), torch.stack(Ks)


def modes_of(
    shares: Float[Tensor, "views k cells cells"],
) -> tuple[Float[Tensor, "views k m 2"], Float[Tensor, "views k m"], Float[Tensor, "views k m"]]:
    """Places, spreads and shares of the two largest peaks: mean and deviation within two cells of each."""
    cells = torch.arange(CELLS) + 0.5
    rest, places, spreads, parts = shares.clone(), [], [], []
    for _ in range(MODES):
        top = rest.flatten(-2).argmax(dim=-1)
        row, column = top // CELLS, top % CELLS
        near = ((torch.arange(CELLS) - row[..., None]).abs() <= WINDOW)[..., :, None]
        near = near & ((torch.arange(CELLS) - column[..., None]).abs() <= WINDOW)[..., None, :]
        peak = torch.where(near, rest, 0.0)
        rest = torch.where(near, 0.0, rest)
        part = peak.sum(dim=(-2, -1))
        across, down = (peak.sum(dim=d) / part.clamp(min=1e-9)[..., None] for d in (-2, -1))
        x, y = (across * cells).sum(dim=-1), (down * cells).sum(dim=-1)
        variance = 0.5 * ((across * cells**2).sum(dim=-1) - x**2 + (down * cells**2).sum(dim=-1) - y**2)
        places.append(torch.stack([x, y], dim=-1))
        spreads.append(variance.clamp(min=0.0).sqrt() + LEAST_SPREAD)
        parts.append(part)
    return torch.stack(places, dim=-2), torch.stack(spreads, dim=-1), torch.stack(parts, dim=-1)


def _square(mask: Float[Tensor, "height width"], margin: float) -> tuple[Float[Tensor, "2"], Tensor]:
    """Upper left corner and side [px] of a square around the mask."""
    inside = mask > 0.5
    rows, columns = (torch.nonzero(inside.any(dim=d))[:, 0] for d in (1, 0))
    low, high = torch.stack([columns[0], rows[0]]).float(), torch.stack([columns[-1], rows[-1]]).float() + 1.0
    side = (high - low).max() * (1.0 + 2.0 * margin)
    return 0.5 * (low + high) - 0.5 * side, side


def _resampled(
    picture: Float[Tensor, "height width 4"], low: Float[Tensor, "2"], side: Tensor, background: Float[Tensor, "3"]
) -> Float[Tensor, "4 128 128"]:
    """The square at 128 px, averaged over the pixels that fall on one; beyond the border there is background."""
    height, width = picture.shape[:2]
    fine = max(1, round(side.item() / SIZE))
    empty = torch.cat([background, torch.zeros(1) if bool((picture[..., 3] != 0.5).any()) else torch.full((1,), 0.5)])
    spots = (torch.arange(SIZE * fine) + 0.5) * side / (SIZE * fine)
    x, y = torch.meshgrid(low[0] + spots, low[1] + spots, indexing="xy")
    grid = torch.stack([2.0 * x / width - 1.0, 2.0 * y / height - 1.0], dim=-1)[None]
    planes = (picture - empty).permute(2, 0, 1)[None]
    sampled = torch.nn.functional.grid_sample(planes, grid, align_corners=False)
    return torch.nn.functional.avg_pool2d(sampled, fine)[0] + empty[:, None, None]
