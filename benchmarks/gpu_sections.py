"""The sections of benchmarks/gpu.py: each takes its options and returns plain data."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from kinesplat import zoo
from kinesplat.camera import Camera
from kinesplat.gaussians import GAUSSIANS, Gaussians
from kinesplat.inverse import track
from kinesplat.rasterizer import cpu, normal_equations, rasterize_links
from kinesplat.self_model import SelfModel
from kinesplat.twists import adjoint

Report = dict[str, Any]
PACKAGES = ("torch", "triton", "gsplat", "warp-lang", "mujoco-warp", "mujoco", "numpy")


def environment(options: Any) -> Report:
    """What is here, and how long the kernels take to compile at their first use."""
    found: Report = {"python": platform.python_version(), "cuda of torch": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    if torch.cuda.is_available():
        found["gpu"], found["capability"] = torch.cuda.get_device_name(), list(torch.cuda.get_device_capability())
        found["nvcc"] = last_line(["nvcc", "--version"])
        found["driver"] = last_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    splats, links, Ts = speed_scene(16 if options.dry_run else 1000, device_of(options))
    started = time.perf_counter()
    step(splats, links, Ts, view(8 if options.dry_run else 64).to(device_of(options)))
    found["first forward and backward [s]"] = time.perf_counter() - started
    return found


def last_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def device_of(options: Any) -> torch.device:
    return torch.device("cpu" if options.dry_run else "cuda")


def parity(options: Any) -> Report:
    """50 random scenes against the float64 reference on the CPU: images away from thresholds, gradients relative."""
    import cuda_scenes
    from rasterizer_scenes import random_gaussians

    rows = []
    for seed in range(2 if options.dry_run else 50):
        torch.manual_seed(seed)
        n, side = (10, 12) if options.dry_run else (300, 64)
        splats = random_gaussians(n, size=float(0.01 + 0.2 * torch.rand(())))
        eye = torch.randn(3)
        camera = Camera.look_at(2.0 * eye / eye.norm(), (0.0, 0.0, 0.0), width=side, height=side)
        camera = camera.to(dtype=torch.float64)
        mask = cuda_scenes.away_from_thresholds(splats, camera)
        Ts, background = torch.eye(4, dtype=torch.float64)[None], torch.rand(3, dtype=torch.float64)
        rows.append({"seed": seed} | cuda_scenes.errors(splats, Ts, camera, background, torch.zeros(n).long(), mask))
    worst = {key: max(row[key] for row in rows) for key in rows[0] if key != "seed"}
    images = max(v for k, v in worst.items() if k in ("rgb", "alpha", "depth", "link_id"))
    gradients = max(v for k, v in worst.items() if k.startswith("d "))
    return {"scenes": len(rows), "images within 1e-4": images < 1e-4, "gradients within 1e-3": gradients < 1e-3,
            "worst": [worst], "by scene": rows}  # fmt: skip


def robots(options: Any) -> Report:
    """Packaged models: images, pose gradients and normal equations against the CPU kernels, or the reference."""
    device, rows = device_of(options), []
    native = cpu._native is not None
    for name in options.robots or zoo.names():
        model = zoo.load(name).subsample(40 if options.dry_run else 1_000_000)
        side = 8 if options.dry_run else 256
        q = model.tree.q_canonical.float()
        camera = Camera.framing(model.posed(q).means, width=side, height=side)
        found = pose_step(model, q, camera, device, "cuda")
        truth = pose_step(model, q, camera, *((torch.device("cpu"), "cpu") if native else (device, "reference")))
        difference = (found["rgb"] - truth["rgb"]).abs()
        row: Report = {"robot": name, "splats": len(model.parameters), "against": "native" if native else "reference"}
        row["rgb max"], row["share of pixels > 1e-4"] = difference.max().item(), share_above(difference, 1e-4)
        row["d q"] = relative(found["q"], truth["q"])
        if native:
            small = model.subsample(3000)
            for key, (a, b) in equations(small, q, camera.resized(min(side, 64), min(side, 64)), device).items():
                row[key] = relative(a, b)
        rows.append(row)
    worst = {key: max(row[key] for row in rows) for key in ("share of pixels > 1e-4", "d q")}
    return {"robots": rows, "largest share of pixels > 1e-4": worst["share of pixels > 1e-4"],
            "gradients within 1e-3": worst["d q"] < 1e-3}  # fmt: skip


def pose_step(model: SelfModel, q: Tensor, camera: Camera, device: torch.device, backend: str) -> dict[str, Tensor]:
    """RGB at `q`, and the gradient of its squared sum."""
    leaf = q.clone().to(device).requires_grad_()
    rgb = model.to(device).render(leaf, camera.to(device), backend=backend, outputs=("rgb",)).rgb
    assert rgb is not None
    rgb.square().sum().backward()
    assert leaf.grad is not None
    return {"rgb": rgb.detach().cpu(), "q": leaf.grad.cpu()}


def equations(model: SelfModel, q: Tensor, camera: Camera, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradient and Hessian on `device` and on the CPU."""
    torch.manual_seed(0)
    target, both = torch.rand(camera.height, camera.width, 3), []
    for where in (device, torch.device("cpu")):
        moved, at = model.to(where), camera.to(where)
        Ts = moved.tree.forward_kinematics(q.to(where))
        splats = moved.parameters.activate()
        both.append(normal_equations(splats, moved.link_index, Ts, at, target.to(where), eps2d=model.eps2d))
    return {name: (getattr(both[0], name), getattr(both[1], name)) for name in ("gradient", "hessian")}


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.cpu().double() - truth.double()).norm() / truth.double().norm())


def share_above(difference: Tensor, bound: float) -> float:
    return float((difference.amax(-1) > bound).double().mean())


def speed(options: Any) -> Report:
    """Forward and forward + backward at 10k splats and 256^2, posed inside, for batches of cameras and of poses."""
    device, rows = device_of(options), []
    n, side, batches = (16, 8, (2,)) if options.dry_run else (10_000, 256, (1, 16, 256))
    splats, links, Ts = speed_scene(n, device)
    for batch in batches:
        for kind in ("cameras", "poses"):
            cameras = orbit(batch, side, device) if kind == "cameras" else view(side).to(device)
            poses = Ts if kind == "cameras" else Ts.expand(batch, -1, 4, 4).clone()
            row: Report = {"splats": n, "side": side, "batch": batch, "of": kind}
            row["forward [ms]"] = median_ms(lambda p=poses, c=cameras: forward(splats, links, p, c), options)
            row["forward + backward [ms]"] = median_ms(lambda p=poses, c=cameras: step(splats, links, p, c), options)
            frozen = replace(splats, **{name: getattr(splats, name).detach() for name in GAUSSIANS})
            pose_only = median_ms(lambda p=poses, c=cameras, f=frozen: step(f, links, p, c), options)
            row["pose only, forward + backward [ms]"] = pose_only
            if device.type == "cuda":
                row["peak memory [MiB]"] = torch.cuda.max_memory_allocated() / 2**20
                torch.cuda.reset_peak_memory_stats()
            rows.append(row)
    return {"speed": rows}


def speed_scene(n: int, device: torch.device) -> tuple[Gaussians, Tensor, Tensor]:
    """Splats over the Panda's surface, half transparent, all of it requiring grad; their links; link transforms."""
    model, generator = zoo.load("franka_emika_panda").subsample(n), torch.Generator().manual_seed(0)
    splats = model.posed(model.tree.q_canonical.float())
    opacities = 0.1 + 0.85 * torch.rand(len(splats), generator=generator)
    colours = 0.3 * torch.randn(len(splats), 9, 3, generator=generator)
    splats = Gaussians(splats.means, splats.quats, splats.scales, opacities, colours)
    leaves = {name: getattr(splats, name).to(device).requires_grad_() for name in GAUSSIANS}
    Ts = torch.eye(4, device=device).repeat(len(model.tree.link_names), 1, 1).requires_grad_()
    return replace(splats, **leaves), model.link_index.to(device), Ts


def view(side: int) -> Camera:
    """1.75 m from the scene, fovy 45 degrees."""
    return Camera.look_at((1.5, 0.6, 0.9), (0.1, 0.0, 0.4), width=side, height=side)


def orbit(count: int, side: int, device: torch.device) -> Camera:
    """`count` cameras about the scene of `view`."""
    angle = torch.linspace(0.0, 1.0, count + 1)[:count] * 6.28
    eyes = torch.stack([1.6 * torch.cos(angle) + 0.1, 1.6 * torch.sin(angle), 0.9 + 0 * angle], -1)
    cameras = [Camera.look_at(eye, (0.1, 0.0, 0.4), width=side, height=side) for eye in eyes]
    T = torch.stack([c.T_cam_world for c in cameras])
    return Camera(cameras[0].K.expand(count, 3, 3).contiguous(), T, side, side).to(device)


def forward(splats: Gaussians, links: Tensor, Ts: Tensor, camera: Camera) -> None:
    with torch.no_grad():
        rasterize_links(splats, links, Ts, camera, backend="cuda", outputs=("rgb",))


def step(splats: Gaussians, links: Tensor, Ts: Tensor, camera: Camera) -> None:
    rgb = rasterize_links(splats, links, Ts, camera, backend="cuda", outputs=("rgb",)).rgb
    assert rgb is not None
    leaves = [t for t in (*(getattr(splats, name) for name in GAUSSIANS), Ts) if t.requires_grad]
    torch.autograd.grad(rgb.square().sum(), leaves)


def median_ms(call: Callable[[], object], options: Any) -> float:
    """Median time of as many calls as fit into `options.seconds`, after warming up; device events on a GPU."""
    if options.dry_run:
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times, until = [], time.perf_counter() + options.seconds
    while time.perf_counter() < until or len(times) < 5:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def gsplat(options: Any) -> Report:
    """gsplat called directly with the same splats, already posed, and the same cameras; and our backend for it."""
    device, rows = device_of(options), []
    n, side, batches = (16, 8, (2,)) if options.dry_run else (10_000, 256, (1, 16, 256))
    if options.dry_run:
        import fake_gsplat

        rasterization = fake_gsplat.make("1.5.3").rasterization
    else:
        from gsplat import rasterization
    splats, links, Ts = speed_scene(n, device)
    leaves = [getattr(splats, name) for name in GAUSSIANS]
    for batch in batches:
        cameras = orbit(batch, side, device)
        backgrounds = torch.ones(batch, 3, device=device)

        def render(c: Camera = cameras, b: Tensor = backgrounds) -> Tensor:
            return rasterization(*leaves, c.T_cam_world, c.K, c.width, c.height, sh_degree=2, packed=False,
                                 backgrounds=b)[0]  # fmt: skip

        def ours(c: Camera = cameras) -> Tensor:
            rgb = rasterize_links(splats, links, Ts, c, backend="cuda", outputs=("rgb",)).rgb
            assert rgb is not None
            return rgb

        with torch.no_grad():
            gap = (render() - ours()).abs().max().item()
        direct = median_ms(lambda r=render: torch.autograd.grad(r().square().sum(), leaves), options)
        mine = median_ms(lambda c=cameras: step(splats, links, Ts, c), options)
        rows.append({"batch": batch, "gsplat f+b [ms]": direct, "ours f+b, posing included [ms]": mine,
                     "ours / gsplat": mine / direct, "largest difference": gap})  # fmt: skip
    return {"gsplat": rows, "at most 1.1 x": all(row["ours / gsplat"] <= 1.1 for row in rows)}


def fits(options: Any) -> Report:
    """1,024 starts at 64^2, 100 steps of Adam; and Gauss-Newton steps of 64 starts."""
    device = device_of(options)
    starts, side, steps, n = (1, 8, 1, 16) if options.dry_run else (1024, 64, 100, 3000)
    model, q, camera, target = fit_problem(n, side, device)
    torch.manual_seed(0)
    at = (q + 0.3 * torch.randn(starts, model.tree.dof).to(device)).requires_grad_()
    optimizer = torch.optim.Adam([at], lr=0.02)
    loss = torch.empty(0)
    started = 0.0
    for number in range(steps + 1):
        if number == min(1, steps):  # the first step compiles
            synchronize(device)
            started = time.perf_counter()
        rgb = model.render(at, camera, backend="cuda", outputs=("rgb",)).rgb
        assert rgb is not None
        loss = (rgb - target).square().mean((1, 2, 3))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    synchronize(device)
    seconds, best = time.perf_counter() - started, int(loss.argmin())
    found: Report = {"starts": starts, "side": side, "steps": steps, "splats": n, "Adam [s]": seconds,
                     "within 3 s": seconds <= 3.0}  # fmt: skip
    found["joint error of the best start, mean [rad or m]"] = float((at[best].detach() - q).abs().mean())
    batch = at[:64].detach()
    found["Gauss-Newton step of 64 starts [ms]"] = median_ms(lambda: normal_step(model, batch, camera, target), options)
    return found


def fit_problem(n: int, side: int, device: torch.device) -> tuple[SelfModel, Tensor, Camera, Tensor]:
    """The Panda, coarser; a configuration, a camera, and the picture."""
    model = zoo.load("franka_emika_panda").subsample(n).to(device)
    q = model.tree.q_canonical.float()
    camera = Camera.framing(model.posed(q.to(device)).means.cpu(), width=side, height=side).to(device)
    q = q.to(device)
    with torch.no_grad():
        target = model.render(q, camera, backend="cuda", outputs=("rgb",)).rgb
    assert target is not None
    return model, q, camera, target


def normal_step(model: SelfModel, q: Tensor, camera: Camera, target: Tensor) -> Tensor:
    """Damped Gauss-Newton step of joints ``(batch, dof)``."""
    Ts = model.tree.forward_kinematics(q)
    splats = model.parameters.activate()
    system = normal_equations(splats, model.link_index, Ts, camera, target, eps2d=model.eps2d)
    J = adjoint(camera.T_cam_world).to(q) @ model.tree.link_jacobian(q)
    system = system.contract(J.flatten(-3, -2))
    damping = 1e-3 * system.hessian.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None] + 1e-9
    H = system.hessian + damping * torch.eye(q.shape[-1], device=q.device, dtype=torch.float64)
    return q - torch.linalg.solve(H, system.gradient[..., None])[..., 0].to(q)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def tracking(options: Any) -> Report:
    """A swaying Panda at 256^2: by three Gauss-Newton steps a frame, and by `track` as users call it; frames are
    rendered beforehand."""
    device = device_of(options)
    n, side, count, many = (40, 16, 3, 2) if options.dry_run else (10_000, 256, 200, 100)
    model, q, camera, _ = fit_problem(n, side, device)
    phase = torch.linspace(0, 12, count, device=device)[:, None]
    truth = q + 0.2 * torch.sin(phase + torch.arange(len(q), device=device))
    truth = truth.clamp(model.tree.q_lower.to(q), model.tree.q_upper.to(q))
    with torch.no_grad():
        frames = torch.cat([model.render(t, camera, outputs=("rgb",)).rgb for t in truth.split(50)])
        at, errors = truth[0].clone(), []
        normal_step(model, at, camera, frames[0])
        synchronize(device)
        started = time.perf_counter()
        for frame, exact in zip(frames, truth, strict=True):
            for _ in range(3):
                at = normal_step(model, at, camera, frame)
            errors.append((at - exact).abs().max())
        synchronize(device)
    rate = len(frames) / (time.perf_counter() - started)
    worst = torch.stack(errors)
    followed = track(model, frames[:many].cpu().clamp(0.0, 1.0), camera.to("cpu"), q_init=truth[0].cpu())
    off = (followed.q - truth[:many].cpu()).abs().amax(dim=1)
    return {"frames/s": rate, "at least 60": rate >= 60, "largest joint error, median over frames [rad or m]":
            float(worst.median()), "and its maximum": float(worst.max()), "track, frames/s": followed.frames_per_second,
            "track, largest joint error, median over frames [rad or m]": float(off.median()),
            "track, states": {state: followed.states.count(state) for state in set(followed.states)}}  # fmt: skip


def capture(options: Any) -> Report:
    """MuJoCo's pictures traced on the card, 4 rays a pixel."""
    from kinesplat.dataset.capture import Capture
    from kinesplat.description import load_description

    count, side = (2, 8) if options.dry_run else (64, 256)
    renderer = Capture(load_description("kinearm"), device=device_of(options).type)
    model = zoo.load("kinearm")
    q = model.tree.q_canonical.float().expand(count, -1)
    camera = Camera.framing(model.posed(q[0]).means, width=side, height=side)
    renderer.render(q, camera)
    started = time.perf_counter()
    renderer.render(q, camera)
    return {f"images/s at {side}^2": count / (time.perf_counter() - started)}
