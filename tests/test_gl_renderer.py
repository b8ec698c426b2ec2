"""MuJoCo's OpenGL renderer against the ray tracer: two renderers, one picture. In a process of its own with EGL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mujoco_warp", reason="needs mujoco_warp (pip install kinesplat[render])")

from kinesplat.camera import Camera
from kinesplat.dataset.capture import Capture
from kinesplat.description import load_description
from kinesplat.errors import InputError

COMPARE = """
import json, sys
import torch
from kinesplat.camera import Camera
from kinesplat.dataset.capture import Capture
from kinesplat.dataset.lights import WORLD_LIGHT
from kinesplat.description import load_description
from kinesplat.files import write_png

light = sys.argv[1]
robot = load_description("kinearm")
camera = Camera.look_at((0.9, -0.5, 0.7), (0.0, 0.0, 0.3), width=96, height=80)
K = camera.K + torch.tensor([[5.0, 0.0, 9.0], [0.0, -7.0, -6.0], [0.0, 0.0, 0.0]])
camera = Camera(K, camera.T_cam_world, 96, 80)
T = torch.eye(4)
T[:3, 3] = torch.tensor([0.05, 0.02, -0.1])
q = robot.tree.q_canonical + 0.2
row = None if light == "headlight" else torch.tensor([0.3, 0.5, -0.8, 0.3, 0.5, 0.2, 1.0])
a, b = (Capture(robot, 4, light, renderer=r).render(q, camera, T, light=row) for r in ("warp", "gl"))
write_png(sys.argv[2], torch.cat([a.rgb, b.rgb, (a.rgb - b.rgb).abs()], dim=1))
mask_a, mask_b = a.alpha >= 0.5, b.alpha >= 0.5
both = (a.alpha == 1) & (b.alpha == 1)
print(json.dumps({
    "iou": float((mask_a & mask_b).sum() / (mask_a | mask_b).sum()),
    "seen": int(both.sum()),
    "alpha": float((a.alpha - b.alpha).abs().mean()),
    "rgb": float((a.rgb - b.rgb)[both].abs().mean()),
    "depth": float((a.depth - b.depth)[both].abs().median()),
    "links": float((a.link_id == b.link_id).float().mean()),
    "empty": float(b.rgb[b.alpha == 0].min()),
}))
"""


@pytest.mark.parametrize("light", ["headlight", "world"])
def test_gl_and_ray_tracer_agree(light: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMPARE, light, str(tmp_path / "both.png")]
    ended = subprocess.run(command, env={**os.environ, "MUJOCO_GL": "egl"}, capture_output=True, text=True, check=False)
    if "finds no OpenGL" in ended.stderr or "MUJOCO_GL" in ended.stderr or "OpenGL.EGL" in ended.stderr:
        pytest.skip("needs EGL")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["seen"] > 400
    assert found["iou"] > 0.985
    assert found["alpha"] < 0.01
    assert found["rgb"] < 0.02
    assert found["depth"] < 1e-3
    assert found["links"] > 0.985
    assert found["empty"] == 1.0


def test_what_gl_cannot_do_is_refused() -> None:
    robot = load_description("kinearm")
    with pytest.raises(InputError, match="samples is 5; the gl renderer needs a square number"):
        Capture(robot, samples=5, renderer="gl")
    capture = Capture(robot, samples=4, renderer="gl")
    K = torch.tensor([[90.0, 2.0, 21.3], [0.0, 70.0, 30.6], [0.0, 0.0, 1.0]])
    with pytest.raises(InputError, match="skew of 2 px"):
        capture.render(robot.tree.q_canonical, Camera(K, torch.eye(4), 40, 40))
