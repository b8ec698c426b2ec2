"""The core without Python under the sanitizers, on several threads with two callers at a time."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import kinesplat.rasterizer
from kinesplat.rasterizer import cpu

SOURCES = Path(kinesplat.rasterizer.__file__).parent / "native"
MAIN = Path(__file__).parent / "native" / "exercise.cpp"
CORE = ("engine", "prepare", "check", "pool", "profile", "photometric", "kernels")
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"],
}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("level", cpu.native().levels())
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_core_is_clean_under(sanitizers: str, level: str, tmp_path: Path) -> None:
    """The level takes the place of the baseline, so that nothing without the sanitizer is linked in."""
    program = tmp_path / "exercise"
    command = ["g++", "-std=c++17", "-O1", "-g1", "-ffp-contract=off", *FLAGS[level], f"-I{SOURCES}"]
    command += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-DKS_LEVEL=baseline"]
    command += ["-DKS_TABLE=kernels_baseline", "-o", program]
    subprocess.run([*command, *(SOURCES / f"{name}.cpp" for name in CORE), MAIN, "-lpthread"], check=True)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith("baseline: "), done.stdout
