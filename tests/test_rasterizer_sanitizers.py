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
CORE = ("engine", "prepare", "check", "pool", "profile", "photometric")
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"],
}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_core_is_clean_under(sanitizers: str, tmp_path: Path) -> None:
    common = ["g++", "-std=c++17", "-O1", "-g", "-ffp-contract=off", f"-fsanitize={sanitizers}", f"-I{SOURCES}"]
    common += ["-fno-sanitize-recover=all"]
    levels = cpu.native().levels()
    if "avx2" in levels:
        common.append("-DKS_X86_LEVELS")
    jobs, objects = [], []
    for level in FLAGS if "avx2" in levels else ["baseline"]:
        objects.append(tmp_path / f"{level}.o")
        defines = [f"-DKS_LEVEL={level}", f"-DKS_TABLE=kernels_{level}"]
        jobs.append([*common, *FLAGS[level], *defines, "-c", SOURCES / "kernels.cpp", "-o", objects[-1]])
    program = tmp_path / "exercise"
    for job in [*jobs, [*common, *(SOURCES / f"{c}.cpp" for c in CORE), MAIN, *objects, "-o", program, "-lpthread"]]:
        subprocess.run(job, check=True)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(levels), done.stdout
