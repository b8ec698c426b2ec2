"""Speed of the rasteriser on this machine: times, lane evaluations against the FMA peak, scaling, and the reference.

`run` measures and returns plain data, `table` turns it into Markdown; the command line prints and writes them.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kinesplat import __version__
from kinesplat.camera import Camera
from kinesplat.description import load_description
from kinesplat.errors import InputError, KinesplatError
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import cpu, normal_equations, rasterize, rasterize_links
from kinesplat.rasterizer.render import make_scene

SIZES = ((10_000, 256), (10_000, 512), (50_000, 256), (50_000, 512))
POSE_SPLATS, POSE_SIZE, POSE_BATCH = 3_000, 64, 64
ROBOT = "franka_emika_panda"
FIELDS = ("means", "quats", "scales", "opacities", "sh")

Report = dict[str, Any]


def run(
    *, seconds: float = 1.0, threads: tuple[int, ...] = (1, 2), progress: Callable[[str], None] = lambda _: None
) -> Report:
    """Measure everything; each figure is the shortest and the median of as many calls as fit into `seconds`.

    Args:
        seconds: time for each figure [s].
        threads: thread counts to compare.
        progress: told what is being measured.

    Raises:
        InputError: a number that is not positive.
        BackendError: the native module is missing.
    """
    if seconds <= 0 or not threads or min(threads) < 1:
        raise InputError(f"seconds is {seconds} and threads {threads}; expected positive numbers")
    before = torch.get_num_threads()
    report: Report = {"machine": machine(), "scene": scene_splats(100)[2]}
    try:
        progress("multiply-add peak, stages")
        report["stages"] = [_stages(n, size, seconds) for n, size in SIZES]
        for count in threads:
            torch.set_num_threads(count)
            progress(f"{count} thread(s)")
            report[f"threads_{count}"] = _calls(seconds)
        torch.set_num_threads(1)
        progress("two busy processes beside it")
        report["under_load"] = _under_load(seconds, max(threads))
        progress("the reference")
        torch.set_num_threads(1)
        report["reference"] = _reference()
    finally:
        torch.set_num_threads(before)
    report["peers"] = {"gsplat": version("gsplat") + ", CUDA only" if find_spec("gsplat") else "not installed"}
    return report


def machine() -> Report:
    """Processor, cores, load and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    level = cpu.simd_level()
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "simd_level": level,
        "fma_peak_gflops_per_thread": round(cpu.native().fma_peak(level, 0.3) / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kinesplat": __version__,
    }


def scene_splats(n: int, seed: int = 0) -> tuple[Gaussians, Int[Tensor, " n"], str]:
    """n flat splats on the surface of the Panda (or of a torus where its description is not at hand).

    Returns:
        splats in the world at the canonical configuration, their links, and what was sampled.
    """
    rng = np.random.default_rng(seed)
    try:
        robot = load_description(ROBOT)
    except KinesplatError:
        points, normals, area = _torus(n, rng)
        links, name = torch.arange(n) * 8 // n, "torus of 1 m, in 8 links"
    else:
        points, normals, links, area = _robot_surface(robot, n, rng)
        name = f"{ROBOT}, canonical configuration, points on its visual meshes"
    spacing = (area / n) ** 0.5
    splats = Gaussians(
        means=torch.as_tensor(points, dtype=torch.float32),
        quats=_turn_z_to(torch.as_tensor(normals, dtype=torch.float32)),
        scales=torch.as_tensor(spacing * np.exp(rng.normal(0, 0.2, (n, 3))) * [0.6, 0.6, 0.1], dtype=torch.float32),
        opacities=torch.as_tensor(rng.uniform(0.1, 0.95, n), dtype=torch.float32),
        sh=torch.as_tensor(rng.normal(0, 0.3, (n, 9, 3)), dtype=torch.float32),
    )
    return splats, links, name


def view(size: int) -> Camera:
    """The camera of every figure: 1.75 m from the scene, fovy 45 degrees."""
    return Camera.look_at((1.5, 0.6, 0.9), (0.1, 0.0, 0.4), width=size, height=size)


def _torus(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    ring, tube = 0.35, 0.12
    phi, theta = rng.uniform(0, 2 * np.pi, (2, n))
    normals = np.stack([np.cos(phi) * np.cos(theta), np.sin(phi) * np.cos(theta), np.sin(theta)], -1)
    centres = ring * np.stack([np.cos(phi), np.sin(phi), 0 * phi], -1) + [0.1, 0.0, 0.4]
    return centres + tube * normals, normals, 4 * np.pi**2 * ring * tube


def _robot_surface(robot: Any, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Tensor, float]:
    """Area-weighted points, their normals and links, in the world."""
    Ts = robot.tree.forward_kinematics(robot.tree.q_canonical).numpy()
    corners = [
        Ts[m.link, :3, :3] @ m.vertices[m.faces].reshape(-1, 3).T + Ts[m.link, :3, 3:] for m in robot.link_meshes
    ]
    triangles = np.concatenate([c.T.reshape(-1, 3, 3) for c in corners])
    links = np.concatenate([np.full(len(m.faces), m.link) for m in robot.link_meshes])
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    areas = 0.5 * np.linalg.norm(cross, axis=-1)
    pick = np.sort(rng.choice(len(areas), n, p=areas / areas.sum()))
    a, b = rng.uniform(0, 1, (2, n, 1))
    a, b = np.where(a + b > 1, 1 - a, a), np.where(a + b > 1, 1 - b, b)
    chosen = triangles[pick]
    points = chosen[:, 0] + a * (chosen[:, 1] - chosen[:, 0]) + b * (chosen[:, 2] - chosen[:, 0])
    return points, cross[pick] / (2 * areas[pick, None]), torch.as_tensor(links[pick]), float(areas.sum())


def _turn_z_to(normals: Tensor) -> Tensor:
    """Quaternions wxyz that turn +Z to the unit normals."""
    x, y, z = normals.unbind(-1)
    quats = torch.stack([1 + z, -y, x, torch.zeros_like(x)], -1)
    flipped = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand_as(quats)
    quats = torch.where((z < -0.9999)[:, None], flipped, quats)
    return quats / quats.norm(dim=-1, keepdim=True)


def _timed(call: Callable[[], object], seconds: float) -> Report:
    """Shortest, median and longest time of a call and its smallest processor time over all threads [ms]."""
    call()
    times: list[float] = []
    processor: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start, processor_start = time.perf_counter(), time.process_time()
        call()
        times.append(1e3 * (time.perf_counter() - start))
        processor.append(1e3 * (time.process_time() - processor_start))
    figures = {"min": min(times), "median": float(np.median(times)), "max": max(times), "processor_min": min(processor)}
    return {f"{name}_ms": round(value, 3) for name, value in figures.items()}


def _stages(n: int, size: int, seconds: float) -> Report:
    splats, _, _ = scene_splats(n)
    index = torch.zeros(n, dtype=torch.int32)
    scene = make_scene(splats, index, None, torch.eye(4)[None], view(size), (1.0, 1.0, 1.0), 0.3, ("rgb",))
    plan = cpu.make_plan(scene)
    t = cpu.native().profile_stages(plan.native_scene, plan.level, max(5, int(200 * seconds)))
    blends = {"forward_blend": t.forward_blend, "backward_blend": t.backward_blend}
    return {
        "splats": n,
        "size": size,
        **{f"{name}_ms": round(1e3 * getattr(t, name), 3) for name in ("prepare", *blends, "backward_splats")},
        **{f"{k}_evaluations_per_ns": round(t.lane_evaluations / s * 1e-9, 2) for k, s in blends.items()},
        "lane_evaluations": int(t.lane_evaluations),
        "frame_mebibytes": round(t.frame_bytes / 2**20, 1),
    }


def _full_step(splats: Gaussians, camera: Camera) -> Callable[[], object]:
    leaves = [getattr(splats, f).clone().requires_grad_() for f in FIELDS]
    T = camera.T_cam_world.clone().requires_grad_()
    moving, gradient = replace(camera, T_cam_world=T), torch.rand(camera.height, camera.width, 3)

    def step() -> object:
        rgb = rasterize(Gaussians(*leaves), moving, outputs=("rgb",)).rgb
        assert rgb is not None
        return torch.autograd.grad(rgb, [*leaves, T], gradient)

    return step


def _pose_step(batch: int) -> Callable[[], object]:
    splats, links, _ = scene_splats(POSE_SPLATS)
    camera = view(POSE_SIZE)
    Ts = torch.eye(4).repeat(batch, int(links.max()) + 1, 1, 1).requires_grad_()
    gradient = torch.rand(batch, POSE_SIZE, POSE_SIZE, 3)

    def step() -> object:
        rgb = rasterize_links(splats, links, Ts, camera, outputs=("rgb",)).rgb
        assert rgb is not None
        return torch.autograd.grad(rgb, Ts, gradient)

    return step


def _gauss_newton_step(n: int, size: int, batch: int) -> Callable[[], object]:
    splats, links, _ = scene_splats(n)
    Ts = torch.eye(4).repeat(batch, int(links.max()) + 1, 1, 1)
    target, camera = torch.rand(size, size, 3), view(size)
    return lambda: normal_equations(splats, links, Ts, camera, target, alpha=target[..., 0])


def _calls(seconds: float) -> list[Report]:
    """Calls through the Python API at the current number of threads."""
    rows: list[Report] = []
    for n, size in SIZES:
        splats, camera = scene_splats(n)[0], view(size)
        rows.append(
            {
                "call": f"forward {n}/{size}",
                **_timed(lambda s=splats, c=camera: rasterize(s, c, outputs=("rgb",)), seconds),
            }
        )
        rows.append({"call": f"forward + backward {n}/{size}", **_timed(_full_step(splats, camera), seconds)})
    pose = f"{POSE_SPLATS}/{POSE_SIZE}"
    rows.append({"call": f"pose-only step {pose}", **_timed(_pose_step(1), seconds)})
    rows.append({"call": f"pose-only step {pose} x {POSE_BATCH}", **_timed(_pose_step(POSE_BATCH), seconds)})
    rows.append({"call": "normal equations 10000/256", **_timed(_gauss_newton_step(10_000, 256, 1), seconds)})
    rows.append({"call": f"normal equations {pose}", **_timed(_gauss_newton_step(POSE_SPLATS, POSE_SIZE, 1), seconds)})
    rows.append(
        {
            "call": f"normal equations {pose} x {POSE_BATCH}",
            **_timed(_gauss_newton_step(POSE_SPLATS, POSE_SIZE, POSE_BATCH), seconds),
        }
    )
    return rows


def _under_load(seconds: float, threads: int) -> Report:
    """10,000 splats at 256 x 256, forward + backward, beside two processes that never sleep."""
    step = _full_step(scene_splats(10_000)[0], view(256))
    alone = _timed(step, seconds)
    spin = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        torch.set_num_threads(threads)
        busy = _timed(step, 2 * seconds)
    finally:
        for process in spin:
            process.kill()
            process.wait()
    return {"alone_1_thread": alone, f"busy_{threads}_threads": busy}


def _reference() -> Report:
    """The plain-torch oracle in float32 on one thread, three calls."""
    splats = scene_splats(10_000)[0]
    leaves = [getattr(splats, f).clone().requires_grad_() for f in FIELDS]
    gradient = torch.rand(256, 256, 3)
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        rgb = rasterize(Gaussians(*leaves), view(256), outputs=("rgb",), backend="reference").rgb
        assert rgb is not None
        torch.autograd.grad(rgb, leaves, gradient)
        times.append(1e3 * (time.perf_counter() - start))
    return {"call": "forward + backward 10000/256", "min_ms": round(min(times), 1)}


def table(report: Report) -> str:
    """Markdown of a report."""
    m = report["machine"]
    peak = m["fma_peak_gflops_per_thread"]
    counts = sorted(int(k.removeprefix("threads_")) for k in report if k.startswith("threads_"))
    lines = [
        f"{m['processor']}, {m['cores']} cores, {m['simd_level']}, measured peak of multiply-adds {peak} GFLOP/s "
        f"per thread, "
        f"load average {m['load_average']} at the start; Python {m['python']}, torch {m['torch']}, "
        f"kinesplat {m['kinesplat']}. Scene: {report['scene']}.",
        "",
        "Shortest (median) time of a call through the Python API, and its smallest processor time [ms]:",
        "",
        "| call | " + " | ".join(f"{c} thread{'s' * (c > 1)}" for c in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for rows in zip(*(report[f"threads_{c}"] for c in counts), strict=True):
        cells = " | ".join(f"{r['min_ms']:.2f} ({r['median_ms']:.2f}), {r['processor_min_ms']:.2f}" for r in rows)
        lines.append(f"| {rows[0]['call']} | {cells} |")
    lines += [
        "",
        "Stages on one thread, shortest times:",
        "",
        "| splats / size | prepare ms | forward blend ms | evaluations/ns | % of peak | backward blend ms "
        "| evaluations/ns | splat backward ms | frame MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for s in report["stages"]:
        share = 100 * 32 * s["forward_blend_evaluations_per_ns"] / peak
        lines.append(
            f"| {s['splats']} / {s['size']} | {s['prepare_ms']} | {s['forward_blend_ms']} "
            f"| {s['forward_blend_evaluations_per_ns']} | {share:.0f} | {s['backward_blend_ms']} "
            f"| {s['backward_blend_evaluations_per_ns']} | {s['backward_splats_ms']} | {s['frame_mebibytes']} |"
        )
    full = next(r for r in report[f"threads_{counts[0]}"] if r["call"] == report["reference"]["call"])
    ratio = report["reference"]["min_ms"] / full["min_ms"]
    load = report["under_load"]
    busy = load[next(k for k in load if k.startswith("busy"))]
    lines += [
        "",
        f"An evaluation is one splat at one pixel, 32 operations. Reference (plain torch, one thread), {full['call']}: "
        f"{report['reference']['min_ms']:.0f} ms, {ratio:.0f} times ours. "
        f"Beside two processes that never sleep, the same call: "
        f"median {busy['median_ms']:.2f} ms, longest {busy['max_ms']:.2f} ms "
        f"({busy['max_ms'] / load['alone_1_thread']['min_ms']:.1f} times its time alone on one thread). "
        f"gsplat: {report['peers']['gsplat']}.",
    ]
    return "\n".join(lines)
