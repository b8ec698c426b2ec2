"""Pose-estimation benchmarks in the DREAM (NDDS) format: reader, per-joint errors, ADD and its area under the curve.

A folder is one video: ``_camera_settings.json`` with the intrinsics, and for every frame ``NNNNNN.json`` beside
``NNNNNN.rgb.jpg`` (or .png): joint positions in ``sim_state.joints`` [rad]/[m], with or without names, and, in the
``keypoints`` of one of the ``objects``, the origins of some links in the camera's frame, in metres (real recordings) or
centimetres (synthetic ones: the unit of the engine that NDDS plugs into). Which of the two it is follows from the
robot's own size. Everything else is left unread: ``camera_data`` (the engine's left-handed world), quaternions, boxes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.kinematics import KinematicTree

AUC_LIMIT_M = 0.1
UNITS = {"metres": 1.0, "centimetres": 0.01}
UNIT_TOLERANCE = 1.5
LINE_SHARE = 0.02  # points that spread less across their line than along it are on one line


@dataclass(frozen=True)
class PoseSequence:
    """One folder.

    Attributes:
        name: of the folder.
        images: one file per frame, in order.
        K: ``(3, 3)`` [px].
        width: of the images [px].
        height: of the images [px].
        q: ``(frames, dof)`` annotated joints [rad]/[m]; canonical values where a joint is not annotated.
        annotated: ``(dof,)`` whether it is.
        links: index of the link behind every keypoint.
        keypoints: ``(frames, keypoints, 3)`` their origins in the camera's frame [m].
    """

    name: str
    images: tuple[Path, ...]
    K: Float[Tensor, "3 3"]
    width: int
    height: int
    q: Float[Tensor, "frames dof"]
    annotated: Tensor
    links: tuple[int, ...]
    keypoints: Float[Tensor, "frames keypoints 3"]

    @classmethod
    def read(cls, folder: Path, tree: KinematicTree) -> "PoseSequence":
        """Read a folder for a robot; names of joints and links match with or without a prefix as in "panda_joint1".

        Joints without names count in the robot's order; the first object with a keypoint on the robot is the robot.

        Raises:
            InputError: something is missing, broken, or fits no joint or link of the robot.
        """
        K, width, height = read_intrinsics(folder / "_camera_settings.json")
        files = sorted(p for p in folder.glob("*.json") if p.stem.isdigit())
        if not files:
            raise InputError(f"{folder} holds no frame (NNNNNN.json)")
        frames = [_frame(path, tree) for path in files]
        joints = match_names([joint["name"] for joint in frames[0][0]], tree.joint_names)
        links = match_names([point["name"] for point in frames[0][1]], tree.link_names)
        if not joints or not links:
            kind, valid = ("joint", tree.joint_names) if not joints else ("link", tree.link_names)
            raise InputError(f"{files[0]}: no {kind} of the robot is annotated; it has {', '.join(valid)}")
        q = tree.q_canonical.float().repeat(len(files), 1)
        keypoints = torch.zeros(len(files), len(links), 3)
        for i, frame in enumerate(frames):
            try:
                angles, points = ({entry["name"]: entry for entry in entries} for entries in frame)
                for source, target in joints.items():
                    q[i, target] = float(angles[frames[0][0][source]["name"]]["position"])
                for column, source in enumerate(links):
                    keypoints[i, column] = _location(points[frames[0][1][source]["name"]]["location"])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{files[i]}: a joint or keypoint of the first frame is missing or broken ({error})"
                ) from error
        keypoints = keypoints * _unit(tree, q, keypoints, tuple(links.values()), folder)
        annotated = torch.zeros(tree.dof, dtype=torch.bool)
        annotated[list(joints.values())] = True
        images = tuple(_image_of(path) for path in files)
        return cls(folder.name, images, K, width, height, q, annotated, tuple(links.values()), keypoints)

    def first(self, count: int) -> "PoseSequence":
        """The first frames alone."""
        return replace(self, images=self.images[:count], q=self.q[:count], keypoints=self.keypoints[:count])

    def camera(self, tree: KinematicTree) -> Camera:
        """The camera of the first frame, from its keypoints and joints (rigid alignment, Kabsch 1976).

        Raises:
            InputError: fewer than three keypoints, or all of them on one line.
        """
        world = tree.forward_kinematics(self.q[0])[list(self.links), :3, 3]
        try:
            T = rigid_alignment(world.double(), self.keypoints[0].double()).float()
        except InputError as error:
            raise InputError(
                f"{self.name}: the keypoints of the first frame do not say where the camera is: {error}; "
                "let it be estimated (--camera free)"
            ) from error
        return Camera(self.K, T, self.width, self.height)


@dataclass(frozen=True)
class PoseErrors:
    """How far estimates are from the annotations.

    Attributes:
        joint_error_rad: mean absolute error by joint name; full turns are no error.
        joint_error_mean_rad: mean over joints.
        add_mm: mean distance of the keypoints (ADD), mean over the frames [mm].
        add_median_mm: the same, median over the frames.
        add_auc: area under the curve "share of frames below a threshold of ADD", 0 to 100 mm, over 100 mm.
        frames: how many.
    """

    joint_error_rad: dict[str, float]
    joint_error_mean_rad: float
    add_mm: float
    add_median_mm: float
    add_auc: float
    frames: int


def pose_errors(
    tree: KinematicTree,
    sequence: PoseSequence,
    q: Float[Tensor, "frames dof"],
    T_cam_world: Float[Tensor, "*#frames 4 4"],
) -> PoseErrors:
    """Errors of estimated joints and cameras.

    Args:
        tree: the robot.
        sequence: the annotations.
        q: ``(frames, dof)`` estimates [rad]/[m].
        T_cam_world: ``(4, 4)`` or ``(frames, 4, 4)``: estimated, or known.
    """
    hinge = torch.tensor([kind != "slide" for kind in tree.joint_types])
    away = q - sequence.q
    turned = torch.remainder(away + torch.pi, 2.0 * torch.pi) - torch.pi
    errors = torch.where(hinge, turned, away).abs().mean(dim=0)
    judged = sequence.annotated & hinge
    names = [name for name, taken in zip(tree.joint_names, judged.tolist(), strict=True) if taken]
    points = (T_cam_world[..., None, :, :] @ tree.forward_kinematics(q)[:, list(sequence.links)].float())[..., :3, 3]
    add = (points - sequence.keypoints).norm(dim=-1).mean(dim=-1)
    return PoseErrors(
        joint_error_rad=dict(zip(names, errors[judged].tolist(), strict=True)),
        joint_error_mean_rad=errors[judged].mean().item(),
        add_mm=1000.0 * add.mean().item(),
        add_median_mm=1000.0 * add.median().item(),
        add_auc=add_auc(add),
        frames=len(q),
    )


def add_auc(add: Float[Tensor, " frames"], limit: float = AUC_LIMIT_M) -> float:
    """Area under the curve of the share of frames below a threshold from 0 to `limit` [m], over `limit`: exact."""
    return (1.0 - add / limit).clamp(min=0.0).mean().item()


def rigid_alignment(source: Float[Tensor, "n 3"], target: Float[Tensor, "n 3"]) -> Float[Tensor, "4 4"]:
    """The rigid motion that brings `source` closest to `target` in the sense of least squares.

    Raises:
        InputError: fewer than three points, or all of them on one line, about which any turn is as good.
    """
    a, b = source - source.mean(dim=0), target - target.mean(dim=0)
    if len(a) < 3:
        raise InputError(f"{len(a)} point(s) where three are needed")
    for points in (a, b):
        spread = torch.linalg.svdvals(points)
        if spread[1] <= LINE_SHARE * spread[0]:
            raise InputError(f"its {len(a)} points lie on one line")
    U, _, Vt = torch.linalg.svd(a.T @ b)
    flip = torch.diag(torch.tensor([1.0, 1.0, torch.sign(torch.det(U @ Vt)).item()]).to(U))
    T = torch.eye(4).to(U)
    T[:3, :3] = (U @ flip @ Vt).T
    T[:3, 3] = target.mean(dim=0) - T[:3, :3] @ source.mean(dim=0)
    return T


def read_intrinsics(path: Path) -> tuple[Float[Tensor, "3 3"], int, int]:
    """K [px], width and height of ``_camera_settings.json``.

    Raises:
        InputError: it is missing, lacks a key, or has lengths that are not positive.
    """
    try:
        entry = json.loads(path.read_text())["camera_settings"][0]
        s = entry["intrinsic_settings"]
        size = entry.get("captured_image_size") or s.get("resolution") or {"width": s["resX"], "height": s["resY"]}
        K = [[s["fx"], s.get("s", 0.0), s["cx"]], [0.0, s["fy"], s["cy"]], [0.0, 0.0, 1.0]]
        found = torch.tensor(K, dtype=torch.float32), int(size["width"]), int(size["height"])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no NDDS camera settings ({error!r})") from error
    lengths = {"fx": K[0][0], "fy": K[1][1], "width": found[1], "height": found[2]}
    for name, value in lengths.items():
        if not 0.0 < value < math.inf:
            raise InputError(f"{path}: {name} is {value}; expected a positive number of pixels")
    return found


def match_names(given: Sequence[str], valid: Sequence[str]) -> dict[int, int]:
    """Index of every given name that is a valid one, but for a path or a prefix, to the index of that one."""
    found = {}
    for i, name in enumerate(given):
        last = name.rsplit("/", 1)[-1]
        fits = [k for k, v in enumerate(valid) if last == v or last.endswith(f"_{v}") or v.endswith(f"_{last}")]
        if fits:
            found[i] = max(fits, key=lambda k: len(valid[k]))
    return found


def _frame(path: Path, tree: KinematicTree) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Joints and keypoints of one frame; joints without names get those of the robot."""
    try:
        data = json.loads(path.read_text())
        joints, objects = data["sim_state"]["joints"], [o["keypoints"] for o in data["objects"] if "keypoints" in o]
        if not any("name" in joint for joint in joints):
            joints = [{**joint, "name": name} for joint, name in zip(joints, tree.joint_names, strict=False)]
        if not all(isinstance(entry["name"], str) for entry in joints):
            raise TypeError("a joint's name is no string")
        own = [points for points in objects if match_names([point["name"] for point in points], tree.link_names)]
        return joints, (own or objects)[0]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no NDDS annotation of joints and keypoints ({error!r})") from error


def _unit(
    tree: KinematicTree,
    q: Float[Tensor, "frames dof"],
    keypoints: Float[Tensor, "frames keypoints 3"],
    links: tuple[int, ...],
    folder: Path,
) -> float:
    """Metres per unit of the keypoints: as far apart as the links are at the annotated joints, within half as much.

    Raises:
        InputError: neither unit makes them so, there is one keypoint only, or all coincide.
    """
    if keypoints.shape[1] == 1:
        raise InputError(
            f"{folder}: a single keypoint ({tree.link_names[links[0]]}) does not tell metres from centimetres; "
            "expected two of the robot's links or more"
        )
    expected = tree.forward_kinematics(q)[:, list(links), :3, 3].float()
    sizes = [(p - p.mean(dim=1, keepdim=True)).norm(dim=-1).mean(dim=1).median().item() for p in (expected, keypoints)]
    for metres in UNITS.values():
        if sizes[0] / UNIT_TOLERANCE < metres * sizes[1] < sizes[0] * UNIT_TOLERANCE:
            return metres
    raise InputError(
        f"{folder}: the keypoints are {sizes[1]:.3g} off their middle where the robot's are {sizes[0]:.3g} m; "
        f"neither {' nor '.join(UNITS)} fit: is it another robot?"
    )


def _location(values: Any) -> Float[Tensor, "3"]:
    location = torch.tensor(values, dtype=torch.float32)
    if location.shape != (3,) or not bool(torch.isfinite(location).all()):
        raise ValueError(f"location {values}, expected three numbers")
    return location


def _image_of(path: Path) -> Path:
    for ending in (".rgb.jpg", ".rgb.png", ".jpg", ".png"):
        candidate = path.with_name(path.stem + ending)
        if candidate.is_file():
            return candidate
    raise InputError(f"{path}: no picture {path.stem}.rgb.jpg or .rgb.png beside it")
