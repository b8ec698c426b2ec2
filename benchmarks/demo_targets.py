"""Render the pictures of `kinesplat demo` with MuJoCo: `python benchmarks/demo_targets.py` (needs kinesplat[render]).

Four configurations are drawn within the middle 70 % of the joint limits and started 0.3 rad off; two are drawn within
0.4 rad of the canonical configuration and started from it. Nothing is chosen by hand but the seed.
"""

import json
import math
from pathlib import Path

import torch

import kinesplat as ks
from kinesplat.dataset.capture import Capture
from kinesplat.files import write_png

ROBOT = "franka_emika_panda"
SEED = 2024
SIZE = 256
FOLDER = Path(__file__).parents[1] / "src" / "kinesplat" / "demo_data"


def main() -> None:
    robot = ks.load_description(ROBOT)
    capture = Capture(robot, samples=16)
    generator = torch.Generator().manual_seed(SEED)
    FOLDER.mkdir(exist_ok=True)
    targets = []
    for index in range(6):
        start = "0.3 rad off" if index < 4 else "canonical configuration"
        q_true, q_start = draw(robot.tree, start, generator)
        camera = draw_camera(robot, q_true, generator)
        image = capture.render(q_true, camera)
        name = f"target_{index}"
        write_png(FOLDER / f"{name}.png", image.rgb)
        write_png(FOLDER / f"{name}_mask.png", image.alpha)
        values = {"q_true": q_true, "q_start": q_start, "K": camera.K, "T_cam_world": camera.T_cam_world}
        targets.append({"name": name, "start": start, **{key: value.tolist() for key, value in values.items()}})
        print(f"wrote {FOLDER / name}.png")
    data = {"robot": ROBOT, "seed": SEED, "width": SIZE, "height": SIZE, "targets": targets}
    (FOLDER / "targets.json").write_text(json.dumps(data, indent=1) + "\n")


def draw(tree: ks.KinematicTree, start: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A configuration and the one that its fit starts from."""
    canonical, span = tree.q_canonical.float(), (tree.q_upper - tree.q_lower).float()
    share, noise = torch.rand(2, tree.dof, generator=generator)
    scale = torch.minimum(span / 2.0, torch.tensor(1.0))
    if start == "0.3 rad off":
        q_true = tree.q_lower.float() + span * (0.15 + 0.7 * share)
        return q_true, tree.clamp(q_true + 0.3 * scale * (2.0 * noise - 1.0).sign())
    return tree.clamp(canonical + 0.4 * scale * (2.0 * share - 1.0)), canonical


def draw_camera(robot: ks.Robot, q: torch.Tensor, generator: torch.Generator) -> ks.Camera:
    """A camera at a random place around the robot that sees all of it."""
    azimuth, elevation = torch.rand(2, generator=generator).tolist()
    azimuth, elevation = 2.0 * math.pi * azimuth, 0.1 + 0.6 * elevation
    flat = math.cos(elevation)
    direction = (flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation))
    Ts = robot.tree.forward_kinematics(q)
    corners = [
        torch.from_numpy(m.vertices).float() @ Ts[m.link, :3, :3].T + Ts[m.link, :3, 3] for m in robot.link_meshes
    ]
    return ks.Camera.framing(torch.cat(corners), direction, width=SIZE, height=SIZE)


if __name__ == "__main__":
    main()
