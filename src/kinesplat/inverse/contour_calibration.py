"""Cameras from known joints and photographs without masks, in front of anything, by the robot's contours."""

import math
import time
from dataclasses import replace

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.calibration import CalibrationObjective, CameraGuesses, Rig, others, spread_groups
from kinesplat.inverse.calibration_result import (
    CalibrationResult,
    ImageQuality,
    about_cameras,
    assembled,
    camera_shifts,
    distinct_answers,
)
from kinesplat.inverse.camera_search import distinct_rotations, spread_rows
from kinesplat.inverse.contour_cameras import Templates, slid_cameras
from kinesplat.inverse.contour_fit import SYSTEMATIC
from kinesplat.inverse.contour_objective import ContourObjective, Poses
from kinesplat.inverse.contour_search import ContourLevel
from kinesplat.inverse.contour_verdict import verdict_of
from kinesplat.inverse.contours import unlit
from kinesplat.inverse.edges import EdgePictures
from kinesplat.inverse.levenberg_marquardt import levenberg_marquardt
from kinesplat.inverse.result import covariance_of

TEMPLATE_PX, TEMPLATE_SPLATS = 128, 1_000
SLID, STARTS, KEPT = 512, 24, 4
SCREENING = ContourLevel(160, 1_000, 2.0, 0, 150)
COARSE = (ContourLevel(160, 1_000, 4.0, 8, 150), ContourLevel(320, 3_000, 4.0, 8, 200))
FINE = (
    *(ContourLevel(320, 3_000, sigma, 6, 300) for sigma in (8.0, 6.0, 4.0, 3.0, 2.0)),
    ContourLevel(512, 1_000_000, 1.5, 8, 800),
)
NEIGHBOURS, TURN_RAD, SHIFT = 512, 0.25, 0.15
SEARCH_IMAGES = 4
REFITS = 4
APART_RAD = 0.05


def calibrated_by_contours(
    objective: CalibrationObjective,
    rig: Rig,
    K: Float[Tensor, "cams 3 3"],
    T_init: Float[Tensor, "cams 4 4"] | None,
    seed: int,
    bar: Progress,
) -> CalibrationResult:
    """The cameras that explain the edges of pictures whose background is unknown.

    Args:
        objective: model and pictures.
        rig: what is known.
        K: intrinsics at the full size.
        T_init: first guesses of ``T_cam_mount``.
        seed: of random cameras around a guess.
        bar: where progress is shown.

    Raises:
        InputError: focal lengths are wanted as well, cameras ride on a link and there is no guess, or a camera ended up
            inside the robot.
    """
    if rig.focal_free:
        raise InputError("the focal length needs masks, a plain background or a backdrop; only contours are known here")
    if T_init is None and rig.mount is not None:
        raise InputError("cameras on a link need masks, a plain background, a backdrop, or a first guess")
    began, solutions = time.perf_counter(), []
    task = bar.add_task("looking for contours", total=1 + len(FINE))
    guesses = first_cameras(objective, rig, K, T_init, seed)
    bar.advance(task)
    for level in FINE:
        here = contour_objective(objective, level)
        solutions.append(levenberg_marquardt(here.linearize, guesses, iterations=level.iterations))
        guesses = solutions[-1].state
        bar.advance(task)
    proof, at = here.evidence(guesses), solutions[-1].linearization
    index = int(proof.total.argmax())
    best, points = guesses.select(torch.tensor([index])), int(proof.length[index].item())
    covariance = SYSTEMATIC**2 * covariance_of(at.hessian[index], at.loss[index].item(), points)
    groups = spread_groups(rig)
    shifts = [camera_shifts(without(objective, best, rows), best) for rows in groups]
    hypotheses = distinct_answers(guesses, proof.losses)
    return assembled(
        objective.model,
        objective.full,
        best,
        verdict_of([h.loss for h in hypotheses]),
        hypotheses,
        about_cameras(covariance, best),
        shifts,
        qualities(here, best, shifts, groups),
        tuple(v for s in solutions for v in s.losses.amin(dim=1).tolist()),
        time.perf_counter() - began,
    )


def first_cameras(
    objective: CalibrationObjective,
    rig: Rig,
    K: Float[Tensor, "cams 3 3"],
    T_init: Float[Tensor, "cams 4 4"] | None,
    seed: int,
) -> CameraGuesses:
    """Every camera on its own: its best guesses side by side, from around a first guess or from everywhere."""
    found = []
    for camera in range(rig.cameras):
        rows = torch.nonzero(rig.camera_of_image == camera)[:, 0]
        own = replace(rig.select(rows), camera_of_image=torch.zeros(len(rows), dtype=torch.long), offsets_free=False)
        part = objective.select(rows)
        starts = slid(part, own, K[camera]) if T_init is None else around(T_init[camera], own, seed)
        found.append(sharpened(part, own, K[camera], starts))
    rows = torch.arange(max(len(T) for T in found))
    return CameraGuesses.start(rig, torch.stack([T[rows.clamp(max=len(T) - 1)] for T in found], dim=1), K)


def without(objective: CalibrationObjective, best: CameraGuesses, left_out: Tensor) -> CameraGuesses:
    """The answer, fitted again to the images that remain."""
    rows = others(left_out, len(best.rig.q))
    here = contour_objective(objective.select(rows), FINE[-2])
    return levenberg_marquardt(here.linearize, replace(best, rig=best.rig.select(rows)), iterations=REFITS).state


def qualities(
    here: ContourObjective, best: CameraGuesses, shifts: list[tuple[Tensor, Tensor]], groups: list[Tensor]
) -> tuple[ImageQuality, ...]:
    """Image by image: the share of its contours' evidence that is missing; there are no silhouettes to compare."""
    proof = here.of_views(best)
    losses = 1.0 - proof.total / (proof.chance * proof.length.clamp(min=1.0))
    moved = {int(i): shift for group, shift in zip(groups, shifts, strict=True) for i in group}
    found = []
    for i, (loss, camera) in enumerate(zip(losses.tolist(), best.rig.camera_of_image.tolist(), strict=True)):
        mm, deg = (part[camera].item() for part in moved[i]) if i in moved else (math.nan, math.nan)
        found.append(ImageQuality(loss, math.nan, mm, deg))
    return tuple(found)


def contour_objective(objective: CalibrationObjective, level: ContourLevel) -> ContourObjective:
    """The contours of all images of a calibration at one size."""
    small = replace(objective, observation=objective.observation.resized(level.px))
    model = unlit(objective.model.subsample(level.splats))

    def poses(at: CameraGuesses) -> Poses:
        return Poses(at.q, small.camera(at), small.twists(at))

    return ContourObjective(model, EdgePictures.of(small.observation), poses, level.sigma_px, level.points)


def slid(objective: CalibrationObjective, rig: Rig, K: Float[Tensor, "3 3"]) -> Float[Tensor, "n 4 4"]:
    """Level cameras from all around."""
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
    templates = Templates.around(rig.pivot, radius, view.K, (view.width, view.height))
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
    guesses = best_of(contour_objective(few, SCREENING), guesses, STARTS)
    for level in COARSE:
        here = contour_objective(few, level)
        guesses = levenberg_marquardt(here.linearize, guesses, iterations=level.iterations).state
    judge = contour_objective(few, replace(COARSE[-1], sigma_px=2.0))
    return best_of(judge, guesses, KEPT).T_cam_mount[:, 0]


def best_of(objective: ContourObjective, guesses: CameraGuesses, count: int) -> CameraGuesses:
    """The guesses that the pictures speak for most, turned apart from each other.

    Chance is what half of them reach; were it less, robots too small to be wrong in many places would win.
    """
    proof = objective.evidence(guesses)
    total = replace(proof, chance=proof.cost.median().item()).total
    return guesses.select(distinct_rotations(guesses.T_cam_mount[:, 0], -total, count, APART_RAD))
