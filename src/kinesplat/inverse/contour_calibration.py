"""Cameras from known joints and photographs without masks, in front of anything, by the robot's contours."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.inverse.calibration import CalibrationObjective, CameraGuesses, Rig
from kinesplat.inverse.camera_search import distinct_rotations, spread_rows
from kinesplat.inverse.contour_cameras import Templates, slid_cameras
from kinesplat.inverse.contour_objective import CHANCE, ContourObjective, Evidence, Poses
from kinesplat.inverse.contour_search import SCREEN, ContourLevel
from kinesplat.inverse.contours import unlit
from kinesplat.inverse.edges import EdgePictures
from kinesplat.inverse.levenberg_marquardt import Solution, levenberg_marquardt

TEMPLATE_PX, TEMPLATE_SPLATS = 128, 1_000
SLID, STARTS, KEPT = 512, 24, 4
COARSE = (ContourLevel(160, 1_000, 4.0, 8, 150), ContourLevel(320, 3_000, 4.0, 8, 200))
FINE = (ContourLevel(320, 3_000, 2.0, 8, 300), ContourLevel(640, 1_000_000, 1.5, 8, 800))
NEIGHBOURS, TURN_RAD, SHIFT = 512, 0.25, 0.15
SEARCH_IMAGES = 4
APART_RAD = 0.05


@dataclass(frozen=True)
class ContourCameras:
    """What was found: the solutions of all levels, best first in the last, and what the pictures say about that."""

    solutions: list[Solution[CameraGuesses]]
    finest: ContourObjective
    evidence: Evidence

    @property
    def losses(self) -> Float[Tensor, " n"]:
        """Share that is missing of the evidence that the best answer's contours could give: 1 is mere chance."""
        most = CHANCE * self.evidence.length[self.evidence.total.argmax()].clamp(min=1.0)
        return 1.0 - self.evidence.total / most


def cameras_by_contours(
    objective: CalibrationObjective,
    rig: Rig,
    K: Float[Tensor, "cams 3 3"],
    T_init: Float[Tensor, "cams 4 4"] | None,
    seed: int,
    bar: Progress,
) -> ContourCameras:
    """The cameras that explain the edges of the pictures best, from a guess or from none."""
    task = bar.add_task("looking for contours", total=2 + len(FINE))
    found = []
    for camera in range(rig.cameras):
        rows = torch.nonzero(rig.camera_of_image == camera)[:, 0]
        own = replace(rig.select(rows), camera_of_image=torch.zeros(len(rows), dtype=torch.long), offsets_free=False)
        part = objective.select(rows)
        starts = slid(part, own, K[camera]) if T_init is None else around(T_init[camera], own, seed)
        found.append(sharpened(part, own, K[camera], starts))
    bar.advance(task, 2)
    rows = torch.arange(max(len(T) for T in found))
    T = torch.stack([own[rows.clamp(max=len(own) - 1)] for own in found], dim=1)
    guesses, solutions = CameraGuesses.start(rig, T, K), []
    for level in FINE:
        here = contour_objective(objective, level)
        solutions.append(levenberg_marquardt(here.linearize, guesses, iterations=level.iterations))
        guesses = solutions[-1].state
        bar.advance(task)
    return ContourCameras(solutions, here, here.evidence(guesses))


def contour_objective(objective: CalibrationObjective, level: ContourLevel) -> ContourObjective:
    """The contours of all images of a calibration at one size."""
    small = replace(objective, observation=objective.observation.resized(level.px))
    model = unlit(objective.model.subsample(level.splats))

    def poses(at: CameraGuesses) -> Poses:
        return Poses(at.q, small.camera(at), small.twists(at))

    return ContourObjective(model, EdgePictures.of(small.observation), poses, level.sigma_px, level.points)


def slid(objective: CalibrationObjective, rig: Rig, K: Float[Tensor, "3 3"]) -> Float[Tensor, "n 4 4"]:
    """Cameras from all around: level ones where the cameras stand still, all where they ride on the robot."""
    rows = spread_rows(rig.q, SEARCH_IMAGES)
    few, some = objective.select(rows), rig.select(rows)
    small = few.observation.resized(TEMPLATE_PX)
    model = unlit(objective.model.subsample(TEMPLATE_SPLATS))
    view = Camera(K, torch.eye(4), objective.full.width, objective.full.height)
    view = view.resized(small.camera.width, small.camera.height)
    pictures = EdgePictures.of(small)
    pictures = replace(pictures, camera=Camera(view.K.expand(len(rows), 3, 3), torch.eye(4), view.width, view.height))
    T_mount_world = torch.linalg.inv(some.Ts_world_mount)
    means = objective.model.posed(some.q).means
    means = means @ T_mount_world[:, :3, :3].mT + T_mount_world[:, None, :3, 3]
    radius = (means - rig.pivot).norm(dim=-1).max().item()
    templates = Templates.around(rig.pivot, radius, view.K, (view.width, view.height), rig.mount is None)
    return slid_cameras(model, some, pictures, templates, SLID)


def around(T: Float[Tensor, "4 4"], rig: Rig, seed: int) -> Float[Tensor, "n 4 4"]:
    """The guess, and random cameras around it: turned and shifted about the middle of the robot."""
    generator = torch.Generator().manual_seed(seed)
    guess = CameraGuesses.start(replace(rig, focal_free=False), T[None, None], torch.eye(3)[None])
    distance = (T[:3, :3] @ rig.pivot + T[:3, 3]).norm()
    noise = 2.0 * torch.rand(NEIGHBOURS, 6, generator=generator) - 1.0
    noise[0] = 0.0
    scale = torch.tensor([SHIFT * distance] * 3 + [TURN_RAD] * 3)
    return guess.select(torch.zeros(NEIGHBOURS, dtype=torch.long)).retract(noise * scale).T_cam_mount[:, 0]


def sharpened(
    objective: CalibrationObjective, rig: Rig, K: Float[Tensor, "3 3"], T: Float[Tensor, "n 4 4"]
) -> Float[Tensor, "found 4 4"]:
    """The best of many guesses of ONE camera after screening and coarse least squares on some images, best first."""
    rows = spread_rows(rig.q, SEARCH_IMAGES)
    few, some = objective.select(rows), rig.select(rows)
    guesses = CameraGuesses.start(some, T[:, None], K[None])
    guesses = best_of(contour_objective(few, SCREEN), guesses, STARTS)
    for level in COARSE:
        here = contour_objective(few, level)
        guesses = levenberg_marquardt(here.linearize, guesses, iterations=level.iterations).state
    judge = contour_objective(few, replace(COARSE[-1], sigma_px=2.0))
    return best_of(judge, guesses, KEPT).T_cam_mount[:, 0]


def best_of(objective: ContourObjective, guesses: CameraGuesses, count: int) -> CameraGuesses:
    """The guesses that the pictures speak for most, turned apart from each other."""
    total = objective.evidence(guesses).total
    return guesses.select(distinct_rotations(guesses.T_cam_mount[:, 0], -total, count, APART_RAD))
