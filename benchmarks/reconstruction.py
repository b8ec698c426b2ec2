"""How often are joints and cameras found? `python benchmarks/reconstruction.py --robots NAME --images 50 -o FILE`.

MuJoCo renders the pictures (kinesplat[render]). Views show the whole robot; configurations are uniform within the
middle 80 % of the limits, above the floor. Every fit is a line of FILE (JSON); lines that are there already are not
computed again, so that a run can be stopped and goes on. `--table` prints the tables of FILE.

A fit counts as right when every arm joint is within 0.05 rad (full turns are no error), or when MuJoCo's picture of the
answer equals the target (an alias that leaves the image unchanged: PSNR of RGB and mask above 40 dB). Where the camera
is not known, every link that shows 20 pixels or more must lie within 10 mm in the camera frame: the mean
distance of its surface points. Of the Shadow Hand the mean joint error must be below 0.1 rad.
"""

import argparse
import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch

import kinesplat as ks
from kinesplat.dataset.capture import Capture
from kinesplat.demo import camera_error
from kinesplat.inverse.initializer import Initializer
from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.search import joint_scale
from kinesplat.twists import exp_twist

CASES = {
    "near": "start 0.3 rad off",
    "none": "no start",
    "camera": "start 0.3 rad off, camera 0.1 rad and 5 % off",
    "nothing": "nothing known but K",
    "views": "two views, start 0.3 rad off",
    "far": "one start, every joint 0.5 to 0.8 rad off",
    "astray": "one start, every joint 0.1 rad off, camera 0.2 rad and 10 % off",
}
ONE_START = ("far", "astray")
FREE = ("camera", "nothing", "astray")
ARM_JOINTS = {"franka_emika_panda": 7, "universal_robots_ur5e": 6, "ufactory_xarm7": 7, "trossen_vx300s": 6}
SAME_PICTURE_DB = 40.0
VISIBLE_PX = 20
GRIPPER_PX = 100


@dataclass(frozen=True)
class Problem:
    """Pictures of one configuration and their truth."""

    q: torch.Tensor
    camera: ks.Camera
    rgb: torch.Tensor
    alpha: torch.Tensor
    visible: tuple[int, ...]
    pixels: tuple[int, ...]  # of every link, over all views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--robots", nargs="+", default=["franka_emika_panda"])
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="seed of the first image")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["near", "none", "camera", "nothing"])
    parser.add_argument("--splats", type=int, default=20_000, help="size of the mesh-bound model")
    parser.add_argument("--initializers", type=Path, help="folder with learned starts, NAME.safetensors; else packaged")
    parser.add_argument("--no-initializer", action="store_true", help="by search alone")
    parser.add_argument("--zoo", action="store_true", help="the packaged model instead of a mesh-bound one")
    parser.add_argument("-o", "--out", type=Path, default=Path("reconstruction.jsonl"))
    parser.add_argument("--no-pull", action="store_true", help="without the distances to silhouettes")
    parser.add_argument("--table", action="store_true", help="only print the tables of the file")
    arguments = parser.parse_args()
    if not arguments.table:
        for robot in arguments.robots:
            with patch("kinesplat.inverse.attempts.PULL_STEPS", 0) if arguments.no_pull else nullcontext():
                run(robot, arguments)
    for line in tables(arguments.out):
        print(line)


def run(name: str, arguments: argparse.Namespace) -> None:
    """All fits of one robot that the file does not hold yet."""
    done = {(r["robot"], r["case"], r["seed"]) for r in rows_of(arguments.out)}
    seeds = range(arguments.first, arguments.first + arguments.images)
    jobs = [(seed, case) for seed in seeds for case in arguments.cases if (name, case, seed) not in done]
    if not jobs:
        return
    robot = ks.load_description(name)
    model = ks.zoo.load(name) if arguments.zoo else ks.SelfModel.from_description(robot, n=arguments.splats)
    start: Initializer | Literal[False] | None = False if arguments.no_initializer else None
    if (
        start is None
        and arguments.initializers is not None
        and (arguments.initializers / f"{name}.safetensors").is_file()
    ):
        start = Initializer.load(arguments.initializers / f"{name}.safetensors")
    capture, problem, drawn = Capture(robot), None, None
    for seed, case in jobs:
        if problem is None or drawn != (seed, case == "views"):
            problem, drawn = draw(robot, model, capture, seed, 2 if case == "views" else 1), (seed, case == "views")
        row = {"robot": name, "case": case, "seed": seed, **solve(model, case, problem, seed, capture, start)}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        words = "right" if row["right"] else "WRONG"
        print(f"{name} {case} {seed}: {words} {row['verdict']} {row['seconds']:.1f} s", flush=True)


def draw(robot: ks.Robot, model: ks.SelfModel, capture: Capture, seed: int, views: int = 1) -> Problem:
    """A configuration above the floor and cameras that frame it from random sides, a quarter turn apart."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tree = robot.tree
    span = (tree.q_upper - tree.q_lower).float()
    while True:
        q = tree.q_lower.float() + span * (0.1 + 0.8 * torch.rand(tree.dof, generator=generator))
        points = model.posed(q).means
        if points[:, 2].min() > -0.05 or robot.name == "shadow_hand":
            break
    azimuth, elevation = (torch.rand(2, generator=generator) * torch.tensor([2.0 * math.pi, 0.6])).tolist()
    flat, cameras = math.cos(elevation + 0.1), []
    for view in range(views):
        turned = azimuth + view * math.pi / 2
        side = (flat * math.cos(turned), flat * math.sin(turned), math.sin(elevation + 0.1))
        cameras.append(ks.Camera.framing(points, side))
    camera = cameras[0]
    if views > 1:
        camera = ks.Camera(torch.stack([c.K for c in cameras]), torch.stack([c.T_cam_world for c in cameras]), 256, 256)
    image = capture.render(q, camera)
    assert image.rgb is not None
    assert image.alpha is not None
    assert image.link_id is not None
    counts = image.link_id[image.link_id >= 0].flatten().bincount(minlength=len(tree.link_names))
    visible = tuple(torch.nonzero(counts >= VISIBLE_PX)[:, 0].tolist())
    return Problem(q, camera, image.rgb, image.alpha, visible, tuple(counts.tolist()))


def solve(
    model: ks.SelfModel,
    case: str,
    p: Problem,
    seed: int,
    capture: Capture,
    initializer: Initializer | Literal[False] | None,
) -> dict[str, Any]:
    """One fit and everything that is known about it."""
    generator = torch.Generator().manual_seed(seed)
    noise = 2.0 * torch.rand(model.tree.dof, generator=generator) - 1.0
    by = {"far": noise.sign() * (0.5 + 0.3 * noise.abs()), "astray": 0.1 * noise.sign()}.get(case, 0.3 * noise)
    start = model.tree.clamp(p.q + by * joint_scale(model.tree))
    twist = torch.nn.functional.normalize(torch.randn(2, 3, generator=generator), dim=-1)
    twist = twist * torch.tensor([[0.05 * p.camera.T_cam_world[..., :3, 3].norm(dim=-1).max().item()], [0.1]])
    twist = 2.0 * twist if case == "astray" else twist
    off = exp_twist(twist.flatten()) @ p.camera.T_cam_world
    moved = ks.Camera(p.camera.K, off, p.camera.width, p.camera.height)
    guess = {"camera": moved, "astray": moved, "nothing": None}.get(case, p.camera)
    fit = ks.reconstruct(
        model,
        p.rgb,
        guess,
        K=p.camera.K,
        masks=p.alpha,
        q_init=None if case in ("none", "nothing") else start,
        optimize_camera=case in FREE,
        starts=1 if case in ONE_START else None,
        initializer=initializer,
        seed=seed,
    )
    return {
        **errors(model, case, p, fit.q, fit.camera, capture),
        **gripper(model.tree, ARM_JOINTS.get(capture.robot.name, model.tree.dof), p, fit.q),
        "verdict": fit.verdict,
        "seconds": fit.seconds,
        "loss_ratio": fit.loss / true_loss(model, p),
        "losses": [h.loss for h in fit.hypotheses],
        "right_hypotheses": [
            rank for rank, h in enumerate(fit.hypotheses[:4]) if errors(model, case, p, h.q, h.camera, capture)["right"]
        ],
        "weak": list(fit.weak_variables),
        "std": fit.covariance.diagonal().sqrt().clamp(max=1e9).tolist(),
        "q": fit.q.tolist(),
        "T_cam_world": fit.camera.T_cam_world.tolist(),
        **fit.evidence,
    }


def errors(
    model: ks.SelfModel, case: str, p: Problem, q: torch.Tensor, camera: ks.Camera, capture: Capture
) -> dict[str, Any]:
    """How far off an answer is, and whether it counts as right."""
    hinge = torch.tensor([kind == "hinge" for kind in model.tree.joint_types])
    arm = ARM_JOINTS.get(capture.robot.name, model.tree.dof)
    turns = torch.remainder(q - p.q + math.pi, 2.0 * math.pi) - math.pi
    off = torch.where(hinge, turns, q - p.q).abs()
    millimetres = max(link_distances(model, p, q, camera))
    same = math.inf
    if case in FREE:
        right = millimetres < 10.0
    elif case == "views":
        right = off[hinge].mean().item() < 0.1
    else:
        right = off[:arm].max().item() < 0.05
        if not right:
            same = same_picture(capture, p, q)
    place, degrees = camera_error(camera, p.camera) if not camera.batch_shape else (0.0, 0.0)
    return {
        "right": right or (math.isfinite(same) and same > SAME_PICTURE_DB),
        "alias_db": same if math.isfinite(same) else None,
        "joint_error_rad": off.tolist(),
        "arm_error_max_rad": off[:arm].max().item(),
        "arm_error_mean_rad": off[:arm].mean().item(),
        "link_error_mm": millimetres,
        "camera_error_mm": 1000.0 * place,
        "camera_error_deg": degrees,
    }


def gripper(tree: ks.KinematicTree, joint: int, p: Problem, q: torch.Tensor) -> dict[str, Any]:
    """How far the gripper's joint is off, as a share of its range, and how many pixels of what it moves show."""
    if joint >= tree.dof:
        return {}
    moved = tree.link_jacobian(p.q)[..., joint].abs().sum(dim=-1) > 1e-6
    span = (tree.q_upper - tree.q_lower)[joint]
    return {
        "gripper_off": ((q - p.q)[joint].abs() / span).item(),
        "gripper_px": sum(count for count, moves in zip(p.pixels, moved.tolist(), strict=True) if moves),
    }


def same_picture(capture: Capture, p: Problem, q: torch.Tensor) -> float:
    """PSNR of RGB and mask between MuJoCo's picture of `q` and the target [dB]."""
    image = capture.render(capture.robot.tree.clamp(q), p.camera)
    assert image.rgb is not None
    assert image.alpha is not None
    both = torch.cat([image.rgb - p.rgb, (image.alpha - p.alpha)[..., None]], dim=-1)
    return -10.0 * math.log10(max(both.square().mean().item(), 1e-12))


def link_distances(model: ks.SelfModel, p: Problem, q: torch.Tensor, camera: ks.Camera) -> list[float]:
    """Mean distance of the surface points of every visible link in the camera frame, answer against truth [mm]."""
    points = []
    for joints, view in ((p.q, p.camera), (q, camera)):
        T = view.T_cam_world.reshape(-1, 4, 4)[0]
        points.append(model.posed(joints).means @ T[:3, :3].T + T[:3, 3])
    distance = 1000.0 * (points[0] - points[1]).norm(dim=-1)
    return [distance[model.link_index == link].mean().item() for link in p.visible]


def true_loss(model: ks.SelfModel, p: Problem) -> float:
    """What the fit minimises, at the truth."""
    objective = PhotometricObjective(model, Observation.create(p.rgb, p.alpha, p.camera))
    T = p.camera.T_cam_world.reshape(1, -1, 4, 4)
    return objective.linearize(Configurations(model.tree, p.q[None], T, False)).loss.item()


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; one that a killed run left half written does not count."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def tables(path: Path) -> list[str]:
    """A Markdown table, one line for every robot and case."""
    head = ["robot", "case", "right", "joints off, median of means [rad]", "links off, median [mm]", "loss ratio"]
    lines = ["| " + " | ".join([*head, "seconds, mean (max)", "right of those called converged"]) + " |"]
    lines.append("|---" * 8 + "|")
    rows = rows_of(path)
    for robot in dict.fromkeys(r["robot"] for r in rows):
        for case in CASES:
            some = [r for r in rows if r["robot"] == robot and r["case"] == case]
            if some:
                lines.append(table_line(robot, case, some))
    return [*lines, "", *gripper_table(rows)]


def gripper_table(rows: list[dict[str, Any]]) -> list[str]:
    """How well grippers are found where they show."""
    lines = [
        f"| robot | fits with {GRIPPER_PX} px of the gripper or more | off, median [% of its range] | within 10 % |"
    ]
    lines.append("|---" * 4 + "|")
    for robot in dict.fromkeys(r["robot"] for r in rows):
        off = [r["gripper_off"] for r in rows if r["robot"] == robot and r.get("gripper_px", 0) >= GRIPPER_PX]
        if off:
            median = 100.0 * torch.tensor(off).median().item()
            lines.append(f"| {robot} | {len(off)} | {median:.1f} | {sum(share < 0.1 for share in off)} |")
    return lines


def table_line(robot: str, case: str, rows: list[dict[str, Any]]) -> str:
    def median(key: str) -> float:
        return torch.tensor([r[key] for r in rows]).median().item()

    seconds, called = [r["seconds"] for r in rows], [r for r in rows if r["verdict"] == "converged"]
    return (
        f"| {robot} | {CASES[case]} | {sum(r['right'] for r in rows)} of {len(rows)} "
        f"| {median('arm_error_mean_rad'):.4f} | {median('link_error_mm'):.1f} | {median('loss_ratio'):.2f} "
        f"| {sum(seconds) / len(rows):.1f} ({max(seconds):.1f}) | {sum(r['right'] for r in called)} of {len(called)} |"
    )


if __name__ == "__main__":
    main()
