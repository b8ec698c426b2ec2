"""benchmarks/gpu.py: its dry run measures every section here; a section that fails is a line of the report."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA wheels; on a CPU: pip install triton (Linux)")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="this process compiles its kernels for a GPU")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SECTIONS = ("environment", "parity", "robots", "speed", "fits", "tracking", "gsplat", "graphs", "tiles")
LONGER = ("compiled", "capture", "train", "paper")  # they trace with Dynamo, or compile Warp's kernels


@INTERPRETED
@pytest.mark.parametrize("section", SECTIONS)
def test_dry_run(gpu: ModuleType, section: str, tmp_path: Path) -> None:
    options = ["--robots", "kinearm", "--images", "20x1"]
    report = gpu.main(["--dry-run", "--out", str(tmp_path), "--only", section, *options])
    assert json.loads((tmp_path / "gpu_report.json").read_text()) == report
    text = (tmp_path / "gpu_report.md").read_text()
    assert "No figure here says anything of a GPU" in text
    assert f"## {section}" in text
    found = report["sections"][section]
    assert "failed" not in found
    assert "skipped" not in found
    if section == "parity":
        assert found["images within 1e-4"] is True
        assert found["gradients within 1e-3"] is True
    if section == "robots":
        assert found["robots"][0]["rgb max"] < 1e-4
        assert found["robots"][0]["d q"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("section", LONGER)
def test_longer_dry_run(section: str, tmp_path: Path) -> None:
    """As a process, without the type checks of the test run, which Dynamo cannot trace; what is finished stays."""
    for name in {"train": ("mujoco_warp",), "paper": ("mujoco_warp",), "capture": ("mujoco_warp",)}.get(section, ()):
        pytest.importorskip(name)
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(tmp_path), "--only", section]
    reports = []
    for _ in range(2):
        run = subprocess.run([*command, "--robots", "kinearm", "--images", "20x1"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        reports.append(json.loads((tmp_path / "gpu_report.json").read_text())["sections"][section])
    if section == "train":
        assert reports[0]["train"] == reports[1]["train"]
        assert reports[0]["train"][0]["state"] == "finished"
    if section == "paper":
        assert reports[0]["paper"] == reports[1]["paper"]
        assert {"ours", "no deform", "K-planes"} <= {row["model"] for row in reports[0]["paper"]}


@INTERPRETED
def test_reports_of_several_calls_are_one(gpu: ModuleType, tmp_path: Path) -> None:
    for section in ("graphs", "environment"):
        report = gpu.main(["--dry-run", "--out", str(tmp_path), "--only", section])
    assert set(report["sections"]) == {"environment", "graphs"}
    text = (tmp_path / "gpu_report.md").read_text()
    assert text.index("## environment") < text.index("## graphs")
    assert gpu.former(tmp_path, dry_run=False)["sections"] == {}


def test_a_failing_section_is_a_line_of_the_report(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine where not even the imports work."""
    monkeypatch.setattr(gpu, "environment_of", lambda out: {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)})
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    monkeypatch.setattr(gpu, "install", lambda wheels, native, out: {})
    report = gpu.main(["--out", str(tmp_path), "--only", "speed", "fits", "--budget", "100"])
    assert list(report["sections"]) == ["speed", "fits"]
    for found in report["sections"].values():
        assert found["failed"] == "ImportError: no torch here"
    assert json.loads((tmp_path / "gpu_report.json").read_text()) == report


def test_a_spent_budget_is_said(gpu: ModuleType, tmp_path: Path) -> None:
    report = gpu.main(["--out", str(tmp_path), "--only", "capture", "--budget", "0"])
    assert "budget of 0 s is spent" in report["sections"]["capture"]["skipped"]
