"""How often are joints and cameras found? `python benchmarks/reconstruction.py --robot NAME --images 20`.

MuJoCo renders the pictures (kinesplat[render]).
Views show the whole robot; configurations are uniform within the middle 80 % of the limits, above the floor. A joint
counts as found within 0.05 rad; only hinges count, and full turns are no error.
"""

import argparse
import math
from dataclasses import dataclass

import torch

import kinesplat as ks
from kinesplat.dataset.capture import Capture
from kinesplat.demo import camera_error
from kinesplat.inverse.search import joint_scale
from kinesplat.twists import exp_twist

CASES = {
    "near": "start 0.3 rad off",
    "camera": "start 0.3 rad off, camera 3 cm and 0.03 rad off per axis",
    "global": "no start",
}


@dataclass(frozen=True)
class Problem:
    """One rendered picture and its truth."""

    q: torch.Tensor
    camera: ks.Camera
    rgb: torch.Tensor
    alpha: torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--robot", default="franka_emika_panda")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    robot = ks.load_description(arguments.robot)
    model = ks.SelfModel.from_description(robot)
    problems = [draw(robot, model, capture, seed) for capture in [Capture(robot)] for seed in range(arguments.images)]
    head = ["robot", "case", "found", "joints off, median of means [rad]", "camera off, median [mm]", "seconds"]
    print("| " + " | ".join([*head, "right of those called converged"]) + " |\n" + "|---" * 7 + "|", flush=True)
    for case in arguments.cases:
        print(row(arguments.robot, model, case, problems), flush=True)


def draw(robot: ks.Robot, model: ks.SelfModel, capture: Capture, seed: int) -> Problem:
    """A configuration above the floor and a camera that frames it from a random side."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tree = robot.tree
    span = (tree.q_upper - tree.q_lower).float()
    while True:
        q = tree.q_lower.float() + span * (0.1 + 0.8 * torch.rand(tree.dof, generator=generator))
        if model.posed(q).means[:, 2].min() > -0.05:
            break
    azimuth, elevation = (torch.rand(2, generator=generator) * torch.tensor([2.0 * math.pi, 0.6])).tolist()
    flat = math.cos(elevation + 0.1)
    side = (flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation + 0.1))
    camera = ks.Camera.framing(model.posed(q).means, side)
    image = capture.render(q, camera)
    assert image.alpha is not None
    return Problem(q, camera, image.rgb, image.alpha)


def row(robot: str, model: ks.SelfModel, case: str, problems: list[Problem]) -> str:
    """Solve every problem of one case; a line of the table."""
    hinges = torch.tensor([kind == "hinge" for kind in model.tree.joint_types])
    found, means, millimetres, seconds, converged, right = 0, [], [], 0.0, 0, 0
    for seed, p in enumerate(problems):
        generator = torch.Generator().manual_seed(seed)
        noise = 2.0 * torch.rand(model.tree.dof, generator=generator) - 1.0
        start = None if case == "global" else model.tree.clamp(p.q + 0.3 * noise * joint_scale(model.tree))
        twist = 0.03 * torch.randn(6, generator=generator) * (case == "camera")
        guess = ks.Camera(p.camera.K, exp_twist(twist) @ p.camera.T_cam_world, p.camera.width, p.camera.height)
        free = case == "camera"
        fit = ks.reconstruct(model, p.rgb, guess, masks=p.alpha, q_init=start, optimize_camera=free, seed=seed)
        off = (torch.remainder(fit.q - p.q + math.pi, 2.0 * math.pi) - math.pi).abs()[hinges]
        good = bool(off.max() < 0.05)
        found, converged = found + good, converged + (fit.verdict == "converged")
        right += good and fit.verdict == "converged"
        means.append(off.mean().item())
        millimetres.append(1000.0 * camera_error(fit.camera, p.camera)[0])
        seconds += fit.seconds
    median = sorted(means)[len(means) // 2], sorted(millimetres)[len(millimetres) // 2]
    return (
        f"| {robot} | {CASES[case]} | {found} of {len(problems)} | {median[0]:.4f} | {median[1]:.1f} "
        f"| {seconds / len(problems):.1f} | {right} of {converged} |"
    )


if __name__ == "__main__":
    main()
