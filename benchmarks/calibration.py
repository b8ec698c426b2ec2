"""How honest is a calibration from one picture? `python benchmarks/calibration.py --images 30 -o FILE`.

MuJoCo renders Panda, xArm7 and UR5e in random light (kinesplat[render]), 512 x 384 px. The masks are disturbed in turn:
widened, thinned (by 1 to 3 px), holed, its border moved by a smooth random field of 2.5 px rms, or all but the second.
Each line of FILE (JSON) is one calibration without a guess; lines that are there already are not computed again.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch

import kinesplat as ks
from kinesplat.dataset.capture import Capture

ROBOTS = ("franka_emika_panda", "ufactory_xarm7", "universal_robots_ur5e")
KINDS = ("wide", "thin", "holes", "border", "all", "clean")
WIDTH, HEIGHT = 512, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS[:-1]))
    parser.add_argument("-o", "--out", type=Path, default=Path("calibration.jsonl"))
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.is_file() else []
    done = {(row["robot"], row["kind"], row["seed"]) for row in rows}
    for number, name in enumerate(ROBOTS):
        robot = ks.load_description(name)
        model, capture = ks.SelfModel.from_description(robot, n=20_000), Capture(robot, light="random")
        for seed in range(number, arguments.images, len(ROBOTS)):
            kind = arguments.kinds[seed // len(ROBOTS) % len(arguments.kinds)]
            if (name, kind, seed) not in done:
                row = {"robot": name, "kind": kind, "seed": seed, **calibrated(robot, model, capture, kind, seed)}
                rows.append(row)
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)
    ratios = torch.tensor([row["off_mm"] / row["said_mm"] for row in rows if row["verdict"] != "failed"])
    middle, most = torch.quantile(ratios, torch.tensor([0.5, 0.9])).tolist()
    rms = ratios.square().mean().sqrt().item()
    print(f"errors over standard deviations: rms {rms:.2f}, median {middle:.2f}, nine tenths below {most:.2f}")
    for verdict in sorted({row["verdict"] for row in rows}):
        some = 100.0 * torch.tensor([r["off_mm"] / r["distance_mm"] for r in rows if r["verdict"] == verdict])
        print(
            f"{verdict}: {len(some)}, off by {some.median():.1f} % of the distance in median, {some.max():.1f} at most"
        )


def calibrated(robot: ks.Robot, model: ks.SelfModel, capture: Capture, kind: str, seed: int) -> dict:
    """One picture, its disturbed mask, and how far off the camera is and is said to be."""
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    tree, span = robot.tree, (robot.tree.q_upper - robot.tree.q_lower).float().clamp(max=4.0)
    while True:
        q = tree.clamp(tree.q_canonical.float() + span * 0.7 * (torch.rand(tree.dof, generator=generator) - 0.5))
        points = model.posed(q).means
        if points[:, 2].min() > -0.05:
            break
    around, up = 2.0 * math.pi * random.random(), 0.1 + 0.6 * random.random()
    side = (math.cos(up) * math.cos(around), math.cos(up) * math.sin(around), math.sin(up))
    camera = ks.Camera.framing(points, side, width=WIDTH, height=HEIGHT)
    image = capture.render(q, camera)
    assert image.rgb is not None
    assert image.alpha is not None
    mask = torch.from_numpy(disturbed((image.alpha > 0.5).numpy(), kind, random))
    began = time.process_time()
    found = ks.calibrate(model, [image.rgb], q[None], camera.K, [mask])
    off = (found.camera.T_world_cam - camera.T_world_cam)[:3, 3].norm().item()
    return {
        "off_mm": 1000.0 * off,
        "said_mm": found.position_std_mm[0],
        "distance_mm": 1000.0 * found.distance_m[0],
        "iou": found.images[0].iou,
        "verdict": found.verdict,
        "seconds": time.process_time() - began,
    }


def disturbed(mask: np.ndarray, kind: str, random: np.random.Generator) -> np.ndarray:
    """A mask with errors of one kind, or of all."""
    if kind in ("wide", "all"):
        mask = scipy.ndimage.binary_dilation(mask, iterations=int(random.integers(1, 4)))
    if kind == "thin":
        mask = scipy.ndimage.binary_erosion(mask, iterations=int(random.integers(1, 4)))
    if kind in ("holes", "all"):
        field = scipy.ndimage.gaussian_filter(random.standard_normal(mask.shape), 8)
        mask = mask & (field < np.quantile(field, 0.93))
    if kind in ("border", "all"):
        field = scipy.ndimage.gaussian_filter(random.standard_normal(mask.shape), 14)
        inside, outside = (np.asarray(scipy.ndimage.distance_transform_edt(part)) for part in (mask, ~mask))
        mask = inside - outside + 2.5 * field / field.std() > 0
    return mask


if __name__ == "__main__":
    main()
