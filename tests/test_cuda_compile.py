"""Triton's compiler takes every kernel, down to machine code, on machines without a GPU too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA wheels; on a CPU: pip install triton (Linux)")
KERNELS = 9


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_cuda_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(script), str(capability)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len({line.split()[0] for line in lines}) == KERNELS
    assert all(int(line.split()[1]) > 1000 for line in lines)
