"""Making a data set: shard by shard, in as many processes as wanted; a killed run goes on where it was."""

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat import __version__
from kinesplat.dataset.capture import Capture, capture_frames
from kinesplat.dataset.collision import SelfCollision
from kinesplat.dataset.container import FORMAT_VERSION, MANIFEST, SURFACE, Dataset
from kinesplat.dataset.device import Device
from kinesplat.dataset.lights import draw_lights
from kinesplat.dataset.plan import Plan, Shard
from kinesplat.dataset.sampling import random_cameras, random_configurations
from kinesplat.dataset.shards import write_shard
from kinesplat.description import Robot, load_description, mujoco_qpos
from kinesplat.errors import DatasetError, InputError
from kinesplat.files import written_whole
from kinesplat.surface.meshes import sample_meshes
from kinesplat.surface.visibility import seen_from_outside

SURFACE_POINTS = 20_000
SURFACE_CANDIDATES = 160_000
AIM_POINTS = 2_000
Report = Callable[[int], None]


@dataclass(frozen=True)
class Maker:
    """What a process needs to make shards."""

    robot: Robot
    capture: Capture
    collision: SelfCollision | None
    aim: tuple[Float[np.ndarray, "n 3"], np.ndarray]


def write_dataset(
    directory: str | Path, plan: Plan, processes: int = 1, device: Device = "auto", report: Report | None = None
) -> Dataset:
    """Make a data set, or go on with one that the same plan began.

    Every shard is written whole or not at all, and has its own seed: a run that is killed and started again, with any
    number of processes, gives the same files.

    Args:
        directory: folder for the files; created if needed.
        plan: what to make.
        processes: how many at a time.
        device: where to trace rays.
        report: called with the number of images of every finished shard; first with that of the shards that were
            there.

    Raises:
        InputError: the folder holds another data set, or cannot be written.
        DescriptionError: the robot cannot be loaded.
        BackendError: the renderer is missing.
    """
    if processes < 1:
        raise InputError(f"processes is {processes}; expected at least 1")
    directory = Path(directory)
    robot = load_robot(plan)
    _begin(directory, plan, robot)
    missing = [s for s in plan.shards() if not (directory / s.file_name).is_file()]
    if report is not None:
        report(sum(s.images for s in plan.shards()) - sum(s.images for s in missing))
    for done in _made(directory, plan, robot, missing, min(processes, len(missing)), device) if missing else ():
        if report is not None:
            report(done.images)
    return Dataset.open(directory)


def load_robot(plan: Plan) -> Robot:
    """The robot of a plan."""
    return load_description(plan.robot, packages=dict(plan.packages))


def _made(
    directory: Path, plan: Plan, robot: Robot, shards: list[Shard], processes: int, device: Device
) -> Iterator[Shard]:
    """Make shards, in order or in parallel; yields each when it is on disk."""
    maker = _maker(robot, plan, device)
    here = shards if processes == 1 else shards[:1]  # the first one compiles the kernels, for all
    for shard in here:
        make_shard(directory, plan, shard, maker)
        yield shard
    if processes == 1:
        return
    context = multiprocessing.get_context("spawn")
    with _one_thread_each(), ProcessPoolExecutor(processes, context) as pool:
        futures = {pool.submit(_make_elsewhere, directory, plan, shard, device): shard for shard in shards[1:]}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _make_elsewhere(directory: Path, plan: Plan, shard: Shard, device: Device) -> None:
    make_shard(directory, plan, shard, _maker_of_process(plan, device))


@lru_cache(maxsize=1)
def _maker_of_process(plan: Plan, device: Device) -> Maker:
    """Prepared once in the life of a worker process, which serves one run."""
    return _maker(load_robot(plan), plan, device)


def make_shard(directory: Path, plan: Plan, shard: Shard, maker: Maker) -> None:
    """Render one shard and write it."""
    generator = plan.generator(shard)
    q, rejected = _configurations(maker, shard, generator)
    Ts_world_link = link_poses(maker.robot, q)
    points, link = maker.aim
    T = Ts_world_link[:, link].numpy()
    world = torch.from_numpy(np.einsum("bnij,nj->bni", T[..., :3, :3], points) + T[..., :3, 3])
    world, q, Ts_world_link = (t.repeat_interleave(shard.views, dim=0) for t in (world, q, Ts_world_link))
    camera = random_cameras(world, generator, size=plan.size, span=plan.span, near=plan.near)
    frames = capture_frames(maker.capture, q, camera, draw_lights(plan.light, shard.images, generator))
    header = {"split": shard.split, "index": shard.index, "views": shard.views, "rejected": rejected}
    write_shard(directory / shard.file_name, frames, {"Ts_world_link": Ts_world_link.numpy()}, header)


def link_poses(robot: Robot, q: Float[Tensor, "n dof"]) -> Float[Tensor, "n links 4 4"]:
    """``Ts_world_link`` by MuJoCo's own kinematics, not by the tree's [m]."""
    model = robot.mj_model
    data = mujoco.MjData(model)
    Ts = np.tile(np.eye(4), (len(q), model.nbody - 1, 1, 1))
    for row, qpos in enumerate(mujoco_qpos(robot, q)):
        data.qpos[:] = qpos
        mujoco.mj_kinematics(model, data)
        Ts[row, :, :3, :3] = data.xmat[1:].reshape(-1, 3, 3)
        Ts[row, :, :3, 3] = data.xpos[1:]
    return torch.from_numpy(Ts)


def _maker(robot: Robot, plan: Plan, device: Device) -> Maker:
    capture = Capture(robot, plan.samples, plan.light, device=device, renderer=plan.renderer)
    collision = None if plan.collisions else SelfCollision(robot)
    points = sample_meshes(robot.link_meshes, AIM_POINTS, np.random.default_rng(0))
    return Maker(robot, capture, collision, (points.positions, points.link))


def _configurations(maker: Maker, shard: Shard, generator: torch.Generator) -> tuple[Float[Tensor, "n dof"], int]:
    tree = maker.robot.tree
    if shard.split == "canonical":
        return tree.q_canonical[None].repeat(shard.configurations, 1), 0
    if maker.collision is None:
        return random_configurations(tree, shard.configurations, generator), 0
    return maker.collision.sample(shard.configurations, generator)


def _begin(directory: Path, plan: Plan, robot: Robot) -> None:
    """Write manifest and surface points, or make sure that those of this plan are there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {directory}: {error.strerror}") from error
    fingerprint = _fingerprint(robot)
    if (directory / MANIFEST).is_file():
        _refuse_others(Dataset.open(directory), plan, fingerprint)
    else:
        leftovers = [s.file_name for s in plan.shards() if (directory / s.file_name).exists()]
        if leftovers:
            raise DatasetError(f"{directory}: holds {leftovers[0]} but no {MANIFEST}; choose another folder")
    for shard in plan.shards():  # what a killed run left half written
        for path in directory.glob(f".{Path(shard.file_name).stem}.*.zip"):
            path.unlink(missing_ok=True)
    if not (directory / SURFACE).is_file():
        _write_surface(directory / SURFACE, plan, robot)
    if not (directory / MANIFEST).is_file():
        with written_whole(directory / MANIFEST) as temporary:
            temporary.write_text(json.dumps(_manifest(plan, robot, fingerprint), indent=1) + "\n")


def _refuse_others(there: Dataset, plan: Plan, fingerprint: str) -> None:
    old, new = there.plan.to_json(), plan.to_json()
    other = [f"{key} {old[key]} (now {new[key]})" for key in new if old[key] != new[key]]
    if there.manifest.get("fingerprint") != fingerprint:
        other.append("another version of the robot's description")
    if other:
        raise InputError(f"{there.directory} holds a data set with {', '.join(other)}; choose another folder")


def _manifest(plan: Plan, robot: Robot, fingerprint: str) -> dict[str, Any]:
    collision = SelfCollision(robot)
    return {
        "format": "kinesplat-dataset",
        "format_version": FORMAT_VERSION,
        "plan": plan.to_json(),
        "robot": robot.name,
        "licence": robot.licence,
        "joint_names": list(robot.tree.joint_names),
        "link_names": list(robot.tree.link_names),
        "q_canonical": robot.tree.q_canonical.tolist(),
        "collisions": {
            "checked": collision.can_tell and not plan.collisions,
            "geom_pairs": len(collision.pairs),
            "excepted_in_canonical": [list(pair) for pair in collision.excepted],
        },
        "fingerprint": fingerprint,
        "kinesplat": __version__,
        "mujoco": mujoco.__version__,
    }


def _fingerprint(robot: Robot) -> str:
    """SHA-256 over the kinematics and the visible surface."""
    digest = hashlib.sha256()
    for name, tensor in sorted(robot.tree.to_tensors().items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor.numpy()).tobytes())
    for mesh in robot.link_meshes:
        for values in (mesh.vertices, mesh.faces, mesh.rgba):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _write_surface(path: Path, plan: Plan, robot: Robot) -> None:
    rng = np.random.default_rng(plan.seed)
    points = sample_meshes(robot.link_meshes, SURFACE_CANDIDATES, rng)
    points = points.select(seen_from_outside(points, robot.tree, rng))
    share = points.area / points.area.sum()
    points = points.select(np.sort(rng.choice(len(points), min(SURFACE_POINTS, len(points)), replace=False, p=share)))
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        positions=points.positions.astype(np.float64),
        normals=points.facing.astype(np.float32),
        link=points.link.astype(np.int16),
    )
    with written_whole(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started meanwhile compute on one thread; several of them share the machine's cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
