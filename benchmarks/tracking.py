"""Track a simulated robot before clutter: `python benchmarks/tracking.py --robot NAME --frames 200`.

MuJoCo renders the frames (kinesplat[render]). The robot moves smoothly at random, some 0.5 rad to either side of a
random configuration above the floor; the background is a random texture that stands still. The camera is known; there
are no masks and no start. Two rates: after the first frame is known, and with everything, the search for it included.
"""

import argparse
import math
from pathlib import Path

import torch

import kinesplat as ks
from kinesplat.dataset.capture import Capture
from kinesplat.files import write_png
from kinesplat.inverse.search import joint_scale
from kinesplat.report import overlay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--robot", default="franka_emika_panda")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pictures", type=Path, help="folder for overlays of some frames")
    arguments = parser.parse_args()
    robot = ks.load_description(arguments.robot)
    model = ks.SelfModel.from_description(robot)
    capture = Capture(robot)
    head = [
        "robot",
        "seed",
        "frames",
        "joints off, mean [rad]",
        "median",
        "largest of the means",
        "lost or doubtful",
        "frames/s",
        "all included",
    ]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    for seed in arguments.seeds:
        q, camera, frames = video(robot, model, capture, arguments.frames, seed)
        result = ks.track(model, frames, camera=camera, seed=seed)
        hinges = torch.tensor([kind == "hinge" for kind in model.tree.joint_types])
        off = (torch.remainder(result.q - q + math.pi, 2.0 * math.pi) - math.pi).abs()[:, hinges]
        means = off.mean(dim=1)
        lost = sum(state in ("lost", "doubtful") for state in result.states)
        print(
            f"| {arguments.robot} | {seed} | {len(q)} | {means.mean():.4f} | {means.median():.4f} | {means.max():.4f} "
            f"| {lost} | {result.frames_per_second:.1f} | {len(q) / result.seconds:.1f} |",
            flush=True,
        )
        if arguments.pictures is not None:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            for i in torch.linspace(0, len(q) - 1, 5).long().tolist():
                out = model.render(result.q[i], camera)
                assert out.rgb is not None
                assert out.alpha is not None
                write_png(arguments.pictures / f"{seed}_{i}.png", overlay(frames[i], out.rgb, out.alpha))


def video(
    robot: ks.Robot, model: ks.SelfModel, capture: Capture, count: int, seed: int
) -> tuple[torch.Tensor, ks.Camera, torch.Tensor]:
    """Configurations ``(frames, dof)``, the camera, and frames ``(frames, 256, 256, 3)``."""
    generator, tree = torch.Generator().manual_seed(seed), robot.tree
    span = (tree.q_upper - tree.q_lower).float()
    while True:
        middle = tree.q_lower.float() + span * (0.2 + 0.6 * torch.rand(tree.dof, generator=generator))
        q = tree.clamp(middle + smooth(count, tree.dof, generator) * joint_scale(tree))
        if model.posed(q[:: max(1, count // 16)]).means[..., 2].min() > -0.05:
            break
    azimuth = 2.0 * math.pi * torch.rand(1, generator=generator).item()
    some = model.posed(q[:: max(1, count // 16)]).means.flatten(0, 1)
    camera = ks.Camera.framing(some, (math.cos(azimuth), math.sin(azimuth), 0.4))
    coarse = torch.rand(2, 3, 24, 24, generator=generator)
    fine = torch.rand(2, 3, 96, 96, generator=generator)
    clutter = sum(
        torch.nn.functional.interpolate(noise[:1], size=(256, 256), mode="bicubic") for noise in (coarse, fine)
    )
    clutter = (0.5 * clutter[0]).clamp(0.0, 1.0).permute(1, 2, 0)
    image = capture.render(q, camera)
    assert image.alpha is not None
    return q, camera, (image.rgb - (1.0 - image.alpha[..., None]) * (1.0 - clutter)).clamp(0.0, 1.0)


def smooth(count: int, dof: int, generator: torch.Generator) -> torch.Tensor:
    """Sums of three slow sines per joint ``(count, dof)``, about 0.3 rms, one to six periods in 200 frames."""
    t = torch.arange(count)[:, None, None] / 200.0
    frequency = 1.0 + 5.0 * torch.rand(dof, 3, generator=generator)
    phase = 2.0 * math.pi * torch.rand(dof, 3, generator=generator)
    return 0.25 * torch.sin(2.0 * math.pi * frequency * t + phase).sum(dim=-1)


if __name__ == "__main__":
    main()
