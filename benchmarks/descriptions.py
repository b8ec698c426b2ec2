"""Every description that can be found: degrees of freedom, load time, kinematics against an oracle, silhouettes.

    MENAGERIE_ROOT=... KINESPLAT_SHARED=... python benchmarks/descriptions.py --write

Takes the MJCF files below MENAGERIE_ROOT (kinematics against MuJoCo), the URDFs below KINESPLAT_SHARED/urdf and those
of the package example-robot-data (against yourdfpy). Writes the section "Descriptions" of docs/results.md.
"""

import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
import torch
import tyro
from silhouettes import RESULTS, scenes, score

from kinesplat.dataset.capture import Capture
from kinesplat.description import Robot, load_description, mujoco_qpos
from kinesplat.errors import KinesplatError
from kinesplat.self_model import SelfModel

HEADER = (
    "| description | dof | links | coupled | faces | load s | bind s | FK error | IoU mean | IoU min |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
NOTE = """Every MJCF file of the robots at hand (not the scenes), and every URDF. FK error: largest entry of any link's
4x4 against MuJoCo (MJCF) or yourdfpy (URDF) over {configurations} random configurations, float64. IoU: masks of
`SelfModel.from_description(robot, n={n})` against `mujoco_warp`, {images} random configurations and cameras at
256 x 256 px. Load and bind (surface sampling) in seconds, {threads} threads, mesh cache warm, {load}. Coupled: joints
that follow others (mimic, joint equality, closed linkage). Names as `x_description/y.urdf` are of the package
example-robot-data. Refused files are listed with the reason. Repeat with

    MENAGERIE_ROOT=... KINESPLAT_SHARED=... python benchmarks/descriptions.py --n {n} --images {images} --write
"""


@dataclass(frozen=True)
class Row:
    """Measures of one description."""

    name: str
    dof: int
    links: int
    coupled: int
    faces: int
    load: float
    bind: float
    fk_error: float
    iou_mean: float
    iou_min: float

    def markdown(self) -> str:
        """The row of the table."""
        counts = f"{self.dof} | {self.links} | {self.coupled} | {self.faces:,} | {self.load:.1f}"
        if np.isnan(self.iou_mean):
            return f"| {self.name} | {counts} | - | {self.fk_error:.0e} | - | - |"
        scores = f"{self.fk_error:.0e} | {self.iou_mean:.4f} | {self.iou_min:.4f}"
        return f"| {self.name} | {counts} | {self.bind:.1f} | {scores} |"


def files() -> list[tuple[str, Path]]:
    """Name and path of every description, by where it comes from."""
    found: list[tuple[str, Path]] = []
    if root := os.environ.get("MENAGERIE_ROOT"):
        mjcf = (f for f in sorted(Path(root).glob("*/*.xml")) if "scene" not in f.stem and f.stem != "keyframes")
        found += [(f"{f.parent.name}/{f.name}", f) for f in mjcf]
    if shared := os.environ.get("KINESPLAT_SHARED"):
        found += [(f"urdf: {f.name}", f) for f in sorted((Path(shared) / "urdf").rglob("*.urdf"))]
    for entry in sys.path:
        robots = Path(entry) / "cmeel.prefix" / "share" / "example-robot-data" / "robots"
        found += [(f"{f.relative_to(robots).parts[0]}/{f.name}", f) for f in sorted(robots.rglob("*.urdf"))]
    return found


def fk_error(robot: Robot, path: Path, configurations: int) -> float:
    """Largest difference of any link's transform from the oracle's."""
    tree = robot.tree
    span = tree.q_upper - tree.q_lower
    q = tree.q_lower + span * torch.rand(configurations, tree.dof, dtype=torch.float64)
    Ts = tree.forward_kinematics(q).numpy()
    oracle = _yourdfpy_transforms if path.suffix == ".urdf" else _mujoco_transforms
    return float(np.abs(Ts - oracle(robot, path, q)).max())


def _mujoco_transforms(robot: Robot, path: Path, q: torch.Tensor) -> np.ndarray:
    data = mujoco.MjData(robot.mj_model)
    T = np.tile(np.eye(4), (len(q), robot.mj_model.nbody - 1, 1, 1))
    for index, qpos in enumerate(mujoco_qpos(robot, q)):
        data.qpos[:] = qpos
        mujoco.mj_kinematics(robot.mj_model, data)
        T[index, :, :3, :3], T[index, :, :3, 3] = data.xmat[1:].reshape(-1, 3, 3), data.xpos[1:]
    return T


def _yourdfpy_transforms(robot: Robot, path: Path, q: torch.Tensor) -> np.ndarray:
    import yourdfpy

    other = yourdfpy.URDF.load(str(path), load_meshes=False, load_collision_meshes=False)
    rows = []
    for values in q.tolist():
        named = dict(zip(robot.tree.joint_names, values, strict=True))
        other.update_cfg(np.array([named[name] for name in other.actuated_joint_names]))
        rows.append([other.get_transform(name, other.base_link) for name in robot.tree.link_names])
    return np.array(rows)


def measure(name: str, path: Path, n: int, images: int, configurations: int) -> Row:
    """All measures of one description."""
    load_description(path)
    began = time.perf_counter()
    robot = load_description(path)
    load = time.perf_counter() - began
    tree, faces = robot.tree, sum(len(m.faces) for m in robot.link_meshes)
    counts = tree.dof, len(tree.link_names), len(tree.couplings.dependent), faces
    error = fk_error(robot, path, configurations)
    if not images or not robot.link_meshes:
        return Row(name, *counts, load, 0.0, error, float("nan"), float("nan"))
    began = time.perf_counter()
    model = SelfModel.from_description(robot, n=n)
    bind = time.perf_counter() - began
    q, camera = scenes(robot, images, 0)
    with torch.no_grad():
        iou, _, _ = score(model.render(q.float(), camera), Capture(robot).render(q, camera))
    return Row(name, *counts, load, bind, error, float(iou.mean()), float(iou.min()))


def write_section(lines: list[str]) -> None:
    """Replace the section "Descriptions" of the results, or append it."""
    text = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    section = "\n".join(["## Descriptions", "", *lines, ""])
    pattern = re.compile(r"^## Descriptions\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text = pattern.sub(lambda _: section + "\n", text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}"
    RESULTS.write_text(text.rstrip() + "\n")


def main(
    n: int = 10_000,
    images: int = 3,
    configurations: int = 5,
    only: str = "",
    rows: Path | None = None,
    write: bool = False,
) -> None:
    """Measure and print; on request write the section of docs/results.md.

    Args:
        only: take descriptions with this in their name.
        rows: file that keeps finished rows, so that a stopped run goes on where it was.
        write: write the section.
    """
    torch.manual_seed(0)
    done = rows.read_text().splitlines() if rows is not None and rows.exists() else []
    lines = []
    for name, path in ((name, path) for name, path in files() if only in name):
        line = next((d for d in done if d.startswith((f"| {name} |", f"- {name}: "))), None)
        if line is None:
            line = outcome(name, path, n, images, configurations)
            print(line, flush=True)
            if rows is not None:
                with rows.open("a") as file:
                    file.write(line + "\n")
        lines.append(line)
    if write:
        load = f"machine load {os.getloadavg()[0]:.1f}"
        threads = torch.get_num_threads()
        note = NOTE.format(n=n, images=images, configurations=configurations, threads=threads, load=load)
        table = [line for line in lines if line.startswith("|")]
        refused = [line for line in lines if line.startswith("-")]
        write_section([*note.splitlines(), "", *HEADER.splitlines(), *table, "", "Refused:", "", *refused])


def outcome(name: str, path: Path, n: int, images: int, configurations: int) -> str:
    """A row of the table, or a line that says why the description is refused."""
    try:
        return measure(name, path, n, images, configurations).markdown()
    except KinesplatError as error:
        return f"- {name}: {str(error).replace(str(path), path.name)[:200]}"


if __name__ == "__main__":
    tyro.cli(main)
