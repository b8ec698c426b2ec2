"""Fit photographs of a real xArm7: `python benchmarks/real_xarm7.py FOLDER` (needs MENAGERIE_ROOT).

FOLDER holds annotations.json (K [px], T_cam_base, joint angles [rad] per frame), image_*.png and mask_*.png. Every
frame is fitted without a start and from the canonical configuration; the labels only score. Then the camera from known
joints: all frames together, and each alone. `--frames 0 4` takes some of them, `--only calibrations` leaves out the
fits. Pictures go to ./real_xarm7.
"""

import argparse
import json
import math
from pathlib import Path

import torch

import kinesplat as ks
from kinesplat.files import read_image, read_mask
from kinesplat.inverse.camera_search import angles_between
from kinesplat.report import write_fit_pictures

ROBOT = "ufactory_xarm7/xarm7_nohand.xml"
OUT = Path("real_xarm7")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, nargs="+", help="numbers of the frames; default: all")
    parser.add_argument("--only", choices=["fits", "calibrations"], help="default: both")
    arguments = parser.parse_args()
    folder = arguments.folder
    labels = json.loads((folder / "annotations.json").read_text())
    robot = ks.load_description(ROBOT)
    model = ks.SelfModel.from_description(robot, n=20_000)
    tree = model.tree
    T_world_base = tree.forward_kinematics(tree.q_canonical)[tree.link_names.index("link_base")].float()
    T_cam_world = torch.tensor(labels["T_cam_base"]) @ torch.linalg.inv(T_world_base)
    camera = ks.Camera(torch.tensor(labels["K"]), T_cam_world, *labels["image_size"])
    numbers = arguments.frames
    frames = [f for f in labels["frames"] if numbers is None or f["image"] in [f"image_{n}.png" for n in numbers]]
    head = ["frame", "start", "start off [deg]", "joints 1-6 off [deg]", "joint 7 off [deg]", "IoU at labels"]
    print("| " + " | ".join([*head, "IoU of fit", "verdict", "weak", "s"]) + " |\n" + "|---" * 10 + "|")
    for frame in frames if arguments.only != "calibrations" else []:
        for start in ("none", "canonical"):
            print(fitted(model, folder, frame, camera, start), flush=True)
    head = ["frames", "camera off [mm]", "base off [mm]", "camera off [deg]", "mean IoU", "said to be off [mm]"]
    print("\n| " + " | ".join([*head, "jackknife [mm]", "verdict", "s"]) + " |\n" + "|---" * 9 + "|")
    for some in (frames, *([frame] for frame in frames)) if arguments.only != "fits" else []:
        print(calibrated(model, folder, some, camera), flush=True)


def fitted(model: ks.SelfModel, folder: Path, frame: dict, camera: ks.Camera, start: str) -> str:
    """A row: the joints from one frame and its mask."""
    image, mask = read_image(folder / frame["image"]), read_mask(folder / frame["image"].replace("image", "mask"))
    truth, canonical = torch.tensor(frame["q"]), model.tree.q_canonical
    fit = ks.reconstruct(model, image, camera, masks=mask, q_init=None if start == "none" else canonical)
    turned = torch.remainder(fit.q - truth + math.pi, 2.0 * math.pi) - math.pi  # full turns look alike
    degrees = turned.abs() * 180.0 / math.pi
    off = ((canonical - truth).abs() * 180.0 / math.pi)[:6].mean()
    write_fit_pictures(model, image, fit, OUT, f"{Path(frame['image']).stem}_{start}")
    row = [
        frame["image"],
        start,
        f"{off:.0f}",
        f"{degrees[:6].mean():.1f}",
        f"{degrees[6]:.1f}",
        *(f"{overlap(model.render(q, camera).alpha, mask):.3f}" for q in (truth, fit.q)),
        fit.verdict,
        ", ".join(fit.weak_variables),
        f"{fit.seconds:.1f}",
    ]
    return "| " + " | ".join(row) + " |"


def calibrated(model: ks.SelfModel, folder: Path, frames: list[dict], truth: ks.Camera) -> str:
    """A row: the camera from these frames and their joint angles, without a guess."""
    images = [read_image(folder / frame["image"]) for frame in frames]
    masks = [read_mask(folder / frame["image"].replace("image", "mask")) for frame in frames]
    found = ks.calibrate(model, images, [frame["q"] for frame in frames], truth.K, masks)
    T_base = model.tree.forward_kinematics(model.tree.q_canonical)[0].float()
    expected = truth.T_cam_world @ T_base
    centres = [torch.linalg.inv(T)[:3, 3] for T in (found.T_cam_base, expected)]
    row = [
        frames[0]["image"] if len(frames) == 1 else f"all {len(frames)}",
        f"{1000 * (centres[0] - centres[1]).norm():.1f}",
        f"{1000 * (found.T_cam_base - expected)[:3, 3].norm():.1f}",
        f"{math.degrees(angles_between(found.T_cam_base, expected).item()):.2f}",
        f"{sum(image.iou for image in found.images) / len(frames):.3f}",
        f"{found.position_std_mm[0]:.1f}",
        f"{found.spread_mm[0]:.1f}",
        found.verdict,
        f"{found.seconds:.1f}",
    ]
    return "| " + " | ".join(row) + " |"


def overlap(alpha: torch.Tensor | None, mask: torch.Tensor) -> float:
    """Intersection over union of two masks."""
    assert alpha is not None
    return (((alpha > 0.5) & (mask > 0.5)).sum() / ((alpha > 0.5) | (mask > 0.5)).sum()).item()


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    main()
