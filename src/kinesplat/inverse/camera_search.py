"""Where is the camera? From no idea to a few good starts, when the joints of some images are known.

Rotations come from all over SO(3); for each, the translation follows from the boxes around the masks; then the boxes,
and small renderings of the survivors, tell how good a guess is.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Integer
from rich.progress import Progress
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.calibration import CalibrationObjective, CameraGuesses, Level, Rig, at_level
from kinesplat.inverse.levenberg_marquardt import levenberg_marquardt

ROTATIONS = 6_144
RENDERED = 768
STARTS = 32
LEVELS = ((Level(32, 1_000, 12), 16), (Level(64, 3_000, 12), 6), (Level(128, 3_000, 15), 3))
CLOSE_RATIO = 2.0
BOX_STEPS = 8
SEARCH_IMAGES = 4
POINTS = 256
CHUNK = 512
APART_RAD = 0.2


@dataclass(frozen=True)
class Boxes:
    """Boxes around masks ``(*batch, 4)`` [px]: left, top, right, bottom, cut off at the image border."""

    edges: Float[Tensor, "*batch 4"]

    @classmethod
    def of_masks(cls, masks: Float[Tensor, "images height width"]) -> "Boxes":
        """Smallest boxes around ``mask > 0.5``."""
        inside = masks > 0.5
        edges = []
        for along in (1, 2):
            lit = inside.any(dim=along)
            index = torch.arange(lit.shape[1], dtype=torch.float32)
            low = torch.where(lit, index, torch.inf).amin(dim=1)
            high = torch.where(lit, index, -torch.inf).amax(dim=1) + 1.0
            edges.append((low, high))
        (left, right), (top, bottom) = edges
        return cls(torch.stack([left, top, right, bottom], dim=-1))

    @classmethod
    def of_pixels(cls, pixels: Float[Tensor, "*batch n 2"], width: int, height: int) -> "Boxes":
        """Smallest boxes around points, cut off at the image border."""
        size = torch.tensor([width, height]).to(pixels)
        low, high = pixels.amin(dim=-2), pixels.amax(dim=-2)
        return cls(torch.cat([low.clamp(min=0.0).minimum(size), high.clamp(min=0.0).minimum(size)], dim=-1))

    @property
    def centre(self) -> Float[Tensor, "*batch 2"]:
        """Middle [px]."""
        return 0.5 * (self.edges[..., :2] + self.edges[..., 2:])

    @property
    def size(self) -> Float[Tensor, "*batch 2"]:
        """Width and height, at least 1 px."""
        return (self.edges[..., 2:] - self.edges[..., :2]).clamp(min=1.0)

    def overlap(self, other: "Boxes") -> Float[Tensor, "*batch"]:
        """Intersection over union."""
        low = torch.maximum(self.edges[..., :2], other.edges[..., :2])
        high = torch.minimum(self.edges[..., 2:], other.edges[..., 2:])
        common = (high - low).clamp(min=0.0).prod(dim=-1)
        return common / (self.size.prod(dim=-1) + other.size.prod(dim=-1) - common)


def find_camera(
    objective: CalibrationObjective, rig: Rig, K: Float[Tensor, "3 3"], generator: torch.Generator, bar: Progress
) -> Float[Tensor, "found 4 4"]:
    """The distinct transforms of ONE camera that explain its images best, best first; others only if they come close.

    Raises:
        InputError: nothing in the images can be told from their background.
    """
    task = bar.add_task("looking for a camera", total=1 + len(LEVELS))
    guesses = search(at_level(objective, LEVELS[0][0]), rig, K, generator)
    losses = torch.zeros(len(guesses.K))
    bar.advance(task)
    for level, kept in LEVELS:
        here = at_level(objective, level)
        solution = levenberg_marquardt(here.linearize, guesses, iterations=level.iterations)
        losses = solution.linearization.loss
        order = distinct_rotations(solution.state.T_cam_mount[:, 0], losses, kept)
        guesses, losses = solution.state.select(order), losses[order]
        bar.advance(task)
    return guesses.T_cam_mount[losses < CLOSE_RATIO * losses[0], 0]


def search(
    objective: CalibrationObjective, rig: Rig, K: Float[Tensor, "3 3"], generator: torch.Generator
) -> CameraGuesses:
    """The best distinct of thousands of guesses of one camera, by the masks' boxes and small renderings."""
    seen, small = objective.observation, objective.observation.camera
    view = Camera(K, torch.eye(4), objective.full.width, objective.full.height).resized(small.width, small.height)
    boxes = Boxes.of_masks(seen.silhouette()).edges
    rows = spread_rows(rig.q, SEARCH_IMAGES)
    rows = rows[torch.isfinite(boxes[rows]).all(dim=1)]
    if not len(rows):
        raise InputError("the robot differs nowhere from the background; give masks or T_cam_base_init")
    points = surface_on_mount(objective, rig, moving=seen.backdrop is not None)[rows]
    R = random_rotations(ROTATIONS, generator)
    T = torch.cat([translated(chunk, points, boxes[rows], view) for chunk in R.split(CHUNK)])
    agreement = torch.cat([box_agreement(chunk, points, boxes[rows], view) for chunk in T.split(CHUNK)])
    T = T[agreement.argsort(descending=True)[:RENDERED]]
    few, guesses = objective.select(rows), CameraGuesses.start(rig.select(rows), T[:, None], K[None])
    losses = torch.cat([few.loss(guesses.select(c)).mean(dim=1) for c in torch.arange(len(T)).split(64)])
    return replace(guesses.select(distinct_rotations(T, losses, STARTS)), rig=rig)


def random_rotations(count: int, generator: torch.Generator) -> Float[Tensor, "count 3 3"]:
    """Rotations spread evenly over SO(3): uniformly random quaternions."""
    w, x, y, z = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1).unbind(1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def translated(
    R: Float[Tensor, "n 3 3"], points: Float[Tensor, "images m 3"], edges: Float[Tensor, "images 4"], view: Camera
) -> Float[Tensor, "n 4 4"]:
    """Rotations completed by the translation at which the projected points fill the boxes best.

    A fixed point: the depth follows from the ratio of the boxes' sizes, the sideways shift from their centres.
    """
    turned = torch.einsum("nab,imb->nima", R, points)
    radius = turned.norm(dim=-1).amax(dim=(1, 2))
    target, focal = Boxes(edges), view.K[..., (0, 1), (0, 1)]
    t = torch.zeros(len(R), 3)
    t[:, 2] = 3.0 * radius
    for _ in range(BOX_STEPS):
        seen = Boxes.of_pixels(_projected(turned + t[:, None, None], view), view.width, view.height)
        shift = (target.centre - seen.centre).mean(dim=1)
        ratio = (seen.size.prod(dim=-1) / target.size.prod(dim=-1)).clamp(0.25, 4.0).log().mean(dim=1)
        depth = (t[:, 2] * torch.exp(0.5 * ratio)).clamp(min=0.2 * radius, max=100.0 * radius)
        t = torch.cat([(t[:, :2] + shift * t[:, 2:] / focal) * (depth / t[:, 2])[:, None], depth[:, None]], dim=1)
    T = torch.eye(4).repeat(len(R), 1, 1)
    T[:, :3, :3], T[:, :3, 3] = R, t
    return T


def spread_rows(q: Float[Tensor, "images dof"], count: int) -> Integer[Tensor, " rows"]:
    """Indices of at most `count` images whose joints differ most from each other (farthest points)."""
    rows, far = [0], torch.full((len(q),), torch.inf)
    while len(rows) < min(count, len(q)):
        far = torch.minimum(far, (q - q[rows[-1]]).norm(dim=1))
        rows.append(int(far.argmax()))
    return torch.tensor(rows)


def distinct_rotations(
    T: Float[Tensor, "n 4 4"], losses: Float[Tensor, " n"], count: int, apart: float = APART_RAD
) -> Integer[Tensor, " kept"]:
    """Indices of the `count` lowest losses, best first, each turned by more than `apart` [rad] from all better ones."""
    kept: list[int] = []
    for i in losses.argsort().tolist():
        if len(kept) == count:
            break
        if not kept or bool((angles_between(T[kept], T[i]) > apart).all()):
            kept.append(i)
    return torch.tensor(kept)


def angles_between(a: Float[Tensor, "*#batch 4 4"], b: Float[Tensor, "*#batch 4 4"]) -> Float[Tensor, "*batch"]:
    """Angle of the rotation from one transform to the other [rad]."""
    R = a[..., :3, :3] @ b[..., :3, :3].mT
    axis = torch.stack([R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]], dim=-1)
    return torch.atan2(axis.norm(dim=-1), R.diagonal(dim1=-2, dim2=-1).sum(dim=-1) - 1.0)


def surface_on_mount(objective: CalibrationObjective, rig: Rig, moving: bool) -> Float[Tensor, "images m 3"]:
    """Some of the robot's surface in the frame of what carries the camera, image by image [m].

    Args:
        moving: only points that are elsewhere in most of the other images, by a third of the largest such distance.
    """
    means = objective.model.posed(rig.q).means
    T_mount_world = torch.linalg.inv(rig.Ts_world_mount)
    means = means @ T_mount_world[:, :3, :3].mT + T_mount_world[:, None, :3, 3]
    if moving:
        away = (means[:, None] - means).norm(dim=-1).median(dim=1).values.amin(dim=0)
        means = means[:, away >= away.max() / 3.0]
    picked = torch.linspace(0, means.shape[1] - 1, min(POINTS, means.shape[1])).round().long()
    return means[:, picked]


def _projected(p_cam: Float[Tensor, "*batch m 3"], view: Camera) -> Float[Tensor, "*batch m 2"]:
    """Pixels of camera points; depths below 1 cm count as 1 cm."""
    p_image = p_cam @ view.K.mT
    return p_image[..., :2] / p_image[..., 2:].clamp(min=0.01)


def box_agreement(
    T: Float[Tensor, "n 4 4"], points: Float[Tensor, "images m 3"], edges: Float[Tensor, "images 4"], view: Camera
) -> Float[Tensor, " n"]:
    """Mean overlap of the projected points' boxes with those of the masks."""
    p_cam = torch.einsum("nab,imb->nima", T[:, :3, :3], points) + T[:, None, None, :3, 3]
    return Boxes.of_pixels(_projected(p_cam, view), view.width, view.height).overlap(Boxes(edges)).mean(dim=1)
