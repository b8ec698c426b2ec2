"""The main job in a minute: packaged pictures of a real robot in, joint values and camera out, scored by the truth.

The pictures were rendered by MuJoCo, not by the self-model (`benchmarks/demo_targets.py` made them). The fit sees the
picture, the mask and the camera; the true configuration is read only to score the answer.
"""

import json
import math
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from kinesplat import zoo
from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.files import read_image, read_mask, written_whole
from kinesplat.inverse import reconstruct
from kinesplat.report import write_fit_pictures, write_page
from kinesplat.self_model import SelfModel
from kinesplat.twists import exp_twist

CAMERA_OFFSET = (0.03, -0.02, 0.03, 0.03, -0.02, 0.03)


@dataclass(frozen=True)
class Target:
    """One packaged problem: picture, mask, camera, where the fit starts, and the truth that scores it."""

    name: str
    rgb: Float[Tensor, "height width 3"]
    mask: Float[Tensor, "height width"]
    camera: Camera
    start: str
    q_start: Float[Tensor, " dof"]
    q_true: Float[Tensor, " dof"]


def run(folder: Path, seed: int, console: Console) -> dict[str, Any]:
    """Fit every packaged target; write pictures, films, report.html and report.json into `folder`.

    Returns:
        What report.json holds; units in the key names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {folder}: {error.strerror}") from error
    robot, targets = packaged_targets()
    model = zoo.load(robot)
    console.print(f"{robot}: {len(model.parameters)} Gaussians, {model.tree.dof} joints, {len(targets)} pictures")
    results, sections = [], []
    for target in targets:
        result, section = _solve(model, target, folder, seed)
        console.print(
            f"{target.name}: mean joint error {result['joint_error_rad']:.4f} rad "
            f"(start {result['start_error_rad']:.2f}); camera off by {result['camera_error_mm']:.1f} mm, "
            f"{result['camera_error_deg']:.2f} deg; {result['verdict']}; {result['seconds']:.1f} s"
        )
        results.append(result)
        sections.append(section)
    report = {"robot": robot, "seed": seed, "targets": results}
    lead = (
        "Joint values recovered from each picture by gradients through pixels, with the camera known, and then again "
        "together with the camera from a guess that is 5 cm and 3 degrees off. Of the truth the fits know only their "
        "start, as far off as said."
    )
    write_page(folder / "report.html", f"Kinesplat demo: {robot}", lead, sections)
    with written_whole(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"wrote {folder / 'report.html'}, {folder / 'report.json'} and pictures in {folder}")
    return report


def packaged_targets() -> tuple[str, list[Target]]:
    """Name of the robot, and the packaged problems."""
    folder = Path(str(files("kinesplat") / "demo_data"))
    data = json.loads((folder / "targets.json").read_text())
    targets = []
    for entry in data["targets"]:
        camera = Camera(torch.tensor(entry["K"]), torch.tensor(entry["T_cam_world"]), data["width"], data["height"])
        rgb, mask = read_image(folder / f"{entry['name']}.png"), read_mask(folder / f"{entry['name']}_mask.png")
        q_start, q_true = torch.tensor(entry["q_start"]), torch.tensor(entry["q_true"])
        targets.append(Target(entry["name"], rgb, mask, camera, entry["start"], q_start, q_true))
    return data["robot"], targets


def _solve(model: SelfModel, target: Target, folder: Path, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    began = time.perf_counter()
    known = reconstruct(model, target.rgb, target.camera, masks=target.mask, q_init=target.q_start, seed=seed)
    guess = Camera(
        target.camera.K,
        exp_twist(torch.tensor(CAMERA_OFFSET)) @ target.camera.T_cam_world,
        target.camera.width,
        target.camera.height,
    )
    both = reconstruct(
        model, target.rgb, guess, masks=target.mask, q_init=target.q_start, seed=seed, optimize_camera=True
    )
    seconds = time.perf_counter() - began
    metres, degrees = camera_error(both.camera, target.camera)
    result = {
        "name": target.name,
        "start": target.start,
        "start_error_rad": joint_error(model, target.q_start, target.q_true),
        "joint_error_rad": joint_error(model, known.q, target.q_true),
        "joint_error_max_rad": (known.q - target.q_true).abs()[_hinges(model)].max().item(),
        "slide_error_mm": 1000.0 * (known.q - target.q_true).abs()[~_hinges(model)].mean().item(),
        "joint_error_camera_free_rad": joint_error(model, both.q, target.q_true),
        "camera_error_mm": 1000.0 * metres,
        "camera_error_deg": degrees,
        "seconds": seconds,
        "verdict": known.verdict,
        "q": known.q.tolist(),
        "q_true": target.q_true.tolist(),
        "loss": known.loss,
    }
    pictures = write_fit_pictures(model, target.rgb, known, folder, target.name)
    pictures["error (difference, times four)"] = pictures.pop("error")
    return result, {"heading": f"{target.name} (start: {target.start})", "facts": _facts(result), "pictures": pictures}


def joint_error(model: SelfModel, q: Float[Tensor, " dof"], q_true: Float[Tensor, " dof"]) -> float:
    """Mean absolute difference over the hinges [rad]."""
    return (q - q_true).abs()[_hinges(model)].mean().item()


def _hinges(model: SelfModel) -> Tensor:
    return torch.tensor([kind == "hinge" for kind in model.tree.joint_types])


def camera_error(camera: Camera, truth: Camera) -> tuple[float, float]:
    """Distance between the camera centres [m] and angle between the orientations [deg]."""
    T = camera.T_world_cam @ truth.T_cam_world
    angle = math.acos(max(-1.0, min(1.0, (T[:3, :3].trace().item() - 1.0) / 2.0)))
    centres = camera.T_world_cam[:3, 3] - truth.T_world_cam[:3, 3]
    return centres.norm().item(), math.degrees(angle)


def _facts(result: dict[str, Any]) -> dict[str, str]:
    return {
        "verdict": result["verdict"],
        "mean joint error at the start": f"{result['start_error_rad']:.3f} rad",
        "mean joint error, camera known": f"{result['joint_error_rad']:.4f} rad",
        "largest joint error, camera known": f"{result['joint_error_max_rad']:.4f} rad",
        "mean joint error, camera unknown": f"{result['joint_error_camera_free_rad']:.4f} rad",
        "mean gripper error": f"{result['slide_error_mm']:.1f} mm",
        "camera error": f"{result['camera_error_mm']:.1f} mm, {result['camera_error_deg']:.2f} deg",
        "time for both fits": f"{result['seconds']:.1f} s",
    }
