"""Fit photographs of a real xArm7: `python benchmarks/real_xarm7.py FOLDER` (needs MENAGERIE_ROOT).

FOLDER holds annotations.json (K [px], T_cam_base, joint angles [rad] per frame), image_*.png and mask_*.png. Every
frame is fitted without a start and from the canonical configuration; the labels only score. Then the camera from known
joints: all frames together, and each alone. `--frames 0 4` takes some of them, `--starts canonical` one of the starts,
`--only calibrations` leaves out the fits. `--no-masks` fits the photographs as they are, masks only score, and
calibrates from all frames together: from a guess 0.1 rad and 50 mm off, and from none. Pictures go to ./real_xarm7.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

import kinesplat as ks
from kinesplat.files import read_image, read_mask, write_png
from kinesplat.inverse.camera_search import angles_between
from kinesplat.report import overlay, write_fit_pictures
from kinesplat.twists import exp_twist

ROBOT = "ufactory_xarm7/xarm7_nohand.xml"
OUT = Path("real_xarm7")
GUESS_OFF = (0.03, -0.03, 0.0265, 0.06, -0.06, 0.053)  # [m], [rad]: 50 mm, 0.1 rad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, nargs="+", help="numbers of the frames; default: all")
    parser.add_argument("--only", choices=["fits", "calibrations"], help="default: both")
    parser.add_argument("--starts", choices=["none", "canonical"], nargs="+", default=["none", "canonical"])
    parser.add_argument("--no-masks", action="store_true", help="fit the photographs as they are")
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
    if not frames:
        parser.error(f"no such frame; there are {', '.join(f['image'] for f in labels['frames'])}")
    head = ["frame", "start", "start off [deg]", "joints 1-6 off [deg]", "joint 7 off [deg]", "IoU at labels"]
    print("| " + " | ".join([*head, "IoU of fit", "verdict", "weak", "s"]) + " |\n" + "|---" * 10 + "|")
    for frame in frames if arguments.only != "calibrations" else []:
        for start in arguments.starts:
            print(fitted(model, folder, frame, camera, start, not arguments.no_masks), flush=True)
    head = ["frames", "camera off [mm]", "base off [mm]", "camera off [deg]", "mean IoU", "said to be off [mm]"]
    print("\n| " + " | ".join([*head, "jackknife [mm]", "verdict", "s"]) + " |\n" + "|---" * 9 + "|")
    if arguments.only == "fits":
        return
    if arguments.no_masks:
        for guess in (exp_twist(torch.tensor(GUESS_OFF)) @ camera.T_cam_world @ T_world_base, None):
            print(calibrated(model, folder, frames, camera, False, guess), flush=True)
        return
    for some in (frames, *([frame] for frame in frames)):
        print(calibrated(model, folder, some, camera, True), flush=True)


def fitted(model: ks.SelfModel, folder: Path, frame: dict, camera: ks.Camera, start: str, masked: bool) -> str:
    """A row: the joints from one frame, and its mask if `masked`."""
    image, mask = read_image(folder / frame["image"]), read_mask(folder / frame["image"].replace("image", "mask"))
    truth, canonical = torch.tensor(frame["q"]), model.tree.q_canonical
    used = mask if masked else None
    fit = ks.reconstruct(model, image, camera, masks=used, q_init=None if start == "none" else canonical)
    turned = torch.remainder(fit.q - truth + math.pi, 2.0 * math.pi) - math.pi  # full turns look alike
    degrees = turned.abs() * 180.0 / math.pi
    off = ((canonical - truth).abs() * 180.0 / math.pi)[:6].mean()
    write_fit_pictures(model, image, fit, OUT, f"{Path(frame['image']).stem}_{start}{'' if masked else '_no_masks'}")
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


def calibrated(
    model: ks.SelfModel,
    folder: Path,
    frames: list[dict],
    truth: ks.Camera,
    masked: bool,
    guess: torch.Tensor | None = None,
) -> str:
    """A row: the camera from these frames and their joint angles, from a guess of ``T_cam_base`` or without."""
    images = [read_image(folder / frame["image"]) for frame in frames]
    masks = [read_mask(folder / frame["image"].replace("image", "mask")) for frame in frames]
    q = [frame["q"] for frame in frames]
    found = ks.calibrate(model, images, q, truth.K, masks if masked else None, guess)
    T_base = model.tree.forward_kinematics(model.tree.q_canonical)[0].float()
    expected = truth.T_cam_world @ T_base
    centres = [torch.linalg.inv(T)[:3, 3] for T in (found.T_cam_base, expected)]
    view = replace(found.camera, K=truth.K)
    overlaps = [overlap(model.render(torch.tensor(v), view).alpha, mask) for v, mask in zip(q, masks, strict=True)]
    for frame, image, v in zip(frames, images, q, strict=True):
        shown = model.render(torch.tensor(v), view)
        assert shown.rgb is not None
        assert shown.alpha is not None
        name = f"{Path(frame['image']).stem}_of_{len(frames)}_{'masks' if masked else 'no_masks'}_camera.png"
        write_png(OUT / name, overlay(image, shown.rgb, shown.alpha).clamp(0, 1))
    row = [
        frames[0]["image"] if len(frames) == 1 else f"all {len(frames)}" + ("" if guess is None else ", from a guess"),
        f"{1000 * (centres[0] - centres[1]).norm():.1f}",
        f"{1000 * (found.T_cam_base - expected)[:3, 3].norm():.1f}",
        f"{math.degrees(angles_between(found.T_cam_base, expected).item()):.2f}",
        f"{sum(overlaps) / len(frames):.3f}",
        f"{found.position_std_mm[0]:.1f}",
        "-" if len(frames) == 1 else f"{found.spread_mm[0]:.1f}",
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
