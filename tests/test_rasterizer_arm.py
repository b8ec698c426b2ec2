"""The NEON build of the core, cross-compiled and emulated, against the native module of this machine."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from rasterizer_scenes import FIELDS, look, random_gaussians, random_transforms

import kinesplat.rasterizer
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import normal_equations, rasterize_links

SOURCES = Path(kinesplat.rasterizer.__file__).parent / "native"
MAIN = Path(__file__).parent / "native" / "render_file.cpp"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
WIDTH, HEIGHT, SPLATS, LINKS = 70, 45, 300, 3


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}")
def test_neon_build_renders_the_same(tmp_path: Path) -> None:
    core = [SOURCES / f"{name}.cpp" for name in ("engine", "prepare", "check", "pool", "profile", "kernels")]
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-static", f"-I{SOURCES}"]
    flags += ["-DKS_LEVEL=baseline", "-DKS_TABLE=kernels_baseline"]
    program = tmp_path / "render_file"
    subprocess.run([COMPILER, *flags, *core, MAIN, "-o", program, "-lpthread"], check=True)

    splats, camera = random_gaussians(SPLATS, dtype=torch.float32), look(WIDTH, HEIGHT)
    index, Ts = torch.randint(0, LINKS, (SPLATS,), dtype=torch.int32), random_transforms(LINKS)
    v_rgb = torch.rand(HEIGHT, WIDTH, 3)
    parts = [np.array([SPLATS, WIDTH, HEIGHT, LINKS], np.int32), *(getattr(splats, f).numpy() for f in FIELDS)]
    parts += [index.numpy(), (camera.T_cam_world @ Ts).numpy(), camera.K.numpy(), v_rgb.numpy()]
    (tmp_path / "scene.bin").write_bytes(b"".join(p.tobytes() for p in parts))
    subprocess.run([EMULATOR, program, tmp_path / "scene.bin", tmp_path / "out.bin"], check=True)

    leaves = [getattr(splats, f).requires_grad_() for f in FIELDS]
    background = (0.2, 0.5, 0.9)
    rgb = rasterize_links(Gaussians(*leaves), index, Ts, camera, background, backend="cpu", outputs=("rgb",)).rgb
    assert rgb is not None
    here = [rgb, *torch.autograd.grad((rgb * v_rgb).sum(), leaves)]
    bare = Gaussians(*(leaf.detach() for leaf in leaves))
    hessian = normal_equations(bare, index, Ts, camera, v_rgb, background=background).hessian
    data = (tmp_path / "out.bin").read_bytes()
    for value in here:
        there = np.frombuffer(data[: 4 * value.numel()], np.float32).reshape(value.shape)
        data = data[4 * value.numel() :]
        assert np.linalg.norm(there - value.detach().numpy()) < 2e-5 * np.linalg.norm(value.detach().numpy())
    there = np.frombuffer(data[8 * 16 * LINKS :], np.float64).reshape(hessian.shape)
    np.testing.assert_allclose(there, hessian.numpy(), rtol=1e-3, atol=1e-4 * float(hessian.abs().max()))
