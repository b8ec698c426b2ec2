"""Mesh-bound self-models against MuJoCo: masks, depth and colours of random configurations and cameras.

    MENAGERIE_ROOT=... python benchmarks/silhouettes.py --n 20000 --write --sheet silhouettes.png

Writes the section "Silhouettes" of docs/results.md, and a sheet of pictures: truth, ours, ten times the difference.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.dataset.capture import Capture
from kinesplat.dataset.sampling import random_cameras, random_configurations
from kinesplat.description import Robot, load_description
from kinesplat.files import write_png
from kinesplat.rasterizer import Render
from kinesplat.self_model import SelfModel

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
ROBOTS = (
    "shadow_hand",
    "unitree_g1_37dof_2024/g1.xml",
    "unitree_h1",
    "franka_emika_panda",
    "google_robot",
    "trossen_vx300s",
    "ufactory_xarm7",
    "unitree_go1",
    "unitree_go2",
    "universal_robots_ur5e",
)
NOTE = """`SelfModel.from_description` against MuJoCo (`mujoco_warp`, 4 rays a pixel, headlight) at {images} random
configurations within the joint limits, one random camera each, 256 x 256 px, robot between half and all of the frame.
IoU of the masks alpha >= 1/2; depth: median error over the pixels common to both masks, mean over the images; PSNR on
white. Build: 10,000 splats from loaded meshes, wall clock / CPU seconds on 2 cores that other work shared (load
average {load:.1f} at the end). Seed {seed}. Repeat with

    MENAGERIE_ROOT=... python benchmarks/silhouettes.py --n {n} --images {images} --seed {seed} --write
"""


@dataclass(frozen=True)
class Row:
    """Scores of one robot."""

    robot: str
    n: int
    wall_s: float
    cpu_s: float
    iou_mean: float
    iou_min: float
    depth_mm: float
    psnr_db: float

    def markdown(self) -> str:
        """The row of the table."""
        scores = f"{self.iou_mean:.4f} | {self.iou_min:.4f} | {self.depth_mm:.2f} | {self.psnr_db:.2f}"
        return f"| {self.robot} | {self.n} | {self.wall_s:.1f} / {self.cpu_s:.1f} | {scores} |"


def load(name: str) -> Robot:
    """A robot by name, or by its path below MENAGERIE_ROOT."""
    return load_description(str(Path(os.environ["MENAGERIE_ROOT"]) / name) if "/" in name else name)


def scenes(robot: Robot, images: int, seed: int) -> tuple[Tensor, Camera]:
    """Random configurations, and for each a random camera that frames the robot's surface."""
    generator = torch.Generator().manual_seed(seed)
    q = random_configurations(robot.tree, images, generator)
    Ts = robot.tree.forward_kinematics(q)
    points = []
    for mesh in robot.link_meshes:
        vertices = torch.from_numpy(mesh.vertices[:: max(1, len(mesh.vertices) // 200)]).double()
        R, t = Ts[:, mesh.link, :3, :3], Ts[:, mesh.link, None, :3, 3]
        points.append(vertices @ R.mT + t)
    return q, random_cameras(torch.cat(points, dim=1).float(), generator)


def score(ours: Render, truth: Render) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, median depth error [mm] and PSNR [dB] per image."""
    mask, true_mask = ours.alpha >= 0.5, truth.alpha >= 0.5
    both = mask & true_mask
    iou = both.sum((-1, -2)) / (mask | true_mask).sum((-1, -2))
    error = (ours.depth - truth.depth).abs()
    depth = torch.stack([1000.0 * e[b].median() for e, b in zip(error, both, strict=True)])
    psnr = -10.0 * (ours.rgb - truth.rgb).square().mean((-1, -2, -3)).log10()
    return iou, depth, psnr


def measure(name: str, n: int, images: int, seed: int) -> tuple[Row, Tensor]:
    """Scores of one robot, and a strip of its worst and its median picture."""
    robot = load(name)
    began = time.perf_counter(), time.process_time()
    SelfModel.from_description(robot, n=10_000, seed=seed)
    seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    model = SelfModel.from_description(robot, n=n, seed=seed)
    q, camera = scenes(robot, images, seed)
    truth = Capture(robot).render(q, camera)
    with torch.no_grad():
        ours = model.render(q.float(), camera)
    iou, depth, psnr = score(ours, truth)
    order = iou.argsort()
    strips = []
    for i in (int(order[0]), int(order[images // 2])):
        difference = (1.0 - 10.0 * (ours.rgb[i] - truth.rgb[i]).abs()).clamp(0.0, 1.0)
        strips += [truth.rgb[i], ours.rgb[i], difference]
    row = Row(name.split("/")[0], n, *seconds, *(float(x) for x in (iou.mean(), iou.min(), depth.mean(), psnr.mean())))
    return row, torch.cat(strips, dim=1)


def write_section(lines: list[str]) -> None:
    """Replace the section "Silhouettes" of the results, or append it."""
    text = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    section = "\n".join(["## Silhouettes", "", *lines, ""])
    pattern = re.compile(r"^## Silhouettes\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text = pattern.sub(lambda _: section + "\n", text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}"
    RESULTS.write_text(text.rstrip() + "\n")


def main(
    n: int = 20_000,
    images: int = 20,
    seed: int = 0,
    robots: tuple[str, ...] = ROBOTS,
    write: bool = False,
    sheet: Path | None = None,
) -> None:
    """Measure, print, and on request write the section of docs/results.md and the sheet of pictures."""
    lines = [
        "| robot | splats | build 10k s | IoU mean | IoU min | depth mm | PSNR dB |",
        "|---|---|---|---|---|---|---|",
    ]
    rows, strips = [], []
    for name in robots:
        row, strip = measure(name, n, images, seed)
        rows.append(row)
        strips.append(strip)
        print(row.markdown(), flush=True)
    means = [
        sum(getattr(r, k) for r in rows) / len(rows)
        for k in ("wall_s", "cpu_s", "iou_mean", "iou_min", "depth_mm", "psnr_db")
    ]
    lines += [*(row.markdown() for row in rows), Row("**mean**", n, *means).markdown()]
    print(lines[-1])
    if write:
        note = NOTE.format(images=images, n=n, seed=seed, load=os.getloadavg()[0])
        write_section([*note.splitlines(), "", *lines])
    if sheet is not None:
        write_png(sheet, torch.cat(strips, dim=0))


if __name__ == "__main__":
    tyro.cli(main)
