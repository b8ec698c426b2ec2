"""From images with known joints to the camera: hand-eye calibration without a marker."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError, unknown
from kinesplat.inverse.backdrop import median_backdrop
from kinesplat.inverse.calibration import (
    CalibrationObjective,
    CameraGuesses,
    Level,
    Rig,
    at_level,
    base_in_world,
    others,
    spread_groups,
)
from kinesplat.inverse.calibration_result import CalibrationResult, explained, summary
from kinesplat.inverse.camera_search import find_camera
from kinesplat.inverse.contour_calibration import calibrated_by_contours
from kinesplat.inverse.levenberg_marquardt import Solution, levenberg_marquardt
from kinesplat.inverse.observation import ImageLike, Observation, image_shape, plain_background
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel

NEAR_LEVELS = (Level(64, 3_000, 15), Level(128, 3_000, 15))
FINE_LEVELS = (Level(256, 1_000_000, 30, 0.5), Level(512, 1_000_000, 15, 0.25))
FINEST_IMAGES = 30
SEARCHES = 3
REFIT_ITERATIONS = 6
DROPPED_RATIO = 2.0
BACKDROP_IMAGES = 3


@torch.no_grad()
def calibrate(
    model: SelfModel,
    images: ImageLike | Sequence[ImageLike],
    q: Float[Tensor, "images dof"] | Sequence[Sequence[float]],
    K: Float[Tensor, "*cams 3 3"],
    masks: ImageLike | Sequence[ImageLike] | None = None,
    T_cam_base_init: Float[Tensor, "*cams 4 4"] | None = None,
    *,
    camera_of_image: Sequence[int] | None = None,
    mount: str | None = None,
    free: Sequence[str] = (),
    backdrop: ImageLike | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CalibrationResult:
    """Recover where one or more cameras stand from images of the robot in known configurations.

    Without a first guess, thousands of camera rotations are tried for each camera; each gets the translation at which
    the robot fills the masks' boxes, and the best of them, rendered small, become starts. All images then sharpen the
    cameras together by Levenberg-Marquardt, in the end at 512 px with a robust loss: masks with holes and things that
    the model lacks hardly matter. The more images, and the more different their configurations, the better. Pictures
    are rendered on the model's device, contours always on the CPU; the result is on the CPU.

    Args:
        model: self-model of the robot.
        images: ``(images, height, width, 3)`` or a list of pictures of one size; float in [0, 1] or uint8.
        q: ``(images, dof)`` joint readings [rad]/[m].
        K: ``(3, 3)`` intrinsics [px] of the camera, or ``(cams, 3, 3)``.
        masks: ``(images, height, width)``, 1 on the robot. Without masks: a background of one colour, or `backdrop`, or
            at least three images of every camera, whose median then stands for the background. Where there are fewer,
            or the answer fails, the robot's contours alone are looked for (`kinesplat.inverse.contour_calibration`):
            of level cameras, or around a first guess.
        T_cam_base_init: ``(4, 4)`` or ``(cams, 4, 4)`` first guess, right within about 0.3 rad and a fifth of the
            distance: of `T_cam_base`, or of ``T_cam_link`` with `mount`. Default: no idea.
        camera_of_image: which camera took each image, counted from 0; default: all are of one camera.
        mount: name of the link that carries the cameras (eye in hand); default: they stand beside the robot.
        free: what else to estimate: "offsets" (one for each joint reading), "focal" (one factor for each camera).
        backdrop: the scene without the robot, ``(height, width, 3)`` or one for every image.
        seed: of the random starts.
        progress: show a progress bar on the terminal.

    Raises:
        InputError: wrong types, shapes, ranges or names; images that cannot be told from their background; a camera
            that ends up inside the robot.
    """
    began, device, model = time.perf_counter(), model.parameters.means.device, model.to("cpu")
    if model.skinning is not None:
        raise InputError("calibrate needs a model whose splats ride on one link each; this one has a skinning field")
    rig, K = checked_rig(model.tree, q, K, camera_of_image, mount, free)
    rig = replace(rig, pivot=middle_of(model, rig))
    full, seen = observed(images, masks, K, rig, backdrop)
    objective = CalibrationObjective(model, seen, full, device=device)
    with Progress(disable=not progress, transient=True) as bar:
        given = None if T_cam_base_init is None else checked_transforms(T_cam_base_init, rig)
        if not seen.unknown:
            learned = masks is None and backdrop is None and seen.backdrop is not None
            more = learned and not rig.focal_free  # contours are left to look for
            result = by_pixels(objective, rig, K, given, seed, bar, 1 if more else SEARCHES, more)
            if result is not None:
                return replace(result, seconds=time.perf_counter() - began)
            objective = replace(objective, observation=replace(seen, backdrop=None, unknown=True))
        result = calibrated_by_contours(objective, rig, K, given, seed, bar)
        return replace(result, seconds=time.perf_counter() - began)


def by_pixels(
    objective: CalibrationObjective,
    rig: Rig,
    K: Float[Tensor, "cams 3 3"],
    given: Float[Tensor, "cams 4 4"] | None,
    seed: int,
    bar: Progress,
    searches: int,
    more: bool,
) -> CalibrationResult | None:
    """The cameras where masks, a plain background or a backdrop tell the robot from what is behind it.

    Args:
        objective: model and pictures.
        rig: what is known.
        K: intrinsics at the full size.
        given: first guesses of ``T_cam_mount``.
        seed: of the random rotations.
        bar: where progress is shown.
        searches: how many are made, at most.
        more: whether there is another way: None is returned where this one leads nowhere.

    Raises:
        InputError: the robot is not seen, or a camera ended up inside it, and there is no other way.
    """
    try:
        result = by_background(objective, rig, K, given, seed, bar, searches)
    except InputError:  # the caller's input was checked before: it is the backdrop or the answer that is refused
        if not more:
            raise
        return None
    return None if more and result.verdict == "failed" else result


def by_background(
    objective: CalibrationObjective,
    rig: Rig,
    K: Float[Tensor, "cams 3 3"],
    given: Float[Tensor, "cams 4 4"] | None,
    seed: int,
    bar: Progress,
    searches: int,
) -> CalibrationResult:
    """The answer of the pixels, and how it changes where images are left out."""
    solutions, finest = looked_for(objective, rig, K, given, seed, bar, searches)
    groups = spread_groups(rig)
    task = bar.add_task("leaving images out", total=len(groups))
    without = []
    for rows in groups:
        without.append(refitted(finest, solutions[-1], rows))
        bar.advance(task)
    return summary(finest, solutions, without, groups, 0.0)


def looked_for(
    objective: CalibrationObjective,
    rig: Rig,
    K: Float[Tensor, "cams 3 3"],
    T_init: Float[Tensor, "cams 4 4"] | None,
    seed: int,
    bar: Progress,
    searches: int = SEARCHES,
) -> tuple[list[Solution[CameraGuesses]], CalibrationObjective]:
    """The cameras, from a guess or from none, and the objective of the last level.

    A search that does not explain the images is done again from other random rotations, `searches` times in all.
    """
    if T_init is not None:
        return sharpened(objective, combinations(rig, K, [T[None] for T in T_init]), False, bar)
    answers = []
    for number in range(searches):
        generator = torch.Generator().manual_seed(seed + number)
        found = [find_camera(*one_camera(objective, rig, c), K[c], generator, bar) for c in range(len(K))]
        answers.append(sharpened(objective, combinations(rig, K, found), True, bar))
        if explained(*answers[-1]):
            break
    return min(answers, key=lambda answer: answer[0][-1].linearization.loss.min().item())


def checked_rig(
    tree: KinematicTree,
    q: Float[Tensor, "images dof"] | Sequence[Sequence[float]],
    K: Float[Tensor, "*cams 3 3"],
    camera_of_image: Sequence[int] | None,
    mount: str | None,
    free: Sequence[str],
) -> tuple[Rig, Float[Tensor, "cams 3 3"]]:
    """What is known, and the intrinsics of every camera.

    Raises:
        InputError: shapes that do not fit each other, an unknown link or an unknown kind of variable.
    """
    if not len(q):
        raise InputError("q holds no configuration; calibration needs at least one image with known joints")
    joints = torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in q]).cpu()
    tree.coordinates(joints)  # raises on a wrong size or NaN
    which = [0] * len(joints) if camera_of_image is None else [int(c) for c in camera_of_image]
    if len(which) != len(joints) or sorted(set(which)) != list(range(max(which) + 1)):
        raise InputError(f"camera_of_image is {which}; expected {len(joints)} numbers, every camera from 0 on in use")
    if mount is not None and mount not in tree.link_names:
        raise InputError(unknown("link", mount, tree.link_names))
    for name in free:
        if name not in ("offsets", "focal"):
            raise InputError(unknown("free variable", name, ("offsets", "focal")))
    link = None if mount is None else tree.link_names.index(mount)
    rig = Rig(tree, joints, torch.tensor(which), link, "offsets" in free, "focal" in free)
    K = torch.as_tensor(K, dtype=torch.float32).cpu()
    if tuple(K.shape) not in ((3, 3), (rig.cameras, 3, 3)):
        raise InputError(f"K has shape {tuple(K.shape)}; expected (3, 3) or ({rig.cameras}, 3, 3)")
    return rig, K.expand(rig.cameras, 3, 3)


def observed(
    images: ImageLike, masks: ImageLike | None, K: Float[Tensor, "cams 3 3"], rig: Rig, backdrop: ImageLike | None
) -> tuple[Camera, Observation]:
    """A camera of the images' full size, and the images, shrunk to the finest level one by one.

    Raises:
        InputError: the numbers of images, masks and configurations differ, or an image is refused.
    """
    for name, count in (("images", len(images)), ("masks", len(rig.q) if masks is None else len(masks))):
        if count != len(rig.q):
            raise InputError(f"{count} {name} but {len(rig.q)} configurations; expected one per configuration")
    _, height, width = image_shape(images[0])
    finest = FINE_LEVELS[-1 if len(rig.q) <= FINEST_IMAGES else -2].px
    full, white = Camera(K[0], torch.eye(4), width, height), torch.ones(height, width, 3)
    parts = []
    for i, picture in enumerate(images):  # without masks each is read as if before a white backdrop
        mask, behind = (None, white) if masks is None else (masks[i], None)
        seen = Observation.create(picture, mask, full, behind)
        parts.append(seen.resized(finest))
    rgb = torch.cat([part.rgb for part in parts])
    view = Camera(parts[0].camera.K.expand(len(rgb), 3, 3), torch.eye(4), rgb.shape[2], rgb.shape[1])
    if masks is not None:
        return full, Observation.create(rgb, torch.cat([p.mask for p in parts if p.mask is not None]), view)
    if backdrop is not None:
        scenes = _checked_backdrop(backdrop, full, len(rgb))
        return full, Observation.create(rgb, None, view, torch.cat([s.resized(finest).rgb for s in scenes]))
    if plain_background(rgb) is not None:
        return full, Observation.create(rgb, None, view)
    fewest = int(torch.bincount(rig.camera_of_image).min())
    if rig.mount is not None or fewest < BACKDROP_IMAGES:
        return full, Observation.create(rgb, None, view, unknown=True)
    return full, Observation.create(rgb, None, view, _medians(rgb, rig))


def _checked_backdrop(backdrop: ImageLike, full: Camera, count: int) -> list[Observation]:
    """The scene without the robot, once or for every image."""
    if not isinstance(backdrop, (list, tuple)) and not hasattr(backdrop, "ndim"):
        raise InputError(f"backdrop is a {type(backdrop).__name__}; expected a tensor, an array, or a list of them")
    single = not isinstance(backdrop, (list, tuple)) and backdrop.ndim == 3
    pictures = [backdrop] if single else list(backdrop)
    if len(pictures) not in (1, count):
        raise InputError(f"{len(pictures)} backdrops for {count} images; expected one for all or one each")
    white = torch.ones(full.height, full.width, 3)
    return [Observation.create(picture, None, full, white) for picture in pictures]


def _medians(rgb: Float[Tensor, "images height width 3"], rig: Rig) -> Float[Tensor, "images height width 3"]:
    """The median picture of every image's camera."""
    medians = torch.stack([median_backdrop(rgb[rig.camera_of_image == c]) for c in range(rig.cameras)])
    return medians[rig.camera_of_image]


def checked_transforms(T_init: Float[Tensor, "*cams 4 4"], rig: Rig) -> Float[Tensor, "cams 4 4"]:
    """First guesses as `T_cam_mount`.

    Raises:
        InputError: a wrong shape, or no rigid motions.
    """
    T = torch.as_tensor(T_init, dtype=torch.float32).cpu()
    if tuple(T.shape) not in ((4, 4), (rig.cameras, 4, 4)):
        raise InputError(f"T_cam_base_init has shape {tuple(T.shape)}; expected (4, 4) or ({rig.cameras}, 4, 4)")
    T = Camera(torch.eye(3), T, 1, 1).T_cam_world.expand(rig.cameras, 4, 4)
    return T if rig.mount is not None else T @ torch.linalg.inv(base_in_world(rig.tree))


def middle_of(model: SelfModel, rig: Rig) -> Float[Tensor, "3"]:
    """Middle of the robot as its cameras' carrier sees it, averaged over the images [m]."""
    centres = model.posed(rig.q).means.mean(dim=1)
    T_mount_world = torch.linalg.inv(rig.Ts_world_mount)
    return ((T_mount_world[:, :3, :3] @ centres[..., None])[..., 0] + T_mount_world[:, :3, 3]).mean(dim=0)


def one_camera(objective: CalibrationObjective, rig: Rig, index: int) -> tuple[CalibrationObjective, Rig]:
    """The images of one camera alone, and a rig in which nothing but the camera is unknown."""
    rows = torch.nonzero(rig.camera_of_image == index)[:, 0]
    own = replace(rig.select(rows), camera_of_image=torch.zeros(len(rows), dtype=torch.long))
    return objective.select(rows), replace(own, offsets_free=False, focal_free=False)


def combinations(rig: Rig, K: Float[Tensor, "cams 3 3"], found: list[Float[Tensor, "_ 4 4"]]) -> CameraGuesses:
    """The best guess of every camera, and variants in which one of them is replaced by its next best."""
    best = torch.stack([T[0] for T in found])
    rows = [best]
    for camera, guesses in enumerate(found):
        for T in guesses[1:]:
            rows.append(best.clone())
            rows[-1][camera] = T
    return CameraGuesses.start(rig, torch.stack(rows), K)


def sharpened(
    objective: CalibrationObjective, guesses: CameraGuesses, searched: bool, bar: Progress
) -> tuple[list[Solution[CameraGuesses]], CalibrationObjective]:
    """Levenberg-Marquardt from level to level, all cameras together; also the objective of the last level."""
    few = len(guesses.rig.q) <= FINEST_IMAGES
    levels = (FINE_LEVELS if searched else (*NEAR_LEVELS, *FINE_LEVELS))[: None if few else -1]
    here = objective
    solutions: list[Solution[CameraGuesses]] = []
    task = bar.add_task("sharpening", total=len(levels))
    for level in levels:
        here = at_level(objective, level)
        solutions.append(levenberg_marquardt(here.linearize, guesses, iterations=level.iterations))
        losses = solutions[-1].linearization.loss
        guesses = solutions[-1].state.select(losses.argsort()[: int((losses < DROPPED_RATIO * losses.min()).sum())])
        bar.advance(task)
    return solutions, here


def refitted(finest: CalibrationObjective, last: Solution[CameraGuesses], left_out: Tensor) -> CameraGuesses:
    """The best answer, fitted again to the images that remain."""
    best = last.state.select(last.linearization.loss.argmin()[None])
    rows = others(left_out, len(best.rig.q))
    start = replace(best, rig=best.rig.select(rows))
    return levenberg_marquardt(finest.select(rows).linearize, start, iterations=REFIT_ITERATIONS).state
